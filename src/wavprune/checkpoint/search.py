"""The step at which something that follows it, bytes or a divergence, is what was asked for."""

from __future__ import annotations

import math
from collections.abc import Callable

from ..errors import WavpruneError

ROUNDS = 10
# How far the next step is at most, in logarithms, while the goal is on one side of all.
FARTHEST = 2.0
# The next step is in the middle of its bracket: values that do not rise evenly must not hold the
# search at one end.
MIDDLE = 0.05, 0.95


class Search:
    """Finds a step, from the values of the steps tried.

    Args:
        goal: the value that is wanted.
        close: how far from it a value may be.
        first: the first step to try.
        slope: of the value in the logarithm of the step, at a step; of one sign everywhere.
        bounds: of the step.

    Attributes:
        step: the next to try; None after one that was close enough, or after the last round.
        tried: steps and their values.
    """

    def __init__(
        self,
        goal: float,
        close: float,
        first: float,
        slope: Callable[[float], float],
        bounds: tuple[float, float] = (0.0, math.inf),
    ) -> None:
        self.goal, self.close = goal, close
        self._slope, self._bounds = slope, bounds
        self.step: float | None = first
        self.tried: list[tuple[float, float]] = []

    @property
    def found(self) -> bool:
        """True where the last value was close enough."""
        return bool(self.tried) and abs(self.tried[-1][1] - self.goal) <= self.close

    def report(self, value: float) -> None:
        """Say what the value of ``step`` is."""
        assert self.step is not None
        self.tried.append((self.step, value))
        if self.found or len(self.tried) == ROUNDS:
            self.step = None
            return
        low, high = self._bounds
        self.step = min(max(self._next(), low), high)

    def _next(self) -> float:
        last, value = self.tried[-1]
        slope = self._slope(last)
        sign = math.copysign(1.0, slope)
        # Excess over the goal, which rises with the step.
        excess = [(step, sign * (value - self.goal)) for step, value in self.tried]
        below = max((pair for pair in excess if pair[1] <= 0), default=None)
        above = min((pair for pair in excess if pair[1] > 0), default=None)
        if below is None or above is None or above[0] <= below[0]:
            move = (self.goal - value) / slope
            return last * math.exp(min(max(move, -FARTHEST), FARTHEST))
        share = min(max(below[1] / (below[1] - above[1]), MIDDLE[0]), MIDDLE[1])
        return float(below[0] * (above[0] / below[0]) ** share)


def search_bytes(
    size_of: Callable[[float], int],
    target: float,
    close: float,
    first: float,
    slope: Callable[[float], float],
    bounds: tuple[float, float] = (0.0, math.inf),
) -> float:
    """The step at which a file has some bytes.

    Args:
        size_of: makes the file of a step, and gives its bytes; the last call is the answer's.
        target: bytes.
        close: see ``Search``, over the target.
        first: see ``Search``.
        slope: see ``Search``.
        bounds: see ``Search``.

    Raises:
        WavpruneError: no step reaches the target.
    """
    search = Search(target, close * target, first, slope, bounds)
    while search.step is not None:
        search.report(size_of(search.step))
    if not search.found:
        nearest = min((size for _, size in search.tried), key=lambda size: abs(size - target))
        raise WavpruneError(
            f"no step brings the file to {target:,.0f} bytes; the nearest has {nearest:,.0f}, "
            "of which the tensors that stay as they are may be most"
        )
    return search.tried[-1][0]
