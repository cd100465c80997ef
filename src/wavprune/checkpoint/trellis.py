"""Matrices of whole numbers times a step, quantised by a trellis.

Down each column of a matrix runs a trellis of eight states, 0 at its top. Its state says which of
two quantisers the next entry has: the even multiples of the step, or 0 and the odd ones; the parity
of the index leads to the next state. The union has every multiple, so that the error is that of
half the step of what is coded (trellis-coded quantisation, Marcellin and Fischer 1990; with entropy
coding, Joshi et al. 1997, "Comparison of generalized trellis coded quantization and entropy-coded
trellis coded quantization").

``csrc/coding`` is fast; what is here is its definition, and runs where there is no compiled
extension.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

try:
    from .. import ops
except ImportError:
    ops = None  # type: ignore[assignment]  # without a compiler, numpy does it

Ints = npt.NDArray[np.int32]
# Of int8 where they fit.
IndexArray = npt.NDArray[np.signedinteger[Any]]
Floats = npt.NDArray[np.float32]

STATES = 8
LARGEST_INLINE, LARGEST_INDEX = 127, 1 << 21
NEXT = np.array([[0, 2], [5, 7], [1, 3], [6, 4], [2, 0], [4, 6], [3, 1], [7, 5]])
# Above this, a state is as good as out of reach.
FAR = np.float32(1e30)
REBASE = 64
# Values of up to so many steps have indices of up to half of them and 2.
NARROW = 240


class Rounded(NamedTuple):
    """A matrix of whole numbers times a step.

    Attributes:
        indices: ``(R, C)``.
        values: ``(R, C)``, as decoding gives them.
        squared_error: of the values.
    """

    indices: IndexArray
    values: Floats
    squared_error: float


def values_of(indices: IndexArray) -> Ints:
    """The multiples of the step that indices ``(R, C)`` stand for."""
    wide = indices.astype(np.int32)
    result: Ints = (2 * wide - np.sign(wide) * quantisers(wide)).astype(np.int32)
    return result


def dequantised(indices: IndexArray, step: float, *, compiled: bool = True) -> Floats:
    """The values of indices ``(R, C)``, float32, as decoding gives them."""
    if compiled and ops is not None:
        result: torch.Tensor = torch.ops.wavprune.trellis_values(
            torch.from_numpy(indices.astype(np.int32, copy=False)), float(np.float32(step))
        )
        return result.numpy()
    return values_of(indices).astype(np.float32) * np.float32(step)


def quantisers(indices: IndexArray) -> Ints:
    """0 or 1, the quantiser of each of the indices ``(R, C)``."""
    state = np.zeros(indices.shape[1], dtype=np.int64)
    result = np.empty(indices.shape, dtype=np.int32)
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
        IndexArray ``(C, R)``, and the errors ``weights - step * values``.
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


def rounded(
    matrix: Floats,
    step: float,
    zeros: npt.NDArray[np.bool_] | None = None,
    *,
    peak: float = math.inf,
    out: Floats | None = None,
    compiled: bool = True,
) -> Rounded:
    """The indices of the least squared error of a matrix whose columns are independent.

    Args:
        matrix: ``(R, C)``.
        step: of the values.
        zeros: ``(R, C)``: entries that must be 0; None for none.
        peak: what no magnitude is above; with a small one, indices are int8.
        out: gets the values; it may be the matrix.
        compiled: use the compiled operator, where it is there; the bits are the same.
    """
    dtype = np.int8 if peak <= NARROW * step else np.int32
    values = np.empty(matrix.shape, dtype=np.float32) if out is None else out
    indices: IndexArray = np.empty(matrix.shape, dtype=dtype)
    if compiled and ops is not None:
        given = _float32(matrix) if matrix.strides[1] != matrix.itemsize else matrix
        masked = np.zeros(0, dtype=np.uint8)
        if zeros is not None:
            masked = np.ascontiguousarray(zeros).view(np.uint8)
        found: torch.Tensor = torch.ops.wavprune.trellis_round_(
            *map(torch.from_numpy, (given, masked)),
            *(float(np.float32(step)), torch.from_numpy(indices), torch.from_numpy(values)),
        )
        errors = found.numpy()
    else:
        targets = _float32(matrix.T)
        flipped = None if zeros is None else zeros.T
        indices[...] = quantise(targets, targets, step, zeros=flipped, compiled=False)[0].T
        decoded = dequantised(indices, step, compiled=False)
        change = (decoded - matrix)[::-1].astype(np.float64)
        # In the order of the operator's sums.
        errors = np.add.accumulate(change * change, axis=0)[-1]
        values[...] = decoded
    return Rounded(indices, values, float(np.add.accumulate(errors)[-1]))


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
