"""PyWavelets and numpy, step by step: the definition that every other backend is tested against.

Nothing here reads the matrices of ``bases.py``; the transforms are ``pywt.wavedec2`` and
``pywt.waverec2`` on the whole layer, the percentile is ``numpy.percentile``.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, TypeGuard

import numpy as np
import numpy.typing as npt
import pywt
import torch

from ..bases.basis import Basis, coefficient_bands, unpack
from ..bases.matrices import NEGLIGIBLE
from .protocol import Backend, Batch, Target

Array = npt.NDArray[Any]


class Transform(Protocol):
    """A 2-D transform of many kernels, orthonormal but for PyWavelets' own."""

    def forward(self, kernels: Array) -> Array:
        """Packed coefficients ``(n, Mh, Mw)`` of kernels ``(n, kh, kw)``."""
        ...

    def inverse(self, packed: Array) -> Array:
        """Kernels ``(n, kh, kw)`` of packed coefficients."""
        ...


class ReferenceBackend:
    """The five steps in PyWavelets and numpy."""

    name = "reference"
    unit = 1
    one_at_a_time = True

    def unsupported(self, batch: Batch) -> str | None:
        """Why this backend cannot prune this batch: there is no such batch."""
        del batch
        return None

    def threshold(self, jobs: Sequence[tuple[Sequence[Batch], Target]]) -> torch.Tensor:
        """One exact threshold for each job; see ``Backend``."""
        found = [_threshold(batches, target) for batches, target in jobs]
        return torch.tensor(found, dtype=torch.float64)

    def apply_(self, batches: Sequence[Batch], thresholds: torch.Tensor) -> torch.Tensor:
        """Prune each batch's weight in place; see ``Backend``."""
        if thresholds.isnan().any():
            return torch.full((len(batches), 4), torch.nan, dtype=torch.float64)
        done = zip(batches, thresholds.tolist(), strict=True)
        rows = [_apply(batch, threshold) for batch, threshold in done]
        return torch.tensor(rows, dtype=torch.float64)


def _threshold(batches: Sequence[Batch], target: Target) -> float:
    if not all(np.isfinite(_kernels(batch)).all() for batch in batches):
        return float("nan")
    ranks = np.concatenate([_ranks(batch, _coefficients(batch)).ravel() for batch in batches])
    if not len(ranks):
        return float("inf")
    if target.percentile is not None:
        return float(np.percentile(ranks, target.percentile))
    assert target.keep is not None
    largest_first = np.sort(ranks)[::-1]
    keep = min(target.keep, len(ranks))
    return float(largest_first[keep - 1]) if keep else float("inf")


def _apply(batch: Batch, threshold: float) -> tuple[float, float, float, float]:
    before = _kernels(batch).copy()
    coefficients = _coefficients(batch)
    ranks = _ranks(batch, coefficients)
    mask = (ranks >= threshold) & (ranks > 0)
    pruned = _transform(batch).inverse(np.where(mask, coefficients, 0))
    # Float16 ends at 65504, which a sum of coefficients may pass.
    limit = torch.finfo(batch.weight.dtype).max
    pruned = np.clip(pruned, -limit, limit)
    batch.weight.copy_(torch.from_numpy(np.ascontiguousarray(pruned)).view(batch.weight.shape))
    after = _kernels(batch)
    before, after = before.astype(np.float64), after.astype(np.float64)
    return (
        float(np.count_nonzero(mask)),
        float(np.count_nonzero(after == 0)),
        float(np.sum((before - after) ** 2)),
        float(np.sum(before**2)),
    )


def _kernels(batch: Batch) -> Array:
    weight = batch.weight.detach().to("cpu", batch.compute_dtype)
    result: Array = weight.flatten(0, 1).contiguous().numpy()
    return result


def _coefficients(batch: Batch) -> Array:
    transform = _transform(batch)
    packed = transform.forward(_kernels(batch))
    return np.where(transform.nonzero(), packed, 0) if _scales(transform) else packed


