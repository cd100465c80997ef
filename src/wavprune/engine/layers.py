"""Which weights to prune: a model and its settings -> named weights, all of them checked."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from ..bases.basis import Kernel
from ..config import PruneConfig
from .sharding import as_sharded, in_all, local_part, problem

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class LayerRef:
    """One weight to prune.

    Attributes:
        name: the layer's name in its model, such as ``"layer1.0.conv1"``.
        weight: ``(Cout, Cin/groups, kh, kw)``, or ``(out, in)``; pruned in place.
    """

    name: str
    weight: torch.Tensor

    def kernels(self, kernel: Kernel) -> torch.Tensor:
        """The weight as kernels of this size, a view ``(Cout, Cin/groups, kh, kw)``.

        A matrix ``(out, in)`` is one kernel of its size, or ``out x in`` kernels of one value. Of a
        weight that is sharded, this rank's part.
        """
        weight = local_part(self.weight)
        if weight.ndim == 4:
            return weight
        return weight[None, None] if weight.shape == kernel else weight[:, :, None, None]


def select_layers(model: nn.Module, config: PruneConfig) -> list[LayerRef]:
    """The weights of a model that ``targets`` and ``ignore`` select.

    Args:
        model: any module; every ``nn.Conv2d`` in it, subclasses too, is selected where there are
            no ``targets``, and every ``nn.Linear`` can be selected by them.
        config: ``targets`` and ``ignore`` are read: exact names, globs (``"layer1.*"``), or
            ``"re:"`` and a regular expression that must match from the name's beginning.

    Returns:
        The selected weights in the model's order; a shared weight appears once, under its
        first name.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: nothing is selected, a pattern matches nothing, or a weight cannot be pruned.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 1))
        >>> [ref.name for ref in select_layers(net, PruneConfig(ignore=("2",)))]
        ['0']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    found = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, (nn.Conv2d, nn.Linear))
    }
    names = [
        name
        for name, module in found.items()
        if config.targets is not None or isinstance(module, nn.Conv2d)
    ]
    if not names:
        hint = "; its Linear layers are pruned where targets names them" if found else ""
        raise ValueError(f"{type(model).__name__} has no Conv2d layer to prune{hint}")
    refs = []
    for name in select_names(names, config):
        _check_owned(name, found[name])
        refs.append(LayerRef(name, found[name].weight))
    return unique_layers(refs)


def select_names(names: Sequence[str], config: PruneConfig) -> list[str]:
    """The names that ``targets`` picks and ``ignore`` does not, in their given order.

    Raises:
        ValueError: a pattern matches no name, is not a regular expression, or nothing is left.
    """
    chosen = set(names) if config.targets is None else _matched("targets", config.targets, names)
    dropped = set() if config.ignore is None else _matched("ignore", config.ignore, names)
    kept = [name for name in names if name in chosen and name not in dropped]
    if not kept:
        raise ValueError(
            f"no layer is left to prune: ignore={list(config.ignore or ())} drops all that "
            f"targets={list(config.targets or ['*'])} selects"
        )
    return kept


def unique_layers(refs: Iterable[LayerRef]) -> list[LayerRef]:
    """The layers, each weight once, after a check of every one of them.

    Raises:
        ValueError: a weight is on the meta device, quantised, sparse, of an integer or complex
            dtype, not 4-D or 2-D, or overlaps itself in memory.
    """
    seen: set[object] = set()
    result = []
    for ref in refs:
        _check_weight(ref)
        weight = ref.weight
        # Two parameters can be one memory; an empty one has none, and a part of one may be empty
        # on some ranks only.
        whole = as_sharded(weight) is None and weight.numel() > 0
        place = (weight.data_ptr(), weight.numel()) if whole else id(weight)
        if place not in seen:
            seen.add(place)
            result.append(ref)
    return result


def non_finite(weight: torch.Tensor) -> int:
    """How many values of a weight are NaN or infinite."""
    return weight.numel() - int(in_all(torch.isfinite(weight.detach()).sum()))


def _matched(parameter: str, patterns: Iterable[str], names: Sequence[str]) -> set[str]:
    result: set[str] = set()
    for pattern in patterns:
        matched = _match(parameter, pattern, names)
        if not matched:
            shown = ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")
            raise ValueError(f"{parameter}: {pattern!r} matches no layer; the layers are {shown}")
        result |= matched
    return result


def _match(parameter: str, pattern: str, names: Sequence[str]) -> set[str]:
    if pattern in names:
        return {pattern}
    if not pattern.startswith("re:"):
        return {name for name in names if fnmatch.fnmatchcase(name, pattern)}
    try:
        expression = re.compile(pattern.removeprefix("re:"))
    except re.error as error:
        raise ValueError(
            f"{parameter}: {pattern!r} is not a regular expression: {error}"
        ) from error
    return {name for name in names if expression.match(name)}


def _check_owned(name: str, module: nn.Conv2d | nn.Linear) -> None:
    if "weight" not in module._parameters:
        raise ValueError(
            f"layer {name!r}: its weight is computed by a parametrization, so a change to it would "
            "be lost; remove the parametrization first (torch.nn.utils.parametrize."
            "remove_parametrizations, torch.nn.utils.prune.remove)"
        )


def _check_weight(ref: LayerRef) -> None:
    weight = ref.weight
    reason: str | None = None
    if nn.parameter.is_lazy(weight):
        reason = "is not initialised yet; run the model once"
    elif weight.is_meta:
        reason = "is on the meta device and has no values"
    elif weight.is_quantized:
        reason = f"is quantised ({weight.dtype})"
    elif weight.layout != torch.strided:
        reason = f"is sparse ({weight.layout})"
    elif weight.dtype not in DTYPES:
        reason = f"has dtype {weight.dtype}"
    elif weight.ndim not in (2, 4):
        reason = f"has shape {tuple(weight.shape)}, not (Cout, Cin/groups, kh, kw) or (out, in)"
    elif (sharded := as_sharded(weight)) is not None:
        reason = problem(sharded)
    elif not weight.is_contiguous() and any(
        step == 0 and size > 1 for step, size in zip(weight.stride(), weight.shape, strict=True)
    ):
        reason = f"overlaps itself in memory (strides {weight.stride()})"
    if reason is not None:
        allowed = ", ".join(str(dtype).removeprefix("torch.") for dtype in DTYPES)
        raise ValueError(
            f"layer {ref.name!r}: its weight {reason}; allowed: dense 4-D and 2-D weights with "
            f"values, of {allowed}"
        )
