"""Large kernels: a basis as two small matrices a level, where ``A`` and ``S`` would not fit.

Every basis of this library but ``"klt"`` is separable: a level multiplies a block of values by one
matrix for its rows and one for its columns, and what comes out top left goes on to the next level.
A matrix of 784 x 128 weights then takes a few matrices of that size instead of two of
``100352 x 100352``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pywt
import torch

from .matrices import NEGLIGIBLE, Matrix, frozen

Size = tuple[int, int]


class Axis(NamedTuple):
    """One level along one axis: ``n`` values become ``m`` coefficients, approximations first.

    Attributes:
        analysis: ``(m, n)``.
        synthesis: ``(n, m)``.
        coarse: how many of the coefficients are approximations.
        start: where in the grid the details begin.
        reach: ``(m,)``, the largest magnitude with which each one takes a value of the kernel.
        norms: ``(m,)``, the norm of what each one puts back into the kernel.
    """

    analysis: Matrix
    synthesis: Matrix
    coarse: int
    start: int
    reach: Matrix
    norms: Matrix

    def places(self) -> tuple[tuple[slice, slice], tuple[slice, slice]]:
        """Approximations and details: their place among the coefficients, and in the grid."""
        m, details = len(self.analysis), len(self.analysis) - self.coarse
        return (
            (slice(0, self.coarse), slice(0, self.coarse)),
            (slice(self.coarse, m), slice(self.start, self.start + details)),
        )


@dataclass(frozen=True, eq=False)
class Factors:
    """A basis in factors. Hashes by identity.

    Attributes:
        kernel: ``(kh, kw)``.
        grid: ``(Mh, Mw)``, as ``pywt.coeffs_to_array`` arranges the coefficients.
        levels: the axes ``(rows, columns)`` of each level, the finest first; none is the identity.
    """

    kernel: Size
    grid: Size
    levels: tuple[tuple[Axis, Axis], ...]

    def places(self, level: int) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """Where the coefficients that a level leaves lie: in its block, and in the grid."""
        rows, columns = self.levels[level]
        pairs = [
            ((row[0], column[0]), (row[1], column[1]))
            for row in rows.places()
            for column in columns.places()
        ]
        # The approximations go on, but for the last ones.
        return pairs if level == len(self.levels) - 1 else pairs[1:]

    @cached_property
    def reachable(self) -> npt.NDArray[np.bool_]:
        """``(Mh, Mw)``: False at the structural zeros."""
        reach = self._products([(rows.reach, columns.reach) for rows, columns in self.levels])
        result: npt.NDArray[np.bool_] = reach > NEGLIGIBLE * reach.max()
        return result

    def norms(self) -> Matrix:
        """``(Mh, Mw)``: the norm of the kernel that each coefficient makes."""
        return self._products([(rows.norms, columns.norms) for rows, columns in self.levels])

    @cached_property
    def off_norm(self) -> float:
        """How far the norm of any axis function is from 1."""
        norms = [axis.norms for axes in self.levels for axis in axes]
        return max((float(np.abs(norm - 1).max()) for norm in norms), default=0.0)

    @cached_property
    def orthonormal(self) -> bool:
        """True where every level is, on the coefficients that can be non-zero."""
        return all(_orthonormal(axis) for axes in self.levels for axis in axes)

    def _products(self, axes: Sequence[tuple[Matrix, Matrix]]) -> Matrix:
        if not axes:
            return np.ones(self.grid)
        result = np.zeros(self.grid)
        for level, (rows, columns) in enumerate(axes):
            for (row, column), place in self.places(level):
                result[place] = np.outer(rows[row], columns[column])
        return result


def wavelet_factors(name: str, kernel: Size, mode: str, level: int) -> Factors:
    """PyWavelets' ``wavedec2`` and ``waverec2``, from what it answers to unit impulses.

    Args:
        name: any of ``pywt.wavelist(kind="discrete")``.
        kernel: ``(kh, kw)``.
        mode: any of ``pywt.Modes.modes``.
        level: how many levels, 0 or more.

    Raises:
        ValueError: PyWavelets cannot extend an axis this short in this mode.

    Example:
        >>> wavelet_factors("db4", (784, 128), "periodization", 3).grid
        (784, 128)
    """
    axes = [_wavelet_axis(name, n, mode, level) for n in kernel]
    grid = tuple(
        axis[0].start + len(axis[0].analysis) - axis[0].coarse if axis else n
        for axis, n in zip(axes, kernel, strict=True)
    )
    return Factors(kernel, (grid[0], grid[1]), tuple(zip(*axes, strict=True)))


def kronecker_factors(rows: Matrix, columns: Matrix) -> Factors:
    """The orthonormal basis ``kron(rows, columns)``."""
    axes = []
    for matrix in (rows, columns):
        n = len(matrix)
        axes.append(Axis(matrix, matrix.T, n, n, np.abs(matrix).max(axis=1), np.ones(n)))
    kernel = (len(rows), len(columns))
    return Factors(kernel, kernel, ((axes[0], axes[1]),))


def _wavelet_axis(name: str, n: int, mode: str, levels: int) -> list[Axis]:
    found = []
    forward, backward = None, None
    for _ in range(levels):
        size = n if forward is None else len(forward)
        low, high = pywt.dwt(np.eye(size), name, mode, axis=0)
        m = len(low)
        A = np.concatenate([low, high])
        ones = np.eye(m)
        halves = (
            pywt.idwt(ones, None, name, mode, axis=0),
            pywt.idwt(None, ones, name, mode, axis=0),
        )
        S = np.concatenate(halves, axis=1)[:size]
        whole = A if forward is None else A @ forward
        back = S if backward is None else backward @ S
        reach, norms = np.abs(whole).max(axis=1), np.linalg.norm(back, axis=0)
        found.append((frozen(A), frozen(S), m, frozen(reach), frozen(norms)))
        forward, backward = whole[:m], back[:, :m]
    axes: list[Axis] = []
    start = found[-1][2] if found else 0
    for A, S, m, reach, norms in reversed(found):
        axes.insert(0, Axis(A, S, m, start, reach, norms))
        start += m
    return axes


def _orthonormal(axis: Axis) -> bool:
    used = axis.reach > NEGLIGIBLE * axis.reach.max()
    A, S = axis.analysis[used], axis.synthesis[:, used]
    return bool(
        len(A) == A.shape[1]
        and np.allclose(A, S.T, atol=1e-10)
        and np.allclose(A @ A.T, np.eye(len(A)), atol=1e-10)
    )


class FactoredTransform:
    """The factors as tensors, with the structural zeros as plain zeros among the coefficients.

    Args:
        factors: the basis.
        by_importance: True scales a coefficient by the norm of the kernel that it makes.
        dtype: float32 or float64.
        device: where to compute.
    """

    def __init__(
        self, factors: Factors, by_importance: bool, dtype: torch.dtype, device: torch.device
    ) -> None:
        self._factors = factors
        self._levels = [
            tuple(
                (
                    torch.tensor(axis.analysis, dtype=dtype, device=device),
                    torch.tensor(axis.synthesis, dtype=dtype, device=device),
                )
                for axis in axes
            )
            for axes in factors.levels
        ]
        used = factors.reachable
        scale: Matrix | None = None
        if by_importance and factors.off_norm > torch.finfo(dtype).eps / 8:
            scale = factors.norms()
            used = used & (scale > NEGLIGIBLE * scale.max())
            scale = np.where(used, scale, 1)
        self._unused = None if used.all() else torch.tensor(~used, device=device)
        self._scale = None if scale is None else torch.tensor(scale, dtype=dtype, device=device)

    def analyse(self, kernels: torch.Tensor) -> torch.Tensor:
        """Coefficients ``(n, Mh * Mw)`` of kernels ``(n, kh, kw)``, a new tensor or a view."""
        if not self._levels:
            return kernels.reshape(len(kernels), -1)
        packed = kernels.new_zeros(len(kernels), *self._factors.grid)
        block = kernels
        for level, ((rows, _), (columns, _)) in enumerate(self._levels):
            found = rows @ block @ columns.T
            for source, place in self._factors.places(level):
                packed[:, place[0], place[1]] = found[:, source[0], source[1]]
            row, column = self._factors.levels[level]
            block = found[:, : row.coarse, : column.coarse]
        if self._unused is not None:
            packed.masked_fill_(self._unused, 0)
        if self._scale is not None:
            packed.mul_(self._scale)
        return packed.flatten(1)

    def synthesise(self, coefficients: torch.Tensor) -> torch.Tensor:
        """Kernels ``(n, kh * kw)`` of coefficients ``(n, Mh * Mw)``."""
        if not self._levels:
            return coefficients
        packed = coefficients.view(-1, *self._factors.grid)
        if self._scale is not None:
            packed = packed / self._scale
        block: torch.Tensor | None = None
        for level in reversed(range(len(self._levels))):
            (_, rows), (_, columns) = self._levels[level]
            row, column = self._factors.levels[level]
            whole = packed.new_empty(len(packed), rows.shape[1], columns.shape[1])
            for source, place in self._factors.places(level):
                whole[:, source[0], source[1]] = packed[:, place[0], place[1]]
            if block is not None:
                whole[:, : row.coarse, : column.coarse] = block
            block = rows @ whole @ columns.T
        assert block is not None
        return block.flatten(1)
