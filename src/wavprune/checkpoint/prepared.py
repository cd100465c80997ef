"""A weight and what is kept of it, as what is stored: its coefficients in a basis."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..backends import masks
from ..bases import Basis, basis_for
from ..common.cache import ByteCache
from ..config import PruneConfig
from ..engine.auto import bases_for
from ..engine.layers import LayerRef, non_finite
from ..errors import WavpruneError
from .formats.safetensors import DTYPE_NAMES
from .layer import Layer, transform
from .quantisers import exponent_for
from .records import CHUNK
from .selection import Kept, axis_functions
from .stored_basis import Floats, StoredBasis, store

LARGEST_KERNEL = 1024
CACHE_BYTES = 1 << 24
# Kernels that are looked at to choose a basis.
SAMPLE = 1 << 12
# What is below this share of the root mean square costs no bits at the steps that are in use.
FLOOR = 0.25


@dataclass(frozen=True, slots=True)
class Size:
    """How large the values of a weight are.

    Attributes:
        peak: the largest magnitude.
        exponent: see ``Layer``.
        norm: the Frobenius norm of the values over ``2 ** exponent``.
    """

    peak: float
    exponent: int
    norm: float


def size_of(ref: LayerRef) -> Size:
    """How large the values of a contiguous weight are.

    Raises:
        WavpruneError: a value is NaN or infinite.
    """
    weight = ref.weight
    least, most = torch.aminmax(weight.view(-1))
    peak = max(abs(float(least)), abs(float(most)))
    if not math.isfinite(peak):
        count = non_finite(weight)
        raise WavpruneError(
            f"layer {ref.name!r}: {count} of {weight.numel()} weights are NaN or infinite; "
            "allowed: finite weights"
        )
    exponent = exponent_for(peak)
    compute_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = 0.0
    flat = weight.view(-1)
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK]
        if exponent:
            values = np.ldexp(part.to(torch.float64).numpy(), -exponent)
        else:
            values = part.to(compute_dtype).numpy()
        total += float(np.vdot(values, values))
    return Size(peak, exponent, math.sqrt(total))


def cheapest_basis(weight: torch.Tensor, config: PruneConfig) -> Basis:
    """The basis of a weight of which nothing is pruned."""
    if weight.ndim == 2:
        # A transform of a whole matrix takes longer than everything else.
        return basis_for(replace(config, wavelet="identity"), weight)
    bases = bases_for(config, weight)
    return bases[0] if len(bases) == 1 else min(bases, key=_rate(weight))


def _rate(weight: torch.Tensor) -> Callable[[Basis], float]:
    """The bits that each basis takes, but for a constant: Laplace variables' at one step."""
    kernels = weight.flatten(0, 1).flatten(1)
    kernels = kernels[:: max(1, len(kernels) // SAMPLE)]
    exponent = exponent_for(float(kernels.abs().max()))
    if exponent:
        sample = np.ldexp(kernels.to(torch.float64).numpy(), -exponent).astype(np.float32)
    else:
        sample = kernels.to(torch.float32).numpy()
    floor = FLOOR * math.sqrt(float(np.vdot(sample, sample)) / sample.size) or 1.0

    def rate(basis: Basis) -> float:
        analysis = basis.importance_operator.analysis.astype(np.float32)
        means = np.abs(transform(analysis, sample.T)).mean(axis=1)
        return float(np.log2(means + floor).sum())

    return rate


def check_kernel(ref: LayerRef) -> None:
    """Raise WavpruneError, before a basis of it is computed, where a kernel is too large."""
    kernel = ref.weight.shape[2:]
    if math.prod(kernel) > LARGEST_KERNEL:
        raise _too_large(ref, kernel)


def _too_large(ref: LayerRef, kernel: Sequence[int], where: str = "") -> WavpruneError:
    return WavpruneError(
        f"layer {ref.name!r}: {'x'.join(map(str, kernel))} kernels are too large to be stored"
        f"{where}; allowed: kernels of at most {LARGEST_KERNEL} values, or method='min_weight'"
    )


def prepared(ref: LayerRef, kept: Kept, size: Size) -> Layer:
    """A weight as it is stored.

    Raises:
        WavpruneError: its basis cannot be stored.
    """
    basis = kept.basis
    if not basis.is_dense or basis.num_values > LARGEST_KERNEL:
        raise _too_large(ref, basis.kernel, f" in {basis.name!r}")
    matrices = _matrices_of(basis, kept.by_importance)
    analysis, synthesis = matrices.analysis, matrices.synthesis
    keep = None
    if kept.mask is not None:
        coefficients = 1 if analysis is None else len(analysis)
        keep = _keeper(kept.mask, coefficients, flat=analysis is None)
    return Layer(
        dtype=DTYPE_NAMES[ref.weight.dtype],
        shape=tuple(ref.weight.shape),
        kernels=ref.weight.reshape(-1, 1 if synthesis is None else len(synthesis)),
        peak=size.peak,
        exponent=size.exponent,
        norm=size.norm,
        basis=matrices.basis,
        basis_bytes=matrices.basis_bytes,
        analysis=analysis,
        synthesis=synthesis,
        keep=keep,
    )


class _Matrices(NamedTuple):
    """A basis as it is stored, and what computes with it; all empty for the identity."""

    basis: StoredBasis | None = None
    basis_bytes: bytes = b""
    analysis: Floats | None = None
    synthesis: Floats | None = None

    @property
    def nbytes(self) -> int:
        matrices = (self.analysis, self.synthesis)
        return sum(matrix.nbytes for matrix in matrices if matrix is not None)


_CACHE = ByteCache[_Matrices](CACHE_BYTES, lambda matrices: matrices.nbytes)


def _matrices_of(basis: Basis, by_importance: bool) -> _Matrices:
    def make() -> _Matrices:
        operator = basis.importance_operator if by_importance else basis.coefficient_operator
        if operator.identity:
            return _Matrices()
        axes = axis_functions(basis)
        stored, payload = store(basis.name, basis.kernel, operator, axes, by_importance)
        analysis = operator.analysis.astype(np.float32)
        return _Matrices(stored, payload, analysis, stored.matrix(payload))

    if basis.data_driven:
        return make()
    return _CACHE.get((basis, by_importance), make)


def _keeper(
    mask: torch.Tensor, M: int, *, flat: bool
) -> Callable[[int, int], npt.NDArray[np.bool_]]:
    """Gives the mask ``(M, count)`` of some kernels."""

    def keep(start: int, count: int) -> npt.NDArray[np.bool_]:
        block, skipped = divmod(start, masks.BLOCK)
        offset, count = block * M * 2, skipped + count
        part = mask[offset : offset + masks.mask_bytes(count, M, flat=flat)]
        return masks.unpack(part, count, M, flat=flat).numpy().T[:, skipped:]

    return keep
