"""Matrices of whole numbers times a step, quantised by a trellis and coded by an asymmetric system.

Down each column of a matrix runs a trellis of eight states, 0 at its top. Its state says which of
two quantisers the next entry has: the even multiples of the step, or 0 and the odd ones; the parity
of the index leads to the next state. The union has every multiple, so that the error is that of
half the step of what is coded (trellis-coded quantisation, Marcellin and Fischer 1990; with entropy
coding, Joshi et al. 1997, "Comparison of generalized trellis coded quantization and entropy-coded
trellis coded quantization").

Indices are coded by 32 states of an asymmetric numeral system with tables of 12 bits (Duda 2013;
Giesen 2014, "Interleaved entropy coders"), one state for each of 32 columns. Decoding is integer
arithmetic and one product, so that every machine gives the same bits. ``csrc/coding`` is fast; what
is here is its definition, and runs where there is no compiled extension.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..errors import WavpruneError

try:
    from .. import ops
except ImportError:
    ops = None  # type: ignore[assignment]  # without a compiler, numpy does it

Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]

COLUMNS = 32
STATES = 8
PRECISION = 12
TOTAL = 1 << PRECISION
LEAST_STATE = 1 << 16
SYMBOLS, ESCAPE = 256, 255
LARGEST_INLINE, LARGEST_INDEX = 127, 1 << 21
# Words that the compiled decoder may read in vain.
PADDING = 64
NEXT = np.array([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]])
# Above this, a state is as good as out of reach.
FAR = np.float32(1e30)
REBASE = 64


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


def values_of(indices: Ints) -> Ints:
    """The multiples of the step that indices ``(R, C)`` stand for."""
    result: Ints = (2 * indices - np.sign(indices) * quantisers(indices)).astype(np.int32)
    return result


def dequantised(indices: Ints, step: float, *, compiled: bool = True) -> Floats:
    """The values of indices ``(R, C)``, float32, as decoding gives them."""
    if compiled and ops is not None:
        result: torch.Tensor = torch.ops.wavprune.trellis_values(
            torch.from_numpy(indices), float(np.float32(step))
        )
        return result.numpy()
    return values_of(indices).astype(np.float32) * np.float32(step)


def quantisers(indices: Ints) -> Ints:
    """0 or 1, the quantiser of each of the indices ``(R, C)``."""
    state = np.zeros(indices.shape[1], dtype=np.int64)
    result = np.empty_like(indices)
    for row, index in enumerate(indices):
        result[row] = state & 1
        state = NEXT[state, index & 1]
    return result


def quantise(
    targets: Floats,
    weights: Floats,
    step: float,
    *,
    lower: Floats | None = None,
    importance: Floats | None = None,
    zeros: npt.NDArray[np.bool_] | None = None,
    compiled: bool = True,
) -> tuple[Ints, Floats]:
    """The indices of the least squared error, column by column from the last to the first.

    Args:
        targets: ``(C, R)``: each row one column of a matrix, what its values should be.
        weights: ``(C, R)``: of what the errors are.
        step: of the values.
        lower: ``(groups, C, C)``: what the error of column i adds to the target of column j < i, at
            ``[group, i, j]``; a group is a run of rows. None adds nothing.
        importance: ``(C, R)``: of the squared error of each entry; None takes all alike.
        zeros: ``(C, R)``: entries that must be 0.
        compiled: use the compiled operator, where it is there; the bits are the same.

    Returns:
        Indices ``(C, R)``, and the errors ``weights - step * values``.
    """
    shape = targets.shape
    if compiled and ops is not None:
        none = torch.empty(0)

        def given(array: npt.NDArray[np.float32] | None) -> torch.Tensor:
            return none if array is None else torch.from_numpy(_float32(array))

        masked = none.to(torch.uint8)
        if zeros is not None:
            masked = torch.from_numpy(np.ascontiguousarray(zeros, dtype=np.uint8))
        symbols, errors = torch.empty(shape, dtype=torch.int32), torch.empty(shape)
        torch.ops.wavprune.trellis_quantise_(
            *(given(targets), given(weights), given(lower), given(importance), masked),
            *(float(np.float32(step)), symbols, errors),
        )
        return symbols.numpy(), errors.numpy()
    symbols_, errors_ = np.zeros(shape, dtype=np.int32), np.zeros(shape, dtype=np.float32)
    inverse = np.float32(1) / np.float32(step)
    # Without feedback all columns run at once.
    blocks = [slice(0, shape[0])] if lower is None else [slice(j, j + 1) for j in range(shape[0])]
    for block in reversed(blocks):
        x = targets[block].astype(np.float32)
        if lower is not None:
            for i in range(block.stop, shape[0]):
                factors = np.repeat(lower[:, i, block.start], shape[1] // len(lower))
                x = x + factors * errors_[i]
        limit = np.float32(LARGEST_INDEX)
        x = np.clip(x * inverse, -limit, limit)
        of_block = [None if array is None else array[block] for array in (importance, zeros)]
        symbols_[block], values = _walk(x, *of_block)
        errors_[block] = weights[block] - values.astype(np.float32) * np.float32(step)
    return symbols_, errors_


def _float32(array: Floats) -> Floats:
    return np.ascontiguousarray(array, dtype=np.float32)


def _nearest(a: Floats) -> Ints:
    """Indices nearest to the magnitudes ``a``, for both quantisers and parities: ``(4, ...)``."""
    quarter = np.float32(0.25)
    return np.stack(
        [
            2 * ((a + 2) * quarter).astype(np.int32),
            2 * (a * quarter).astype(np.int32) + 1,
            np.where(a < 1.5, 0, 2 * ((a + 3) * quarter).astype(np.int32)),
            2 * ((a + 1) * quarter).astype(np.int32) + 1,
        ]
    ).astype(np.int32)


def _walk(
    x: Floats, importance: Floats | None, zeros: npt.NDArray[np.bool_] | None
) -> tuple[Ints, Ints]:
    """The indices and values of targets in steps, ``(columns, R)``: the algorithm of Viterbi."""
    magnitude = np.abs(x)
    index = _nearest(magnitude)
    quantiser = np.array([0, 0, 1, 1]).reshape(4, 1, 1)
    value = np.where(index > 0, 2 * index - quantiser, 0).astype(np.float32)
    costs = (magnitude - value) ** 2
    if importance is not None:
        costs = costs * importance
    if zeros is not None:
        costs = np.where(zeros, np.array([0, FAR, 0, FAR], np.float32).reshape(4, 1, 1), costs)
        index = np.where(zeros, 0, index)
    before, branch = _transitions()
    total = np.full((len(x), STATES), FAR, dtype=np.float32)
    total[:, 0] = 0
    ways = np.empty((x.shape[1], len(x), STATES), dtype=np.uint8)
    for row in range(x.shape[1]):
        if row and row % REBASE == 0:
            total = total - total.min(axis=1, keepdims=True)
        at = costs[:, :, row].T
        first = total[:, before[0]] + at[:, branch[0]]
        second = total[:, before[1]] + at[:, branch[1]]
        ways[row] = second < first
        total = np.where(second < first, second, first)
    if x.shape[1] and x.shape[1] % REBASE == 0:
        total = total - total.min(axis=1, keepdims=True)
    state = total.argmin(axis=1)
    symbols = np.empty(x.shape, dtype=np.int32)
    values = np.empty(x.shape, dtype=np.int32)
    columns = np.arange(len(x))
    for row in reversed(range(x.shape[1])):
        way = ways[row, columns, state]
        chosen = branch[way, state]
        state = before[way, state]
        k = index[chosen, columns, row]
        sign = np.where(x[:, row] < 0, -1, 1)
        symbols[:, row] = sign * k
        values[:, row] = sign * (2 * k - (k > 0) * (chosen >> 1))
    return symbols, values


def _transitions() -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """For each state the two before it, ``(2, 8)``, the lower first, and their branches."""
    before, branch = np.zeros((2, STATES), np.int64), np.zeros((2, STATES), np.int64)
    # In the order in which csrc/coding compares them.
    pairs = ((0, 2, 0, 2, 3, 1, 3, 1), (4, 6, 4, 6, 5, 7, 5, 7))
    for way, states in enumerate(pairs):
        for target, state in enumerate(states):
            parity = int(NEXT[state, 1] == target)
            before[way, target] = state
            branch[way, target] = 2 * (state & 1) + parity
    return before, branch


def symbols_of(indices: Ints) -> Ints:
    """The symbols of indices; ``ESCAPE`` for large ones."""
    magnitudes = np.abs(indices)
    return np.where(
        magnitudes > LARGEST_INLINE, ESCAPE, 2 * magnitudes - (indices < 0).astype(np.int32)
    )


def counts(indices: Ints, classes: Classes, *, compiled: bool = True) -> npt.NDArray[np.int64]:
    """How often each symbol is coded by each table, ``(2 * classes, 256)``."""
    if compiled and ops is not None:
        tensors = [torch.from_numpy(array) for array in (indices, classes.rows, classes.columns)]
        result: torch.Tensor = torch.ops.wavprune.trellis_counts(*tensors, classes.number)
        return result.numpy()
    tables = 2 * classes.table() + quantisers(indices)
    flat = tables * SYMBOLS + symbols_of(indices)
    size = 2 * classes.number * SYMBOLS
    return np.bincount(flat.ravel(), minlength=size).reshape(-1, SYMBOLS)


def encode(
    matrices: list[tuple[Ints, Classes]], frequencies: Ints, *, compiled: bool = True
) -> Coded:
    """A stream of matrices.

    Args:
        matrices: indices ``(R, C)``, int32 and contiguous, with their classes.
        frequencies: ``(2 * classes, 256)``, those of each table 0 or of sum 4,096.
        compiled: use the compiled operator, where it is there; the bytes are the same.
    """
    room = sum(indices.size for indices, _ in matrices)
    words = np.zeros(room, dtype=np.uint16)
    state = np.full(2 + COLUMNS, LEAST_STATE, dtype=np.int64)
    state[:2] = room, 0
    escapes: list[Ints] = []
    for indices, classes in reversed(matrices):
        if compiled and ops is not None:
            tensors = (words.view(np.int16), state, frequencies, classes.rows, classes.columns)
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
    indices: Ints,
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
        self._words = np.concatenate([coded.words, np.zeros(PADDING, dtype=np.uint16)])
        self._tables, self._escapes = tables, coded.escapes
        self._state = np.zeros(2 + COLUMNS, dtype=np.int64)
        self._state[2:] = coded.states
        self._compiled = compiled and ops is not None

    @property
    def words_read(self) -> int:
        """How many words of the stream have been read."""
        return int(self._state[0])

    def read(self, classes: Classes, step: float) -> Floats:
        """The next matrix, ``(R, C)``, float32.

        Raises:
            WavpruneError: the stream ends within it.
        """
        if not self._compiled:
            return self._read(classes, np.float32(step))
        tensors = (
            self._words.view(np.int16),
            self._state,
            self._tables.view(np.int32),
            classes.rows,
            classes.columns,
        )
        try:
            result: torch.Tensor = torch.ops.wavprune.trellis_decode(
                *map(torch.from_numpy, tensors),
                *(classes.number, torch.from_numpy(self._escapes), float(np.float32(step))),
            )
        except RuntimeError as error:
            raise WavpruneError("its coded values end early") from error
        return result.numpy()

    def _read(self, classes: Classes, step: np.float32) -> Floats:
        rows, columns = classes.shape
        out = np.empty((rows, columns), dtype=np.float32)
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
        return out

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
    place = np.arange(TOTAL)
    for table, sizes in enumerate(frequencies):
        if sizes.any():
            symbols = np.repeat(np.arange(SYMBOLS), sizes)
            starts = np.cumsum(sizes) - sizes
            result[table] = symbols << 24 | sizes[symbols] << 12 | (place - starts[symbols])
    return result.ravel()
