"""One run on one network: candidates, their comparison, and the one that is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple, get_args

import torch
from torch import nn

from ..decision import Decision
from ..engine.layers import LayerRef
from ..engine.patterns import Pattern
from ..engine.plan import Plan
from ..errors import WavpruneError
from .admm import pattern_mask, select
from .auto import choose_bases
from .budget import Probe, calibrated, choose_ridges
from .candidates import Candidate, Trials
from .collect import rotations
from .collected import Calibration
from .guard import MAGNITUDE, Reference, Verdict, decide
from .magnitude import budget_of, magnitude_masks
from .network import Network
from .problem import Problem, problem_of
from .sequential import solve_in_sequence
from .statistics import merged
from .together import ATTEMPTS, WAYS, Steps, refine

Level = Literal["refit", "select", "sequential", "full"]
LEVELS: tuple[str, ...] = get_args(Level)
REFIT = f"{MAGNITUDE}, refit"

Masks = dict[str, torch.Tensor]
Advance = Callable[[float], object]
# How often a few inputs are divided, so that each is held back once.
FOLDS = 4


@dataclass(frozen=True, slots=True)
class Recipe:
    """How a candidate is made.

    Attributes:
        select: the masks of the layers that are called, by ADMM; None means those of magnitude.
        refitted: whether values are solved for.
        sequential: whether all layers are solved once more for what the pruned network feeds them.
        reselect: whether their masks are then selected again.
    """

    select: Callable[[Mapping[str, Problem]], Masks] | None = None
    refitted: bool = True
    sequential: bool = False
    reselect: bool = False


class _Refined(NamedTuple):
    """By which steps, how much of their way, and to what."""

    steps: Steps
    way: str
    candidate: Candidate


class Run:
    """One run on one network.

    Args:
        model: on the device that runs it.
        refs: its selected layers.
        plan: of these.
        calibration: what is known of them.
        level: of ``LEVELS``.

    Attributes:
        choices: which option of the plan each layer is pruned as.
        problems: each layer, by its name.
    """

    def __init__(
        self,
        model: nn.Module,
        refs: Sequence[LayerRef],
        plan: Plan,
        calibration: Calibration,
        level: str,
    ) -> None:
        config = plan.config
        self._model, self._refs, self._plan = model, refs, plan
        self._calibration, self._level, self._shared = calibration, level, config.scope == "global"
        self._network = Network(model, refs)
        options = plan.bind(refs)
        self.choices = choose_bases(options, refs, calibration, config)
        layers = [o[c.option] for o, c in zip(options, self.choices, strict=True)]
        self.problems = {layer.name: problem_of(layer, calibration) for layer in layers}
        budget = budget_of(refs, config)
        self._pattern = plan.rule if isinstance(plan.rule, Pattern) else None
        if self._pattern is None:
            self._plain = magnitude_masks(self.problems, budget, self._shared)
        else:
            self._plain = {
                name: pattern_mask(self._pattern, problem, problem.C.abs())
                for name, problem in self.problems.items()
            }
        share = sum(budget.values()) / sum(ref.weight.numel() for ref in refs)
        choose_ridges(self._called(self.problems), calibration, calibration.gains, share)
        self._reference = Reference(self._network.outputs(calibration.guard))
        self._notes: list[str] = []
        self._solved_on_all = False
        self._compared = 0

    @property
    def steps(self) -> int:
        """How many candidates are made at most."""
        each = {"refit": 2, "select": 5, "sequential": 7, "full": 9}[self._level]
        return each * (FOLDS if self._calibration.few else 1) + 1

    def choose(self, advance: Advance = lambda _: None) -> tuple[Candidate, Verdict]:
        """The candidate that is taken, and why."""
        made, losses = self._compare(advance)
        runs = [(self, made)]
        if self._calibration.few:
            # Of few inputs every one is held back once.
            for other in rotations(self._model, self._refs, self._calibration):
                again = Run(self._model, self._refs, self._plan, other, self._level)
                also, more = again._compare(advance)
                losses = {n: torch.cat([v, more[n]]) for n, v in losses.items() if n in more}
                runs.append((again, also))
        self._compared = len(losses[MAGNITUDE])
        verdict = decide(losses)
        taken = verdict.chosen
        recipe, chosen = made[taken]
        refined: _Refined | None = None
        if self._level == "full" and recipe.refitted:
            starts = [(run, also[taken][1]) for run, also in runs]
            verdict, refined = self._refine(starts, verdict, losses, advance)
        if refined is not None and not self._calibration.few:
            # It saw all inputs but those that it was compared on.
            return refined.candidate, verdict
        solved = self._on_all(recipe)
        if solved is not None and refined is not None:
            inputs = self._calibration.inputs
            found = refine(
                self._network, self._calibration, self.problems, solved, inputs, refined.steps
            )
            solved = None if found is None else found[refined.way]
        advance(1)
        best = chosen if refined is None else refined.candidate
        if solved is None:
            return best, verdict
        trials = Trials(self._network, self._calibration, self.problems)
        before, after = (
            float(trials.losses(candidate, self._reference).mean()) for candidate in (best, solved)
        )
        self._solved_on_all = after <= before
        return solved if self._solved_on_all else best, verdict

    def _refine(
        self,
        starts: Sequence[tuple[Run, Candidate]],
        verdict: Verdict,
        losses: Mapping[str, torch.Tensor],
        advance: Advance,
    ) -> tuple[Verdict, _Refined | None]:
        """What was taken refined in each run, if that is better on the inputs held back."""
        for steps in ATTEMPTS:
            found = []
            for run, candidate in starts:
                tried = run._refined(candidate, steps)
                if tried is None:
                    break
                found.append(tried)
            advance(len(starts))
            if len(found) < len(starts):
                continue
            ways = {f"{verdict.chosen}, {way}": way for way in WAYS}
            more = {
                name: torch.cat([tried[way][1] for tried in found]) for name, way in ways.items()
            }
            again = decide({**losses, **more})
            if again.chosen in ways:
                way = ways[again.chosen]
                return again, _Refined(steps, way, found[0][way][0])
            verdict = verdict._replace(losses=again.losses, errors=again.errors)
        return verdict, None

    def _refined(
        self, candidate: Candidate, steps: Steps
    ) -> dict[str, tuple[Candidate, torch.Tensor]] | None:
        """A candidate refined on all inputs but those held back, and its losses on these."""
        calibration = self._calibration
        inputs = [*calibration.statistics, *calibration.probe]
        found = refine(self._network, calibration, self.problems, candidate, inputs, steps)
        if found is None:
            return None
        trials = Trials(self._network, calibration, self.problems)
        return {way: (made, trials.losses(made, self._reference)) for way, made in found.items()}

    def _compare(
        self, advance: Advance
    ) -> tuple[dict[str, tuple[Recipe, Candidate]], dict[str, torch.Tensor]]:
        """All candidates, and the losses of each on the inputs held back."""
        trials = Trials(self._network, self._calibration, self.problems)
        recipes: dict[str, Recipe] = {
            MAGNITUDE: Recipe(refitted=False),
            REFIT: Recipe(),
            **({} if self._level == "refit" else self._selections()),
        }
        made: dict[str, tuple[Recipe, Candidate]] = {}
        losses: dict[str, torch.Tensor] = {}

        def add(name: str, recipe: Recipe, candidate: Candidate) -> None:
            made[name] = recipe, candidate
            losses[name] = trials.losses(candidate, self._reference)
            advance(1)

        for name, recipe in recipes.items():
            add(name, recipe, self._made(trials, recipe))
        batch = self._calibration.batch
        if self._level in ("sequential", "full") and batch is not None:
            base = self._sequenced(losses)
            for reselect in (False, True):
                name = f"{base}, sequential" + (", selected again" if reselect else "")
                recipe = replace(recipes[base], sequential=True, reselect=reselect)
                solved = self._in_sequence(trials, made[base][1].masks, recipe, batch)
                if solved is not None:
                    add(name, recipe, solved)
        return made, losses

    def _sequenced(self, losses: Mapping[str, torch.Tensor]) -> str:
        """Which candidate is solved again in sequence."""
        names = [name for name in losses if name != MAGNITUDE]
        if self._calibration.few:
            # The same one whichever inputs are held back.
            return names[min(1, len(names) - 1)]
        return min(names, key=lambda name: float(losses[name].nan_to_num(torch.inf).mean()))

    def _selections(self) -> dict[str, Recipe]:
        """Ways to select by ADMM as much as magnitude keeps."""
        calibration = self._calibration
        called = self._called(self.problems)
        counts = {name: int(self._plain[name].sum()) for name in called}
        kinds = {"gn": calibration.gradients, "bn": calibration.gains}
        if self._pattern is not None:
            # Within a row all weights are scaled alike.
            del kinds["gn"]
        probe = None
        if not calibration.few and self._shared and self._pattern is None:
            probe = Probe(self._network, calibration, called, calibration.gains)
        recipes = {}
        for kind, weights in kinds.items():
            if weights is None:
                self._notes.append("the outputs have no gradient, so there are no weights 'gn'")
                continue
            if probe is not None:
                keep = sum(counts.values())
                recipes[f"calibrated {kind}"] = Recipe(
                    partial(calibrated, keep=keep, row_weights=weights, probe=probe)
                )
            if probe is None or kind == "gn":
                recipes[f"selected {kind}"] = Recipe(partial(self._by_admm, counts, weights))
        return recipes

    def _by_admm(
        self,
        counts: Mapping[str, int],
        weights: Mapping[str, torch.Tensor],
        problems: Mapping[str, Problem],
    ) -> Masks:
        if self._pattern is not None:
            keep = sum(counts.values())
            return select(list(problems.values()), keep, weights, pattern=self._pattern)
        if self._shared:
            return select(list(problems.values()), sum(counts.values()), weights)
        masks: Masks = {}
        for name, problem in problems.items():
            masks.update(select([problem], counts[name], weights))
            problem.forget()
        return masks

    def _made(self, trials: Trials, recipe: Recipe) -> Candidate:
        """The candidate of a recipe, before any sequential pass."""
        masks = dict(self._plain)
        if recipe.select is not None:
            masks.update(recipe.select(self._called(trials.problems)))
        return trials.assemble(masks, recipe.refitted)

    def _in_sequence(
        self, trials: Trials, masks: Masks, recipe: Recipe, batch: torch.Tensor
    ) -> Candidate | None:
        calibration = self._calibration
        weights = calibration.gradients or calibration.gains
        start = trials.start(masks)
        try:
            return solve_in_sequence(
                self._network,
                calibration,
                trials.problems,
                start,
                weights,
                recipe.reselect,
                batch,
                self._pattern,
            )
        except WavpruneError as error:
            self._notes.append(str(error))
            return None

    def _on_all(self, recipe: Recipe) -> Candidate | None:
        """The chosen recipe once more, with what was held back to choose it."""
        calibration = self._calibration
        if not recipe.refitted or not calibration.held:
            return None
        for problem in self.problems.values():
            problem.forget()
        problems = dict(self.problems)
        for name, problem in self._called(problems).items():
            statistics = merged([calibration.fitted[name], calibration.held[name]])
            problems[name] = problem.on(statistics, calibration.layers[name].centered)
        trials = Trials(self._network, calibration, problems)
        made = self._made(trials, recipe)
        everything = calibration.everything
        if not recipe.sequential or everything is None:
            return made
        return self._in_sequence(trials, made.masks, recipe, everything)

    def _called(self, problems: Mapping[str, Problem]) -> dict[str, Problem]:
        return {n: problem for n, problem in problems.items() if n in self._calibration.layers}

    def decision(self, chosen: Candidate, verdict: Verdict) -> Decision:
        """What the report says of the choice."""
        calibration = self._calibration
        names = {ref.name for ref in self._refs}
        return Decision(
            level=self._level,
            chosen=verdict.chosen,
            reason=verdict.reason,
            measure=self._reference.measure,
            losses=verdict.losses,
            errors=verdict.errors,
            solved_on_all=self._solved_on_all,
            fitted=sum(map(len, calibration.statistics)),
            probed=sum(map(len, calibration.probe)),
            compared=self._compared,
            ridges={name: problem.ridge for name, problem in self._called(self.problems).items()},
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
