"""Indices of a trellis, coded by an asymmetric numeral system.

It has 32 states with tables of 12 bits (Duda 2013; Giesen 2014, "Interleaved entropy coders"), one
for each of 32 columns. Decoding is integer arithmetic and one product, so that every machine gives
the same bits. ``csrc/coding`` is fast; what is here is its definition, and runs where there is no
compiled extension.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..errors import WavpruneError
from .trellis import LARGEST_INLINE, NEXT, Floats, IndexArray, Ints, quantisers

try:
    from .. import ops
except ImportError:
    ops = None  # type: ignore[assignment]  # without a compiler, numpy does it

Bytes = npt.NDArray[np.uint8]

COLUMNS = 32
PRECISION = 12
TOTAL = 1 << PRECISION
LEAST_STATE = 1 << 16
SYMBOLS, ESCAPE = 256, 255
# Words that the compiled decoder may read in vain.
PADDING = 64


class Classes(NamedTuple):
    """Which table codes each entry of a matrix: ``min(rows[i] + columns[j], number - 1)``.

    Attributes:
        rows: ``(R,)``, uint8.
        columns: ``(C,)``, uint8.
        number: how many classes there are.
    """

    rows: Bytes
    columns: Bytes
    number: int

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        return len(self.rows), len(self.columns)

    def columns_of(self, start: int, stop: int) -> Classes:
        """Of some of the columns."""
        return self._replace(columns=self.columns[start:stop])

    def table(self) -> npt.NDArray[np.int64]:
        """The class of each entry, ``(R, C)``."""
        sums = self.rows[:, None].astype(np.int64) + self.columns
        result: npt.NDArray[np.int64] = np.minimum(sums, self.number - 1)
        return result


class Coded(NamedTuple):
    """A stream: the indices of some matrices.

    Attributes:
        states: ``(32,)``, uint32, with which decoding begins.
        words: uint16.
        escapes: int32, the indices that have no symbol.
    """

    states: npt.NDArray[np.uint32]
    words: npt.NDArray[np.uint16]
    escapes: Ints


def symbols_of(indices: IndexArray) -> Ints:
    """The symbols of indices; ``ESCAPE`` for large ones."""
    magnitudes = np.abs(indices.astype(np.int32))
    return np.where(
        magnitudes > LARGEST_INLINE, ESCAPE, 2 * magnitudes - (indices < 0).astype(np.int32)
    )


def counts(
    indices: IndexArray, classes: Classes, *, compiled: bool = True
) -> npt.NDArray[np.int64]:
    """How often each symbol is coded by each table, ``(2 * classes, 256)``."""
    if compiled and ops is not None:
        tensors = [torch.from_numpy(array) for array in (indices, classes.rows, classes.columns)]
        result: torch.Tensor = torch.ops.wavprune.trellis_counts(*tensors, classes.number)
        return result.numpy()
    tables = 2 * classes.table() + quantisers(indices)
    flat = tables * SYMBOLS + symbols_of(indices)
    size = 2 * classes.number * SYMBOLS
    return np.bincount(flat.ravel(), minlength=size).reshape(-1, SYMBOLS)


def sums(
    indices: IndexArray, kinds: Bytes, number: int, *, compiled: bool = True
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Sums of the magnitudes of indices ``(R, C)``: of each row, and of the rows of each kind.

    Args:
        indices: the indices.
        kinds: ``(R,)``: of the rows; ``(0,)`` where there are none.
        number: of kinds.
        compiled: use the compiled operator, where it is there.

    Returns:
        ``(R,)`` and ``(number, C)``.
    """
    if compiled and ops is not None:
        found: torch.Tensor = torch.ops.wavprune.trellis_sums(
            torch.from_numpy(indices), torch.from_numpy(kinds), number
        )
        both = found.numpy()
        return both[: len(indices)], both[len(indices) :].reshape(number, indices.shape[1])
    magnitudes = np.abs(indices.astype(np.int64))
    of_kinds = np.zeros((number, indices.shape[1]), dtype=np.int64)
    if number:
        np.add.at(of_kinds, kinds, magnitudes)
    return magnitudes.sum(axis=1), of_kinds


