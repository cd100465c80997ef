"""An asymmetric numeral system, for small layers.

Their Huffman tables would weigh more than what they save. Each row of symbols gets one of a fixed
family of distributions, named by a byte.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from functools import cache, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from ...common.optional import require
from ...errors import WavpruneError
from .protocol import CODERS, Coded, Symbols

ANS = "ans"
# A layer is one chunk of this many coefficients, or Zstandard's.
MOST = 1 << 18
# The largest symbol of the distributions.
LARGEST = (15, 127, 1023)
SCALES, SHAPES = 63, 4
FIRST_SCALE = 0.004
SCALE_RATIO = 1.2
# How many scales on either side of the estimated one are tried.
NEIGHBOURS = 4


@cache
def constriction() -> Any:
    """The library."""
    return require("constriction", extra="checkpoint", purpose="the coder 'ans'")


@lru_cache(maxsize=8)
def distributions(largest: int) -> npt.NDArray[np.float64]:
    """The family of distributions over ``-largest .. largest``, ``(SCALES * SHAPES, symbols)``.

    At each scale, mixtures of a two-sided geometric distribution, which a quantized Laplace
    variable has, and that of a quantized normal one. Only products, sums and quotients of float64
    are taken, so that the numbers are the same on every machine.
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
            halves = (1 - weight) * _normalised(laplace) + weight * _normalised(normal)
            row = np.maximum(halves[size], 2.0**-30)
            family.append(row / np.add.accumulate(row)[-1])
        scale *= SCALE_RATIO
    result = np.stack(family)
    result.flags.writeable = False
    return result


def _powers(ratio: float, count: int) -> npt.NDArray[np.float64]:
    """``ratio ** 0 .. ratio ** count``, multiplied one after the other."""
    powers: npt.NDArray[np.float64] = np.multiply.accumulate([1.0, *[ratio] * count])
    return powers


def _normalised(half: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    total: float = 2 * np.add.accumulate(half)[-1] - half[0]
    return half / total


@lru_cache(maxsize=8)
def _costs(largest: int) -> npt.NDArray[np.float32]:
    """Bits of each symbol in each distribution."""
    return -np.log2(distributions(largest)).astype(np.float32)


@lru_cache(maxsize=1024)
def _model(largest: int, index: int) -> Any:
    models = constriction().stream.model
    return models.Categorical(distributions(largest)[index], perfect=False)


def span(rows: Sequence[Symbols]) -> int | None:
    """The smallest of ``LARGEST`` that holds all symbols, or None."""
    peak = max((max(int(r.max(initial=0)), -int(r.min(initial=0))) for r in rows), default=0)
    return next((largest for largest in LARGEST if peak <= largest), None)


def _best(row: Symbols, largest: int) -> int:
    """The distribution that takes the fewest bits, of those whose scale is about the row's."""
    counts = np.bincount(row + largest, minlength=2 * largest + 1).astype(np.float32)
    mean = max(float(np.abs(row).mean()) if len(row) else 0.0, FIRST_SCALE)
    middle = round(math.log(mean / FIRST_SCALE) / math.log(SCALE_RATIO))
    start = min(max(middle - NEIGHBOURS, 0), SCALES - 1 - 2 * NEIGHBOURS) * SHAPES
    costs = _costs(largest)[start : start + (2 * NEIGHBOURS + 1) * SHAPES]
    # einsum calls no BLAS, whose threads take longer to wake than this takes.
    return start + int(np.einsum("ij,j->i", costs, counts).argmin())


def ans_encode(rows: Sequence[Symbols], largest: int) -> bytes:
    """Rows of symbols, each in its best distribution: a byte a row, then the words."""
    chosen = [_best(row, largest) for row in rows]
    coder = constriction().stream.stack.AnsCoder()
    for row, index in zip(reversed(rows), reversed(chosen), strict=True):
        coder.encode_reverse((row + largest).astype(np.int32), _model(largest, index))
    words: bytes = coder.get_compressed().astype("<u4").tobytes()
    return bytes(chosen) + words


def ans_decode(data: bytes | memoryview, largest: int, lengths: Sequence[int]) -> list[Symbols]:
    """The rows of ``ans_encode``.

    Raises:
        WavpruneError: the bytes are not those of rows of these lengths.
    """
    if largest not in LARGEST:
        raise WavpruneError(f"its largest symbol is {largest!r}; allowed: {LARGEST}")
    chosen, rest = bytes(data[: len(lengths)]), data[len(lengths) :]
    if len(chosen) != len(lengths) or len(rest) % 4 or max(chosen, default=0) >= SCALES * SHAPES:
        raise WavpruneError("its bytes are not those of an 'ans' coder")
    words = np.frombuffer(rest, dtype="<u4").astype(np.uint32)
    if len(words) and words[-1] == 0:
        raise WavpruneError("its bytes are not those of an 'ans' coder")
    coder = constriction().stream.stack.AnsCoder(words)
    rows = [
        (coder.decode(_model(largest, index), length) - largest).astype(np.int16)
        for index, length in zip(chosen, lengths, strict=True)
    ]
    if not coder.is_empty():
        raise WavpruneError("it holds more values than it says")
    return rows


class _Encoder:
    def __init__(self) -> None:
        self._rows: list[Symbols] = []

    def add(self, rows: Symbols) -> bytes:
        self._rows.extend(rows)
        return b""

    def finish(self) -> Coded | None:
        largest = span(self._rows)
        if largest is None:
            return None
        return Coded(ans_encode(self._rows, largest), parameter=largest)


class AnsCoder:
    """See ``Coder``."""

    most: int | None = MOST
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
    ) -> Iterator[Symbols]:
        """The symbols of each chunk, flat; see ``Coder``."""
        if len(shapes) != 1:
            raise WavpruneError("it is too large for the coder 'ans'")
        ((rows, length),) = shapes
        decoded = ans_decode(values, parameter, [length] * rows)
        yield np.concatenate(decoded) if decoded else np.zeros(0, dtype=np.int16)


CODERS.register(ANS, AnsCoder())
