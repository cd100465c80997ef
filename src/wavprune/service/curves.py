"""What pruning costs a model, for every basis and sparsity: measured once, read in microseconds.

The importances of a layer's coefficients are sorted once for each basis. Then the error at every
sparsity is a sum of squares up to a rank, and a size the entropy of the symbols that are kept.
Where a basis is not orthonormal, pairs of coefficients of one kernel count too.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..bases import Operator, bases_of, max_level, names, request_for
from ..bases.basis import DENSE_VALUES
from ..config import PruneConfig
from ..engine.layers import LayerRef

Floats = npt.NDArray[Any]

# The sparsities of every curve; a slider stops at them.
# The last drops everything: of all layers together, some lose more than any slider says.
GRID = np.arange(201) / 200
# Sizes change slowly: they are counted here, and interpolated.
SIZED = np.arange(0, len(GRID), 10)
SIZE_GRID = GRID[SIZED]
# Steps over the norm of a weight, as ``checkpoint.save(step=)`` takes them.
STEPS = np.geomspace(1.0, 2e-5, 41)
# A step this far below the root mean square of the coefficients costs one bit a halving.
FINE = 16.0
# Of a value, in ``checkpoint.save``; and how far a symbol goes.
BITS = 8
LARGEST = (1 << (BITS - 1)) - 1
IDENTITY = "identity"
FIRST = (IDENTITY, "uhaar", "dct", "klt", "haar")
# As many lines as a person tells apart in one picture.
MOST_BASES = 8
# So many coefficients say how large a layer becomes.
SAMPLED = 1 << 18
# Pairs of coefficients that are looked at together.
CHUNK = 1 << 20
# Of each compressed layer beside its symbols and scales.
LAYER_BYTES = 96


class LayerCurves(NamedTuple):
    """One layer in one basis.

    Attributes:
        errors: ``(G,)`` squared errors at ``GRID``.
        kept: ``(G,)`` coefficients kept there.
        thresholds: ``(G,)`` the least importance that is kept.
        sizes: ``(S,)`` bytes at ``SIZE_GRID``, values of 8 bits.
        step_sizes: ``(D,)`` bytes at ``STEPS``, where nothing is pruned but what is rounded to 0.
        step_errors: ``(D,)`` squared errors there.
    """

    errors: Floats
    kept: Floats
    thresholds: Floats
    sizes: Floats
    step_sizes: Floats
    step_errors: Floats


@dataclass(frozen=True)
class Measured:
    """One layer in every basis.

    Attributes:
        norm: squared, of the weight.
        curves: one entry a basis, in the order that was asked for.
        matrices: by name, the analysis matrices of bases that were computed from the weight.
    """

    norm: float
    curves: list[LayerCurves]
    matrices: dict[str, Floats]


def bases_shown(kernels: Iterable[tuple[int, int]]) -> tuple[str, ...]:
    """The bases that are compared for kernels of these sizes, the identity first.

    Those of this library and ``haar``, then PyWavelets' wavelets that have a level on the largest
    kernel; of several that are one transform there, the first.

    Example:
        >>> bases_shown([(3, 3), (1, 1)])
        ('identity', 'uhaar', 'dct', 'klt', 'haar')
    """
    sizes = [size for size in kernels if size != (1, 1) and math.prod(size) <= DENSE_VALUES]
    if not sizes:
        return (IDENTITY,)
    largest = max(sizes, key=math.prod)
    weight = torch.zeros(1, 1, *largest)
    found = list(FIRST)
    known = [_analysis(FIRST[-1], weight)]
    for name in names():
        if name in found or not max_level(name, largest):
            continue
        analysis = _analysis(name, weight)
        if not any(np.array_equal(analysis, other) for other in known):
            known.append(analysis)
            found.append(name)
        if len(found) == MOST_BASES:
            break
    return tuple(found)


def _analysis(name: str, weight: torch.Tensor) -> Floats:
    request = request_for(PruneConfig(wavelet=name), weight)
    # The same filters are given to different numbers of digits.
    return np.asarray(bases_of([request], [weight])[0].analysis.round(6))


def measure(ref: LayerRef, bases: Sequence[str]) -> Measured:
    """What pruning one layer costs, in each of some bases.

    Args:
        ref: its weight, of three to five axes, finite, its kernels of at most ``DENSE_VALUES``.
        bases: names; on a kernel of one value only the identity is measured and stands for all.

    Returns:
        The curves; where a basis has no level on these kernels, it is the identity once more.
    """
    weight = ref.weight.detach().float()
    requests = [request_for(PruneConfig(wavelet=name), weight) for name in bases]
    built = bases_of(requests, [weight] * len(bases))
    kernels = ref.kernels(built[0].kernel).detach().float()
    values = kernels.reshape(-1, built[0].num_values).contiguous().numpy()
    norm = float(np.square(values, dtype=np.float64).sum())
    curves: list[LayerCurves] = []
    for basis in built:
        same = next((i for i, other in enumerate(built[: len(curves)]) if other == basis), None)
        if same is None and curves and basis.importance_operator.identity:
            same = 0
        if same is None:
            operator = basis.importance_operator
            curves.append(_of_basis(values, operator, weight.shape[0], norm))
        else:
            curves.append(curves[same])
    matrices = {
        basis.name: basis.analysis.astype(np.float32) for basis in built if basis.data_driven
    }
    return Measured(norm, curves, matrices)


def _of_basis(values: Floats, operator: Operator, channels: int, norm: float) -> LayerCurves:
    numel = values.size
    coefficients = values
    if not operator.identity:
        # Numpy's library takes a thread for each core, which then wait for each other.
        analysis = torch.from_numpy(operator.analysis.T.astype(np.float32))
        coefficients = torch.mm(torch.from_numpy(values), analysis).numpy()
    magnitudes = np.abs(coefficients)
    ordered = np.sort(magnitudes, axis=None)
    count = len(ordered)
    keep = np.minimum(np.ceil((1 - GRID) * numel - 1e-9).astype(np.int64), count)
    thresholds = ordered[np.minimum(count - keep, count - 1)]
    thresholds[keep == 0] = np.nextafter(ordered[-1], np.float32(np.inf))
    # Ties at the threshold are kept, and a zero is not.
    smallest = np.nextafter(np.float32(0), np.float32(1))
    kept = count - np.searchsorted(ordered, np.maximum(thresholds, smallest), side="left")
    squares = np.cumsum(np.square(ordered, dtype=np.float64))
    sums = np.cumsum(ordered, dtype=np.float64)
    dropped = count - kept
    errors = np.where(dropped > 0, squares[dropped - 1], 0.0)
    if not operator.identity:
        errors = np.maximum(errors + _of_pairs(coefficients, operator, thresholds), 0)
    sizes = _sizes(magnitudes, thresholds[SIZED], channels)
    step_sizes, step_errors = _of_steps(ordered, sums, squares, math.sqrt(norm))
    return LayerCurves(errors, kept, thresholds, sizes, step_sizes + LAYER_BYTES, step_errors)


def _of_pairs(coefficients: Floats, operator: Operator, thresholds: Floats) -> Floats:
    """What pairs of dropped coefficients add to the squared error at each threshold, ``(G,)``."""
    gram = np.triu(operator.synthesis.T @ operator.synthesis, 1)
    rows, columns = np.nonzero(np.abs(gram) > 1e-9)
    total = np.zeros(len(thresholds) + 1)
    if not len(rows):
        return total[:-1]
    # Thresholds rise with the sparsity: a coefficient is dropped at all that lie above it.
    size = max(1, CHUNK // len(rows))
    for start in range(0, len(coefficients), size):
        part = coefficients[start : start + size]
        first = np.searchsorted(thresholds, np.abs(part), side="right")
        both = np.maximum(first[:, rows], first[:, columns])
        products = 2 * gram[rows, columns] * part[:, rows] * part[:, columns]
        total += np.bincount(both.ravel(), products.ravel(), len(total))
    return np.cumsum(total)[:-1]


def _sizes(magnitudes: Floats, thresholds: Floats, channels: int) -> Floats:
    """Bytes of the symbols of 8 bits at some thresholds, by their entropy, ``(S,)``."""
    per_channel = magnitudes.reshape(channels, -1)
    stride = max(1, math.ceil(magnitudes.size / SAMPLED))
    sample = per_channel[::stride]
    if len(sample) * stride > channels and len(sample) > 1 and channels % stride:
        sample = sample[:-1]
    share = magnitudes.size / sample.size
    scales = sample.max(axis=1, keepdims=True) / LARGEST
    symbols = np.rint(sample / np.where(scales > 0, scales, 1)).astype(np.int64)
    # By the first threshold that drops it, so that what is kept is a sum from the end.
    bins = np.searchsorted(thresholds, sample, side="right")
    width = LARGEST + 1
    counts = np.bincount((bins * width + symbols).ravel(), minlength=width * (len(thresholds) + 1))
    by_bin = counts.reshape(len(thresholds) + 1, width)
    # A coefficient of bin b is kept at the thresholds before b.
    kept = by_bin[::-1].cumsum(axis=0)[::-1][1:]
    kept[:, 0] = sample.size - kept[:, 1:].sum(axis=1)
    bits = _entropy(kept) + kept[:, 1:].sum(axis=1)
    return np.asarray(bits * share / 8 + 4 * channels + LAYER_BYTES)


def _entropy(counts: Floats) -> Floats:
    """Bits that an ideal code takes for symbols of these counts ``(..., symbols)``."""
    totals = counts.sum(axis=-1, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        bits = np.where(counts > 0, -counts * np.log2(counts / totals), 0)
    return np.asarray(bits.sum(axis=-1))


def _of_steps(ordered: Floats, sums: Floats, squares: Floats, norm: float) -> tuple[Floats, Floats]:
    """Bytes and squared errors of coefficients rounded to steps, ``(D,)`` each."""
    count = len(ordered)
    bits, errors = np.zeros(len(STEPS)), np.zeros(len(STEPS))
    if norm == 0:
        return bits, errors
    rms = math.sqrt(squares[-1] / count)
    for i, step in enumerate(STEPS * norm):
        if step < rms / FINE and i and errors[i - 1]:
            bits[i] = bits[i - 1] + count * math.log2(STEPS[i - 1] / STEPS[i])
            errors[i] = errors[i - 1] * (STEPS[i] / STEPS[i - 1]) ** 2
            continue
        symbols = np.arange(int(ordered[-1] / step + 0.5) + 1)
        # In the same dtype, or all coefficients would be converted first.
        halves = ((symbols + 0.5) * step).astype(ordered.dtype)
        edges = np.searchsorted(ordered, halves, side="left")
        counts = np.diff(edges, prepend=0)
        linear = np.diff(_until(sums, edges), prepend=0.0)
        square = np.diff(_until(squares, edges), prepend=0.0)
        centers = symbols * step
        errors[i] = max(0.0, float((square - 2 * centers * linear + centers**2 * counts).sum()))
        bits[i] = float(_entropy(counts)) + counts[1:].sum()
    return bits / 8, errors


def _until(cumulative: Floats, edges: Floats) -> Floats:
    """The sum of the first ``edges`` values, from their cumulative sums."""
    return np.where(edges > 0, cumulative[np.maximum(edges, 1) - 1], 0.0)
