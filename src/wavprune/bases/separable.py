"""Bases that multiply both axes of a kernel by an orthonormal matrix each."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from .basis import Basis, Request
from .factors import Factors


def separable_basis(
    request: Request,
    level_used: int,
    level_max: int,
    factors: Factors,
    spans: Sequence[Mapping[str, slice]],
) -> Basis:
    """A basis without a boundary, with as many coefficients as the kernel has values.

    Args:
        request: what was asked for.
        level_used: the level that ran.
        level_max: the deepest level that exists.
        factors: of the basis.
        spans: per axis, the name of each band and which of its coefficients belong to it.
    """
    return Basis(
        name=request.name,
        kernel=request.kernel,
        mode=None,
        level_requested=request.level,
        level_used=level_used,
        level_max=level_max,
        grid=request.kernel,
        bands=_Products(spans[0], spans[1]),
        factors=factors,
    )


class _Products(Mapping[str, tuple[slice, slice]]):
    """The bands ``row,column``, made when asked for: a large kernel has millions."""

    def __init__(self, rows: Mapping[str, slice], columns: Mapping[str, slice]) -> None:
        self._rows, self._columns = rows, columns

    def __getitem__(self, name: str) -> tuple[slice, slice]:
        row, _, column = name.partition(",")
        return self._rows[row], self._columns[column]

    def __iter__(self) -> Iterator[str]:
        return (f"{row},{column}" for row in self._rows for column in self._columns)

    def __len__(self) -> int:
        return len(self._rows) * len(self._columns)
