"""Plain torch, on any device: one matmul a chunk, and a radix select that stores nothing.

Every step walks the layer in chunks of at most ``CHUNK`` weights. The threshold is found from
histograms of the coefficients' bit patterns, 16 bits at a time from the top: non-negative floats
order as their bits do. That is exact, takes two passes for float32 whatever the data, needs no
memory beyond a chunk, and adds up over layers, so that one layer and a whole network are the same
code. On two cores it takes a sixth of ``torch.kthvalue``'s time for the same answer.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ..bases.basis import Operator
from ..bases.factors import FactoredTransform
from .masks import pack, unpack
from .protocol import Backend, Batch, Target

# Weights a chunk: its temporaries stay in a core's cache, and far below 64 MiB.
CHUNK = 1 << 18
ALIGNMENT = 64
DIGIT = 16
LOWEST = (1 << DIGIT) - 1
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Chunk(NamedTuple):
    """Some kernels of a layer.

    Attributes:
        view: ``(outs, ins, kh, kw)``, a view of the weight.
        out: which output channel of the weight its first is.
        inner: which input channel of the weight its first is.
    """

    view: torch.Tensor
    out: int
    inner: int


class EagerBackend:
    """The five steps in plain torch. Subclasses replace the transform."""

    name = "eager"
    unit = 1
    one_at_a_time = True
    chunk = CHUNK

    def unsupported(self, batch: Batch) -> str | None:
        """Why this backend cannot prune this batch: there is no such batch."""
        del batch
        return None

    def analyse(self, batch: Batch, kernels: torch.Tensor) -> torch.Tensor:
        """Coefficients ``(n, M')`` of kernels ``(n, kh, kw)``, a new tensor or a view."""
        if batch.basis.factors is not None:
            return _factored(batch, kernels).analyse(kernels)
        flat = kernels.reshape(len(kernels), -1)
        A = _matrices(batch.operator, flat.dtype, flat.device).analysis
        # The long side last: BLAS takes a sixth of the time that it takes for flat @ A.T.
        return flat if A is None else (A @ flat.T).T

    def synthesise(self, batch: Batch, coefficients: torch.Tensor) -> torch.Tensor:
        """Kernels ``(n, K)`` of coefficients ``(n, M')``."""
        if batch.basis.factors is not None:
            return _factored(batch, coefficients).synthesise(coefficients)
        S = _matrices(batch.operator, coefficients.dtype, coefficients.device).synthesis
        return coefficients if S is None else (S @ coefficients.T).T

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all parts of the batches: here the batches are whole."""
        return values

    def counted(self, count: int, device: torch.device) -> int:
        """The sum of a number over all parts of the batches."""
        del device
        return count

    def smallest(self, values: torch.Tensor) -> torch.Tensor:
        """The minimum over all parts of the batches."""
        return values

    def threshold(self, jobs: Sequence[tuple[Sequence[Batch], Target]]) -> torch.Tensor:
        """One exact threshold for each job; see ``Backend``."""
        return torch.stack([self._threshold(batches, target) for batches, target in jobs])

    def apply_(self, batches: Sequence[Batch], thresholds: torch.Tensor) -> torch.Tensor:
        """Prune each batch's weight in place; see ``Backend``."""
        # NaN for all where one is NaN: minimum and maximum pass on a NaN, and change nothing else.
        cuts = torch.maximum(thresholds, thresholds.amin()) if len(thresholds) else thresholds
        done = zip(batches, cuts.unbind(), strict=True)
        return torch.stack([self._apply(batch, threshold) for batch, threshold in done])

    def masks(self, batches: Sequence[Batch], thresholds: torch.Tensor) -> list[torch.Tensor]:
        """Which coefficients are kept; see ``Backend``."""
        done = zip(batches, thresholds.unbind(), strict=True)
        return [self._mask(batch, threshold) for batch, threshold in done]

    def project_(self, batches: Sequence[Batch], masks: Sequence[torch.Tensor]) -> None:
        """Set the coefficients that are not kept to 0, in place; see ``Backend``."""
        for batch, mask in zip(batches, masks, strict=True):
            kept = unpack(mask, batch.kernels, batch.ranked, flat=batch.flat)
            first = 0
            for chunk in chunks(batch.weight, self.chunk):
                kernels = self._kernels(batch, chunk)
                coefficients = self.analyse(batch, kernels)
                bits = kept[first : first + len(kernels)]
                first += len(kernels)
                chunk.view.copy_(self._restored(batch, chunk, coefficients * bits))

    def _threshold(self, batches: Sequence[Batch], target: Target) -> torch.Tensor:
        dtype = _ranking_dtype(batches)
        device = batches[0].weight.device
        # By index, not in turn: what is not on the device need not come for this.
        known = [batches[i] for i in range(len(batches))]
        total = self.counted(sum(batch.kernels * batch.ranked for batch in known), device)
        if target.keep == 0 or total == 0:
            return torch.tensor(math.inf, dtype=torch.float64, device=device)
        if target.keep is not None:
            value = self._order_statistic(batches, max(total - target.keep, 0), dtype)
            return value.to(torch.float64)
        assert target.percentile is not None
        zeros = self.counted(sum(batch.kernels * batch.dropped for batch in known), device)
        rank, fraction = percentile_rank(total + zeros, target.percentile)
        low = self._order_statistic(batches, rank - zeros, dtype)
        if fraction == 0 or rank + 1 < zeros:
            return low.to(torch.float64)
        high = self._next(batches, rank + 1 - zeros, low)
        return lerp(low, high, fraction).to(torch.float64)

    def _order_statistic(
        self, batches: Sequence[Batch], rank: int, dtype: torch.dtype
    ) -> torch.Tensor:
        device = batches[0].weight.device
        if rank < 0:
            # The structural zeros come first; a weight that is not finite must still show.
            smallest = self._order_statistic(batches, 0, dtype)
            return torch.where(smallest.isnan(), smallest, 0)
        bits = BITS[dtype]
        exponent = _nonfinite_key(dtype)
        prefix = torch.zeros((), dtype=bits, device=device)
        remaining = torch.tensor(rank, dtype=torch.int64, device=device)
        finite = torch.ones((), dtype=torch.bool, device=device)
        top = torch.iinfo(bits).bits - DIGIT
        for shift in range(top, -1, -DIGIT):
            histogram = torch.zeros(1 << DIGIT, dtype=torch.int64, device=device)
            for keys in self._keys(batches, dtype):
                digits = keys >> shift
                if shift < top:
                    digits = digits[keys >> (shift + DIGIT) == prefix.to(keys.device)] & LOWEST
                histogram += torch.bincount(digits, minlength=1 << DIGIT).to(device)
            histogram = self.summed(histogram)
            if shift == top:
                finite = histogram[exponent >> shift :].sum() == 0
            upto = histogram.cumsum(0)
            digit = torch.searchsorted(upto, remaining, right=True)
            remaining = remaining - torch.where(digit > 0, upto[(digit - 1).clamp(min=0)], 0)
            prefix = (prefix << DIGIT) | digit.to(bits)
        value = prefix.view(dtype)
        return torch.where(finite, value, torch.nan)

    def _next(self, batches: Sequence[Batch], rank: int, low: torch.Tensor) -> torch.Tensor:
        """The order statistic at ``rank``, where the one before it is ``low``."""
        key = low.view(BITS[low.dtype])
        upto = torch.zeros((), dtype=torch.int64, device=low.device)
        limit = torch.iinfo(key.dtype).max
        above = torch.full_like(key, limit)
        for keys in self._keys(batches, low.dtype):
            larger = keys > key.to(keys.device)
            upto += keys.numel() - torch.count_nonzero(larger).to(key.device)
            above = torch.minimum(above, torch.where(larger, keys, limit).min().to(key.device))
        upto, above = self.summed(upto), self.smallest(above)
        return torch.where(upto > rank, low, above.view(low.dtype))

    def _keys(self, batches: Sequence[Batch], dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The bit patterns of what ranks the coefficients, one chunk after the other."""
        for batch in batches:
            for chunk in chunks(batch.weight, self.chunk):
                kernels = self._kernels(batch, chunk)
                ranks = self._ranks(batch, chunk, self.analyse(batch, kernels))
                # In the order in memory: a transposed matrix would be copied to be flat.
                keys = (ranks if ranks.is_contiguous() else ranks.T).reshape(-1)
                # One kernel may hold more than a chunk.
                yield from torch.split(keys.view(BITS[dtype]), self.chunk)

    def _kernels(self, batch: Batch, chunk: Chunk) -> torch.Tensor:
        kernels = chunk.view.to(batch.compute_dtype).flatten(0, 1)
        # BLAS rounds differently where a matrix is not aligned; a weight's place in memory must
        # not show in the result.
        return kernels.clone() if kernels.data_ptr() % ALIGNMENT else kernels

    def _ranks(self, batch: Batch, chunk: Chunk, coefficients: torch.Tensor) -> torch.Tensor:
        if batch.draw is None:
            return coefficients.abs()
        draws = torch.where(coefficients == 0, 0, uniform(_places(batch, chunk), batch.draw))
        # A draw says nothing of its weight; the difference is NaN where that is not finite.
        return (draws + (coefficients - coefficients)).abs()

    def _mask(self, batch: Batch, threshold: torch.Tensor) -> torch.Tensor:
        cut = self._cut(batch, threshold)
        kept = [
            self._ranks(batch, chunk, self.analyse(batch, self._kernels(batch, chunk))) >= cut
            for chunk in chunks(batch.weight, self.chunk)
        ]
        none = torch.empty(0, batch.ranked, dtype=torch.bool, device=batch.weight.device)
        return pack(torch.cat([none, *kept]), flat=batch.flat)

    def _cut(self, batch: Batch, threshold: torch.Tensor) -> torch.Tensor:
        # At the smallest positive number or above, a coefficient of 0 is never kept.
        zero = torch.zeros((), dtype=_ranking_dtype([batch]), device=batch.weight.device)
        return torch.maximum(threshold.to(zero.device, zero.dtype), torch.nextafter(zero, zero + 1))

    def _restored(self, batch: Batch, chunk: Chunk, coefficients: torch.Tensor) -> torch.Tensor:
        """The kernels of pruned coefficients, which are overwritten, in a chunk's shape."""
        # Adding 0 makes 0 of the -0 that a negative coefficient leaves.
        pruned = self.synthesise(batch, coefficients.add_(0))
        if chunk.view.dtype != pruned.dtype:
            # Float16 ends at 65504, which a sum of coefficients may pass.
            limit = torch.finfo(chunk.view.dtype).max
            pruned = pruned.clamp(-limit, limit)
        return pruned.reshape(chunk.view.shape)

    def _apply(self, batch: Batch, threshold: torch.Tensor) -> torch.Tensor:
        device = batch.weight.device
        # On a GPU the host cannot know without waiting.
        if device.type == "cpu" and threshold.isnan():
            return threshold.expand(4)
        kept, zeros, error, norm = torch.zeros(4, dtype=torch.float64, device=device).unbind()
        cut = self._cut(batch, threshold)
        for chunk in chunks(batch.weight, self.chunk):
            kernels = self._kernels(batch, chunk)
            coefficients = self.analyse(batch, kernels)
            ranks = self._ranks(batch, chunk, coefficients)
            mask = ranks >= cut
            kept += torch.count_nonzero(mask)
            before = chunk.view.to(batch.compute_dtype, copy=True)
            pruned = self._restored(batch, chunk, coefficients * mask)
            if device.type != "cpu":
                pruned = torch.where(threshold.isnan(), before, pruned)
            chunk.view.copy_(pruned)
            zeros += chunk.view.numel() - torch.count_nonzero(chunk.view)
            norm += _squared_norm(before)
            error += _squared_norm(before.sub_(chunk.view))
        return torch.stack([kept, zeros, error, norm])


class _Matrices(NamedTuple):
    analysis: torch.Tensor | None
    synthesis: torch.Tensor | None


@lru_cache(maxsize=64)
def _matrices(operator: Operator, dtype: torch.dtype, device: torch.device) -> _Matrices:
    if operator.identity:
        return _Matrices(None, None)
    return _Matrices(
        torch.tensor(operator.analysis, dtype=dtype, device=device),
        torch.tensor(operator.synthesis, dtype=dtype, device=device),
    )


def _factored(batch: Batch, like: torch.Tensor) -> FactoredTransform:
    assert batch.basis.factors is not None
    return _transform(batch.basis.factors, batch.by_importance, like.dtype, like.device)


# As large as the weights of such layers: those of a few sizes are enough.
_transform = lru_cache(maxsize=4)(FactoredTransform)


def chunks(weight: torch.Tensor, size: int) -> Iterator[Chunk]:
    """The weight in chunks of at most ``size`` values (one kernel, where that is larger)."""
    outs, ins, kh, kw = weight.shape
    K = kh * kw
    wide = min(max(size // K, 1), ins)
    tall = max(size // (K * wide), 1) if wide else 1
    for o in range(0, outs, tall):
        for i in range(0, ins, max(wide, 1)):
            yield Chunk(weight[o : o + tall, i : i + wide], o, i)


def percentile_rank(count: int, percentile: float) -> tuple[int, float]:
    """Where ``numpy.percentile`` looks: the lower order statistic and the way to the next.

    Example:
        >>> percentile_rank(5, 30)
        (1, 0.19999999999999996)
    """
    place = (count - 1) * (percentile / 100)
    rank = min(math.floor(place), count - 1)
    return rank, place - rank


def lerp(low: torch.Tensor, high: torch.Tensor, fraction: float) -> torch.Tensor:
    """``numpy.percentile``'s interpolation, rounding for rounding."""
    span = high - low
    return low + span * fraction if fraction < 0.5 else high - span * (1 - fraction)


def uniform(places: torch.Tensor, seed: int) -> torch.Tensor:
    """A random float64 in (0, 1) for each place: the same on every device, in any order.

    SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom number generators"),
    read at the given places of its sequence; the upper 52 bits make the number.

    Args:
        places: integers, int64.
        seed: 64 bits, taken as a signed integer.
    """

    def mixed(x: torch.Tensor, shift: int, factor: int) -> torch.Tensor:
        logical = (x >> shift) & ((1 << (64 - shift)) - 1)
        return (x ^ logical) * factor

    x = (places + 1) * _GAMMA + seed
    x = mixed(mixed(x, 30, _MIX_1), 27, _MIX_2)
    x = x ^ ((x >> 31) & ((1 << 33) - 1))
    upper = (x >> 12) & ((1 << 52) - 1)
    return (upper.to(torch.float64) + 0.5) * 2.0**-52


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


_GAMMA = _signed(0x9E3779B97F4A7C15)
_MIX_1 = _signed(0xBF58476D1CE4E5B9)
_MIX_2 = _signed(0x94D049BB133111EB)


def _ranking_dtype(batches: Sequence[Batch]) -> torch.dtype:
    return torch.float64 if batches[0].draw is not None else batches[0].compute_dtype


def _squared_norm(values: torch.Tensor) -> torch.Tensor:
    """In float64: the square of a float32 may leave its range."""
    wide = values.flatten().to(torch.float64)
    return wide.dot(wide)


def _places(batch: Batch, chunk: Chunk) -> torch.Tensor:
    """``(n, K)``: where each value of a chunk lies among all those of the weight."""
    weight, first = batch.weight, batch.first + chunk.out
    outs, ins, kh, kw = chunk.view.shape
    rows = torch.arange(first, first + outs, device=weight.device)
    columns = torch.arange(chunk.inner, chunk.inner + ins, device=weight.device)
    values = torch.arange(kh * kw, device=weight.device)
    kernels = (rows[:, None] * weight.shape[1] + columns).flatten()
    return kernels[:, None] * (kh * kw) + values


def _nonfinite_key(dtype: torch.dtype) -> int:
    """The bit pattern of infinity; every NaN's is above it."""
    return int(torch.tensor(math.inf, dtype=dtype).view(BITS[dtype]))


def make() -> Backend:
    """The backend, for the registry."""
    return EagerBackend()
