"""Keep a network pruned while it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from ..backends.masks import mask_bytes
from ..backends.protocol import Batch, check_name, resolve_projector
from ..bases.basis import Basis, klt_basis
from ..bases.matrices import frozen
from ..config import PruneConfig
from ..engine.auto import bases_for
from ..engine.collective import sharded_backend
from ..engine.layers import LayerRef, select_layers
from ..engine.run import layer_batches, prune_layers
from ..engine.sharding import as_sharded, first_channel, in_all, local_part
from ..report import LayerStats, Outcome, PruneReport
from .schedules import Constant, Schedule

FORMAT = 1
# Running means of gradients, which are linear in them; everything else an optimizer remembers of
# a weight (running squares, step sizes, quantised values) has no coefficients.
MOMENTUM = ("momentum_buffer", "exp_avg")
# The settings that a mask means nothing without.
SETTINGS = ("method", "wavelet", "mode", "level", "force_level", "scope")


class Pruner:
    """Prunes a model in training, and keeps it pruned after every optimizer step.

    An optimizer moves every weight, so the pruned coefficients come back. After each step the
    weights are projected: transformed, the coefficients without a mask bit set to 0, transformed
    back, in place. In an expansive basis that is no projection: a part of what is kept leaks into
    what is not, and is lost at the next step.

    Nothing is added to the model: no hook, no parametrization, no renamed or second parameter. The
    masks are a bit a coefficient.

    Args:
        model: whose ``Conv2d`` weights (and what ``config.targets`` names) are pruned.
        config: method, basis and scope; ``sparsity`` is the schedule's, where there is one.
        schedule: when, and how far; None prunes once, before the first step, as ``config`` says.
        regrow: True chooses new masks among all coefficients, as training left them; False only
            among those that were kept so far, in the basis of the first choice. That may leave
            fewer than the schedule asks for.
        project_state: True projects the optimizer's floating-point ``momentum_buffer`` and
            ``exp_avg`` of the weights too: momentum, Adam's first moment. Second moments stay as
            they are: they belong to weights and have no coefficients. Needs ``attach``.

    Raises:
        ValueError: the settings do not go together, or a layer cannot be kept pruned with them.

    Example:
        >>> import torch, wavprune
        >>> model = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3), torch.nn.Flatten())
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> pruner = wavprune.Pruner(model, wavprune.PruneConfig(sparsity=0.75))
        >>> pruner.attach(optimizer)
        >>> for _ in range(3):
        ...     model(torch.ones(2, 3, 8, 8)).square().mean().backward()
        ...     optimizer.step()
        >>> pruner.finish().kept
        54
    """

    def __init__(
        self,
        model: nn.Module,
        config: PruneConfig | None = None,
        schedule: Schedule | None = None,
        *,
        regrow: bool = True,
        project_state: bool = False,
    ) -> None:
        config = PruneConfig() if config is None else config
        if schedule is not None and config.percentile is not None:
            raise ValueError(
                f"percentile={config.percentile!r} does not go with a schedule, which says how "
                "sparse each pruning is; leave one of them out"
            )
        if config.device is not None:
            raise ValueError(
                f"device={str(config.device)!r}: weights in training are pruned where they live; "
                "leave device out"
            )
        self._config = config
        self._scheduled = schedule is not None
        self._schedule: Schedule = schedule or Constant(config.sparsity or 0.0)
        self._regrow = regrow
        self._project_state = project_state
        check_name(config.backend)
        self._layers = select_layers(model, config)
        self._modules = [model.get_submodule(ref.name) for ref in self._layers]
        options = layer_batches(self._layers, config)
        if sharded_backend(self._layers, config) is None:
            resolve_projector(config.backend, [batch for each in options for batch in each])
        self._steps = 0
        self._asked = -1
        self._bases: list[Basis] = []
        self._masks: list[torch.Tensor] = []
        self._report: PruneReport | None = None
        self._optimizer: torch.optim.Optimizer | None = None
        self._handle: RemovableHandle | None = None

    @property
    def steps(self) -> int:
        """Optimizer steps so far."""
        return self._steps

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """Each layer's mask, as ``wavprune.masks`` lays it out; empty before the first pruning."""
        names = (ref.name for ref in self._layers)
        return dict(zip(names, self._masks, strict=False))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow an optimizer: every ``optimizer.step()`` is a step of the pruner.

        Prunes at once where the schedule says so: load a state before.

        Args:
            optimizer: of ``torch.optim``, or any that calls the hooks of
                ``register_step_post_hook``.

        Raises:
            RuntimeError: the pruner follows an optimizer already, or a weight was replaced.
            ValueError: pruning at once fails: a weight is not finite. No weight has changed then.
        """
        if self._handle is not None:
            raise RuntimeError("this pruner follows an optimizer already; call detach() first")
        self._follow_weights()
        self._optimizer = optimizer
        if self._due():
            self._prune()
        self._handle = optimizer.register_step_post_hook(lambda *_: self.step())

    def detach(self) -> None:
        """Stop following the optimizer; ``attach`` goes on from here."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def step(self) -> None:
        """Prune or project once: call it after each ``optimizer.step()``, unless attached.

        By hand, what the schedule wants before the first step is done after it: the first call asks
        for steps 0 and 1.

        Raises:
            RuntimeError: a weight was replaced, or ``project_state=True`` has no optimizer.
            ValueError: a weight is not finite; none has changed by this call then.
        """
        self._follow_weights()
        if self._project_state and self._optimizer is None:
            raise RuntimeError(
                "project_state=True projects what an optimizer remembers, and this pruner was "
                "given none; call attach(optimizer) in place of step()"
            )
        self._steps += 1
        if self._due():
            self._prune()
        elif self._masks:
            self._project()

    def finish(self) -> PruneReport:
        """Stop following the optimizer, and say what is pruned.

        Returns:
            The report of the last choice of masks, with the zeros that the weights have now.

        Raises:
            RuntimeError: nothing was pruned yet, or a weight was replaced.
        """
        self.detach()
        self._follow_weights()
        if self._report is None:
            raise RuntimeError(
                f"nothing is pruned after {self._steps} steps; the schedule is {self._schedule}"
            )
        stats = map(_with_zeros, self._report, self._layers)
        sums = (self._report.squared_norm, self._report.squared_error)
        return PruneReport(Outcome(tuple(stats), *sums), self._report.settings)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: numbers, strings and tensors only.

        Of weights that are sharded over ranks, each rank's has that rank's part.
        """
        layers = {
            ref.name: {**_place(ref), **_basis_state(basis), "mask": mask.clone()}
            for ref, basis, mask in zip(self._layers, self._bases, self._masks, strict=False)
        }
        report = None if self._report is None else _plain(self._report)
        return {
            "format": FORMAT,
            "settings": _settings(self._config),
            "steps": self._steps,
            "asked": self._asked,
            "layers": layers,
            "report": report,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another pruner of the same model and settings was.

        The weights are the model's own state dict, loaded before or after. Load before ``attach``,
        which prunes where no state says that this was done.

        Args:
            state: what ``state_dict()`` gave; of sharded weights, on the same rank.

        Raises:
            ValueError: the state is of another format, of other settings, layers, sizes or ranks,
                or not whole; nothing has changed then.
        """
        try:
            bases, masks = self._parsed(state)
            steps, asked = int(state["steps"]), int(state["asked"])
            report = None if state["report"] is None else _report_of(state["report"])
        except KeyError as error:
            raise ValueError(f"the state has no {error}; allowed: what state_dict() gave") from None
        except (TypeError, AttributeError) as error:
            raise ValueError(f"the state is not what state_dict() gave: {error}") from error
        if bool(bases) != (report is not None):
            raise ValueError("the state has masks without a report, or a report without masks")
        self._bases, self._masks = bases, masks
        self._steps, self._asked, self._report = steps, asked, report

    def _parsed(self, state: dict[str, Any]) -> tuple[list[Basis], list[torch.Tensor]]:
        """The bases and masks of a state."""
        if state.get("format") != FORMAT:
            raise ValueError(f"the state has format {state.get('format')!r}; allowed: {FORMAT}")
        for key, here in _settings(self._config).items():
            if state["settings"][key] != here:
                raise ValueError(
                    f"the state is of {key}={state['settings'][key]!r}, this pruner of {here!r}"
                )
        layers = state["layers"]
        if not layers:
            return [], []
        names = [ref.name for ref in self._layers]
        if list(layers) != names:
            raise ValueError(
                f"the state is of layers {', '.join(layers)}; this model's are {', '.join(names)}"
            )
        bases = []
        for ref in self._layers:
            found = layers[ref.name]
            for key, here in _place(ref).items():
                if found[key] != here:
                    raise ValueError(
                        f"layer {ref.name!r}: the state is of {key}={found[key]!r}, this pruner "
                        f"of {here!r}"
                    )
            bases.append(_basis_of(found, ref, self._config))
        masks = []
        for ref, batch in zip(self._layers, self._batches(bases), strict=True):
            mask = layers[ref.name]["mask"]
            expected = mask_bytes(batch.kernels, batch.ranked, flat=batch.flat)
            if mask.dtype != torch.uint8 or mask.shape != (expected,):
                raise ValueError(
                    f"layer {ref.name!r}: its mask has {mask.numel()} values of {mask.dtype} where "
                    f"{expected} bytes are due"
                )
            masks.append(mask.to(ref.weight.device, copy=True))
        return bases, masks

    def _batches(self, bases: Sequence[Basis]) -> list[Batch]:
        """The weights as they are now. A draw ranks weights; what it kept is projected like any."""
        known = layer_batches(self._layers, self._config, [[basis] for basis in bases])
        return [replace(batch, draw=None) for (batch,) in known]

    def _follow_weights(self) -> None:
        """Raise where a weight was replaced; masks move with weights to another device."""
        for ref, module in zip(self._layers, self._modules, strict=True):
            now = module._parameters.get("weight")
            # While it computes, fully_shard puts whole weights where the sharded ones were.
            whole = now is not None and as_sharded(now) is None
            if now is not ref.weight and not (whole and as_sharded(ref.weight) is not None):
                raise RuntimeError(
                    f"layer {ref.name!r}: its weight is not the Parameter any more that this "
                    "pruner was made for (load_state_dict(assign=True), fully_shard and "
                    "parametrizations replace it); make the Pruner after that"
                )
        pairs = zip(self._layers, self._masks, strict=False)
        self._masks = [mask.to(ref.weight.device) for ref, mask in pairs]

    def _due(self) -> bool:
        """True where a step that the schedule was not asked about yet is one to prune at."""
        unasked = range(self._asked + 1, self._steps + 1)
        self._asked = self._steps
        return any(self._schedule.due(step) for step in unasked)

    def _prune(self) -> None:
        config = self._config
        if self._scheduled:
            config = replace(config, sparsity=self._schedule.sparsity(self._steps))
        bases: list[Basis] = []
        masks: list[torch.Tensor] = []

        def record(members: Sequence[Batch], found: Sequence[torch.Tensor]) -> None:
            bases.extend(batch.basis for batch in members)
            masks.extend(found)

        fixed = bool(self._masks) and not self._regrow
        known = list(zip(self._bases, self._masks, strict=True)) if fixed else None
        report = prune_layers(self._layers, config, record=record, within=known)
        # Of weights on a GPU only the report knows that one is not finite, and then every mask is
        # empty: reading it raises before they would be used.
        len(report.layers)
        self._report, self._bases, self._masks = report, bases, masks
        if self._project_state:
            self._project(weights=False)

    @torch.no_grad()
    def _project(self, *, weights: bool = True) -> None:
        """Project the weights, and what the optimizer remembers of them where that is asked for."""
        batches: list[Batch] = []
        masks: list[torch.Tensor] = []
        known = zip(self._layers, self._batches(self._bases), self._masks, strict=True)
        for ref, batch, mask in known:
            if weights:
                batches.append(batch)
                masks.append(mask)
            for tensor in self._remembered(ref.weight):
                kernels = LayerRef(ref.name, tensor).kernels(batch.basis.kernel)
                batches.append(replace(batch, weight=kernels))
                masks.append(mask.to(tensor.device))
        if batches:
            resolve_projector(self._config.backend, batches).project_(batches, masks)

    def _remembered(self, weight: torch.Tensor) -> list[torch.Tensor]:
        if self._optimizer is None or not self._project_state:
            return []
        state = self._optimizer.state.get(weight, {})
        found = [state[key] for key in MOMENTUM if isinstance(state.get(key), torch.Tensor)]
        return [each for each in found if each.is_floating_point() and each.shape == weight.shape]


