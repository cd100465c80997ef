"""When a network in training is pruned, and how far."""

from __future__ import annotations

import numbers
from dataclasses import dataclass
from typing import Protocol


class Schedule(Protocol):
    """What ``Pruner`` asks after every optimizer step."""

    def due(self, step: int) -> bool:
        """True where new masks are chosen after this many optimizer steps."""
        ...

    def sparsity(self, step: int) -> float:
        """The sparsity of the masks that are chosen then, in [0, 1)."""
        ...


@dataclass(frozen=True, slots=True)
class Constant:
    """One pruning, and training with its masks from then on.

    Args:
        final_sparsity: the sparsity, in [0, 1).
        start: after how many optimizer steps; 0 means before the first.

    Raises:
        ValueError: a value is outside what is allowed.
        TypeError: a value is of the wrong type.

    Example:
        >>> [step for step in range(5) if Constant(0.8, start=2).due(step)]
        [2]
    """

    final_sparsity: float
    start: int = 0

    def __post_init__(self) -> None:
        _fraction("final_sparsity", self.final_sparsity)
        _count("start", self.start, 0)

    def due(self, step: int) -> bool:
        """True at ``start`` alone."""
        return step == self.start

    def sparsity(self, step: int) -> float:
        """``final_sparsity``."""
        del step
        return self.final_sparsity


@dataclass(frozen=True, slots=True)
class Cubic:
    """Gradual pruning: fast while much is redundant, slower towards the end.

    ``s(t) = final + (init - final) * (1 - (t - start) / (end - start)) ** 3`` (Zhu and Gupta 2017,
    "To prune, or not to prune: exploring the efficacy of pruning for model compression").

    Args:
        init_sparsity: the sparsity at ``start``, in [0, 1).
        final_sparsity: the sparsity from ``end`` on, in [0, 1).
        start: the optimizer step of the first masks; 0 means before the first step.
        end: the step of the last new masks, after ``start``.
        every: steps from one choice of masks to the next, 1 or more.

    Raises:
        ValueError: a value is outside what is allowed.
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
        _fraction("init_sparsity", self.init_sparsity)
        _fraction("final_sparsity", self.final_sparsity)
        _count("start", self.start, 0)
        _count("end", self.end, self.start + 1)
        _count("every", self.every, 1)

    def due(self, step: int) -> bool:
        """True every ``every`` steps from ``start`` on, and at ``end``."""
        inside = self.start <= step <= self.end
        return inside and ((step - self.start) % self.every == 0 or step == self.end)

    def sparsity(self, step: int) -> float:
        """The cubic ramp, flat before ``start`` and after ``end``."""
        first, last = self.init_sparsity, self.final_sparsity
        if step <= self.start:
            return first
        left = max(self.end - step, 0) / (self.end - self.start)
        value = last + (first - last) * left**3
        # Rounding must not lead past where the ramp begins.
        return max(value, first) if first < last else min(value, first)


def _fraction(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    if not 0 <= float(value) < 1:
        raise ValueError(f"{name} must be in [0, 1), not {value!r}")


def _count(name: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, {low} or more, not {value!r}")
    if int(value) < low:
        raise ValueError(f"{name} must be {low} or more, not {value!r}")
