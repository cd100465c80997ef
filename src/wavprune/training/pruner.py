"""Keep a network pruned while it is trained."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config import PruneConfig
from ..engine.coverage import coverage_of
from ..engine.layers import LayerRef, check_finite, non_finite, select_layers
from ..engine.plan import plan_layers
from ..engine.projection import checksum, distances, projection_plan, rounding
from ..engine.run import prune_layers, prune_within
from ..engine.sharding import in_all
from ..engine.undo import undone_on_error
from ..errors import WavpruneError
from ..report import LayerStats, Outcome, PruneReport
from . import state as states
from .layers import WatchedLayers, trainable
from .masked import Entry, MaskedLayers
from .optimizers import Followed
from .schedules import Constant, Schedule


class Pruner:
    """Prunes a model in training, and keeps it pruned after every optimizer step.

    An optimizer moves every weight, so the pruned coefficients come back. After each step the
    weights are projected: transformed, the coefficients without a mask bit set to 0, transformed
    back, in place. In an expansive basis that is no projection: a part of what is kept leaks into
    what is not, and is lost at the next step.

    Nothing is added to the model: no hook, no parametrization, no renamed or second parameter. The
    masks are a bit a coefficient.

    A step is done or not done: after an error, weights, masks, counts and what optimizers remember
    are as before, or the error says what changed. While new masks are chosen, a copy of the
    weights is held for that.

    Copies and pickles of model, optimizer and pruner together go on pruning; a pruner alone takes
    its model and optimizers along. To store a run, use ``state_dict()``.

    Args:
        model: whose convolutions (and what ``config.targets`` names) are pruned.
        config: method, basis and scope; ``sparsity`` is the schedule's, where there is one.
        schedule: when, and how far; None prunes once, before the first step, as ``config`` says.
        regrow: True chooses new masks among all coefficients, as training left them; False only
            among those that were kept so far, in the basis of the first choice. That may leave
            fewer than the schedule asks for.
        project_state: True projects the optimizer's floating-point ``momentum_buffer`` and
            ``exp_avg`` of the weights too: momentum, Adam's first moment. Second moments stay as
            they are: they belong to weights and have no coefficients. Needs ``attach``.

    Raises:
        WavpruneError: the settings do not go together, or a layer cannot be kept pruned with them.

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
            raise WavpruneError(
                f"percentile={config.percentile!r} does not go with a schedule, which says how "
                "sparse each pruning is; leave one of them out"
            )
        if config.device is not None:
            raise WavpruneError(
                f"device={str(config.device)!r}: weights in training are pruned where they live; "
                "leave device out"
            )
        self._config = config
        self._scheduled = schedule is not None
        self._schedule: Schedule = schedule or Constant(config.sparsity or 0.0)
        self._regrow = regrow
        self._project_state = project_state
        refs = select_layers(model, config)
        # Whether all of this can be done, before any training.
        plan_layers(refs, config).backend(scattered=False, masks=True)
        self._layers = WatchedLayers(model, refs)
        self._steps = 0
        self._asked = -1
        self._masked: MaskedLayers | None = None
        self._report: PruneReport | None = None
        self._followed: list[Followed] = []

    @property
    def model(self) -> nn.Module:
        """The model that is pruned."""
        return self._layers.model

    @property
    def layer_names(self) -> list[str]:
        """The names of the layers that are pruned."""
        return [ref.name for ref in self._layers.refs]

    @property
    def steps(self) -> int:
        """Optimizer steps so far; of several optimizers, those of the first."""
        return self._steps

    @property
    def masks(self) -> dict[str, torch.Tensor]:
        """Each layer's mask, as ``wavprune.backends.masks`` packs it; none before the first."""
        masks = [] if self._masked is None else self._masked.masks
        return dict(zip(self.layer_names, masks, strict=False))

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Follow an optimizer: every ``optimizer.step()`` is a step of the pruner.

        Prunes at once where the schedule says so: load a state before. Where several optimizers
        train the layers, attach each: the first one's steps are counted and keep all layers pruned,
        those of the others their own layers.

        Args:
            optimizer: of ``torch.optim``, what accelerate's ``prepare`` made of one, or any that
                calls the hooks of ``register_step_post_hook``.

        Raises:
            TypeError: this is no optimizer.
            RuntimeError: the pruner follows an optimizer of these layers already, or a weight was
                replaced.
            WavpruneError: it trains none of the layers; or pruning at once fails: a weight is not
                finite. Nothing has changed then.
        """
        followed = Followed(optimizer)
        self._layers.check()
        self._check_new(followed)
        first = not self._followed
        self._followed.append(followed)
        try:
            self._register(followed)
            if first and self._is_due(self._steps):
                self._prune(self._steps)
            if first:
                self._asked = self._steps
        except BaseException:
            followed.remove()
            self._followed.remove(followed)
            raise

    def detach(self) -> None:
        """Stop following optimizers; ``attach`` goes on from here."""
        for followed in self._followed:
            followed.remove()
        self._followed = []

    def step(self) -> None:
        """Prune or project once: call it after each ``optimizer.step()``, unless attached.

        By hand, what the schedule wants before the first step is done after it: the first call asks
        for steps 0 and 1.

        Raises:
            RuntimeError: a layer or weight was replaced, or ``project_state=True`` has no
                optimizer.
            WavpruneError: a weight is not finite. Nothing has changed by this call then, and the
                next one makes up for it.
        """
        self._layers.check()
        if self._project_state and not self._followed:
            raise RuntimeError(
                "project_state=True projects what an optimizer remembers, and this pruner was "
                "given none; call attach(optimizer) in place of step()"
            )
        steps = self._steps + 1
        if self._is_due(steps):
            self._prune(steps)
        else:
            self._project(range(len(self._layers.refs)))
        self._steps = self._asked = steps

    def _warn_of_schedule(self) -> None:
        end = getattr(self._schedule, "end", None)
        if isinstance(end, int) and self._steps < end:
            warnings.warn(
                f"finished after step {self._steps} at sparsity "
                f"{self._schedule.sparsity(self._asked):.1%}; the schedule ends at step {end} with "
                f"{self._schedule.sparsity(end):.1%}",
                stacklevel=3,
            )

    def finish(self, *, enforce: bool = False) -> PruneReport:
        """Stop following optimizers, and say what is pruned.

        The weights are compared with the masks: what changed them after the last step, such as a
        checkpoint that was loaded, averaged weights, or an optimizer that is not followed, may have
        brought pruned coefficients back. Where the schedule has a step ``end`` that was not
        reached, a warning says so.

        Args:
            enforce: True projects such weights once more, and warns. Where nothing was changed,
                nothing is.

        Returns:
            The report of the last choice of masks, with the zeros that the weights have now. A
            weight that is not finite makes a warning, and an error of NaN in the report.

        Raises:
            RuntimeError: nothing was pruned yet, or a weight was replaced.
            WavpruneError: a layer is not pruned as its mask says; the pruner stays attached. With
                ``enforce``: a weight is not finite, and none has changed.
        """
        self._layers.check()
        if self._report is None or self._masked is None:
            raise RuntimeError(
                f"nothing is pruned after {self._steps} steps; the schedule is {self._schedule}"
            )
        self._warn_of_schedule()
        if enforce:
            self.enforce()
        else:
            strays = self._masked.strays(list(enumerate(self._layers.refs)))
            if strays:
                raise WavpruneError(
                    f"{self._described(strays)}; attach every optimizer that trains them, or "
                    "project them once more by finish(enforce=True)"
                )
        rows = [
            _as_now(stats, ref) for stats, ref in zip(self._report, self._layers.refs, strict=True)
        ]
        self.detach()
        sums = (self._report.squared_norm, self._report.squared_error)
        masks = {name: mask.clone() for name, mask in self.masks.items()}
        return PruneReport(
            Outcome(tuple(rows), *sums),
            self._report.settings,
            dict(zip(masks, self._masked.bases, strict=True)),
            masks,
            coverage=coverage_of(self.model, self._layers.refs),
        )

    def enforce(self) -> None:
        """Project the layers that are not pruned as their masks say, and warn where there are any.

        Raises:
            RuntimeError: a layer or weight was replaced.
            WavpruneError: a weight is not finite. Nothing has changed then.
        """
        self._layers.check()
        if self._masked is not None:
            refs = self._layers.refs
            changed = self._enforce(list(enumerate(refs)), "the model")
            self._masked.remember((i, refs[i]) for i in changed)

    def enforced(self, weights: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Of some weights by the names of ``model.state_dict()``, those that are not pruned.

        Args:
            weights: such as the averaged weights that a checkpoint will hold; they stay as they
                are.

        Returns:
            What they are once they are projected, by their names; a warning says so.

        Raises:
            WavpruneError: a weight is not finite.
        """
        names = {}
        for i, ref in enumerate(self._layers.refs if self._masked else ()):
            name = f"{ref.name}.weight".removeprefix(".")
            if name in weights and weights[name].shape == ref.weight.shape:
                names[i] = name
        refs = self._layers.refs
        copies = [(i, LayerRef(refs[i].name, weights[name].clone())) for i, name in names.items()]
        changed = self._enforce(copies, "these weights")
        return {names[i]: ref.weight for i, ref in copies if i in changed}

    def describes(self, state: Mapping[str, Any]) -> bool:
        """True where a state's masks are of the weights that the model has now.

        Raises:
            WavpruneError: as for ``load_state_dict``.
        """
        refs = self._layers.refs
        progress = states.read(state, refs, self._config)
        if None in progress.checksums:
            plan = projection_plan(refs, self._config, progress.bases)
            pairs = zip(plan.layers, distances(plan, refs, progress.masks), strict=True)
            return all(d <= rounding(layer) for layer, d in pairs if not layer.basis.expansive)
        known = zip(progress.checksums, refs, strict=False)
        return all(value == int(checksum(ref.weight)) for value, ref in known)

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed run needs: numbers, strings and tensors only.

        Of weights that are sharded over ranks, each rank's has that rank's part.
        """
        return states.write(self._progress(), self._layers.refs, self._config)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where another pruner of the same model and settings was.

        The weights are the model's own state dict, loaded before or after. Load before ``attach``,
        which prunes where no state says that this was done.

        Args:
            state: what ``state_dict()`` gave, also of an older version; of sharded weights, on the
                same rank.

        Raises:
            WavpruneError: the state is of another format, of other settings, layers, sizes or
                ranks, or not whole; nothing has changed then.
        """
        progress = states.read(state, self._layers.refs, self._config)
        self._masked = None
        if progress.masks:
            self._masked = MaskedLayers(
                self._config, progress.bases, progress.masks, progress.checksums
            )
        self._report = progress.report
        self._steps, self._asked = progress.steps, progress.asked

    def __setstate__(self, state: dict[str, Any]) -> None:
        """A copy follows the copies of the optimizers."""
        self.__dict__.update(state)
        for followed in self._followed:
            self._register(followed)

    def __copy__(self) -> Pruner:
        raise TypeError("two pruners of one model undo each other; use copy.deepcopy or state_dict")

    # What is due.

    def _progress(self) -> states.Progress:
        masked = self._masked
        bases, masks = ([], []) if masked is None else (masked.bases, masked.masks)
        return states.Progress(self._steps, self._asked, bases, masks, [], self._report)

    def _check_new(self, followed: Followed) -> None:
        """Raise unless it makes sense to follow this optimizer too."""
        weights = [ref.weight for ref in self._layers.refs]
        trained = [weight for weight in weights if followed.trains(weight)]
        if any(other.trains(weight) for other in self._followed for weight in trained) or (
            self._followed and not trained
        ):
            raise RuntimeError("this pruner follows an optimizer already; call detach() first")
        if not trained and trainable(weights):
            raise WavpruneError(
                f"this {followed.name} trains none of the {len(weights)} layers of this pruner; "
                "allowed: an optimizer of the very parameters of the model that the Pruner was "
                "made for (a copy, also a pickled one, has its own)"
            )

    def _register(self, followed: Followed) -> None:
        first = followed is self._followed[0]
        followed.register(self.step if first else partial(self._keep_pruned, followed))

    def _keep_pruned(self, followed: Followed) -> None:
        """After a step of an optimizer that is not the first: its layers alone."""
        self._layers.check()
        refs = self._layers.refs
        self._project([i for i, ref in enumerate(refs) if followed.trains(ref.weight)])

    def _is_due(self, steps: int) -> bool:
        """True where a step that the schedule was not asked about yet is one to prune at."""
        return any(self._schedule.due(step) for step in range(self._asked + 1, steps + 1))

    def _prune(self, steps: int) -> None:
        """Choose new masks; all or nothing."""
        config = self._config
        if self._scheduled:
            config = replace(config, sparsity=self._schedule.sparsity(steps))
        entries = list(enumerate(self._layers.refs))
        momentum = [entry for i, _ in entries for entry in self._momentum(i)]
        before = (self._masked, self._report)
        try:
            with undone_on_error([ref.weight for _, ref in (*entries, *momentum)]):
                self._masked, self._report = self._chosen(entries, config)
                self._masked.project("momentum", momentum, guarded=True)
                self._masked.remember(entries)
        except BaseException:
            self._masked, self._report = before
            raise

    def _chosen(
        self, entries: Sequence[Entry], config: PruneConfig
    ) -> tuple[MaskedLayers, PruneReport]:
        """Prune the layers, to new masks."""
        refs = [ref for _, ref in entries]
        if self._masked is not None and not self._regrow:
            plan = plan_layers(refs, config, bases=self._masked.bases)
            report = prune_within(plan, refs, [self._masked.mask(entry) for entry in entries])
        else:
            report = prune_layers(refs, config, masks=True)
        # On a GPU only this tells that a weight is not finite, and then no mask means anything.
        report.wait()
        assert report.masks is not None
        bases = [report.bases[ref.name] for ref in refs]
        masks = [report.masks[ref.name] for ref in refs]
        return MaskedLayers(self._config, bases, masks), report

    def _project(self, indices: Sequence[int]) -> None:
        """Project weights, and what optimizers remember of them where that is asked for."""
        if self._masked is None:
            return
        weights = [(i, self._layers.refs[i]) for i in indices]
        momentum = [entry for i in indices for entry in self._momentum(i)]
        use = "all" if len(weights) == len(self._layers.refs) else "some"
        self._masked.project(use, [*weights, *momentum])
        self._masked.remember(weights)

    def _momentum(self, index: int) -> list[Entry]:
        """What the optimizers remember of a layer, where that is to be projected."""
        if not self._project_state:
            return []
        ref = self._layers.refs[index]
        return [
            (index, LayerRef(f"{ref.name} ({key} of {followed.name})", tensor))
            for followed in self._followed
            for key, tensor in followed.momentum(ref.weight)
        ]

    # Whether the weights are what the masks say.

    def _enforce(self, entries: Sequence[Entry], what: str) -> list[int]:
        """Project what is not as its mask says once more, and warn; the indices of those layers."""
        for _, ref in entries:
            check_finite(ref)
        strays = {} if self._masked is None else self._masked.strays(entries)
        if self._masked is not None and strays:
            self._masked.project("enforce", [(i, ref) for i, ref in entries if i in strays])
            warnings.warn(
                f"{self._described(strays, what)}; they were projected onto their masks once more",
                stacklevel=4,
            )
        return list(strays)

    def _described(self, strays: dict[int, float], what: str = "the model") -> str:
        refs = self._layers.refs
        shown = list(strays.items())[:8]
        rows = ", ".join(f"{refs[i].name!r} {distance:.2%}" for i, distance in shown)
        more = ", ..." if len(strays) > len(shown) else ""
        idle = [
            refs[i].name
            for i in strays
            if self._followed and not any(f.trains(refs[i].weight) for f in self._followed)
        ]
        reason = (
            f"no attached optimizer trains {', '.join(map(repr, idle[:8]))}"
            if idle
            else "something changed them after the last step (a checkpoint that was loaded, "
            "averaged weights, an optimizer that is not attached)"
        )
        return (
            f"{len(strays)} of {len(refs)} layers of {what} are not pruned as their masks say: "
            f"{rows}{more} of their weights, by norm, is pruned away by the masks; {reason}"
        )


def _as_now(stats: LayerStats, ref: LayerRef) -> LayerStats:
    zeros = int(in_all((ref.weight.detach() == 0).sum()))
    error = math.nan if non_finite(ref.weight) else stats.relative_error
    return replace(
        stats,
        weight_zeros=zeros,
        weight_sparsity=zeros / max(stats.numel, 1),
        relative_error=error,
    )
