"""Whole numbers and bits to bytes and back.

Two coders, both of well-kept libraries. Zstandard codes large layers: its level 1 finds nothing to
repeat in weights and comes to a Huffman code a block, within 1 to 3% of the entropy, at a gigabyte
a second. An asymmetric numeral system (constriction's) codes small ones, whose Huffman tables would
weigh more than what they save: each row of symbols gets one of a fixed family of distributions,
named by a byte.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

Symbols = npt.NDArray[np.int16]

ZSTD, ANS = "zstd", "ans"
# Symbols that fill a Huffman table of their own.
BLOCK = 4096
# The largest symbol of the distributions.
LARGEST = (15, 127, 1023)
SCALES, SHAPES = 63, 4
FIRST_SCALE = 0.004
STEP_OF_SCALE = 1.2
NEAR = 4


def _zstandard() -> Any:
    try:
        import zstandard
    except ImportError as error:
        raise ImportError(
            "compressed checkpoints need zstandard; pip install 'wavprune[checkpoint]'"
        ) from error
    return zstandard


def _constriction() -> Any:
    try:
        import constriction  # type: ignore[import-untyped]  # it has no stubs
    except ImportError as error:
        raise ImportError(
            "the coder 'ans' needs constriction; pip install 'wavprune[checkpoint]'"
        ) from error
    return constriction


def bytes_of(values: npt.NDArray[Any]) -> memoryview:
    """An array's bytes, in the order of its values."""
    return np.ascontiguousarray(values).reshape(-1).view(np.uint8).data


class Squeezer:
    """Zstandard's bytes of some rows of bytes, one after the other."""

    def __init__(self) -> None:
        library = _zstandard()
        self._flush = library.COMPRESSOBJ_FLUSH_BLOCK
        self._coder = library.ZstdCompressor(level=1).compressobj()
        self._waiting = 0
        self._kept: list[bytes] = []

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

    def keep(self, row: bytes | npt.NDArray[Any]) -> None:
        """As ``add``, for ``kept``."""
        self._kept.append(self.add(row))

    def kept(self) -> bytes:
        """All bytes, of rows that ``keep`` got."""
        return b"".join([*self._kept, self.end()])


def squeezed(rows: Iterable[bytes | npt.NDArray[Any]]) -> bytes:
    """All bytes of a ``Squeezer``."""
    squeezer = Squeezer()
    for row in rows:
        squeezer.keep(row)
    return squeezer.kept()