def _ranks(batch: Batch, coefficients: Array) -> Array:
    if batch.draw is not None:
        draws = _uniform(batch.weight.numel(), batch.draw).reshape(coefficients.shape)
        return np.where(coefficients == 0, 0, draws)
    transform = _transform(batch)
    if not batch.by_importance or not _scales(transform):
        return np.abs(coefficients)
    return np.asarray(np.abs(coefficients) * transform.norms().astype(coefficients.dtype))


def _scales(transform: Transform) -> TypeGuard[_PyWavelets]:
    """True where a coefficient may be larger or smaller than what it does to the weight."""
    return isinstance(transform, _PyWavelets)


class _PyWavelets:
    def __init__(self, basis: Basis) -> None:
        self.basis = basis

    def forward(self, kernels: Array) -> Array:
        coeffs = self._decompose(kernels)
        packed, _ = pywt.coeffs_to_array(coeffs, axes=(-2, -1))
        result: Array = packed
        return result

    def inverse(self, packed: Array) -> Array:
        kh, kw = self.basis.kernel
        coeffs = unpack(packed, self._places())
        whole = pywt.waverec2(coeffs, self.basis.name, mode=self.basis.mode, axes=(-2, -1))
        result: Array = whole[:, :kh, :kw]
        return result

    def nonzero(self) -> Array:
        """``(Mh, Mw)``: False at the structural zeros, where every unit impulse leaves nothing."""
        reach = self._products(lambda one: np.abs(one.forward).max(axis=1))
        result: Array = reach > NEGLIGIBLE * reach.max()
        return result

    def norms(self) -> Array:
        """``(Mh, Mw)``: the norm of the kernel that each single coefficient makes."""
        norms = self._products(lambda one: np.linalg.norm(one.inverse, axis=0))
        return np.where(norms > NEGLIGIBLE * norms.max(), norms, 0)

    def _products(self, size: Callable[[_Band], Array]) -> Array:
        """``(Mh, Mw)``: the transform is separable, and so is the size of what it makes of one."""
        basis = self.basis
        levels = range(1, basis.level_used + 1) or [0]
        axes = [{i: _bands(basis, n, i) for i in levels} for n in basis.kernel]
        result = np.zeros(basis.grid)
        for name, (rows, columns) in self._places().items():
            letters = {"a": (0, 0), "h": (1, 0), "v": (0, 1), "d": (1, 1)}[name[0]]
            sizes = [size(axis[int(name[1:])][k]) for axis, k in zip(axes, letters, strict=True)]
            result[rows, columns] = np.outer(*sizes)
        return result

    def _places(self) -> dict[str, tuple[slice, slice]]:
        return coefficient_bands(self._decompose(np.zeros((1, *self.basis.kernel))))

    def _decompose(self, kernels: Array) -> list[Any]:
        basis = self.basis
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Level value")
            coeffs: list[Any] = pywt.wavedec2(
                kernels, basis.name, mode=basis.mode, level=basis.level_used, axes=(-2, -1)
            )
        return coeffs


class _Band(NamedTuple):
    """One band of one axis: what the n unit impulses leave in it, what its m impulses make."""

    forward: Array
    inverse: Array


