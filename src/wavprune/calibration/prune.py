"""Pruning from calibration data, from settings to a report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..backends.masks import pack
from ..common.checks import choice
from ..config import PruneConfig
from ..decision import Decision
from ..engine.ambient import neutral
from ..engine.layers import LayerRef
from ..engine.plan import Plan, plan_model
from ..engine.running import running, write_all
from ..errors import WavpruneError
from ..report import PruneReport
from .admm import select
from .auto import choose_bases
from .budget import Probe, calibrated, choose_ridges
from .candidates import Candidate, Trials
from .collect import Calibration, calibrate
from .guard import MAGNITUDE, Reference, Verdict, decide
from .magnitude import budget_of, magnitude_masks
from .network import Network
from .outcome import report_of
from .problem import Problem, is_solvable, problem_of
from .sequential import solve_in_sequence

LEVELS = ("refit", "select", "full")
DEFAULT_LEVEL = "full"


def prune_calibrated(
    model: nn.Module,
    config: PruneConfig,
    calibration: Calibration | Iterable[Any],
    level: str = DEFAULT_LEVEL,
    progress: bool = False,
) -> PruneReport:
    """Prune a model's selected layers in place, from data; see ``wavprune.fast.prune``."""
    choice("calibration_level", level, LEVELS)
    _check(config)
    if not isinstance(calibration, Calibration):
        calibration = calibrate(
            model,
            calibration,
            targets=config.targets,
            ignore=config.ignore,
            device=config.device,
            seed=config.seed,
            progress=progress,
        )
    refs, plan = plan_model(model, config)
    _check_bases(plan, refs)
    calibration.check(refs)
    plan.warn()
    start = time.perf_counter()
    with neutral(ref.weight for ref in refs), running(model, config.device) as home:
        run = _Run(model, refs, plan, calibration.to(home), level)
        chosen, verdict = run.choose()
        report = report_of(
            plan,
            refs,
            run.choices,
            [int(chosen.masks[ref.name].sum()) for ref in refs],
            [pack_mask(run.problems[ref.name], chosen.masks[ref.name]) for ref in refs],
            [chosen.values.weights[ref.name] for ref in refs],
            time.perf_counter() - start,
            run.decision(chosen, verdict),
        )
        changes = run.changes(chosen)
    write_all(changes)
    return report


