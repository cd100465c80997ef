"""Tables of frequencies for the symbols of a trellis: a byte for each of a family, or written out.

Small layers cannot pay for tables of their own, so there is a family of them, mixtures of a
two-sided geometric and a normal distribution at many scales; a large file writes out those tables
that save more than they take. The family is made by products, sums and quotients of float64 alone,
so that it is the same on every machine.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import WavpruneError
from .binary import Reader, Writer
from .trellis import IndexArray, Ints
from .trellis_coder import ESCAPE, SYMBOLS, TOTAL, Classes, counts, sums

Doubles = npt.NDArray[np.float64]

# Classes are half octaves of the mean magnitude of an index.
CLASSES = 40
FIRST_CLASS = -10
# What a mean magnitude is at least: 0 has no logarithm.
LEAST_MEAN = 0.08
SCALES, SHAPES = 62, 4
FIRST_SCALE, SCALE_RATIO = 0.05, 1.15
UNUSED, WRITTEN = 0, 255
# Below this share of a slot, a symbol is an escape.
LEAST_SHARE = 0.6
# What an escape's index takes in bits, about.
ESCAPE_BITS = 16


@lru_cache(maxsize=2)
def family(quantiser: int) -> tuple[Ints, npt.NDArray[np.float32]]:
    """Frequencies ``(248, 256)`` of a quantiser's symbols, and the bits that each then takes."""
    values = np.arange(ESCAPE)
    magnitude = (values + 1) // 2
    value = np.where(magnitude > 0, 2 * magnitude - quantiser, 0)
    width = np.full(ESCAPE, 2.0)
    if quantiser:
        # Half way to the neighbors: 0 and +-1, +-3.
        width[0], width[1:3] = 1.0, 1.5
    rows = []
    scale = FIRST_SCALE
    for _ in range(SCALES):
        laplace = _powers(scale / (1 + scale), 2 * SYMBOLS)[value]
        # exp(-x) without a library's: (1 - x / 2**20)**(2**20), by squaring.
        base = 1 - 0.32 / (scale * scale + 0.02) / 2**20
        for _ in range(20):
            base = base * base
        odd = _powers(base * base, 2 * SYMBOLS)
        normal = np.multiply.accumulate(np.concatenate([[1.0], base * odd[:-1]]))[value]
        for share in range(SHAPES):
            weight = share / (SHAPES - 1)
            mixed = (1 - weight) * _normalised(laplace * width)
            rows.append(frequencies_of(mixed + weight * _normalised(normal * width)))
        scale *= SCALE_RATIO
    result = np.stack(rows)
    result.flags.writeable = False
    return result, bits_of(result)


def _powers(ratio: float, count: int) -> Doubles:
    powers: Doubles = np.multiply.accumulate([1.0, *[ratio] * (count - 1)])
    return powers


def _normalised(parts: Doubles) -> Doubles:
    # A sum whose order does not depend on the processor.
    total: float = np.add.accumulate(parts)[-1]
    return parts / total


def bits_of(frequencies: Ints) -> npt.NDArray[np.float32]:
    """The bits that each symbol takes, ``(tables, 256)``."""
    with np.errstate(divide="ignore"):
        bits = -np.log2(frequencies / TOTAL)
    escape = bits[:, ESCAPE:] + ESCAPE_BITS
    bits[:, ESCAPE:] = escape
    return np.where(frequencies > 0, bits, escape).astype(np.float32)


