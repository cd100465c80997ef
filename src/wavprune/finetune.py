"""Keep a network pruned while it is trained."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from .backends import Batch, resolve_projector
from .bases import Basis, klt_basis, named_basis
from .config import PruneConfig
from .layers import LayerRef, select_layers
from .masks import mask_bytes
from .matrices import frozen
from .pipeline import prune_layers
from .report import LayerStats, Outcome, PruneReport
from .schedule import Constant, Schedule
from .shards import in_all

FORMAT = 1
# Running means of squares: a weight has one, a coefficient has none.
SECOND_MOMENTS = ("exp_avg_sq", "max_exp_avg_sq", "square_avg", "sum", "acc_delta", "exp_inf")


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
            among those that were kept so far.
        project_state: True projects what the optimizer remembers of the weights too: momentum,
            Adam's first moment. Second moments stay as they are: they belong to weights and have no
            coefficients.

    Raises:
        ValueError: the settings do not go together, or a layer cannot be pruned.

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
        self._layers = select_layers(model, config)
        self._steps = 0
        self._asked = -1
        self._batches: list[Batch] = []
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

        Prunes at once where the schedule says so for step 0.

        Args:
            optimizer: of ``torch.optim``, or any that calls the hooks of
                ``register_step_post_hook``.

        Raises:
            RuntimeError: the pruner follows an optimizer already.
        """
        if self._handle is not None:
            raise RuntimeError("this pruner follows an optimizer already; call finish() first")
        self._optimizer = optimizer
        if self._due():
            self._prune()
        self._handle = optimizer.register_step_post_hook(lambda *_: self.step())

    def step(self) -> None:
        """Prune or project once: call it after each ``optimizer.step()``, unless attached."""
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
            RuntimeError: nothing was pruned yet.
        """
        if self._handle is not None:
            self._handle.remove()
            self._handle = None
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
            ref.name: {"mask": mask.clone(), **_basis_state(batch.basis)}
            for ref, mask, batch in zip(self._layers, self._masks, self._batches, strict=False)
        }
        report = None if self._report is None else _plain(self._report)
        return {
            "format": FORMAT,
            "steps": self._steps,
            "asked": self._asked,
            "layers": layers,
            "report": report,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another pruner of the same model and settings was.

        The weights are the model's own state dict, loaded before or after.

        Raises:
            ValueError: the state is of another format, of other layers, or of other sizes.
        """
        if state.get("format") != FORMAT:
            raise ValueError(f"the state has format {state.get('format')!r}; allowed: {FORMAT}")
        layers = state["layers"]
        names = [ref.name for ref in self._layers]
        if layers and list(layers) != names:
            raise ValueError(
                f"the state is of layers {', '.join(layers)}; this model's are {', '.join(names)}"
            )
        batches = [self._batch(ref, layers[ref.name]) for ref in self._layers if layers]
        masks = [layers[name]["mask"] for name in names if layers]
        for ref, batch, mask in zip(self._layers, batches, masks, strict=False):
            expected = mask_bytes(batch.kernels, batch.ranked, flat=batch.flat)
            if mask.dtype != torch.uint8 or mask.shape != (expected,):
                raise ValueError(
                    f"layer {ref.name!r}: its mask has {mask.numel()} values of {mask.dtype} where "
                    f"{expected} bytes are due"
                )
        self._batches = batches
        self._masks = [
            mask.to(batch.weight.device, copy=True)
            for mask, batch in zip(masks, batches, strict=True)
        ]
        self._steps, self._asked = int(state["steps"]), int(state["asked"])
        self._report = None if state["report"] is None else _report_of(state["report"])

    def _batch(self, ref: LayerRef, state: dict[str, Any]) -> Batch:
        basis = _basis_of(state, self._config)
        wide = ref.weight.dtype == torch.float64
        return Batch(
            ref.kernels(basis.kernel),
            basis,
            by_importance=self._config.percentile is None,
            compute_dtype=torch.float64 if wide else torch.float32,
        )

    def _due(self) -> bool:
        """True where a step that the schedule was not asked about yet is one to prune at."""
        unasked = range(self._asked + 1, self._steps + 1)
        self._asked = self._steps
        return any(self._schedule.due(step) for step in unasked)

    def _prune(self) -> None:
        if self._masks and not self._regrow:
            self._project()
        config = self._config
        if self._scheduled:
            config = replace(config, sparsity=self._schedule.sparsity(self._steps))
        batches: list[Batch] = []
        masks: list[torch.Tensor] = []

        def record(members: Sequence[Batch], found: Sequence[torch.Tensor]) -> None:
            # A draw ranks weights; what it kept is projected like any other identity.
            batches.extend(replace(batch, draw=None) for batch in members)
            masks.extend(found)

        self._report = prune_layers(self._layers, config, record=record)
        if self._masks and not self._regrow:
            masks = [new & old for new, old in zip(masks, self._masks, strict=True)]
        self._batches, self._masks = batches, masks
        if self._project_state:
            self._project()

    @torch.no_grad()
    def _project(self) -> None:
        """Project the weights, and what the optimizer remembers of them where that is asked for."""
        batches: list[Batch] = []
        masks: list[torch.Tensor] = []
        for ref, known, mask in zip(self._layers, self._batches, self._masks, strict=True):
            for tensor in (ref.weight, *self._remembered(ref.weight)):
                kernels = LayerRef(ref.name, tensor).kernels(known.basis.kernel)
                batches.append(replace(known, weight=kernels))
                masks.append(mask)
        resolve_projector(self._config.backend, batches).project_(batches, masks)

    def _remembered(self, weight: torch.Tensor) -> list[torch.Tensor]:
        if self._optimizer is None or not self._project_state:
            return []
        state = self._optimizer.state.get(weight, {})
        return [
            value
            for key, value in state.items()
            if isinstance(value, torch.Tensor)
            and value.shape == weight.shape
            and key not in SECOND_MOMENTS
        ]


def _with_zeros(stats: LayerStats, ref: LayerRef) -> LayerStats:
    zeros = int(in_all((ref.weight.detach() == 0).sum()))
    return replace(stats, weight_zeros=zeros, weight_sparsity=zeros / max(stats.numel, 1))


def _basis_state(basis: Basis) -> dict[str, Any]:
    state: dict[str, Any] = {
        "wavelet": basis.name,
        "kernel": list(basis.kernel),
        "mode": basis.mode,
        "level": basis.level_requested,
    }
    if basis.name == "klt":
        state["matrix"] = torch.tensor(basis.analysis)
    return state


def _basis_of(state: dict[str, Any], config: PruneConfig) -> Basis:
    height, width = state["kernel"]
    if "matrix" in state:
        return klt_basis((height, width), frozen(state["matrix"].numpy()), state["level"])
    mode = state["mode"] or config.mode
    return named_basis(state["wavelet"], (height, width), mode, state["level"], config.force_level)


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