def _with_zeros(stats: LayerStats, ref: LayerRef) -> LayerStats:
    zeros = int(in_all((ref.weight.detach() == 0).sum()))
    return replace(stats, weight_zeros=zeros, weight_sparsity=zeros / max(stats.numel, 1))


def _settings(config: PruneConfig) -> dict[str, Any]:
    settings = {name: getattr(config, name) for name in SETTINGS}
    return {**settings, "by_importance": config.percentile is None}


def _place(ref: LayerRef) -> dict[str, Any]:
    """What a mask is of: the shape of this rank's part, and the output channel it begins with."""
    return {"shape": list(local_part(ref.weight).shape), "channel": first_channel(ref.weight)}


def _basis_state(basis: Basis) -> dict[str, Any]:
    matrix = {"matrix": torch.tensor(basis.analysis)} if basis.name == "klt" else {}
    return {"basis": basis.name, **matrix}


def _basis_of(state: dict[str, Any], ref: LayerRef, config: PruneConfig) -> Basis:
    kernel, name = ref.weight.shape[-2:], state["basis"]
    if config.method == "dwt" and config.wavelet == "klt" and kernel != (1, 1):
        matrix, size = state["matrix"], kernel.numel()
        if matrix.shape != (size, size) or not bool(matrix.isfinite().all()):
            raise ValueError(
                f"layer {ref.name!r}: its basis has a matrix of {tuple(matrix.shape)}; allowed: "
                f"finite values, {(size, size)}"
            )
        return klt_basis((kernel[0], kernel[1]), frozen(matrix.cpu().numpy()), config.level)
    options = {basis.name: basis for basis in bases_for(config, ref.weight)}
    if name not in options:
        raise ValueError(
            f"layer {ref.name!r}: the state is of basis {name!r}; allowed: {', '.join(options)}"
        )
    return options[name]


def _plain(report: PruneReport) -> dict[str, Any]:
    return {
        "layers": [dataclasses.asdict(layer) for layer in report],
        "squared_norm": report.squared_norm,
        "squared_error": report.squared_error,
        "settings": report.settings,
    }


def _report_of(state: dict[str, Any]) -> PruneReport:
    layers = tuple(
        LayerStats(**{**layer, "shape": tuple(layer["shape"])}) for layer in state["layers"]
    )
    return PruneReport(
        Outcome(layers, state["squared_norm"], state["squared_error"]), state["settings"]
    )