def frequencies_of(shares: Doubles) -> Ints:
    """Frequencies ``(256,)`` of sum 4,096 for the shares ``(255,)`` of the symbols but the escape.

    Rare ones get none; an escape, which stands for them, has at least 1.
    """
    scaled = shares * TOTAL
    result = np.zeros(SYMBOLS, dtype=np.int32)
    result[:ESCAPE] = np.where(scaled < LEAST_SHARE, 0, np.maximum(np.floor(scaled + 0.5), 1))
    rare = np.add.accumulate(np.where(scaled < LEAST_SHARE, scaled, 0.0))[-1]
    result[ESCAPE] = max(1, int(rare + 0.5))
    if not result[:ESCAPE].any():
        # 4,096 of one symbol has no place in an entry of a decoding table.
        result[0] = 1
    while (rest := TOTAL - int(result.sum())) != 0:
        largest = int(result.argmax())
        # Never all of it at once: a table of many small frequencies has no large one.
        result[largest] += rest if rest > 0 else max(rest, -max(1, int(result[largest]) // 8))
    return result


def choose(symbol_counts: npt.NDArray[np.int64]) -> tuple[bytes, Ints]:
    """The tables for symbols that were counted.

    Args:
        symbol_counts: ``(2 * CLASSES, 256)``.

    Returns:
        Their bytes in a file, and the frequencies.
    """
    codes = bytearray(len(symbol_counts))
    written = Writer()
    chosen = np.zeros((len(symbol_counts), SYMBOLS), dtype=np.int32)
    for table, symbols in enumerate(symbol_counts):
        total = int(symbols.sum())
        if not total:
            continue
        tables, bits = family(table & 1)
        costs = bits @ symbols.astype(np.float32)
        best = int(costs.argmin())
        codes[table], chosen[table] = best + 1, tables[best]
        own = frequencies_of(symbols[:ESCAPE] / total)
        own_cost = float(bits_of(own[None])[0] @ symbols.astype(np.float32))
        if own_cost >= costs[best]:
            continue
        own_bytes = Writer()
        last = int(np.flatnonzero(own[:ESCAPE])[-1]) + 1 if own[:ESCAPE].any() else 0
        own_bytes.numbers([last, *own[:last].tolist()])
        if own_cost + 8 * len(own_bytes.data) < costs[best]:
            codes[table], chosen[table] = WRITTEN, own
            written.raw(bytes(own_bytes.data))
    return bytes(codes) + bytes(written.data), chosen


def read(reader: Reader) -> Ints:
    """The frequencies ``(2 * CLASSES, 256)`` from the bytes of ``choose``.

    Raises:
        WavpruneError: they are not such bytes.
    """
    codes = reader.raw(2 * CLASSES)
    chosen = np.zeros((2 * CLASSES, SYMBOLS), dtype=np.int32)
    for table, code in enumerate(codes):
        if code == WRITTEN:
            last = reader.number(ESCAPE)
            sizes = reader.several(last, TOTAL - 1)
            rest = TOTAL - int(sizes.sum())
            if not 1 <= rest < TOTAL:
                raise WavpruneError("the frequencies of a table do not add up")
            chosen[table, :last] = sizes
            chosen[table, ESCAPE] = rest
        elif code != UNUSED:
            if code > SCALES * SHAPES:
                raise WavpruneError(f"it names a table {code}")
            chosen[table] = family(table & 1)[0][code - 1]
    return chosen


def classify(blocks: Sequence[Callable[[], IndexArray]]) -> Classes:
    """Classes of rows and columns by their mean magnitudes, where these save more than they take.

    Args:
        blocks: give indices ``(R, C)``, int8 or int32, of columns from left to right; called twice.
    """
    sums_of_rows, number = [], 0
    for block in blocks:
        indices = block()
        number += indices.shape[1]
        sums_of_rows.append(sums(indices, np.zeros(0, dtype=np.uint8), 0)[0])
    of_rows = np.add.reduce(sums_of_rows) / number + LEAST_MEAN
    mean = float(of_rows.mean())
    rows = _kinds(of_rows / mean)
    kinds = rows.kind.astype(np.uint8)
    of_kinds = [sums(block(), kinds, len(rows.halves))[1] for block in blocks]
    by_kind = np.concatenate(of_kinds, axis=1) if len(of_kinds) > 1 else of_kinds[0]
    columns = _kinds((by_kind.sum(axis=0) / len(of_rows) + LEAST_MEAN) / mean)
    shape = len(rows.halves), len(columns.halves)
    at = np.arange(shape[0])[:, None] * shape[1] + columns.kind
    # Whole numbers below 2**53, whose sums have any order.
    magnitude = np.bincount(at.ravel(), by_kind.ravel(), minlength=math.prod(shape)).reshape(shape)
    entries = rows.counts[:, None] * columns.counts
    base = int(_halves(np.array([mean]))[0]) - FIRST_CLASS
    zero, more = _geometric_bits()
    options: list[tuple[float, int, npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []
    for column_part in (1, 0):
        halves = column_part * columns.halves
        low = int(halves.min())
        left = np.minimum(halves - low, CLASSES - 1)
        column_bits = _entropy(left, columns.counts) if column_part else 0.0
        for row_part in (1, 0):
            top = np.maximum(row_part * rows.halves + base + low, 0)
            top = np.minimum(top, CLASSES - 1)
            seen = np.minimum(top[:, None] + left, CLASSES - 1)
            bits = float((zero[seen] * entries + more[seen] * magnitude).sum())
            bits += (_entropy(top, rows.counts) if row_part else 0.0) + column_bits
            options.append((bits, 2 * (1 - row_part) - column_part, top, left))
    *_, top, left = min(options, key=lambda option: option[:2])
    return Classes(top.astype(np.uint8)[rows.kind], left.astype(np.uint8)[columns.kind], CLASSES)


class _Kinds(NamedTuple):
    """Rows or columns by their means.

    Attributes:
        halves: the half octaves that there are.
        kind: which of these each has.
        counts: how often each is there.
    """

    halves: npt.NDArray[np.int64]
    kind: npt.NDArray[np.intp]
    counts: npt.NDArray[np.intp]


def _kinds(means: Doubles) -> _Kinds:
    halves = _halves(means)
    low = int(halves.min())
    counts = np.bincount(halves - low)
    there = np.flatnonzero(counts)
    number = np.cumsum(counts > 0) - 1
    return _Kinds(there + low, number[halves - low], counts[there])


@lru_cache(maxsize=1)
def _geometric_bits() -> tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]:
    """Bits of an index 0, and of one more in magnitude, by class, for a geometric distribution."""
    mean = 2.0 ** ((np.arange(CLASSES) + FIRST_CLASS) / 2)
    ratio = (np.sqrt(1 + mean * mean) - 1) / mean
    zero = np.log2((1 + ratio) / (1 - ratio))
    return zero.astype(np.float32), -np.log2(ratio).astype(np.float32)


def _halves(means: Doubles) -> npt.NDArray[np.int64]:
    result: npt.NDArray[np.int64] = np.rint(2 * np.log2(means)).astype(np.int64)
    return result


def _entropy(classes: npt.NDArray[np.int64], counts: npt.NDArray[np.intp]) -> float:
    tally = np.bincount(classes, counts)
    tally = tally[tally > 0]
    return float((tally * np.log2(counts.sum() / tally)).sum()) + 2 * (len(tally) > 1)


__all__ = ["CLASSES", "choose", "classify", "counts", "family", "read"]
