"""Run a plan: thresholds or masks, then the weights, then the report."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import nn

from ..backends import Backend, Budget, Job, Layer, capturable
from ..backends.eager import EagerBackend
from ..common.interrupts import finish
from ..common.progress import progress_bar
from ..config import AUTO, PruneConfig, RunSettings
from ..errors import WavpruneError
from ..report import PruneReport
from .ambient import neutral
from .auto import Choice, choose, rounds
from .clock import Clock
from .device import is_capturing
from .interrupts import cannot_be_interrupted
from .layers import LayerRef, check_finite, overflow
from .outcome import LayerFacts, outcome_of
from .plan import Plan, plan_again, plan_model
from .rules import packed_masks
from .staging import Stage, calls_of

Advance = Callable[[float], object]


class _Call(NamedTuple):
    """Layers that go to the backend together, and what is kept of them.

    Attributes:
        indices: of the layers.
        thresholds: one per layer; NaN where a rule chose masks without one.
        masks: one per layer, where those decide and not the thresholds.
    """

    indices: list[int]
    thresholds: torch.Tensor
    masks: list[torch.Tensor] | None = None


def prune_model(
    model: nn.Module,
    config: PruneConfig,
    match: PruneReport | None = None,
    progress: bool = False,
) -> PruneReport:
    """Prune a model's selected layers in place; see ``wavprune.fast.prune``."""
    refs, plan = plan_model(model, config, match)
    with neutral([ref.weight for ref in refs]):
        return _Run(plan, refs, masks=False).prune(progress, match)


def prune_layers(
    layers: Sequence[LayerRef],
    config: PruneConfig,
    match: PruneReport | None = None,
    progress: bool = False,
    masks: bool = False,
) -> PruneReport:
    """Prune the given weights in place.

    Args:
        layers: checked weights, each once (``select_layers``, ``unique_layers``).
        config: what to do.
        match: a report whose kept counts to use in place of ``config.sparsity``.
        progress: show a progress bar on standard error.
        masks: True puts the mask of each layer into the report.

    Returns:
        The report, one entry per layer.

    Raises:
        WavpruneError: a weight is not finite, the backend cannot do this, or ``match`` does not
            fit; no weight has changed then.
    """
    with neutral([ref.weight for ref in layers]):
        run = _Run(plan_again(layers, config, match), layers, masks)
        return run.prune(progress, match)


def prune_within(
    plan: Plan, refs: Sequence[LayerRef], masks: Sequence[torch.Tensor]
) -> PruneReport:
    """Prune the given weights in place, to coefficients that these masks keep.

    Args:
        plan: of these layers, with one basis each.
        refs: the weights.
        masks: one per layer, in the bases of the plan.

    Returns:
        The report with its masks, which keep nothing that ``masks`` does not.

    Raises:
        WavpruneError: a weight is not finite; none has changed then.
    """
    with neutral([ref.weight for ref in refs]):
        return _Run(plan, refs, masks=True).prune(within=masks)


