"""The synthesis matrix of a basis as a compressed file carries it.

A file needs nothing but itself to be decoded, so it holds the matrix, once for all layers of that
basis. Column m of a separable basis is the outer product of one function along each axis; then the
file holds these functions and, for each column, which of them it takes. That is 36 bytes for 3x3
kernels of ``uhaar`` or ``dct``, and 4 kB where the matrix of a 32x32 kernel has 4 MB. Every other
matrix is stored as it is. All values are float32.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import numpy as np
import numpy.typing as npt

from ..bases.basis import Operator
from ..common.checks import is_count
from ..errors import WavpruneError
from .selection import AxisFunctions

Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
# How far from the operator's matrix, relatively, the product of the functions may be.
TOLERANCE = 1e-6


@dataclass(frozen=True)
class StoredBasis:
    """What a file says of a basis.

    Attributes:
        name: of the basis, for reports; decoding does not depend on it.
        kernel: the size of a kernel.
        coefficients: M, how many a kernel has.
        tensor: in which tensor's ``matrix`` part its bytes are.
        crc: CRC-32 of those bytes.
        functions: how many functions along each axis are stored; None stores the matrix itself.
        shared: True where the functions of the first axis are those of all.
        indexed: True where each column names its functions; else the columns are all combinations,
            the last axis fastest.
    """

    name: str
    kernel: tuple[int, ...]
    coefficients: int
    tensor: str
    crc: int
    functions: tuple[int, ...] | None = None
    shared: bool = False
    indexed: bool = False

    @property
    def K(self) -> int:  # noqa: N802  # the design's letter
        """How many values a kernel has."""
        return math.prod(self.kernel)

    @property
    def _index_type(self) -> np.dtype[Any]:
        return np.dtype("u1" if max(self.functions or (0,)) <= 1 << 8 else "<u2")

    @property
    def size(self) -> int:
        """How many bytes the file holds of it."""
        if self.functions is None:
            return 4 * self.K * self.coefficients
        lengths = [n * count for n, count in zip(self.kernel, self.functions, strict=True)]
        index = self.coefficients * len(self.kernel) * self._index_type.itemsize
        return 4 * (lengths[0] if self.shared else sum(lengths)) + index * self.indexed

    @property
    def working_bytes(self) -> int:
        """The memory that decoding needs for it: the matrix in float32 and in float64."""
        return self.size + 12 * self.K * self.coefficients

    def matrix(self, part: bytes | memoryview) -> Floats:
        """The synthesis matrix ``(K, M)``.

        Args:
            part: the ``matrix`` part of ``tensor``.

        Raises:
            WavpruneError: the bytes are not those of this basis.
        """
        if len(part) != self.size:
            raise WavpruneError(f"it has {len(part)} bytes of a basis, and needs {self.size}")
        if zlib.crc32(part) != self.crc:
            raise WavpruneError(f"the matrix of its basis {self.name!r} is damaged")
        if self.functions is None:
            dense = np.frombuffer(part, dtype="<f4").astype(np.float32)
            return dense.reshape(self.K, self.coefficients)
        tables: list[Doubles] = []
        start = 0
        for length, count in zip(self.kernel, self.functions, strict=True):
            if tables and self.shared:
                tables.append(tables[0])
                continue
            values = np.frombuffer(part, dtype="<f4", count=length * count, offset=start)
            tables.append(values.astype(np.float64).reshape(length, count))
            start += 4 * length * count
        if not self.indexed:
            return _outer(tables, _combinations(self.functions))
        index = np.frombuffer(part, dtype=self._index_type, offset=start)
        index = index.reshape(-1, len(self.kernel))
        if (index >= np.array(self.functions)).any():
            raise WavpruneError(f"its basis {self.name!r} takes functions that are not there")
        return _outer(tables, index.astype(np.intp))


def store(
    name: str,
    kernel: Sequence[int],
    operator: Operator,
    axes: AxisFunctions | None,
    normalised: bool,
) -> tuple[StoredBasis, bytes]:
    """A basis as a file holds it, and its bytes.

    Args:
        name: of the basis.
        kernel: the size of a kernel.
        operator: its matrices.
        axes: the functions along each axis; None where the basis is not separable.
        normalised: True where the operator's columns have norm 1.
    """
    dense = operator.synthesis.astype("<f4")
    payload = dense.tobytes()
    M = dense.shape[1]
    basis = StoredBasis(name, tuple(kernel), M, "", zlib.crc32(payload))
    if axes is None:
        return basis, payload
    tables = [
        (_normalised(table) if normalised else table).astype("<f4").astype(np.float64)
        for table in axes.tables
    ]
    index = axes.choices[operator.rows]
    if not np.allclose(_outer(tables, index), dense, rtol=0, atol=TOLERANCE * np.abs(dense).max()):
        return basis, payload
    counts = tuple(table.shape[1] for table in tables)
    indexed = not np.array_equal(index, _combinations(counts))
    shared = all(np.array_equal(table, tables[0]) for table in tables)
    separable = replace(basis, functions=counts, shared=shared, indexed=indexed)
    parts = [table.astype("<f4").tobytes() for table in (tables[:1] if shared else tables)]
    if indexed:
        parts.append(index.astype(separable._index_type).tobytes())
    functions = b"".join(parts)
    if len(functions) >= len(payload) or max(counts) > 1 << 16:
        return basis, payload
    return replace(separable, crc=zlib.crc32(functions)), functions


def _outer(tables: Sequence[Doubles], index: npt.NDArray[np.intp]) -> Floats:
    """``(K, M)``: column m is the outer product of one column of each table."""

    def product(left: Doubles, right: Doubles) -> Doubles:
        result: Doubles = (left[:, None, :] * right[None, :, :]).reshape(-1, left.shape[1])
        return result

    columns = [table[:, index[:, axis]] for axis, table in enumerate(tables)]
    return reduce(product, columns).astype(np.float32)


def _combinations(counts: Sequence[int]) -> npt.NDArray[np.intp]:
    return np.stack([axis.ravel() for axis in np.indices(tuple(counts))], axis=1)


def _normalised(table: Doubles) -> Doubles:
    norms = np.linalg.norm(table, axis=0)
    result: Doubles = table / np.where(norms > 0, norms, 1)
    return result


def basis_to_json(basis: StoredBasis) -> list[Any]:
    """Its fields, in order; the tensor is that of the first layer in this basis."""
    fields = [basis.name, list(basis.kernel), basis.coefficients, basis.crc]
    if basis.functions is None:
        return fields
    return [*fields, list(basis.functions), basis.shared, basis.indexed]


def basis_from_json(entry: Any, tensor: str) -> StoredBasis:
    """A basis from the fields of ``basis_to_json``.

    Raises:
        WavpruneError: they are not those of a basis.
    """
    error = WavpruneError(f"its basis {str(entry)[:200]} is not one that this version writes")
    if not isinstance(entry, list) or len(entry) not in (4, 7):
        raise error
    name, kernel, M, crc, *separable = entry
    if not isinstance(name, str) or not _counts(kernel):
        raise error
    if not is_count(M, low=1) or not is_count(crc):
        raise error
    basis = StoredBasis(name, tuple(kernel), M, tensor, crc)
    if not separable:
        return basis
    functions, shared, indexed = separable
    if type(shared) is not bool or type(indexed) is not bool:
        raise error
    if not _counts(functions) or len(functions) != len(kernel) or max(functions) > 1 << 16:
        raise error
    if shared and (len(set(kernel)) > 1 or len(set(functions)) > 1):
        raise error
    if not indexed and math.prod(functions) != M:
        raise error
    return replace(basis, functions=tuple(functions), shared=shared, indexed=indexed)


def _counts(value: Any) -> bool:
    return isinstance(value, list) and 0 < len(value) <= 3 and all(is_count(n, 1) for n in value)