class Reader:
    """What a ``Squeezer`` made, taken out piece by piece, so that a bomb never goes off.

    Args:
        data: the bytes of the coder.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        library = _zstandard()
        self._error = library.ZstdError
        # A window larger than what is read at a time would be set up for nothing.
        coder = library.ZstdDecompressor(max_window_size=1 << 27)
        self._stream = coder.stream_reader(data, read_across_frames=False)

    def read(self, count: int) -> bytes:
        """The next ``count`` bytes.

        Raises:
            ValueError: there are fewer, or they are broken.
        """
        try:
            data: bytes = self._stream.read(count)
        except self._error as error:
            raise ValueError(f"its bytes cannot be decompressed: {error}") from error
        if len(data) != count:
            raise ValueError(f"it holds fewer values than it says: {len(data)} of {count}")
        return data

    def end(self) -> None:
        """Raise ValueError where bytes are left."""
        try:
            left = self._stream.read(1)
        except self._error as error:
            raise ValueError(f"its bytes cannot be decompressed: {error}") from error
        if left:
            raise ValueError("it holds more values than it says")


@lru_cache(maxsize=8)
def distributions(largest: int) -> npt.NDArray[np.float64]:
    """The family of distributions over ``-largest .. largest``, ``(SCALES * SHAPES, symbols)``.

    From two-sided geometric (what a quantised Laplace variable has) to that of a quantised normal
    one, each at a row of scales. Only products, sums and quotients of float64 are taken, so that
    the numbers are the same on every machine.
    """
    family = []
    scale = FIRST_SCALE
    size = np.abs(np.arange(-largest, largest + 1))
    for _ in range(SCALES):
        ratio = scale / (1 + scale)
        laplace = _powers(ratio, largest)
        # exp(-x) without a library's: (1 - x / 2**20)**(2**20), by squaring.
        base = 1 - 0.5 / (scale * scale + 0.02) / 2**20
        for _ in range(20):
            base = base * base
        odd = _powers(base * base, largest)
        normal = np.multiply.accumulate(np.concatenate([[1.0], base * odd[:-1]]))
        for share in range(SHAPES):
            weight = share / (SHAPES - 1)
            halves = (1 - weight) * _unit(laplace) + weight * _unit(normal)
            row = np.maximum(halves[size], 2.0**-30)
            family.append(row / np.add.accumulate(row)[-1])
        scale *= STEP_OF_SCALE
    result = np.stack(family)
    result.flags.writeable = False
    return result


def _powers(ratio: float, count: int) -> npt.NDArray[np.float64]:
    """``ratio ** 0 .. ratio ** count``, multiplied one after the other."""
    powers: npt.NDArray[np.float64] = np.multiply.accumulate([1.0, *[ratio] * count])
    return powers


def _unit(half: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    total: float = 2 * np.add.accumulate(half)[-1] - half[0]
    return half / total


@lru_cache(maxsize=8)
def _costs(largest: int) -> npt.NDArray[np.float32]:
    """Bits of each symbol in each distribution."""
    return -np.log2(distributions(largest)).astype(np.float32)


@lru_cache(maxsize=1024)
def _model(largest: int, index: int) -> Any:
    models = _constriction().stream.model
    return models.Categorical(distributions(largest)[index], perfect=False)


def span(symbols: Symbols) -> int | None:
    """The smallest of ``LARGEST`` that holds all symbols, or None."""
    peak = max(int(symbols.max(initial=0)), -int(symbols.min(initial=0)))
    return next((largest for largest in LARGEST if peak <= largest), None)


def _best(row: Symbols, largest: int) -> int:
    """The distribution that takes the fewest bits, of those whose scale is about the row's."""
    counts = np.bincount(row + largest, minlength=2 * largest + 1).astype(np.float32)
    mean = max(float(np.abs(row).mean()) if len(row) else 0.0, FIRST_SCALE)
    middle = round(math.log(mean / FIRST_SCALE) / math.log(STEP_OF_SCALE))
    first = min(max(middle - NEAR, 0), SCALES - 1 - 2 * NEAR) * SHAPES
    costs = _costs(largest)[first : first + (2 * NEAR + 1) * SHAPES]
    # einsum calls no BLAS, whose threads take longer to wake than this takes.
    return first + int(np.einsum("ij,j->i", costs, counts).argmin())


def ans_encode(rows: Sequence[Symbols], largest: int) -> bytes:
    """Rows of symbols, each in its best distribution: a byte a row, then the words."""
    chosen = [_best(row, largest) for row in rows]
    coder = _constriction().stream.stack.AnsCoder()
    for row, index in zip(reversed(rows), reversed(chosen), strict=True):
        coder.encode_reverse((row + largest).astype(np.int32), _model(largest, index))
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    return bytes(chosen) + words


def ans_decode(data: bytes | memoryview, largest: int, lengths: Sequence[int]) -> list[Symbols]:
    """The rows of ``ans_encode``.

    Raises:
        ValueError: the bytes are not those of rows of these lengths.
    """
    if largest not in LARGEST:
        raise ValueError(f"its largest symbol is {largest!r}; allowed: {LARGEST}")
    chosen, rest = bytes(data[: len(lengths)]), data[len(lengths) :]
    if len(chosen) != len(lengths) or len(rest) % 4 or max(chosen, default=0) >= SCALES * SHAPES:
        raise ValueError("its bytes are not those of an 'ans' coder")
    words = np.frombuffer(rest, dtype="<u4").astype(np.uint32)
    if len(words) and words[-1] == 0:
        raise ValueError("its bytes are not those of an 'ans' coder")
    coder = _constriction().stream.stack.AnsCoder(words)
    rows = [
        (coder.decode(_model(largest, index), length) - largest).astype(np.int16)
        for index, length in zip(chosen, lengths, strict=True)
    ]
    if not coder.is_empty():
        raise ValueError("it holds more values than it says")
    return rows


def checksum(data: npt.NDArray[Any], start: int = 0) -> int:
    """CRC-32 of an array's bytes, in the order of its values."""
    return zlib.crc32(bytes_of(data), start)