def encode(
    matrices: Iterable[tuple[IndexArray, Classes]],
    room: int,
    frequencies: Ints,
    *,
    compiled: bool = True,
) -> Coded:
    """A stream of matrices.

    Args:
        matrices: indices ``(R, C)``, int8 or int32 and contiguous, with their classes, from the
            last of the stream to the first. Parts of a matrix are matrices, where a part ends at a
            whole group of columns.
        room: how many indices they have.
        frequencies: ``(2 * classes, 256)``, those of each table 0 or of sum 4,096.
        compiled: use the compiled operator, where it is there; the bytes are the same.
    """
    words = np.zeros(room, dtype=np.uint16)
    state = np.full(2 + COLUMNS, LEAST_STATE, dtype=np.int64)
    state[:2] = room, 0
    escapes: list[Ints] = []
    codes = (np.cumsum(frequencies, axis=1, dtype=np.int32) - frequencies) << 16 | frequencies
    for indices, classes in matrices:
        if compiled and ops is not None:
            tensors = (words.view(np.int16), state, codes, classes.rows, classes.columns)
            escaped = torch.ops.wavprune.trellis_encode_(
                *map(torch.from_numpy, tensors), classes.number, torch.from_numpy(indices)
            )
            escapes.insert(0, escaped.numpy())
        else:
            escapes.insert(0, _encode(words, state, frequencies, indices, classes))
    states = state[2:].astype(np.uint32)
    joined = np.concatenate(escapes) if escapes else np.zeros(0, dtype=np.int32)
    return Coded(states, words[state[0] :], joined)