class _Run:
    """One run of a plan on weights.

    Args:
        plan: what to do.
        refs: the weights, as the plan has them.
        masks: True where the report gets masks.
    """

    def __init__(self, plan: Plan, refs: Sequence[LayerRef], masks: bool) -> None:
        plan.warn()
        self._plan = plan
        self._refs = refs
        self._options = plan.bind(refs)
        self._layers = [options[0] for options in self._options]
        self._choices = [Choice()] * len(refs)
        self._stage = Stage(self._layers, plan.device)
        self._masks: list[torch.Tensor] | None = [] if masks else None
        self._backend: Backend = plan.backend(
            scattered=plan.budget is not None and self._stage.scattered,
            masks=masks or not plan.rule.uses_thresholds,
        )
        if not self._backend.can_capture or plan.has_choice:
            _check_not_captured(self._backend.name, plan.config)
        self._clock = Clock(self._layers)
        # True where only thresholds on a device can tell, by NaN, that a weight is not finite.
        self._unread = False

    def prune(
        self,
        progress: bool = False,
        match: PruneReport | None = None,
        within: Sequence[torch.Tensor] | None = None,
    ) -> PruneReport:
        """Choose the bases, select, rewrite the weights."""
        weights, trials = self._clock.weights, 0
        if self._plan.has_choice:
            trials = rounds(self._plan.budget) * sum(
                len(options) * count
                for options, count in zip(self._options, weights, strict=True)
                if len(options) > 1
            )
        # Every weight is seen twice: for the threshold, and when it is pruned.
        with progress_bar("prune", 2 * (sum(weights) + trials), "weights", progress) as advance:
            if self._plan.has_choice:
                self._choose(advance)
            calls = self._select(advance, within)
            # Copies are taken back one by one.
            alone = len(calls) == 1 and not self._stage.copies
            if alone and cannot_be_interrupted(self._backend, self._plan):
                rows = self._rewrite(calls, advance)
            else:
                rows = finish(lambda: self._rewrite(calls, advance))
        if self._unread and self._stage.copies:
            self._check_finite(calls)
            self._unread = False
        return self._report(calls, rows, match)

    def _choose(self, advance: Advance) -> None:
        """Give each layer that has a choice the best of its bases."""
        several = [i for i, options in enumerate(self._options) if len(options) > 1]
        plan = self._plan
        with self._clock.timed(several, self._layers[several[0]].device):
            self._choices = choose(
                self._backend, self._options, plan.budget, plan.config, plan.device, advance
            )
        pairs = zip(self._options, self._choices, strict=True)
        self._layers = [options[choice.option] for options, choice in pairs]
        self._stage = Stage(self._layers, plan.device)

    def _select(self, advance: Advance, within: Sequence[torch.Tensor] | None) -> list[_Call]:
        """What is kept of each layer; no weight changes.

        Raises:
            WavpruneError: a weight on the CPU is not finite.
        """
        most, limit = self._backend.call_limit, self._stage.bytes_per_call
        if limit is None:
            indices = self._plan.calls_of(most)
        else:
            indices = calls_of(self._layers, most, limit)
        if not self._plan.rule.uses_thresholds:
            return self._calls_by_rule(indices)
        if within is not None:
            return self._calls_within(indices, within, advance)
        if self._plan.budget is None:
            thresholds = self._thresholds(indices, advance)
        else:
            thresholds = self._shared_threshold(indices, self._plan.budget, advance)
        calls = [_Call(*pair) for pair in zip(indices, thresholds, strict=True)]
        if all(part.device.type == "cpu" for part in thresholds):
            self._check_finite(calls)
            return calls
        # The host does not look, so as not to wait: nothing is pruned at a threshold of NaN.
        self._unread = True
        return _all_or_none(calls)

    def _thresholds(self, indices: Sequence[list[int]], advance: Advance) -> list[torch.Tensor]:
        thresholds = []
        for call, layers in zip(indices, self._stage.visit(indices), strict=True):
            with self._clock.timed(call, layers[0].device):
                thresholds.append(self._backend.threshold(_single_jobs(layers)))
            advance(self._clock.size(call))
        return thresholds

    def _shared_threshold(
        self, indices: Sequence[list[int]], budget: Budget, advance: Advance
    ) -> list[torch.Tensor]:
        everything = range(len(self._layers))
        with self._clock.timed(everything, self._layers[0].device):
            shared = self._backend.threshold([self._stage.job(budget)])
        advance(sum(self._clock.weights))
        devices = [self._layers[call[0]].device for call in indices]
        pairs = zip(indices, devices, strict=True)
        return [shared.to(device).expand(len(call)).contiguous() for call, device in pairs]

    def _calls_by_rule(self, indices: Sequence[list[int]]) -> list[_Call]:
        """Masks that the rule chooses."""
        budget = self._plan.budget
        if self._stage.bytes_per_call is not None:
            raise WavpruneError(
                f"method={self._plan.config.method!r} looks at all layers at once, which do not "
                f"fit on {self._plan.device} together; leave device out"
            )
        for ref in self._refs:
            check_finite(ref)
        layers = self._stage.present()
        # Weights that are their own coefficients have been looked at.
        transformed = [[i for i in call if not layers[i].basis.is_identity] for call in indices]
        self._check_coefficients([call for call in transformed if call], layers)
        masks = packed_masks(self._plan.rule, layers, budget, _coefficients)
        unknown = [torch.full((len(call),), torch.nan, dtype=torch.float64) for call in indices]
        chosen = [[masks[i] for i in call] for call in indices]
        return [_Call(*entry) for entry in zip(indices, unknown, chosen, strict=True)]

    def _calls_within(
        self, indices: Sequence[list[int]], within: Sequence[torch.Tensor], advance: Advance
    ) -> list[_Call]:
        """Masks among those of an earlier run.

        Ranked are copies that have those masks already. In an expansive basis a part of what is
        kept leaks into what is not, and ranks too: fewer coefficients than asked may be kept.
        """
        self._check_coefficients(indices, self._layers)
        copies = [replace(layer, weight=layer.weight.clone()) for layer in self._layers]
        self._backend.project_([replace(copy, seed=None) for copy in copies], within)
        budget, calls = self._plan.budget, []
        shared = None if budget is None else self._backend.threshold([Job(copies, budget)])
        for call in indices:
            members = [copies[i] for i in call]
            if shared is None:
                thresholds = self._backend.threshold(_single_jobs(members))
            else:
                thresholds = shared.to(members[0].device).expand(len(call)).contiguous()
            masks = self._backend.masks(members, thresholds)
            both = [mask & within[i] for i, mask in zip(call, masks, strict=True)]
            calls.append(_Call(call, thresholds, both))
            advance(self._clock.size(call))
        self._check_finite(calls)
        return calls

    def _rewrite(self, calls: Sequence[_Call], advance: Advance) -> list[torch.Tensor]:
        """Change the weights; the rows of ``Backend.apply_``.

        Where that fails half-way, the error says which layers are pruned and which may be.
        """
        rows: list[torch.Tensor] = []
        try:
            visited = self._stage.visit([call.indices for call in calls])
            for call, layers in zip(calls, visited, strict=True):
                rows.append(self._apply(call, layers))
                self._stage.leave(layers)
                advance(self._clock.size(call.indices))
            self._stage.finish()
        except BaseException as error:
            done = [self._refs[i].name for call in calls[: len(rows)] for i in call.indices]
            torn = [self._refs[i].name for call in calls[len(rows) :][:1] for i in call.indices]
            error.add_note(
                f"wavprune: pruned before this error: {', '.join(done) or 'nothing'}; perhaps in "
                f"part: {', '.join(torn) or 'nothing'}"
            )
            raise
        return rows

    def _apply(self, call: _Call, layers: Sequence[Layer]) -> torch.Tensor:
        if self._masks is not None:
            masks = call.masks or self._backend.masks(layers, call.thresholds)
            homes = (self._refs[i].weight.device for i in call.indices)
            self._masks.extend(mask.to(home) for mask, home in zip(masks, homes, strict=True))
        with self._clock.timed(call.indices, layers[0].device):
            selection = call.thresholds if call.masks is None else call.masks
            return self._backend.apply_(layers, selection)

    def _check_coefficients(self, calls: Sequence[list[int]], layers: Sequence[Layer]) -> None:
        """Check what has not been ranked; on a device this waits for it.

        Raises:
            WavpruneError: a coefficient is not finite.
        """
        for call in calls:
            # The largest of each layer tells; random numbers would not.
            members = [replace(layers[i], budget=Budget(keep=1), seed=None) for i in call]
            largest = self._backend.threshold(_single_jobs(members)).tolist()
            for i, value in zip(call, largest, strict=True):
                if math.isnan(value):
                    check_finite(self._refs[i])
                    raise overflow(self._refs[i].name)

    def _check_finite(self, calls: Sequence[_Call]) -> None:
        if any(bool(call.thresholds.isnan().any()) for call in calls):
            raise_non_finite(self._refs)

    def _report(
        self, calls: Sequence[_Call], rows: Sequence[torch.Tensor], match: PruneReport | None
    ) -> PruneReport:
        # None of what the report holds on to has weights.
        plan, choices, backend = self._plan, self._choices, self._backend.name
        thresholds = [call.thresholds for call in calls]
        shapes = [ref.weight.shape for ref in self._refs]
        names = [ref.name for ref in self._refs]
        seconds = self._clock.seconds
        # The weights are let go: a report may be read late.
        unread = [weakref.ref(ref.weight) for ref in self._refs] if self._unread else []

        def check() -> None:
            pairs = zip(names, (reference() for reference in unread), strict=True)
            raise_non_finite([LayerRef(name, w) for name, w in pairs if w is not None])

        return PruneReport(
            lambda: outcome_of(
                layer_facts(plan, choices, shapes, backend),
                thresholds,
                rows,
                seconds(),
                check if unread else None,
            ),
            _settings(plan.config, match),
            bases={layer.name: layer.basis for layer in self._layers},
            masks=None if self._masks is None else dict(zip(names, self._masks, strict=True)),
            coverage=plan.coverage,
        )


