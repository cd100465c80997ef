"""A separable basis as two linear maps per level.

A level transforms a block of values along its rows and along its columns, and the approximations,
top left, go on to the next level. A matrix of 784 x 128 weights then takes a few matrices of that
size instead of two of ``100352 x 100352``, and a longer axis no matrix at all.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .axes import Axis, orthonormal_axis
from .matrices import NEGLIGIBLE, Matrix, frozen

Size = tuple[int, int]


class Axes(NamedTuple):
    """The factors of ``A = kron(row_analysis, column_analysis)`` and of ``S`` likewise.

    Attributes:
        row_analysis: ``(Mh', kh)``.
        column_analysis: ``(Mw', kw)``.
        row_synthesis: ``(kh, Mh')``.
        column_synthesis: ``(kw, Mw')``.
        form: what both axes are; see ``Axis.form``.
    """

    row_analysis: Matrix
    column_analysis: Matrix
    row_synthesis: Matrix
    column_synthesis: Matrix
    form: str | None


@dataclass(frozen=True, eq=False)
class Factors:
    """A separable basis in factors.

    Attributes:
        kernel: ``(kh, kw)``.
        grid: ``(Mh, Mw)``, as ``pywt.coeffs_to_array`` arranges the coefficients.
        levels: the axes ``(rows, columns)`` of each level, the finest first; none is the identity.
    """

    kernel: Size
    grid: Size
    levels: tuple[tuple[Axis, Axis], ...]

    def slices(self, level: int) -> list[tuple[tuple[slice, slice], tuple[slice, slice]]]:
        """The slices of what a level leaves: in its block of coefficients, and in the grid."""
        rows, columns = self.levels[level]
        pairs = [
            ((row[0], column[0]), (row[1], column[1]))
            for row in rows.slices()
            for column in columns.slices()
        ]
        # The approximations go on to the next level, but for the last ones.
        return pairs if level == len(self.levels) - 1 else pairs[1:]

    @cached_property
    def reachable(self) -> npt.NDArray[np.bool_]:
        """``(Mh, Mw)``: False at the structural zeros."""
        if not self.levels:
            return np.ones(self.grid, dtype=np.bool_)
        blocks = [
            (rows.reach[row], columns.reach[column], target)
            for level, (rows, columns) in enumerate(self.levels)
            for (row, column), target in self.slices(level)
            if rows.reach[row].size and columns.reach[column].size
        ]
        result = np.zeros(self.grid, dtype=np.bool_)
        least = NEGLIGIBLE * max(row.max() * column.max() for row, column, _ in blocks)
        for row, column, target in blocks:
            every = row.min() * column.min() > least
            result[target] = every or np.outer(row, column) > least
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
        return all(axis.is_orthonormal for axes in self.levels for axis in axes)

    def _products(self, axes: Sequence[tuple[Matrix, Matrix]]) -> Matrix:
        if not axes:
            return np.ones(self.grid)
        result = np.zeros(self.grid)
        for level, (rows, columns) in enumerate(axes):
            for (row, column), target in self.slices(level):
                result[target] = np.outer(rows[row], columns[column])
        return result

    @cached_property
    def is_identity(self) -> bool:
        """True where every coefficient is one value of the kernel."""
        return all(
            axis_map.is_identity
            for axes in self.levels
            for axis in axes
            for axis_map in (axis.analysis, axis.synthesis)
        )

    def dense(self) -> tuple[Matrix, Matrix]:
        """``A`` (M, K) and ``S`` (K, M), the coefficients in the order of the grid."""
        if len(self.levels) == 1:
            rows, columns = self.levels[0]
            return (
                frozen(np.kron(rows.analysis.matrix(), columns.analysis.matrix())),
                frozen(np.kron(rows.synthesis.matrix(), columns.synthesis.matrix())),
            )
        transform = FactoredTransform(self, False, torch.float64, torch.device("cpu"), exact=False)
        num_values, num_coefficients = int(np.prod(self.kernel)), int(np.prod(self.grid))
        impulses = torch.eye(num_values, dtype=torch.float64, device="cpu")
        units = torch.eye(num_coefficients, dtype=torch.float64, device="cpu")
        A = transform.analyse(impulses.view(num_values, *self.kernel)).T
        return frozen(A.numpy()), frozen(transform.synthesise(units).T.numpy())

    def kronecker(self, used: npt.NDArray[np.bool_], scaled: bool) -> Axes | None:
        """The factors of the matrices of some coefficients, where each is one Kronecker product.

        Args:
            used: ``(Mh, Mw)``, which coefficients.
            scaled: True multiplies each coefficient by the norm of the kernel that it makes.

        Returns:
            The factors; None where there are several levels, or none, or where the coefficients
            are not the product of some rows with some columns.
        """
        if len(self.levels) != 1:
            return None
        used_rows = np.asarray(used.any(axis=1))
        used_columns = np.asarray(used.any(axis=0))
        if not np.array_equal(used, np.outer(used_rows, used_columns)):
            return None
        parts = []
        forms = set()
        for axis, chosen in zip(self.levels[0], (used_rows, used_columns), strict=True):
            scale = axis.norms[chosen] if scaled else np.ones(np.count_nonzero(chosen))
            A, S = axis.analysis.matrix(), axis.synthesis.matrix()
            parts.append((A[chosen] * scale[:, None], S[:, chosen] / scale))
            # The first three: approximations of two pairs and their one detail, or all of three.
            forms.add(axis.form if chosen[:3].all() and not chosen[3:].any() else None)
        form = forms.pop() if len(forms) == 1 else None
        (row_analysis, row_synthesis), (column_analysis, column_synthesis) = parts
        return Axes(row_analysis, column_analysis, row_synthesis, column_synthesis, form)


def single_level(rows: Axis, columns: Axis) -> Factors:
    """The basis of one level, with as many coefficients as the kernel has values."""
    kernel = (rows.analysis.shape[1], columns.analysis.shape[1])
    return Factors(kernel, kernel, ((rows, columns),))


def kronecker_factors(rows: Matrix, columns: Matrix, forms: tuple[str | None, ...]) -> Factors:
    """The orthonormal basis ``kron(rows, columns)``; ``forms`` as in ``Axis``."""
    return single_level(orthonormal_axis(rows, forms[0]), orthonormal_axis(columns, forms[1]))


class FactoredTransform:
    """A separable basis as tensors; structural zeros stay among the coefficients, as zeros.

    Args:
        factors: the basis.
        by_importance: True scales a coefficient by the norm of the kernel that it makes.
        dtype: float32 or float64.
        device: where to compute.
        exact: True makes structural zeros exactly 0; False leaves what rounding made of them.
    """

    def __init__(
        self,
        factors: Factors,
        by_importance: bool,
        dtype: torch.dtype,
        device: torch.device,
        exact: bool = True,
    ) -> None:
        self._factors = factors
        self._levels = [
            tuple(
                (axis.analysis.bind(dtype, device), axis.synthesis.bind(dtype, device))
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
        self._unused = None if used.all() or not exact else torch.tensor(~used, device=device)
        self._scale = None if scale is None else torch.tensor(scale, dtype=dtype, device=device)

    @property
    def nbytes(self) -> int:
        """Bytes of everything that it keeps."""
        maps = sum(part.nbytes for level in self._levels for axis in level for part in axis)
        tables = (table for table in (self._unused, self._scale) if table is not None)
        return maps + sum(table.nbytes for table in tables)

    def analyse(self, kernels: torch.Tensor) -> torch.Tensor:
        """Coefficients ``(n, Mh * Mw)`` of kernels ``(n, kh, kw)``, a new tensor or a view."""
        if not self._levels:
            return kernels.reshape(len(kernels), -1)
        packed = kernels.new_zeros(len(kernels), *self._factors.grid)
        block = kernels
        for level, ((rows, _), (columns, _)) in enumerate(self._levels):
            transformed = columns(rows(block, -2), -1)
            for source, target in self._factors.slices(level):
                packed[:, target[0], target[1]] = transformed[:, source[0], source[1]]
            row, column = self._factors.levels[level]
            block = transformed[:, : row.coarse, : column.coarse]
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
            whole = packed.new_empty(len(packed), row.analysis.shape[0], column.analysis.shape[0])
            for source, target in self._factors.slices(level):
                whole[:, source[0], source[1]] = packed[:, target[0], target[1]]
            if block is not None:
                whole[:, : row.coarse, : column.coarse] = block
            block = columns(rows(whole, -2), -1)
        assert block is not None
        return block.flatten(1)
