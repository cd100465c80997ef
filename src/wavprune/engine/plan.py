"""Plans: everything about a run that depends on shapes, settings and devices alone.

A plan is made once: the same call on the same model finds it again.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any, NamedTuple, TypeVar

import torch
from torch import nn

from ..backends import Backend, Budget, Layer, check_name, resolve
from ..backends.registry import registered
from ..bases import Basis, LevelCollapsedWarning, bases_of, family_of, request_for
from ..config import AUTO, BASES, RULES, PruneConfig
from ..coverage import Coverage
from ..errors import WavpruneError
from ..report import LayerStats, PruneReport
from .auto import bases_for
from .coverage import coverage_of, coverage_of_weights
from .device import compute_device, warn
from .layers import LayerRef, check_finite, named_layers, select_layers
from .rules import Rule, rule_for
from .sharding import as_sharded, check_sharded, first_channel, group_of
from .staging import calls_of

Message = tuple[str, type[Warning]]
T = TypeVar("T")


@dataclass(frozen=True, eq=False, slots=True)
class Plan:
    """How some layers will be pruned; it holds no weight.

    Attributes:
        config: what to do.
        rule: what chooses the coefficients that are kept.
        device: where to compute; None means where each weight lives.
        options: per layer, itself in each basis that it may get; one but for ``"auto"``.
        budget: what all layers share; None where each has its own.
        messages: warnings about levels, for every run.
        coverage: the share of the model that the layers are.
        cacheable: True where the bases do not depend on values.
        has_choice: True where a layer has several bases to choose from.
        is_uniform: True where all layers are computed on one device, in one dtype, ranked alike.
        backends: those that were asked for so far.
        calls: which layers go to a backend together, by how many weights it takes at most.
    """

    config: PruneConfig
    rule: Rule
    device: torch.device | None
    options: tuple[tuple[Layer, ...], ...]
    budget: Budget | None
    messages: tuple[Message, ...]
    coverage: Coverage
    cacheable: bool
    has_choice: bool
    is_uniform: bool
    backends: dict[tuple[object, ...], Backend] = field(default_factory=dict)
    calls: dict[int, list[list[int]]] = field(default_factory=dict)

    @property
    def layers(self) -> list[Layer]:
        """Each layer in its first basis."""
        return [options[0] for options in self.options]

    def backend(self, scattered: bool, masks: bool) -> Backend:
        """What prunes them; see ``resolve``."""
        key = (scattered, masks, registered())
        if key not in self.backends:
            layers = [layer for options in self.options for layer in options]
            self.backends[key] = resolve(self.config.backend, layers, scattered, masks)
        return self.backends[key]

    def calls_of(self, max_weights: int) -> list[list[int]]:
        """Which layers go to a backend in one call; see ``staging.calls_of``."""
        if max_weights not in self.calls:
            self.calls[max_weights] = calls_of(self.layers, max_weights)
        return self.calls[max_weights]

    def bind(self, refs: Sequence[LayerRef]) -> list[tuple[Layer, ...]]:
        """The options with the weights as they are now, where they live."""
        return [
            # Nearly always one.
            (_bound(options[0], ref),)
            if len(options) == 1
            else tuple([_bound(layer, ref) for layer in options])
            for options, ref in zip(self.options, refs, strict=True)
        ]

    def warn(self) -> None:
        """Say what is to be said at every run."""
        for message, category in self.messages:
            warn(message, category)


def plan_layers(
    refs: Sequence[LayerRef],
    config: PruneConfig,
    match: PruneReport | None = None,
    bases: Sequence[Basis] | None = None,
    coverage: Coverage | None = None,
) -> Plan:
    """The plan of some layers.

    Args:
        refs: checked weights, each once.
        config: what to do.
        match: a report whose kept counts to use in place of ``config.sparsity``.
        bases: each layer's basis where it is known; None takes them from ``config``.
        coverage: of the model that they are of, where that is known.

    Raises:
        WavpruneError: the settings, or ``match``, do not fit the layers.
    """
    check_name(config.backend)
    rule = rule_for(config)
    for ref in refs:
        rule.check(ref)
    check_sharded(refs, config)
    if match is not None:
        _check_match(config, match)
    keeps = kept_counts(refs, config, match)
    dtypes = _compute_dtypes(refs, config)
    device = compute_device(config.device)
    options = []
    choices = _bases(refs, config) if bases is None else [[basis] for basis in bases]
    for i, ref in enumerate(refs):
        budget = None
        if config.scope == "layer":
            budget = (
                Budget(keeps[i]) if config.percentile is None else Budget(None, config.percentile)
            )
        options.append(
            tuple(
                _template(ref, basis, budget, dtypes[i], device, config, rule)
                for basis in choices[i]
            )
        )
    first = [of_layer[0].basis for of_layer in options]
    return Plan(
        config=config,
        rule=rule,
        device=device,
        options=tuple(options),
        budget=Budget(keep=sum(keeps)) if config.scope == "global" else None,
        messages=tuple(_level_messages(refs, first)),
        coverage=coverage or coverage_of_weights(refs),
        cacheable=not any(layer.basis.data_driven for of_layer in options for layer in of_layer)
        and not any(as_sharded(ref.weight) is not None for ref in refs),
        has_choice=any(len(of_layer) > 1 for of_layer in options),
        is_uniform=is_uniform(options),
    )


def is_uniform(options: Sequence[Sequence[Layer]]) -> bool:
    """True where all layers are computed on one device, in one dtype, ranked alike."""
    layers = [of_layer[0] for of_layer in options]
    return len({(layer.device, layer.compute_dtype, layer.seed is None) for layer in layers}) == 1


def _template(
    ref: LayerRef,
    basis: Basis,
    budget: Budget | None,
    dtype: torch.dtype,
    device: torch.device | None,
    config: PruneConfig,
    rule: Rule,
) -> Layer:
    kernels = ref.kernels(basis.kernel)
    layer = Layer(
        name=ref.name,
        weight=torch.empty_like(kernels, device="meta"),
        basis=basis,
        by_importance=config.percentile is None,
        compute_dtype=dtype,
        budget=budget,
        first_channel=first_channel(ref.weight),
        group=group_of(ref.weight),
        numel=ref.weight.numel(),
        destination=device or kernels.device,
    )
    return rule.prepare(layer, config)


def _bound(layer: Layer, ref: LayerRef) -> Layer:
    # Every field in its order: dataclasses.replace takes many times as long.
    weight = ref.kernels(layer.basis.kernel)
    return Layer(
        layer.name,
        weight,
        layer.basis,
        layer.by_importance,
        layer.compute_dtype,
        layer.budget,
        layer.seed,
        layer.first_channel,
        layer.group,
        layer.numel,
        None,
        layer.destination,
    )


# Selecting again what was selected before.


class _Known(NamedTuple):
    """The selected layers of a model as they were, without a hold on any weight."""

    structure: list[object]
    modules: list[weakref.ref[nn.Module]]
    names: list[str]
    transposed: list[bool]
    weights: list[weakref.ref[torch.Tensor]]
    signatures: list[tuple[Any, ...]]
    coverage: Coverage
    plans: dict[object, Plan]


# By the patterns of the selection.
_KNOWN: weakref.WeakKeyDictionary[nn.Module, dict[object, _Known]] = weakref.WeakKeyDictionary()
_MOST_SELECTIONS = 8
_MOST_PLANS = 64


def plan_model(
    model: nn.Module, config: PruneConfig, match: PruneReport | None = None
) -> tuple[list[LayerRef], Plan]:
    """The selected layers of a model and their plan; see ``plan_layers``.

    Both are remembered for each model as long as nothing about its layers changes; a plan that
    depends on a report is made anew.

    Raises:
        WavpruneError: as for ``select_layers`` and ``plan_layers``.
    """
    check_name(config.backend)
    structure = _structure(model) if isinstance(model, nn.Module) else []
    of_model = _KNOWN.get(model, {}) if structure else {}
    known = of_model.get((config.targets, config.ignore))
    refs = None if known is None or known.structure != structure else _unchanged(known)
    if known is None or refs is None:
        refs = select_layers(model, config)
        known = _remember(model, config, structure, refs)
    if match is not None:
        return refs, plan_layers(refs, config, match, coverage=known.coverage)
    # Whatever is registered under a name now is what it stands for, and "cuda" is what is current.
    key = (config, BASES.changes, RULES.changes, compute_device(config.device))
    plan = known.plans.get(key)
    if plan is None:
        plan = plan_layers(refs, config, coverage=known.coverage)
        if plan.cacheable and len(known.plans) < _MOST_PLANS:
            known.plans[key] = plan
    return refs, plan


# Plans of weights that came without a model, by the settings and what a plan reads of a weight.
_KNOWN_PLANS: dict[object, Plan] = {}


def plan_again(
    refs: Sequence[LayerRef], config: PruneConfig, match: PruneReport | None = None
) -> Plan:
    """The plan of some layers, found again where it was made before; see ``plan_layers``.

    Raises:
        WavpruneError: as for ``plan_layers``.
    """
    if match is not None:
        return plan_layers(refs, config, match)
    weights = [(ref.name, ref.transposed, type(ref.weight), *_kind(ref.weight)) for ref in refs]
    key = (config, BASES.changes, RULES.changes, compute_device(config.device), *weights)
    plan = _KNOWN_PLANS.get(key)
    if plan is None:
        plan = plan_layers(refs, config)
        if plan.cacheable:
            if len(_KNOWN_PLANS) >= _MOST_PLANS:
                _KNOWN_PLANS.clear()
            _KNOWN_PLANS[key] = plan
    return plan


def _remember(
    model: nn.Module, config: PruneConfig, structure: list[object], refs: Sequence[LayerRef]
) -> _Known:
    modules = named_layers(model)
    known = _Known(
        structure,
        [weakref.ref(modules[ref.name]) for ref in refs],
        [ref.name for ref in refs],
        [ref.transposed for ref in refs],
        [weakref.ref(ref.weight) for ref in refs],
        [_signature(ref.weight) for ref in refs],
        coverage_of(model, refs),
        {},
    )
    if all(as_sharded(ref.weight) is None for ref in refs):
        of_model = _KNOWN.setdefault(model, {})
        if len(of_model) >= _MOST_SELECTIONS:
            of_model.clear()
        of_model[config.targets, config.ignore] = known
    return known


def _unchanged(known: _Known) -> list[LayerRef] | None:
    refs = []
    rows = zip(
        known.modules, known.names, known.transposed, known.weights, known.signatures, strict=True
    )
    for module_ref, name, transposed, weight_ref, signature in rows:
        module, before = module_ref(), weight_ref()
        weight = None if module is None else module._parameters.get("weight")
        if weight is None or weight is not before or _signature(weight) != signature:
            return None
        refs.append(LayerRef(name, weight, transposed))
    return refs


def _structure(model: nn.Module) -> list[object]:
    """What names and types of layers follow from, and how much of the model a selection is.

    Names and identities of all modules, identities of parameters, which may be tied, and bytes of
    tensors; empty where those are not known.
    """
    result: list[object] = [type(model)]
    seen = {id(model)}
    pending: list[Iterable[tuple[str, nn.Module | None]]] = [model._modules.items()]
    parameters: list[torch.Tensor | None] = [*model._parameters.values()]
    tensors: list[torch.Tensor | None] = [*model._buffers.values()]
    while pending:
        for name, module in pending.pop():
            if module is None:
                continue
            identity = id(module)
            result.append(name)
            result.append(identity)
            result.append(type(module))
            # Of which parent a module is: with this, the order says it.
            result.append(len(module._modules))
            if identity not in seen:
                seen.add(identity)
                if module._modules:
                    pending.append(module._modules.items())
                parameters += module._parameters.values()
                tensors += module._buffers.values()
    result += map(id, parameters)
    tensors += parameters
    try:
        result += [tensor.nbytes for tensor in tensors if tensor is not None]
    except RuntimeError:
        # Sparse tensors do not say.
        return []
    return result


def _signature(weight: torch.Tensor) -> tuple[Any, ...]:
    """Where the weight is in memory, and what a plan depends on."""
    return weight.data_ptr(), *_kind(weight)


def _kind(weight: torch.Tensor) -> tuple[Any, ...]:
    """What a plan depends on."""
    return weight.shape, weight.stride(), weight.dtype, weight.device


# What is kept.


def kept_counts(
    refs: Sequence[LayerRef], config: PruneConfig, match: PruneReport | None
) -> list[int]:
    """How many coefficients each layer keeps; for scope "global" only their sum counts."""
    sizes = [ref.weight.numel() for ref in refs]
    if match is not None:
        if config.method == "random":
            pairs = zip(refs, sizes, strict=True)
            return [min(_matched(match, ref).kept, size) for ref, size in pairs]
        fraction = min(Fraction(match.kept, match.numel), Fraction(1))
    else:
        # The decimal that the caller wrote: 1 - 0.7 is three tenths, not a little more.
        fraction = 1 - Fraction(repr(config.sparsity or 0.0))
    if config.scope == "global":
        sizes = [sum(sizes)] + [0] * (len(sizes) - 1)
    return [-(-fraction.numerator * size // fraction.denominator) for size in sizes]


def _check_match(config: PruneConfig, match: PruneReport) -> None:
    """Raise unless a run with these settings can prune what another run's report pruned."""
    if not isinstance(match, PruneReport):
        raise TypeError(f"match must be a PruneReport, not {type(match).__name__}")
    if config.method not in ("min_weight", "random"):
        raise WavpruneError(
            f"match goes with method='min_weight' or 'random', not with {config.method!r}"
        )
    if config.method == "random" and config.scope == "global":
        raise WavpruneError(
            "match prunes at random what the report pruned in each layer, so scope='global' does "
            "not go with it; leave scope='layer'"
        )
    if match.numel == 0:
        raise WavpruneError("match: the report holds no weights")