def _settings(config: PruneConfig, match: PruneReport | None) -> RunSettings:
    if match is None:
        return RunSettings.of(config)
    return RunSettings.of(config, match.settings.label, match.sparsity)


def layer_facts(
    plan: Plan, choices: Sequence[Choice], shapes: Sequence[torch.Size], backend: str
) -> list[LayerFacts]:
    """What is known of each layer before its numbers are read."""
    config, facts = plan.config, []
    for options, choice, shape in zip(plan.options, choices, shapes, strict=True):
        layer = options[choice.option]
        basis = layer.basis
        facts.append(
            LayerFacts(
                name=layer.name,
                shape=tuple(shape),
                method=config.method,
                wavelet=basis.name,
                mode=basis.mode,
                level_requested=config.level if plan.rule.basis is None else None,
                level_used=basis.level_used,
                backend=backend,
                coefficients=layer.total_weights // max(basis.num_values, 1) * basis.coefficients,
                runner_up=choice.runner_up,
                runner_up_error=choice.runner_up_error,
            )
        )
    return facts


def raise_non_finite(refs: Sequence[LayerRef]) -> None:
    """Say which weight is not finite.

    Raises:
        WavpruneError: always.
    """
    for ref in refs:
        check_finite(ref)
    raise overflow()


def _single_jobs(layers: Sequence[Layer]) -> list[Job]:
    return [Job((layer,), layer.budget or Budget(keep=0)) for layer in layers]


def _all_or_none(calls: list[_Call]) -> list[_Call]:
    """NaN for all where one is NaN: an error leaves every weight as it was.

    ``apply_`` sees to the thresholds of one call; minimum and maximum, which pass on a NaN and
    change nothing without one, to those of several.
    """
    if len(calls) == 1:
        return calls
    home = calls[0].thresholds.device
    lowest = torch.stack([call.thresholds.amin().to(home) for call in calls]).amin()
    return [
        call._replace(thresholds=torch.maximum(call.thresholds, lowest.to(call.thresholds.device)))
        for call in calls
    ]


def _coefficients(layer: Layer) -> torch.Tensor:
    """``(N, M)``, of a whole layer, for a rule."""
    kernels = layer.weight.to(layer.compute_dtype).flatten(0, 1)
    return EagerBackend().analyse(layer, kernels)


def _check_not_captured(backend: str, config: PruneConfig) -> None:
    if is_capturing():
        what = f"wavelet={AUTO!r}" if config.wavelet == AUTO else f"backend {backend!r}"
        raise WavpruneError(
            f"{what} looks at numbers on the host, which a CUDA graph cannot hold; allowed in a "
            f"capture: {' and '.join(capturable())}, with a basis by its name"
        )