def _encode(
    words: npt.NDArray[np.uint16],
    state: npt.NDArray[np.int64],
    frequencies: Ints,
    indices: IndexArray,
    classes: Classes,
) -> Ints:
    starts = np.cumsum(frequencies, axis=1) - frequencies
    tables = 2 * classes.table() + quantisers(indices)
    symbols = symbols_of(indices)
    symbols = np.where(frequencies[tables, symbols] == 0, ESCAPE, symbols)
    sizes, offsets = frequencies[tables, symbols].astype(np.int64), starts[tables, symbols]
    escapes: list[int] = []
    rows, columns = indices.shape
    for first in reversed(range(0, columns, COLUMNS)):
        lanes = slice(first, min(first + COLUMNS, columns))
        for row in reversed(range(rows)):
            x = state[2 : 2 + lanes.stop - first]
            size = sizes[row, lanes]
            gives = x >> (32 - PRECISION) >= size
            count = int(gives.sum())
            state[0] -= count
            words[state[0] : state[0] + count] = x[gives] & 0xFFFF
            x = np.where(gives, x >> 16, x)
            state[2 : 2 + lanes.stop - first] = (
                (x // size << PRECISION) + x % size + offsets[row, lanes]
            )
            escaped = indices[row, lanes][symbols[row, lanes] == ESCAPE]
            escapes.extend(escaped[::-1].tolist())
    return np.array(escapes[::-1], dtype=np.int32)


class Decoder:
    """Reads the matrices of a stream, in their order.

    Args:
        coded: the stream.
        tables: as ``decoding_tables`` gives them.
        compiled: use the compiled operator, where it is there; the bits are the same.
    """

    def __init__(self, coded: Coded, tables: npt.NDArray[np.uint32], compiled: bool = True) -> None:
        self._words = np.zeros(len(coded.words) + PADDING, dtype=np.uint16)
        self._words[: len(coded.words)] = coded.words
        self._tables, self._escapes = tables, coded.escapes
        self._state = np.zeros(2 + COLUMNS, dtype=np.int64)
        self._state[2:] = coded.states
        self._compiled = compiled and ops is not None

    @property
    def words_read(self) -> int:
        """How many words of the stream have been read."""
        return int(self._state[0])

    def read(self, classes: Classes, step: float, out: Floats | None = None) -> Floats:
        """The next matrix, ``(R, C)``, float32.

        Args:
            classes: of the matrix.
            step: of the values.
            out: rows that get them; None for new ones.

        Raises:
            WavpruneError: the stream ends within it.
        """
        if out is None:
            out = np.empty(classes.shape, dtype=np.float32)
        if not self._compiled:
            self._read(classes, np.float32(step), out)
            return out
        tensors = (
            self._words.view(np.int16),
            self._state,
            self._tables.view(np.int32),
            classes.rows,
            classes.columns,
        )
        try:
            torch.ops.wavprune.trellis_decode_(
                *map(torch.from_numpy, tensors),
                *(classes.number, torch.from_numpy(self._escapes), float(np.float32(step))),
                torch.from_numpy(out),
            )
        except RuntimeError as error:
            raise WavpruneError("its coded values end early") from error
        return out

    def _read(self, classes: Classes, step: np.float32, out: Floats) -> None:
        rows, columns = classes.shape
        table = classes.table()
        position, escape, *states = self._state.tolist()
        x = np.array(states, dtype=np.int64)
        last = len(self._words) - PADDING
        for first in range(0, columns, COLUMNS):
            count = min(COLUMNS, columns - first)
            trellis = np.zeros(count, dtype=np.int64)
            for row in range(rows):
                quantiser = trellis & 1
                at = 2 * table[row, first : first + count] + quantiser
                entry = self._tables[at << PRECISION | (x[:count] & (TOTAL - 1))].astype(np.int64)
                state = (entry >> 12 & 4095) * (x[:count] >> PRECISION) + (entry & 4095)
                state &= 0xFFFFFFFF
                takes = state < LEAST_STATE
                new = self._words[position : position + int(takes.sum())]
                if len(new) < takes.sum() or position > last:
                    raise WavpruneError("its coded values end early")
                state[takes] = state[takes] << 16 | new
                position += len(new)
                x[:count] = state
                symbol = entry >> 24
                index = (symbol + 1 >> 1) * np.where(symbol & 1, -1, 1)
                for lane in np.flatnonzero(symbol == ESCAPE):
                    if escape >= len(self._escapes):
                        raise WavpruneError("its coded values end early")
                    index[lane] = self._escapes[escape]
                    escape += 1
                value = 2 * index - np.sign(index) * quantiser
                out[row, first : first + count] = value.astype(np.float32) * step
                trellis = NEXT[trellis, index & 1]
        if position > last:
            raise WavpruneError("its coded values end early")
        self._state[:] = [position, escape, *x.tolist()]

    def end(self) -> None:
        """Raise WavpruneError unless all of the stream was read, to the states it began with."""
        position, escape, *states = self._state.tolist()
        read_all = position == len(self._words) - PADDING and escape == len(self._escapes)
        if not read_all or any(state != LEAST_STATE for state in states):
            raise WavpruneError("it holds other values than it says")


def decoding_tables(frequencies: Ints) -> npt.NDArray[np.uint32]:
    """What decoding looks up, ``(tables * 4096,)``: symbol, frequency and place in its range.

    Args:
        frequencies: ``(tables, 256)``, those of each table 0 or of sum 4,096.
    """
    result = np.zeros((len(frequencies), TOTAL), dtype=np.uint32)
    used = np.flatnonzero(frequencies.any(axis=1))
    sizes = frequencies[used].astype(np.int64)
    starts = np.cumsum(sizes, axis=1) - sizes
    first = np.arange(SYMBOLS) << 24 | sizes << 12
    first -= starts
    entries = np.repeat(first.astype(np.uint32), sizes.ravel()).reshape(-1, TOTAL)
    result[used] = entries + np.arange(TOTAL, dtype=np.uint32)
    return result.ravel()
