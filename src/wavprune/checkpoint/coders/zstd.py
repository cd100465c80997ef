"""Zstandard, for layers of any size.

Its level 1 finds nothing to repeat in weights and comes to a Huffman code a block, within 1 to 3%
of the entropy, at a gigabyte a second. Symbols of 16 bits are split into low and high bytes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt

from ..compressor import ZSTD, Compressor, Decompressor
from .protocol import CODERS, Coded, Symbols


class _Encoder:
    def __init__(self) -> None:
        self._low = Compressor()
        # Of weights nearly all high bytes are 0, so they can wait until the low ones are written.
        self._high: Compressor | None = None
        self._zeros: list[int] = []

    def add(self, rows: Symbols) -> bytes:
        low = rows.astype(np.int8)
        if np.array_equal(low, rows):
            self._zeros.append(rows.size)
        else:
            self._store_zeros().store(((rows - low) >> 8).astype(np.int8))
        return b"".join([self._low.add(row) for row in low])

    def finish(self) -> Coded:
        return Coded(self._low.end(), b"" if self._high is None else self._store_zeros().stored())

    def _store_zeros(self) -> Compressor:
        """The compressor of the high bytes, after those that are due."""
        self._high = self._high or Compressor()
        for count in self._zeros:
            self._high.store(bytes(count))
        self._zeros.clear()
        return self._high


class ZstdCoder:
    """See ``Coder``."""

    most: int | None = None
    automatic = True

    def encoder(self) -> _Encoder:
        """A new encoder for one layer."""
        return _Encoder()

    def decode(
        self,
        values: memoryview,
        high: memoryview,
        parameter: int,
        shapes: Sequence[tuple[int, int]],
    ) -> Iterator[Symbols | npt.NDArray[np.int8]]:
        """The symbols of each chunk, flat; see ``Coder``."""
        low_bytes = Decompressor(values)
        high_bytes = Decompressor(high) if len(high) else None
        for rows, length in shapes:
            count = rows * length
            low = np.frombuffer(low_bytes.read(count), dtype=np.int8)
            if high_bytes is None:
                yield low
            else:
                top = np.frombuffer(high_bytes.read(count), dtype=np.int8).astype(np.int16)
                yield top * np.int16(256) + low
        low_bytes.end()
        if high_bytes is not None:
            high_bytes.end()


CODERS.register(ZSTD, ZstdCoder())
