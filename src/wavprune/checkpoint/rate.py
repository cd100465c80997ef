"""The step at which a file has the number of bytes that was asked for."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import WavpruneError
from .layer import Layer
from .plan import Plan
from .quantisers import quantise
from .records import chunks_of
from .sources import Tensor
from .stored_basis import Floats

# How far from its target a file may be.
TOLERANCE = 0.015
ROUNDS = 10
SAMPLE = 1 << 15
FINEST, COARSEST = 2.0**-14, 1.0


class Search:
    """Finds the step: from samples of the layers first, then from the files of the steps tried.

    Args:
        target: bytes of the file.
        rest: bytes of what the step does not change.
        tensors: the layers.
        plan: what is kept of them.

    Attributes:
        step: the next to try; None when the last one was close enough.
    """

    def __init__(self, target: float, rest: float, tensors: Sequence[Tensor], plan: Plan) -> None:
        self.target = target
        self._tried: list[tuple[float, float]] = []
        samples = [_sample(plan.layer(tensor)) for tensor in tensors]
        low, high = math.log(FINEST), math.log(COARSEST)
        for _ in range(24):
            middle = (low + high) / 2
            if rest + sum(_bytes(sample, math.exp(middle)) for sample in samples) > target:
                low = middle
            else:
                high = middle
        self.step: float | None = math.exp(high)
        self._samples = samples

    def report(self, size: int) -> None:
        """Say how many bytes the file of ``step`` has.

        Raises:
            WavpruneError: no step reaches the target.
        """
        assert self.step is not None
        self._tried.append((math.log(self.step), float(size)))
        if abs(size - self.target) <= TOLERANCE * self.target:
            self.step = None
            return
        if len(self._tried) == ROUNDS:
            nearest = min(self._tried, key=lambda tried: abs(tried[1] - self.target))[1]
            raise WavpruneError(
                f"no step brings the file to {self.target:,.0f} bytes; the nearest has "
                f"{nearest:,.0f}, of which the tensors that stay as they are may be most"
            )
        self.step = math.exp(min(max(self._next(), math.log(FINEST)), math.log(COARSEST)))

    def _next(self) -> float:
        at, size = self._tried[-1]
        below = max((t for t in self._tried if t[1] > self.target), default=None)
        above = min((t for t in self._tried if t[1] < self.target), default=None)
        if below is not None and above is not None:
            share = (below[1] - self.target) / (below[1] - above[1])
            # Sizes that do not fall evenly must not hold the search at one end.
            return below[0] + min(max(share, 0.05), 0.95) * (above[0] - below[0])
        # The slope that the samples have.
        bytes_at = [sum(_bytes(s, math.exp(at + d)) for s in self._samples) for d in (0.0, 0.1)]
        slope = min((bytes_at[1] - bytes_at[0]) / 0.1, -1.0)
        return at + min(max((self.target - size) / slope, -1.5), 1.5)


class _Sample(NamedTuple):
    coefficients: Floats
    scale: float
    norm: float


def _sample(layer: Layer) -> _Sample:
    """Coefficients of kernels from all over a layer, and how many each stands for."""
    chunks = chunks_of(len(layer.kernels), layer.M)
    per_chunk = max(16, SAMPLE // layer.M // len(chunks) // 16 * 16)
    parts = [layer.coefficients(start, min(per_chunk, count)) for start, count in chunks]
    coefficients = np.concatenate(parts, axis=1)
    scale = len(layer.kernels) * layer.M / coefficients.size
    return _Sample(coefficients, scale, layer.norm or 1.0)


def _bytes(sample: _Sample, step: float) -> float:
    """The entropy of a layer's symbols, of each coefficient's row by itself where that is less."""
    scale = np.array([step * sample.norm], dtype=np.float32)
    symbols = quantise(sample.coefficients, scale)
    rows = sum(_entropy(row) for row in symbols) if len(symbols) <= 64 else math.inf
    return min(_entropy(symbols.ravel()), rows) * sample.scale / 8


def _entropy(symbols: npt.NDArray[np.int16]) -> float:
    low = int(symbols.min())
    counts = np.bincount(symbols.astype(np.int64) - low)
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / counts.sum())).sum())
