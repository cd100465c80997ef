"""PyWavelets and numpy, step by step: the definition that every other backend is tested against.

The transforms are those of each family (``Family.transform``), such as ``pywt.wavedec2`` and
``pywt.waverec2`` on the whole layer; the percentile is ``numpy.percentile``.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from ..bases import transform_of
from ..bases.transform import Array, Transform
from .masks import pack, unpack
from .protocol import SHARDED, Backend, Job, Layer, Measured, Selection
from .random import random_keys


class ReferenceBackend:
    """The steps in PyWavelets and numpy."""

    name = "reference"
    call_limit = 1
    can_stream = True
    is_atomic = False
    has_masks = True
    can_capture = False

    def unsupported(self, layer: Layer) -> str | None:
        """Why this backend cannot prune this layer, or None."""
        return None if layer.group is None else SHARDED

    def threshold(self, jobs: Sequence[Job]) -> torch.Tensor:
        """One exact threshold per job; see ``Backend``."""
        values = [_threshold(job) for job in jobs]
        return torch.tensor(values, dtype=torch.float64, device="cpu")

    def measure(self, jobs: Sequence[Job]) -> Measured | None:
        """Not offered; see ``Backend``."""
        del jobs
        return None

    def masks(self, layers: Sequence[Layer], thresholds: torch.Tensor) -> list[torch.Tensor]:
        """Which coefficients are kept; see ``Backend``."""
        pairs = zip(layers, thresholds.tolist(), strict=True)
        return [_mask(layer, threshold) for layer, threshold in pairs]

    def project_(self, layers: Sequence[Layer], masks: Sequence[torch.Tensor]) -> None:
        """Set the coefficients that are not kept to 0, in place; see ``Backend``."""
        self.apply_(layers, masks)

    def apply_(self, layers: Sequence[Layer], selection: Selection) -> torch.Tensor:
        """Prune each layer's weight in place; see ``Backend``."""
        if isinstance(selection, torch.Tensor):
            if selection.isnan().any():
                shape = (len(layers), 4)
                return torch.full(shape, torch.nan, dtype=torch.float64, device="cpu")
            parts: Sequence[float | torch.Tensor] = selection.tolist()
        else:
            parts = selection
        rows = [_apply(*pair) for pair in zip(layers, parts, strict=True)]
        return torch.tensor(rows, dtype=torch.float64, device="cpu")


def _threshold(job: Job) -> float:
    layers, budget = list(job.visit()), job.budget
    if not all(np.isfinite(_kernels(layer)).all() for layer in layers):
        return float("nan")
    ranks = np.concatenate([_ranks(layer, _coefficients(layer)).ravel() for layer in layers])
    if not len(ranks):
        return float("inf")
    if not np.isfinite(ranks).all():
        return float("nan")
    if budget.percentile is not None:
        return float(np.percentile(ranks, budget.percentile))
    assert budget.keep is not None
    largest_first = np.sort(ranks)[::-1]
    keep = min(budget.keep, len(ranks))
    return float(largest_first[keep - 1]) if keep else float("inf")


def _apply(layer: Layer, selection: float | torch.Tensor) -> tuple[float, float, float, float]:
    before = _kernels(layer).copy()
    coefficients = _coefficients(layer)
    if isinstance(selection, torch.Tensor):
        mask = _unpacked(layer, selection, coefficients.shape) & (coefficients != 0)
    else:
        mask = _kept(layer, coefficients, selection)
    pruned = _transform(layer).inverse(np.where(mask, coefficients, 0))
    # Float16 ends at 65504, which a sum of coefficients may pass.
    limit = torch.finfo(layer.weight.dtype).max
    pruned = np.clip(pruned, -limit, limit)
    layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(pruned)).view(layer.weight.shape))
    after = _kernels(layer).astype(np.float64)
    before = before.astype(np.float64)
    return (
        float(np.count_nonzero(mask)),
        float(np.count_nonzero(after == 0)),
        float(np.sum((before - after) ** 2)),
        float(np.sum(before**2)),
    )


def _kept(layer: Layer, coefficients: Array, threshold: float) -> Array:
    ranks = _ranks(layer, coefficients)
    return np.asarray((ranks >= threshold) & (ranks > 0))


def _mask(layer: Layer, threshold: float) -> torch.Tensor:
    kept = _kept(layer, _coefficients(layer), threshold).reshape(layer.num_kernels, -1)
    rows = kept[:, layer.operator.rows] if layer.basis.is_dense else kept
    bits = torch.from_numpy(np.ascontiguousarray(rows))
    return pack(bits, flat=layer.is_flat).to(layer.weight.device)


def _unpacked(layer: Layer, mask: torch.Tensor, shape: tuple[int, ...]) -> Array:
    """The bits of a mask, with the structural zeros among them."""
    size = (layer.num_kernels, layer.num_coefficients)
    bits = unpack(mask.cpu(), *size, flat=layer.is_flat).numpy()
    if not layer.basis.is_dense:
        return bits.reshape(shape)
    kept = np.zeros((layer.num_kernels, len(layer.basis.structural)), dtype=np.bool_)
    kept[:, layer.operator.rows] = bits
    return kept.reshape(shape)


def _kernels(layer: Layer) -> Array:
    weight = layer.weight.detach().to("cpu", layer.compute_dtype)
    result: Array = weight.flatten(0, 1).contiguous().numpy()
    return result


def _coefficients(layer: Layer) -> Array:
    transform = _transform(layer)
    # What overflows is seen in the result.
    with np.errstate(over="ignore", invalid="ignore"):
        packed = transform.forward(_kernels(layer))
    return np.where(transform.nonzero(), packed, 0) if transform.scales else packed


def _ranks(layer: Layer, coefficients: Array) -> Array:
    if layer.seed is not None:
        ranks = _uniform(layer.weight.numel(), layer.seed).reshape(coefficients.shape)
        return np.where(coefficients == 0, 0, ranks)
    transform = _transform(layer)
    if not layer.by_importance or not transform.scales:
        return np.abs(coefficients)
    return np.asarray(np.abs(coefficients) * transform.norms().astype(coefficients.dtype))


def _transform(layer: Layer) -> Transform:
    return transform_of(layer.basis, _kernels(layer))


def _uniform(count: int, seed: int) -> Array:
    """The random numbers of ``wavprune.backends.random`` at the first ``count`` indices."""
    before, between, low_key, low_step = map(np.uint32, random_keys(seed))
    indices = np.arange(count, dtype=np.uint64)
    index_high = (indices >> np.uint64(32)).astype(np.uint32)
    factors = [np.uint32(factor) for factor in (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)]

    def mixed(x: Array, shift: int) -> Array:
        return np.asarray(x ^ (x >> np.uint32(shift)))

    with np.errstate(over="ignore"):
        x = mixed(indices.astype(np.uint32) + before, 17) * factors[0]
        x = mixed(x + (between + index_high * np.uint32(0x9E3779B9)), 11) * factors[1]
        high = mixed(mixed(x, 15) * factors[2], 14)
        x = (high ^ (low_key + index_high * low_step)) * factors[0]
        low = mixed(x, 15) * factors[2] >> np.uint32(12)
    bits = high.astype(np.uint64) << np.uint64(20) | low.astype(np.uint64)
    return (bits.astype(np.float64) + 0.5) * 2.0**-52


def make() -> Backend:
    """The backend, for the registry."""
    return ReferenceBackend()
