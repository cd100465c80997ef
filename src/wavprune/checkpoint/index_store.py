"""Indices of matrices between quantising and coding, in memory or, where they are many, on disk."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO, NamedTuple

import numpy as np

from .compressor import bytes_of
from .trellis import Ints
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
        read: gives them, ``(R, stop - start)``, int32.
    """

    start: int
    stop: int
    read: Callable[[], Ints]


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

    def parts(self) -> Iterator[tuple[Ints, Classes]]:
        """The blocks with their classes."""
        for block in self.blocks:
            yield block.read(), self.classes.columns_of(block.start, block.stop)

    def parts_reversed(self) -> Iterator[tuple[Ints, Classes]]:
        """The same, from the last."""
        for block in reversed(self.blocks):
            yield block.read(), self.classes.columns_of(block.start, block.stop)


def whole(indices: Ints) -> list[Block]:
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

    def add(self, start: int, indices: Ints) -> Block:
        """Keep the indices of the columns from ``start`` on."""
        stop = start + indices.shape[1]
        if self._kept + indices.nbytes <= IN_MEMORY:
            self._kept += indices.nbytes
            return Block(start, stop, lambda: indices)
        largest = int(np.abs(indices).max(initial=0))
        dtype = np.int8 if largest < 1 << 7 else np.int16 if largest < 1 << 15 else np.int32
        small = indices.astype(dtype)
        at, shape = self._end, indices.shape
        self._file.seek(at)
        self._file.write(bytes_of(small.reshape(-1).view(np.uint8)))
        self._end += small.nbytes

        def read() -> Ints:
            self._file.seek(at)
            data = self._file.read(small_size)
            return np.frombuffer(data, dtype=dtype).reshape(shape).astype(np.int32)

        small_size = small.nbytes
        return Block(start, stop, read)