def _matched(match: PruneReport, ref: LayerRef) -> LayerStats:
    try:
        stats = match[ref.name]
    except KeyError:
        raise WavpruneError(
            f"match: the report has no layer {ref.name!r}; it has "
            f"{', '.join(layer.name for layer in match.layers[:8])}"
        ) from None
    if stats.shape != tuple(ref.weight.shape):
        raise WavpruneError(
            f"match: layer {ref.name!r} is {tuple(ref.weight.shape)}, in the report {stats.shape}"
        )
    return stats


def _bases(refs: Sequence[LayerRef], config: PruneConfig) -> list[list[Basis]]:
    """The bases that each layer may be pruned in."""
    name = config.basis_name
    if name != AUTO and family_of(name).data_driven:
        requests = [_naming(ref, lambda ref: request_for(config, ref.weight)) for ref in refs]
        try:
            return [[basis] for basis in bases_of(requests, [ref.weight for ref in refs])]
        except WavpruneError:
            for ref in refs:
                check_finite(ref)
            raise
    return [_naming(ref, lambda ref: bases_for(config, ref.weight)) for ref in refs]


def _naming(ref: LayerRef, make: Callable[[LayerRef], T]) -> T:
    """What is made for a layer, which an error names."""
    try:
        return make(ref)
    except WavpruneError as error:
        raise WavpruneError(f"layer {ref.name!r}: {error}") from error


