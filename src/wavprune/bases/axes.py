"""Linear maps along one axis of a tensor: the factors of a separable basis."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .matrices import NEGLIGIBLE, Matrix, frozen

# The longest axis that is multiplied by a matrix; longer ones have fast transforms.
LONGEST_DENSE_AXIS = 1024

Constants = Sequence[torch.Tensor]


class AxisMap:
    """A linear map of ``n`` values to ``m`` along one axis.

    Attributes:
        shape: ``(m, n)``.
        constants: the arrays that it computes with, float64 or intp.
        is_identity: True where it changes nothing.
    """

    shape: tuple[int, int]
    constants: tuple[npt.NDArray[Any], ...] = ()
    is_identity: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the constants."""
        return sum(constant.nbytes for constant in self.constants)

    def bind(self, dtype: torch.dtype, device: torch.device) -> BoundMap:
        """The map with its constants on a device; float64 ones become ``dtype``."""
        constants = tuple(
            torch.tensor(
                constant, dtype=dtype if constant.dtype.kind == "f" else torch.int64, device=device
            )
            for constant in self.constants
        )
        return BoundMap(self, constants)

    def apply(self, x: torch.Tensor, dim: int, constants: Constants) -> torch.Tensor:
        """The map along ``dim``, -1 or -2, of ``(..., n, columns)`` or ``(..., rows, n)``."""
        raise NotImplementedError

    def matrix(self) -> Matrix:
        """``(m, n)``: the dense matrix, for short axes."""
        cpu = torch.device("cpu")
        identity = torch.eye(self.shape[1], dtype=torch.float64, device=cpu)
        return frozen(self.bind(torch.float64, cpu)(identity, -2).numpy())


class BoundMap(NamedTuple):
    """An ``AxisMap`` with its constants on one device, ready to run."""

    map: AxisMap
    constants: tuple[torch.Tensor, ...]

    def __call__(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The map along ``dim``, -1 or -2."""
        return self.map.apply(x, dim, self.constants)

    @property
    def nbytes(self) -> int:
        """Bytes of the constants."""
        return sum(constant.nbytes for constant in self.constants)


class DenseMap(AxisMap):
    """A product with a read-only matrix ``(m, n)``, which it keeps in its memory order."""

    def __init__(self, matrix: Matrix) -> None:
        self._matrix = matrix
        m, n = matrix.shape
        self.shape = (m, n)
        self.constants = (matrix,)
        self.is_identity = m == n and np.array_equal(matrix, np.eye(n))

    def apply(self, x: torch.Tensor, dim: int, constants: Constants) -> torch.Tensor:
        """One matmul."""
        return multiply(constants[0], x, dim)

    def matrix(self) -> Matrix:
        """The matrix itself."""
        return self._matrix


def multiply(matrix: torch.Tensor, x: torch.Tensor, dim: int) -> torch.Tensor:
    """The product of a matrix ``(m, n)`` with every vector along ``dim``, -1 or -2."""
    return matrix @ x if dim == -2 else x @ matrix.T


def along(vector: torch.Tensor, dim: int) -> torch.Tensor:
    """A vector ``(n,)`` in a shape that broadcasts along ``dim``, -1 or -2."""
    return vector if dim == -1 else vector[:, None]


def every_second(x: torch.Tensor, dim: int, start: int) -> torch.Tensor:
    """A view of the values at ``start``, ``start + 2``, ... along ``dim``, -1 or -2."""
    return x[..., start::2] if dim == -1 else x[..., start::2, :]


class Axis(NamedTuple):
    """One level along one axis: ``n`` values become ``m`` coefficients, approximations first.

    Attributes:
        analysis: ``(m, n)``.
        synthesis: ``(n, m)``.
        coarse: how many of the coefficients are approximations.
        start: index in the grid at which the details begin.
        reach: ``(m,)``, the largest magnitude with which each one reads a value of the kernel.
        norms: ``(m,)``, the norm of what each one adds to the kernel.
        form: ``"pairs"`` or ``"merges"`` where the axis has three values and needs no
            multiplications but for one scale per coefficient, else None (``csrc/kernel_math.h``).
        orthonormal: whether it is, on the coefficients that can be non-zero; None where the
            matrices tell.
    """

    analysis: AxisMap
    synthesis: AxisMap
    coarse: int
    start: int
    reach: Matrix
    norms: Matrix
    form: str | None = None
    orthonormal: bool | None = None

    def slices(self) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Approximations and details: their slices of the coefficients, and of the grid."""
        m = self.analysis.shape[0]
        details = m - self.coarse
        return (
            (slice(0, self.coarse), slice(0, self.coarse)),
            (slice(self.coarse, m), slice(self.start, self.start + details)),
        )

    @property
    def is_orthonormal(self) -> bool:
        """True where the coefficients that can be non-zero are an orthonormal basis."""
        if self.orthonormal is not None:
            return self.orthonormal
        return orthonormal(self.analysis.matrix(), self.synthesis.matrix(), non_zero(self.reach))


def non_zero(reach: Matrix) -> npt.NDArray[np.bool_]:
    """Which coefficients can be non-zero, from the largest magnitude that each one reads with."""
    return np.asarray(reach > NEGLIGIBLE * reach.max())


def orthonormal(A: Matrix, S: Matrix, used: npt.NDArray[np.bool_]) -> bool:
    """True where ``S = A.T`` and ``A @ A.T = I`` on the used coefficients."""
    A, S = A[used], S[:, used]
    return bool(
        len(A) == A.shape[1]
        and np.allclose(A, S.T, atol=1e-10)
        and np.allclose(A @ A.T, np.eye(len(A)), atol=1e-10)
    )


def orthonormal_axis(matrix: Matrix, form: str | None = None) -> Axis:
    """The axis of an orthonormal analysis matrix ``(n, n)``."""
    n = len(matrix)
    matrix = frozen(matrix)
    reach = np.abs(matrix).max(axis=1)
    return Axis(DenseMap(matrix), DenseMap(matrix.T), n, n, reach, np.ones(n), form)


def fast_orthonormal_axis(analysis: AxisMap, synthesis: AxisMap, reach: Matrix) -> Axis:
    """The axis of an orthonormal transform that has no matrix; ``reach`` as in ``Axis``."""
    n = len(reach)
    return Axis(analysis, synthesis, n, n, reach, np.ones(n), orthonormal=True)
