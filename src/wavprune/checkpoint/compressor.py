"""Zstandard's streams: bytes compressed as they come, and decompressed as they are asked for."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ..common.optional import require
from ..errors import WavpruneError

ZSTD = "zstd"
# Symbols that fill a Huffman table of their own.
BLOCK = 4096
# What level 1 uses has 512 KiB; a decoder sets up as much as a frame asks for.
LARGEST_WINDOW = 1 << 23


@cache
def zstandard() -> Any:
    """The library."""
    return require("zstandard", extra="checkpoint", purpose="reading or writing compressed files")


def bytes_of(values: npt.NDArray[Any]) -> memoryview:
    """An array's bytes, in the order of its values."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


class Compressor:
    """Zstandard's bytes of some rows of bytes, one after the other."""

    def __init__(self) -> None:
        library = zstandard()
        self._flush = library.COMPRESSOBJ_FLUSH_BLOCK
        self._coder = library.ZstdCompressor(level=1).compressobj()
        self._waiting = 0
        self._stored: list[bytes] = []

    def add(self, row: bytes | npt.NDArray[Any]) -> bytes:
        """What is ready after one more row; a long one begins a Huffman table of its own."""
        data = row if isinstance(row, bytes) else bytes_of(row)
        done: bytes = b""
        if self._waiting >= BLOCK <= len(data):
            done = self._coder.flush(self._flush)
            self._waiting = 0
        self._waiting += len(data)
        done += self._coder.compress(data)
        return done

    def end(self) -> bytes:
        """The rest."""
        rest: bytes = self._coder.flush()
        return rest

    def store(self, row: bytes | npt.NDArray[Any]) -> None:
        """As ``add``, but keep the bytes for ``stored``."""
        self._stored.append(self.add(row))

    def stored(self) -> bytes:
        """All bytes of the rows given to ``store``."""
        return b"".join([*self._stored, self.end()])


def compressed(rows: Iterable[bytes | npt.NDArray[Any]]) -> bytes:
    """All bytes of a ``Compressor``."""
    compressor = Compressor()
    for row in rows:
        compressor.store(row)
    return compressor.stored()


class Decompressor:
    """What a ``Compressor`` made, decompressed piece by piece, never more than is asked for.

    Args:
        data: the bytes of the coder.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        library = zstandard()
        self._error = library.ZstdError
        coder = library.ZstdDecompressor(max_window_size=LARGEST_WINDOW)
        self._stream = coder.stream_reader(data, read_across_frames=False)

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes.

        Raises:
            WavpruneError: there are fewer, or they are broken.
        """
        data = self._read(count)
        if len(data) != count:
            raise WavpruneError(f"it holds fewer values than it says: {len(data)} of {count}")
        return data

    def end(self) -> None:
        """Raise WavpruneError where bytes are left."""
        if self._read(1):
            raise WavpruneError("it holds more values than it says")

    def _read(self, count: int) -> bytes:
        try:
            data: bytes = self._stream.read(count)
        except self._error as error:
            raise WavpruneError(f"its bytes cannot be decompressed: {error}") from error
        return data