def _bands(basis: Basis, n: int, level: int) -> list[_Band]:
    """The approximations of a level along an axis of n values, and its details."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Level value")
        coeffs = pywt.wavedec(np.eye(n), basis.name, mode=basis.mode, level=level, axis=0)
    found = []
    for k, forward in enumerate(coeffs[:2]):
        m = len(forward)
        alone = [np.zeros((len(band), m)) for band in coeffs]
        alone[k] = np.eye(m)
        whole = pywt.waverec(alone, basis.name, mode=basis.mode, axis=0)
        found.append(_Band(forward, whole[:n]))
    return found


class _Axes:
    """A function of one axis, run along both; its inverse likewise."""

    def __init__(self, level: int) -> None:
        self.level = level

    def forward(self, kernels: Array) -> Array:
        return self.along(self.along(kernels).swapaxes(1, 2)).swapaxes(1, 2)

    def inverse(self, packed: Array) -> Array:
        return self.back(self.back(packed).swapaxes(1, 2)).swapaxes(1, 2)

    def along(self, x: Array) -> Array:
        raise NotImplementedError

    def back(self, x: Array) -> Array:
        raise NotImplementedError


class _UnbalancedHaar(_Axes):
    def along(self, x: Array) -> Array:
        means = [x[..., i] for i in range(x.shape[-1])]
        sizes = [1] * len(means)
        details: list[Array] = []
        for _ in range(self.level):
            pairs = len(means) // 2
            found, coarse, widths = [], means[2 * pairs :], sizes[2 * pairs :]
            merged, grown = [], []
            for i in range(0, 2 * pairs, 2):
                p, q, a, b = means[i], means[i + 1], sizes[i], sizes[i + 1]
                root = np.sqrt(np.array([a, b, a + b], dtype=x.dtype))
                merged.append((root[0] * p + root[1] * q) / root[2])
                found.append((root[1] * p - root[0] * q) / root[2])
                grown.append(a + b)
            means, sizes, details = merged + coarse, grown + widths, found + details
        return np.stack(means + details, axis=-1)

    def back(self, x: Array) -> Array:
        widths = [[1] * x.shape[-1]]
        for _ in range(self.level):
            last = widths[-1]
            widths.append([sum(last[i : i + 2]) for i in range(0, len(last), 2)])
        means = [x[..., i] for i in range(len(widths[-1]))]
        used = len(means)
        for sizes in widths[-2::-1]:
            finer = []
            for i, mean in enumerate(means):
                if 2 * i + 1 == len(sizes):
                    finer.append(mean)
                    continue
                a, b = sizes[2 * i], sizes[2 * i + 1]
                root = np.sqrt(np.array([a, b, a + b], dtype=x.dtype))
                detail = x[..., used]
                used += 1
                finer.append((root[0] * mean + root[1] * detail) / root[2])
                finer.append((root[1] * mean - root[0] * detail) / root[2])
            means = finer
        return np.stack(means, axis=-1)


class _Cosine(_Axes):
    @staticmethod
    def _table(n: int, dtype: Any) -> Array:
        k, i = np.ogrid[:n, :n]
        table = np.cos(np.pi * k * (2 * i + 1) / (2 * n)) * np.sqrt(np.where(k == 0, 1, 2) / n)
        return np.asarray(table, dtype=dtype)

    def along(self, x: Array) -> Array:
        return np.asarray(np.einsum("nri,ki->nrk", x, self._table(x.shape[-1], x.dtype)))

    def back(self, x: Array) -> Array:
        return np.asarray(np.einsum("nrk,ki->nri", x, self._table(x.shape[-1], x.dtype)))


class _Principal:
    def __init__(self, kernels: Array) -> None:
        matrix = kernels.reshape(len(kernels), -1).astype(np.float64)
        N, K = matrix.shape
        self.vectors = np.linalg.svd(matrix.T, full_matrices=N < K)[0].T

    def forward(self, kernels: Array) -> Array:
        flat = kernels.reshape(len(kernels), -1)
        return np.asarray((flat @ self.vectors.T.astype(flat.dtype)).reshape(kernels.shape))

    def inverse(self, packed: Array) -> Array:
        flat = packed.reshape(len(packed), -1)
        return np.asarray((flat @ self.vectors.astype(flat.dtype)).reshape(packed.shape))


class _Identity:
    def forward(self, kernels: Array) -> Array:
        return kernels

    def inverse(self, packed: Array) -> Array:
        return packed


def _transform(batch: Batch) -> Transform:
    name = batch.basis.name
    if name == "klt":
        return _Principal(_kernels(batch))
    if name == "identity":
        return _Identity()
    if name == "dct":
        return _Cosine(1)
    if name == "uhaar":
        return _UnbalancedHaar(batch.basis.level_used)
    return _PyWavelets(batch.basis)


def _uniform(count: int, seed: int) -> Array:
    """SplitMix64's first ``count`` numbers, their upper 52 bits as floats in (0, 1)."""
    with np.errstate(over="ignore"):
        x = np.arange(1, count + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
        x += np.uint64(seed % 2**64)
        x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        x ^= x >> np.uint64(31)
    return ((x >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52


def make() -> Backend:
    """The backend, for the registry."""
    return ReferenceBackend()
