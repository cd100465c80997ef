"""What a file takes at a step, from samples of its layers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from .layer import Layer
from .plan import Plan
from .quantisers import quantise
from .records import chunks_of
from .sources import Tensor
from .stored_basis import Floats

SAMPLE = 1 << 15
FINEST, COARSEST = 2.0**-14, 1.0


class Rate:
    """Bytes of layers, about.

    Args:
        tensors: the layers.
        plan: what is kept of them.
    """

    def __init__(self, tensors: Sequence[Tensor], plan: Plan) -> None:
        self._samples = [_sample(plan.layer(tensor)) for tensor in tensors]

    def bytes_at(self, step: float) -> float:
        """At a step."""
        return sum(_bytes(sample, step) for sample in self._samples)

    def slope(self, step: float) -> float:
        """Of the bytes in the logarithm of the step."""
        return min((self.bytes_at(step * math.exp(0.1)) - self.bytes_at(step)) / 0.1, -1.0)

    def step_of(self, target: float) -> float:
        """The step at which they are the target."""
        low, high = math.log(FINEST), math.log(COARSEST)
        for _ in range(24):
            middle = (low + high) / 2
            if self.bytes_at(math.exp(middle)) > target:
                low = middle
            else:
                high = middle
        return math.exp(high)


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