class _Run:
    """One run on one network.

    Args:
        model: on the device that runs it.
        refs: its selected layers.
        plan: of these.
        calibration: what is known of them.
        level: of ``LEVELS``.
    """

    def __init__(
        self,
        model: nn.Module,
        refs: Sequence[LayerRef],
        plan: Plan,
        calibration: Calibration,
        level: str,
    ) -> None:
        self._config, self._calibration, self._level = plan.config, calibration, level
        self._network = Network(model, refs)
        self._refs = refs
        self.choices = choose_bases(plan.bind(refs), refs, calibration, plan.config)
        layers = [o[c.option] for o, c in zip(plan.bind(refs), self.choices, strict=True)]
        self.problems = {layer.name: problem_of(layer, calibration) for layer in layers}
        self._called = {n: p for n, p in self.problems.items() if n in calibration.layers}
        self._trials = Trials(self._network, calibration, self.problems)
        self._notes: list[str] = []

    def choose(self) -> tuple[Candidate, Verdict]:
        """The candidate that is taken, and why."""
        calibration = self._calibration
        budget = budget_of(self._refs, self._config)
        plain = magnitude_masks(self.problems, budget, self._config.scope == "global")
        share = sum(budget.values()) / sum(ref.weight.numel() for ref in self._refs)
        choose_ridges(self._called, calibration, calibration.gains, share)
        reference = Reference(self._network.outputs(calibration.guard))
        self._measure = reference.measure
        candidates = {
            MAGNITUDE: self._trials.assemble(plain, refitted=False),
            "magnitude, refit": self._trials.assemble(plain, refitted=True),
        }
        losses = {n: self._trials.losses(c, reference) for n, c in candidates.items()}
        if self._level != "refit":
            for name, masks in self._selections(plain).items():
                candidates[name] = self._trials.assemble({**plain, **masks}, refitted=True)
                losses[name] = self._trials.losses(candidates[name], reference)
        if self._level == "full":
            weights = calibration.gradients or calibration.gains
            for base, reselect in _sequences(decide(losses).losses):
                solved = self._in_sequence(candidates[base], weights, reselect)
                if solved is not None:
                    name = f"{base}, sequential" + (", selected again" if reselect else "")
                    candidates[name] = solved
                    losses[name] = self._trials.losses(solved, reference)
        verdict = decide(losses)
        return candidates[verdict.chosen], verdict

    def _selections(self, plain: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
        """Masks by ADMM, which keep as much as magnitude's."""
        counts = {name: int(plain[name].sum()) for name in self._called}
        calibration = self._calibration
        kinds = {"gn": calibration.gradients, "bn": calibration.gains}
        found = {}
        probe = None
        if not calibration.few and self._config.scope == "global":
            probe = Probe(self._network, calibration, self._called, calibration.gains)
        for kind, weights in kinds.items():
            if weights is None:
                self._notes.append("the outputs have no gradient, so there are no weights 'gn'")
                continue
            if probe is not None:
                found[f"calibrated {kind}"] = calibrated(
                    self._called, sum(counts.values()), weights, probe
                )
            if probe is None or kind == "gn":
                found[f"selected {kind}"] = self._by_admm(counts, weights)
        return found

    def _by_admm(
        self, counts: Mapping[str, int], weights: Mapping[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        problems = list(self._called.values())
        if self._config.scope == "global":
            return select(problems, sum(counts.values()), weights)
        masks: dict[str, torch.Tensor] = {}
        for problem in problems:
            masks.update(select([problem], counts[problem.name], weights))
            problem.forget()
        return masks

    def _in_sequence(
        self, base: Candidate, weights: Mapping[str, torch.Tensor], reselect: bool
    ) -> Candidate | None:
        try:
            return solve_in_sequence(
                self._network, self._calibration, self.problems, base, weights, reselect
            )
        except WavpruneError as error:
            self._notes.append(str(error))
            return None

    def decision(self, chosen: Candidate, verdict: Verdict) -> Decision:
        """What the report says of the choice."""
        calibration = self._calibration
        names = {ref.name for ref in self._refs}
        return Decision(
            level=self._level,
            chosen=verdict.chosen,
            reason=verdict.reason,
            measure=self._measure,
            losses=verdict.losses,
            errors=verdict.errors,
            fitted=sum(map(len, calibration.statistics)),
            probed=sum(map(len, calibration.probe)),
            compared=sum(map(len, calibration.guard)),
            ridges={name: problem.ridge for name, problem in self._called.items()},
            by_magnitude=tuple(n for n in calibration.never_called if n in names),
            block_diagonal={n: b for n, b in calibration.blocks.items() if b > 1 and n in names},
            norms=tuple(chosen.values.norms),
            biases=tuple(chosen.values.biases),
            notes=tuple(dict.fromkeys(self._notes)),
        )

    def changes(self, chosen: Candidate) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """What is to be written: pairs of a tensor and its new values."""
        network, values = self._network, chosen.values
        pairs: list[tuple[torch.Tensor, torch.Tensor]] = [
            (network.weights[name], weight) for name, weight in values.weights.items()
        ]
        pairs += [(network.biases[name], bias) for name, bias in values.biases.items()]
        for name, statistics in values.norms.items():
            norm = network.norms[name]
            assert norm.running_mean is not None
            assert norm.running_var is not None
            pairs += [(norm.running_mean, statistics.mean), (norm.running_var, statistics.var)]
        return pairs


def _sequences(losses: Mapping[str, float]) -> list[tuple[str, bool]]:
    """Which candidates are solved again in sequence, and whether their masks are selected again."""
    names = [name for name in losses if name != MAGNITUDE]
    best = sorted(names, key=lambda name: losses[name])[:2]
    return [(best[0], False), *((name, True) for name in best)]


def pack_mask(problem: Problem, mask: torch.Tensor) -> torch.Tensor:
    """A mask as a report holds it."""
    return pack(problem.mask(mask), flat=problem.layer.is_flat)


def _check(config: PruneConfig) -> None:
    if config.method not in ("dwt", "min_weight"):
        raise WavpruneError(
            f"calibration does not go with method={config.method!r}; allowed: 'dwt', 'min_weight'"
        )
    if config.percentile is not None:
        raise WavpruneError(
            f"percentile={config.percentile!r} ranks magnitudes, which calibration does not; give "
            "sparsity"
        )


def _check_bases(plan: Plan, refs: Sequence[LayerRef]) -> None:
    """Raise where the coefficients of a layer cannot be solved for row by row."""
    for ref, options in zip(refs, plan.options, strict=True):
        if any(is_solvable(ref, layer) for layer in options):
            continue
        basis = options[0].basis
        size = "x".join(map(str, basis.kernel))
        raise WavpruneError(
            f"layer {ref.name!r}: its weight has kernels of {size} in the basis {basis.name!r}, "
            "whose coefficients cannot be solved for row by row; allowed with calibration: "
            "convolutions with kernels of at most 1024 values, Linear layers in "
            f"wavelet='identity' or 'auto'; or leave it out by ignore={[ref.name]!r}"
        )