def _level_messages(refs: Sequence[LayerRef], bases: Sequence[Basis]) -> Iterable[Message]:
    collapsed: dict[Basis, list[str]] = {}
    for ref, basis in zip(refs, bases, strict=True):
        if basis.collapsed or basis.too_deep:
            collapsed.setdefault(basis, []).append(ref.name)
    for basis, names in collapsed.items():
        size = "x".join(map(str, basis.kernel))
        where = f"{size} kernels (first layer {names[0]!r}, {len(names)} in all)"
        if basis.too_deep:
            yield f"{basis.name!r} on {where}: {basis.too_deep}", UserWarning
        else:
            yield (
                f"{basis.name!r} is too long for {where}: the deepest level that exists is "
                f"{basis.level_max}, so no transform runs there and the result is that of "
                "minimum-weight pruning; 'uhaar' fits every kernel, and a forced level transforms "
                "all the same",
                LevelCollapsedWarning,
            )


def _compute_dtypes(refs: Sequence[LayerRef], config: PruneConfig) -> list[torch.dtype]:
    """float64 for float64 weights and for all that are ranked together with one, else float32."""
    in_float64 = [ref.weight.dtype == torch.float64 for ref in refs]
    if config.scope == "global":
        in_float64 = [any(in_float64)] * len(in_float64)
    return [torch.float64 if double else torch.float32 for double in in_float64]
