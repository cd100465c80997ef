"""Indices of matrices between quantising and coding, in memory or, where they are many, on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, Any, NamedTuple

import numpy as np

from .compressor import bytes_of
from .trellis import IndexArray
from .trellis_coder import Classes

# Bytes of indices, and of coded streams, that stay in memory.
IN_MEMORY = 1 << 24


class Scratch:
    """A file without a name, which is in memory while it is small, and goes with this object.

    Args:
        folder: where it is once it is large.
    """

    def __init__(self, folder: Path) -> None:
        self.file: IO[bytes] = tempfile.SpooledTemporaryFile(  # noqa: SIM115  # closed below
            IN_MEMORY, "w+b", dir=str(folder)
        )

    def __del__(self) -> None:
        self.file.close()


class Block(NamedTuple):
    """Indices of some columns.

    Attributes:
        start: the first column.
        stop: behind the last.
        read: gives them, ``(R, stop - start)``, int8 or int32.
    """

    start: int
    stop: int
    read: Callable[[], IndexArray]


class Indices(NamedTuple):
    """Indices of a matrix.

    Attributes:
        blocks: from left to right, each but the last of whole groups of columns of the coder.
        classes: of the whole matrix.
    """

    blocks: list[Block]
    classes: Classes

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self.classes.rows) * len(self.classes.columns)

    def parts(self) -> Iterator[tuple[IndexArray, Classes]]:
        """The blocks with their classes."""
        for block in self.blocks:
            yield block.read(), self.classes.columns_of(block.start, block.stop)

    def parts_reversed(self) -> Iterator[tuple[IndexArray, Classes]]:
        """The same, from the last."""
        for block in reversed(self.blocks):
            yield block.read(), self.classes.columns_of(block.start, block.stop)


def whole(indices: IndexArray) -> list[Block]:
    """A matrix in memory as one block."""
    return [Block(0, indices.shape[1], lambda: indices)]


class IndexStore:
    """Keeps blocks of indices, in as few bytes as the largest of each has.

    Args:
        folder: where the file is that takes them if they are many.
    """

    def __init__(self, folder: Path) -> None:
        self._scratch = Scratch(folder)
        self._file = self._scratch.file
        self._end = self._kept = 0

    def add(self, start: int, indices: IndexArray) -> Block:
        """Keep the indices of the columns from ``start`` on."""
        stop = start + indices.shape[1]
        if self._kept + indices.nbytes <= IN_MEMORY:
            self._kept += indices.nbytes
            return Block(start, stop, lambda: indices)
        dtype: type[np.signedinteger[Any]] = np.int8
        if indices.dtype != np.int8:
            largest = int(np.abs(indices).max(initial=0))
            dtype = np.int8 if largest < 1 << 7 else np.int16 if largest < 1 << 15 else np.int32
        small = indices.astype(dtype, copy=False)
        at, shape = self._end, indices.shape
        self._file.seek(at)
        self._file.write(bytes_of(small))
        size = small.nbytes
        self._end += size

        def read() -> IndexArray:
            self._file.seek(at)
            # In memory that can be written, as torch asks for.
            data = bytearray(self._file.read(size))
            values = np.frombuffer(data, dtype=dtype).reshape(shape)
            return values.astype(np.int32) if dtype == np.int16 else values

        return Block(start, stop, read)
