"""The Karhunen-Loeve transform: the principal components of a layer's own kernels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch

from ..common.extension import has_extension
from ..errors import WavpruneError
from .basis import Basis, Kernel, Request
from .matrices import Matrix, frozen
from .registry import Family, register
from .transform import Array, Transform

# The analysis matrix of longer kernels would take more than 128 MiB.
MAX_VALUES = 4096
# Below this, squares of float64 may have lost digits.
LEAST_ENERGY = 1e-200
# Where torch sums, what is converted to float64 at a time.
VALUES_AT_ONCE = 1 << 20


class PrincipalComponents(Family):
    """Computed from the weight; a file must store the matrix."""

    data_driven = True

    def max_level(self, name: str, kernel: Kernel) -> int:
        """1, but 0 where there is no spatial axis."""
        del name
        return int(kernel != (1, 1))

    def check(self, request: Request) -> None:
        """See ``Family``.

        Raises:
            WavpruneError: the kernels have more than ``MAX_VALUES`` values.
        """
        num_values = request.kernel[0] * request.kernel[1]
        if num_values > MAX_VALUES:
            raise WavpruneError(
                f"{request.name!r} of {request.size} kernels needs a matrix of {num_values} x "
                f"{num_values}; allowed: kernels of at most {MAX_VALUES} values"
            )

    def build_all(
        self, requests: Sequence[Request], weights: Sequence[torch.Tensor]
    ) -> list[Basis]:
        """The bases of several weights; see ``Family``."""
        pairs = zip(requests, klt_matrices(weights), strict=True)
        return [self.restore(request, matrix) for request, matrix in pairs]

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


def klt_matrix(kernels: torch.Tensor) -> Matrix:
    """The principal components ``(K, K)`` of a kernel matrix; see ``klt_matrices``.

    Args:
        kernels: ``(..., kh, kw)`` or ``(N, K)``: every leading axis counts kernels.

    Raises:
        WavpruneError: a value is not finite.

    Example:
        >>> klt_matrix(torch.tensor([[3.0, 0.0], [0.0, 4.0]]))
        array([[0., 1.],
               [1., 0.]])
    """
    return klt_matrices([kernels])[0]


def klt_matrices(weights: Sequence[torch.Tensor]) -> list[Matrix]:
    """The right singular vectors ``(K, K)`` of kernel matrices, the strongest first.

    They are the eigenvectors of the Gram matrix ``W.T @ W`` (W is not centred), which is summed in
    float64. Squares lose what is below 1e-8 of the largest singular value: directions that weak
    come out as any orthonormal basis of what they span, and what they hold is less than float32
    rounds off. Each vector's largest entry (the first of equals) is positive, so that the result
    is reproducible.

    Args:
        weights: ``(..., kh, kw)`` or ``(N, K)`` each: every leading axis counts kernels.

    Returns:
        The analysis matrices, orthonormal; their transposes are the synthesis matrices.

    Raises:
        WavpruneError: a value is not finite.
    """
    grams = [
        matrix if _in_range(matrix) else _rescaled(weight)
        for matrix, weight in zip(gram_matrices(weights), weights, strict=True)
    ]
    return [frozen(_vectors(gram)) for gram in grams]


def gram_matrices(weights: Sequence[torch.Tensor]) -> list[Array]:
    """``W.T @ W`` of each kernel matrix W ``(N, K)``, in float64.

    On the CPU the compiled code sums, in an order of its own that depends on nothing else;
    elsewhere torch does.

    Args:
        weights: ``(..., kh, kw)`` or ``(N, K)`` each.

    Returns:
        ``(K, K)`` each; not finite where a weight is not, or where its squares overflow.
    """
    on_cpu = all(weight.device.type == "cpu" for weight in weights)
    if not (weights and on_cpu and has_extension()):
        return [_gram_by_torch(weight) for weight in weights]
    kernels = [_as_kernels(weight.detach()) for weight in weights]
    sums: Array = torch.ops.wavprune.gram(kernels).numpy()
    sizes = [math.prod(weight.shape[2:]) for weight in kernels]
    parts = np.split(sums, np.cumsum([size**2 for size in sizes])[:-1])
    return [part.reshape(size, size) for part, size in zip(parts, sizes, strict=True)]


def _as_kernels(weight: torch.Tensor) -> torch.Tensor:
    """``(Cout, Cin, kh, kw)``."""
    if weight.ndim == 2:
        return weight[:, None, None, :]
    return weight if weight.ndim == 4 else weight.reshape(-1, 1, *weight.shape[-2:])


def _gram_by_torch(weight: torch.Tensor) -> Array:
    kernels = _as_kernels(weight.detach())
    K = math.prod(kernels.shape[2:])
    total = torch.zeros(K, K, dtype=torch.float64, device=weight.device)
    channels = max(VALUES_AT_ONCE // max(math.prod(kernels.shape[1:]), 1), 1)
    for part in torch.split(kernels, channels):
        matrix = part.to(torch.float64).reshape(-1, K)
        total += matrix.T @ matrix
    result: Array = total.cpu().numpy()
    return result


def _in_range(gram: Array) -> bool:
    """True where no square has left the range of float64."""
    energy = float(np.trace(gram))
    return math.isfinite(energy) and energy > LEAST_ENERGY


def _rescaled(weight: torch.Tensor) -> Array:
    """The Gram matrix of a weight times a power of two, which makes its largest value about 1."""
    peak = float(weight.detach().abs().max()) if weight.numel() else 0.0
    if not math.isfinite(peak):
        raise WavpruneError("klt needs finite weights")
    exponent = math.frexp(peak)[1]
    # In two steps: the power alone may leave the range.
    scaled = weight.detach().to(torch.float64) * 2.0 ** (-exponent // 2)
    return gram_matrices([scaled * 2.0 ** (-exponent - -exponent // 2)])[0]


def _vectors(gram: Array) -> Array:
    """The eigenvectors of a Gram matrix, the strongest first, as rows."""
    # One matrix at a time: the last bits depend on where in memory a matrix starts, and within a
    # batch that depends on the others. By torch: numpy's threads would go on spinning, on the cores
    # that prune next.
    columns: Array = torch.linalg.eigh(torch.from_numpy(gram)).eigenvectors.numpy()
    return _oriented(columns[:, ::-1].T)


def _oriented(vectors: Array) -> Array:
    """Rows ``(K, K)``, each turned so that its largest entry is positive."""
    sizes = np.abs(vectors)
    # Entries equal but for rounding count as equal: the first of them decides.
    peak = (sizes >= (1 - 1e-6) * sizes.max(axis=1, keepdims=True)).argmax(axis=1)
    peaks = np.take_along_axis(vectors, peak[:, None], axis=1)
    return np.where(peaks < 0, -vectors, vectors)


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
