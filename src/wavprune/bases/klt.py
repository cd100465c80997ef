"""The Karhunen-Loeve transform: the principal components of a layer's own kernels."""

from __future__ import annotations

import numpy as np
import torch

from ..errors import WavpruneError
from .basis import Basis, Kernel, Request
from .matrices import Matrix, frozen
from .registry import Family, register
from .transform import Array, Transform

# The analysis matrix of longer kernels would take more than 128 MiB.
MAX_VALUES = 4096


class PrincipalComponents(Family):
    """Computed from the weight; a file must store the matrix."""

    data_driven = True

    def max_level(self, name: str, kernel: Kernel) -> int:
        """1, but 0 where there is no spatial axis."""
        del name
        return int(kernel != (1, 1))

    def build_for(self, request: Request, weight: torch.Tensor) -> Basis:
        """The basis of one weight; see ``Family``.

        Raises:
            WavpruneError: the kernels have more than ``MAX_VALUES`` values.
        """
        num_values = request.kernel[0] * request.kernel[1]
        if num_values > MAX_VALUES:
            raise WavpruneError(
                f"{request.name!r} of {request.size} kernels needs a matrix of {num_values} x "
                f"{num_values}; allowed: kernels of at most {MAX_VALUES} values"
            )
        return self.restore(request, klt_matrix(weight))

    def restore(self, request: Request, matrix: Matrix) -> Basis:
        """The basis from its analysis matrix ``(K, K)``; see ``Family``."""
        kernel = request.kernel
        size = kernel[0] * kernel[1]
        if matrix.shape != (size, size) or not np.isfinite(matrix).all():
            raise WavpruneError(
                f"its basis has a matrix of {matrix.shape}; allowed: finite values, {(size, size)}"
            )
        return Basis(
            name=request.name,
            kernel=kernel,
            mode=None,
            level_requested=request.level,
            level_used=1,
            level_max=1,
            grid=kernel,
            bands={request.name: (slice(0, kernel[0]), slice(0, kernel[1]))},
            matrix=frozen(matrix),
            data_driven=True,
        )

    def transform(self, basis: Basis, kernels: Array) -> Transform:
        """The singular vectors of these kernels."""
        del basis
        return _Principal(kernels)


def klt_matrix(kernels: torch.Tensor, rows_at_once: int = 1 << 15) -> Matrix:
    """Right singular vectors ``(K, K)`` of a kernel matrix, strongest first.

    The matrix is not centred. Each vector's largest entry (the first of equals) is positive, so
    that the result is reproducible.

    Args:
        kernels: ``(..., kh, kw)`` or ``(N, K)``: every leading axis counts kernels.
        rows_at_once: kernels converted to float64 at a time, which bounds the extra memory.

    Returns:
        The analysis matrix, orthonormal; its transpose is the synthesis matrix.
    """
    K = kernels.shape[-1] * (kernels.shape[-2] if kernels.ndim > 2 else 1)
    triangle = np.zeros((0, K))
    for block in torch.split(kernels.reshape(-1, K), rows_at_once):
        values = block.detach().to("cpu", torch.float64).numpy()
        # R of a QR keeps the right singular vectors, and QR of stacked Rs is the R of the whole.
        stacked = np.concatenate([triangle, values])
        triangle = np.asarray(np.linalg.qr(stacked, mode="r"), dtype=np.float64)
    _, _, vectors = np.linalg.svd(triangle, full_matrices=True)
    sizes = np.abs(vectors)
    # Entries equal but for rounding count as equal: the first of them decides.
    peak = (sizes >= (1 - 1e-6) * sizes.max(axis=1, keepdims=True)).argmax(axis=1)
    peaks = np.take_along_axis(vectors, peak[:, None], axis=1)
    return frozen(np.where(peaks < 0, -vectors, vectors))


class _Principal(Transform):
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


register("klt", PrincipalComponents())
