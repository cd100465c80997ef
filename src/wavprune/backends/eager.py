"""Plain torch, on any device: one matmul per chunk, and a radix select that stores nothing.

Every step walks the layer in chunks of at most ``CHUNK`` weights. The threshold is found from
histograms of the coefficients' bit patterns, 16 bits at a time from the top: non-negative floats
order as their bits do. That is exact, takes two passes for float32 whatever the data, needs no
memory beyond a chunk, and adds up over layers, so that one layer and a whole network are the same
code. On two cores it takes a sixth of ``torch.kthvalue``'s time for the same answer.

Of weights that are sharded over ranks each rank has whole kernels. What the steps add up, the
ranks add up too: histograms, counts and sums of squares, never a weight. So every rank finds the
threshold that the whole weight has, exactly.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch

from ..bases import Operator
from ..bases.factors import FactoredTransform
from ..common.cache import ByteCache
from .masks import pack, unpack
from .protocol import Backend, Job, Layer, Measured, Selection
from .random import uniform

# Weights per chunk: its temporaries stay in a core's cache, and far below 64 MiB.
CHUNK = 1 << 18
ALIGNMENT = 64
DIGIT = 16
LOWEST = (1 << DIGIT) - 1
BITS = {torch.float32: torch.int32, torch.float64: torch.int64}


class Chunk(NamedTuple):
    """Some kernels of a layer.

    Attributes:
        view: ``(outs, ins, kh, kw)``, a view of the weight.
        out: index in the weight of its first output channel.
        inner: index in the weight of its first input channel.
    """

    view: torch.Tensor
    out: int
    inner: int


# Which coefficients (n, M') of a chunk are kept: (n, M'), bool.
Keep = Callable[[Chunk, torch.Tensor], torch.Tensor]


class EagerBackend:
    """The steps in plain torch. Subclasses replace the transform."""

    name = "eager"
    call_limit = 1
    can_stream = True
    is_atomic = False
    has_masks = True
    can_capture = False
    chunk = CHUNK

    def unsupported(self, layer: Layer) -> str | None:
        """Why this backend cannot prune this layer: there is no such layer."""
        del layer
        return None

    def analyse(self, layer: Layer, kernels: torch.Tensor) -> torch.Tensor:
        """Coefficients ``(n, M')`` of kernels ``(n, kh, kw)``, a new tensor or a view."""
        if not layer.basis.is_dense:
            return _factored(layer, kernels).analyse(kernels)
        flat = kernels.reshape(len(kernels), -1)
        A = _matrices(layer.operator, flat.dtype, flat.device).analysis
        # The long side last: BLAS takes a sixth of the time that it takes for flat @ A.T.
        return flat if A is None else (A @ flat.T).T

    def synthesise(self, layer: Layer, coefficients: torch.Tensor) -> torch.Tensor:
        """Kernels ``(n, K)`` of coefficients ``(n, M')``."""
        if not layer.basis.is_dense:
            return _factored(layer, coefficients).synthesise(coefficients)
        S = _matrices(layer.operator, coefficients.dtype, coefficients.device).synthesis
        return coefficients if S is None else (S @ coefficients.T).T

    def threshold(self, jobs: Sequence[Job]) -> torch.Tensor:
        """One exact threshold per job; see ``Backend``."""
        return torch.stack([self._threshold(job) for job in jobs])

    def measure(self, jobs: Sequence[Job]) -> Measured | None:
        """Not offered; see ``Backend``."""
        del jobs
        return None

    def masks(self, layers: Sequence[Layer], thresholds: torch.Tensor) -> list[torch.Tensor]:
        """Which coefficients are kept; see ``Backend``."""
        pairs = zip(layers, thresholds.unbind(), strict=True)
        return [self._mask(layer, threshold) for layer, threshold in pairs]

    def apply_(self, layers: Sequence[Layer], selection: Selection) -> torch.Tensor:
        """Prune each layer's weight in place; see ``Backend``."""
        if isinstance(selection, torch.Tensor):
            # NaN for all where one is NaN: minimum and maximum pass on a NaN, and nothing else.
            cuts = torch.maximum(selection, selection.amin()) if len(selection) else selection
            parts: Sequence[torch.Tensor] = cuts.unbind()
            rows = [self._apply(*pair) for pair in zip(layers, parts, strict=True)]
        else:
            pairs = zip(layers, selection, strict=True)
            rows = [self._rewrite(layer, _by_mask(layer, mask)) for layer, mask in pairs]
        return _sum_over_ranks(torch.stack(rows), layers)

    def project_(self, layers: Sequence[Layer], masks: Sequence[torch.Tensor]) -> None:
        """Set the coefficients that are not kept to 0, in place; see ``Backend``."""
        for layer, mask in zip(layers, masks, strict=True):
            keep = _by_mask(layer, mask)
            for chunk in chunks(layer.weight, self.chunk):
                coefficients = self.analyse(layer, self._kernels(layer, chunk))
                kept = coefficients * keep(chunk, coefficients)
                chunk.view.copy_(self._restored(layer, chunk, kept))

    def _threshold(self, job: Job) -> torch.Tensor:
        layers, budget = job.layers, job.budget
        dtype = layers[0].ranking_dtype
        total = sum(_total_kernels(layer) * layer.num_coefficients for layer in layers)
        if budget.keep == 0 or total == 0:
            return torch.tensor(math.inf, dtype=torch.float64, device=layers[0].device)
        if budget.keep is not None:
            value = self._order_statistic(job, max(total - budget.keep, 0), dtype)
            return value.to(torch.float64)
        assert budget.percentile is not None
        zeros = sum(_total_kernels(layer) * layer.num_dropped for layer in layers)
        rank, fraction = percentile_rank(total + zeros, budget.percentile)
        low = self._order_statistic(job, rank - zeros, dtype)
        if fraction == 0 or rank + 1 < zeros:
            return low.to(torch.float64)
        high = self._next(job, rank + 1 - zeros, low)
        return lerp(low, high, fraction).to(torch.float64)

    def _order_statistic(self, job: Job, rank: int, dtype: torch.dtype) -> torch.Tensor:
        device = job.layers[0].device
        if rank < 0:
            # The structural zeros come first; a weight that is not finite must still show.
            smallest = self._order_statistic(job, 0, dtype)
            return torch.where(smallest.isnan(), smallest, 0)
        bits = BITS[dtype]
        exponent = _nonfinite_key(dtype)
        prefix = torch.zeros((), dtype=bits, device=device)
        remaining = torch.tensor(rank, dtype=torch.int64, device=device)
        finite = torch.ones((), dtype=torch.bool, device=device)
        top = torch.iinfo(bits).bits - DIGIT
        for shift in range(top, -1, -DIGIT):
            histogram = torch.zeros(1 << DIGIT, dtype=torch.int64, device=device)
            for keys in self._keys(job, dtype):
                digits = keys >> shift
                if shift < top:
                    digits = digits[keys >> (shift + DIGIT) == prefix.to(keys.device)] & LOWEST
                histogram += torch.bincount(digits, minlength=1 << DIGIT).to(device)
            histogram = _sum_over_ranks(histogram, job.layers)
            if shift == top:
                finite = histogram[exponent >> shift :].sum() == 0
            upto = histogram.cumsum(0)
            digit = torch.searchsorted(upto, remaining, right=True)
            remaining = remaining - torch.where(digit > 0, upto[(digit - 1).clamp(min=0)], 0)
            prefix = (prefix << DIGIT) | digit.to(bits)
        value = prefix.view(dtype)
        return torch.where(finite, value, torch.nan)

    def _next(self, job: Job, rank: int, low: torch.Tensor) -> torch.Tensor:
        """The order statistic at ``rank``, where the one before it is ``low``."""
        key = low.view(BITS[low.dtype])
        upto = torch.zeros((), dtype=torch.int64, device=low.device)
        limit = torch.iinfo(key.dtype).max
        above = torch.full_like(key, limit)
        for keys in self._keys(job, low.dtype):
            larger = keys > key.to(keys.device)
            upto += keys.numel() - torch.count_nonzero(larger).to(key.device)
            above = torch.minimum(above, torch.where(larger, keys, limit).min().to(key.device))
        upto = _sum_over_ranks(upto, job.layers)
        above = _min_over_ranks(above, job.layers)
        return torch.where(upto > rank, low, above.view(low.dtype))

    def _keys(self, job: Job, dtype: torch.dtype) -> Iterator[torch.Tensor]:
        """The bit patterns of what ranks the coefficients, one chunk after the other."""
        for layer in job.visit():
            for chunk in chunks(layer.weight, self.chunk):
                coefficients = self.analyse(layer, self._kernels(layer, chunk))
                ranks = self._ranks(layer, chunk, coefficients)
                # In the order in memory: a transposed matrix would be copied to be flat.
                keys = (ranks if ranks.is_contiguous() else ranks.T).reshape(-1)
                # One kernel may hold more than a chunk.
                yield from torch.split(keys.view(BITS[dtype]), self.chunk)

    def _kernels(self, layer: Layer, chunk: Chunk) -> torch.Tensor:
        kernels = chunk.view.to(layer.compute_dtype).flatten(0, 1)
        # BLAS rounds differently where a matrix is not aligned; the address of a weight must not
        # show in the result.
        return kernels.clone() if kernels.data_ptr() % ALIGNMENT else kernels

    def _ranks(self, layer: Layer, chunk: Chunk, coefficients: torch.Tensor) -> torch.Tensor:
        if layer.seed is None:
            return coefficients.abs()
        random = torch.where(coefficients == 0, 0, uniform(_indices(layer, chunk), layer.seed))
        # A random number says nothing of its weight; the difference is NaN where that is not
        # finite.
        return (random + (coefficients - coefficients)).abs()

    def _by_threshold(self, layer: Layer, threshold: torch.Tensor) -> Keep:
        # At the smallest positive number or above, a coefficient of 0 is never kept.
        zero = torch.zeros((), dtype=layer.ranking_dtype, device=layer.weight.device)
        least = torch.nextafter(zero, zero + 1)
        cut = torch.maximum(threshold.to(zero.device, zero.dtype), least)
        return lambda chunk, coefficients: self._ranks(layer, chunk, coefficients) >= cut

    def _mask(self, layer: Layer, threshold: torch.Tensor) -> torch.Tensor:
        keep = self._by_threshold(layer, threshold)
        kept = [
            keep(chunk, self.analyse(layer, self._kernels(layer, chunk)))
            for chunk in chunks(layer.weight, self.chunk)
        ]
        device = layer.weight.device
        none = torch.empty(0, layer.num_coefficients, dtype=torch.bool, device=device)
        return pack(torch.cat([none, *kept]), flat=layer.is_flat)

    def _restored(self, layer: Layer, chunk: Chunk, coefficients: torch.Tensor) -> torch.Tensor:
        """The kernels of pruned coefficients, which are overwritten, in a chunk's shape."""
        # Adding 0 makes 0 of the -0 that a negative coefficient leaves.
        pruned = self.synthesise(layer, coefficients.add_(0))
        if chunk.view.dtype != pruned.dtype:
            # Float16 ends at 65504, which a sum of coefficients may pass.
            limit = torch.finfo(chunk.view.dtype).max
            pruned = pruned.clamp(-limit, limit)
        return pruned.reshape(chunk.view.shape)

    def _apply(self, layer: Layer, threshold: torch.Tensor) -> torch.Tensor:
        # On a GPU the host cannot know without waiting.
        if layer.weight.device.type == "cpu" and threshold.isnan():
            return threshold.expand(4)
        return self._rewrite(layer, self._by_threshold(layer, threshold), threshold)

    def _rewrite(
        self, layer: Layer, keep: Keep, threshold: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Prune a weight in place; its row of ``apply_``. A threshold of NaN changes nothing."""
        device = layer.weight.device
        kept, zeros, error, norm = torch.zeros(4, dtype=torch.float64, device=device).unbind()
        for chunk in chunks(layer.weight, self.chunk):
            coefficients = self.analyse(layer, self._kernels(layer, chunk))
            mask = keep(chunk, coefficients)
            kept += torch.count_nonzero(mask)
            before = chunk.view.to(layer.compute_dtype, copy=True)
            pruned = self._restored(layer, chunk, coefficients * mask)
            if threshold is not None and device.type != "cpu":
                pruned = torch.where(threshold.isnan(), before, pruned)
            chunk.view.copy_(pruned)
            zeros += chunk.view.numel() - torch.count_nonzero(chunk.view)
            norm += _squared_norm(before)
            error += _squared_norm(before.sub_(chunk.view))
        return torch.stack([kept, zeros, error, norm])


def _by_mask(layer: Layer, mask: torch.Tensor) -> Keep:
    ins = layer.weight.shape[1]
    size = (layer.num_kernels, layer.num_coefficients)
    bits = unpack(mask, *size, flat=layer.is_flat)

    def keep(chunk: Chunk, coefficients: torch.Tensor) -> torch.Tensor:
        start = chunk.out * ins + chunk.inner
        # A zero is never kept.
        return bits[start : start + len(coefficients)] & (coefficients != 0)

    return keep


class _Matrices(NamedTuple):
    analysis: torch.Tensor | None
    synthesis: torch.Tensor | None


def _matrices(operator: Operator, dtype: torch.dtype, device: torch.device) -> _Matrices:
    if operator.identity:
        return _Matrices(None, None)

    def make() -> _Matrices:
        return _Matrices(
            torch.tensor(operator.analysis, dtype=dtype, device=device),
            torch.tensor(operator.synthesis, dtype=dtype, device=device),
        )

    return _MATRICES.get((operator.key, dtype, device), make)


def _factored(layer: Layer, like: torch.Tensor) -> FactoredTransform:
    factors = layer.basis.factors
    assert factors is not None
    key = (layer.basis.key, layer.by_importance, like.dtype, like.device)
    return _TRANSFORMS.get(
        key, lambda: FactoredTransform(factors, layer.by_importance, like.dtype, like.device)
    )


_MATRICES = ByteCache[_Matrices](
    64 << 20, lambda pair: sum(part.nbytes for part in pair if part is not None)
)
_TRANSFORMS = ByteCache[FactoredTransform](256 << 20, lambda transform: transform.nbytes)


def chunks(weight: torch.Tensor, size: int) -> Iterator[Chunk]:
    """The weight in chunks of at most ``size`` values (one kernel, where that is larger)."""
    outs, ins, kh, kw = weight.shape
    num_values = kh * kw
    columns = min(max(size // num_values, 1), ins) if num_values else 0
    rows = max(size // (num_values * columns), 1) if columns else 1
    for out in range(0, outs, rows):
        for inner in range(0, ins, max(columns, 1)):
            yield Chunk(weight[out : out + rows, inner : inner + columns], out, inner)


def percentile_rank(count: int, percentile: float) -> tuple[int, float]:
    """Where ``numpy.percentile`` looks: the lower order statistic and the way to the next.

    Example:
        >>> percentile_rank(5, 30)
        (1, 0.19999999999999996)
    """
    position = (count - 1) * (percentile / 100)
    rank = min(math.floor(position), count - 1)
    return rank, position - rank


def lerp(low: torch.Tensor, high: torch.Tensor, fraction: float) -> torch.Tensor:
    """``numpy.percentile``'s interpolation, rounding for rounding."""
    span = high - low
    return low + span * fraction if fraction < 0.5 else high - span * (1 - fraction)


def _total_kernels(layer: Layer) -> int:
    """Kernels of the layer, on all ranks."""
    if layer.group is None:
        return layer.num_kernels
    return layer.total_weights // layer.basis.num_values


def _sum_over_ranks(values: torch.Tensor, layers: Sequence[Layer]) -> torch.Tensor:
    if layers and layers[0].group is not None:
        torch.distributed.all_reduce(values, group=layers[0].group)
    return values


def _min_over_ranks(values: torch.Tensor, layers: Sequence[Layer]) -> torch.Tensor:
    if layers[0].group is not None:
        minimum = torch.distributed.ReduceOp.MIN
        torch.distributed.all_reduce(values, minimum, group=layers[0].group)
    return values


def _squared_norm(values: torch.Tensor) -> torch.Tensor:
    """In float64: the square of a float32 may leave its range."""
    precise = values.flatten().to(torch.float64)
    return precise.dot(precise)


def _indices(layer: Layer, chunk: Chunk) -> torch.Tensor:
    """``(n, K)``: the index of each value of a chunk among all those of the whole weight."""
    weight, start = layer.weight, layer.first_channel + chunk.out
    outs, ins, kh, kw = chunk.view.shape
    rows = torch.arange(start, start + outs, device=weight.device)
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
