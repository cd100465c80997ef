"""When a network in training is pruned, and to which sparsity."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

from ..common.checks import fraction, integer


class Schedule(Protocol):
    """Called by ``Pruner`` after every optimizer step."""

    def due(self, step: int) -> bool:
        """Whether new masks are chosen after this many optimizer steps."""
        ...

    def sparsity(self, step: int) -> float:
        """The sparsity of the masks chosen after this many optimizer steps, in [0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class Constant:
    """One-shot pruning: masks are chosen once and kept for the rest of the training.

    Args:
        final_sparsity: the sparsity, in [0, 1).
        start: after how many optimizer steps; 0 means before the first.

    Raises:
        WavpruneError: a value is outside what is allowed.
        TypeError: a value is of the wrong type.

    Example:
        >>> [step for step in range(5) if Constant(0.8, start=2).due(step)]
        [2]
    """

    final_sparsity: float
    start: int = 0

    def __post_init__(self) -> None:
        fraction("final_sparsity", self.final_sparsity)
        integer("start", self.start)

    def due(self, step: int) -> bool:
        """True at ``start`` only."""
        return step == self.start

    def sparsity(self, step: int) -> float:
        """``final_sparsity``."""
        del step
        return self.final_sparsity


@dataclass(frozen=True, slots=True)
class Cubic:
    """Gradual pruning: fast while many weights are redundant, slower towards the end.

    ``s(t) = final + (init - final) * (1 - (t - start) / (end - start)) ** 3`` (Zhu and Gupta 2017,
    "To prune, or not to prune: exploring the efficacy of pruning for model compression").

    Args:
        init_sparsity: the sparsity at ``start``, in [0, 1).
        final_sparsity: the sparsity from ``end`` on, in [0, 1).
        start: the optimizer step of the first masks; 0 means before the first step.
        end: the step of the last new masks, after ``start``.
        every: steps from one choice of masks to the next, 1 or more.

    Raises:
        WavpruneError: a value is outside what is allowed.
        TypeError: a value is of the wrong type.

    Example:
        >>> schedule = Cubic(0.0, 0.8, start=0, end=40, every=10)
        >>> [round(schedule.sparsity(step), 3) for step in range(0, 50, 10)]
        [0.0, 0.463, 0.7, 0.788, 0.8]
        >>> [step for step in range(100) if schedule.due(step)]
        [0, 10, 20, 30, 40]
    """

    init_sparsity: float
    final_sparsity: float
    start: int
    end: int
    every: int = 100

    def __post_init__(self) -> None:
        fraction("init_sparsity", self.init_sparsity)
        fraction("final_sparsity", self.final_sparsity)
        integer("start", self.start)
        integer("end", self.end, low=self.start + 1)
        integer("every", self.every, low=1)

    def due(self, step: int) -> bool:
        """True every ``every`` steps from ``start`` on, and at ``end``."""
        inside = self.start <= step <= self.end
        return inside and ((step - self.start) % self.every == 0 or step == self.end)

    def sparsity(self, step: int) -> float:
        """The cubic ramp, constant before ``start`` and after ``end``."""
        init, final = self.init_sparsity, self.final_sparsity
        if step <= self.start:
            return init
        remaining = max(self.end - step, 0) / (self.end - self.start)
        value = final + (init - final) * remaining**3
        # Rounding must not overshoot the initial sparsity.
        return max(value, init) if init < final else min(value, init)
