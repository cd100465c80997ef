"""Filters along a long axis: the matrix of a short axis, with more of the same in the middle.

Far from the ends each coefficient of a wavelet reads the same filter one step further on. So a
short axis, whose matrix PyWavelets gives, tells the filter and what happens at both ends.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .axes import AxisMap, Constants, along, every_second
from .matrices import Matrix, frozen

Indices = npt.NDArray[np.intp]


@dataclass(frozen=True)
class Streams:
    """How an axis is divided into sequences of which each goes on by one value per step.

    Attributes:
        count: 1 or 2.
        interleaved: True for even and odd positions, False for one half after the other.
    """

    count: int
    interleaved: bool

    def length(self, stream: int, total: int) -> int:
        """How many of the ``total`` values of the axis belong to a stream."""
        return (
            (total - stream + self.count - 1) // self.count
            if self.interleaved
            else (total // self.count)
        )

    def split(self, total: int) -> tuple[Indices, Indices]:
        """``(total,)`` each: the stream of every value, and its position in the stream."""
        index = np.arange(total)
        if self.interleaved:
            return index % self.count, index // self.count
        return np.divmod(index, total // self.count)

    def locate(self, stream: int | Indices, position: Indices, total: int) -> Any:
        """Where on the axis a position of a stream is."""
        if self.interleaved:
            return position * self.count + stream
        return stream * (total // self.count) + position

    def views(self, x: torch.Tensor, dim: int) -> list[torch.Tensor]:
        """The streams along ``dim``, -1 or -2, as views."""
        if self.interleaved and self.count == 2:
            return [every_second(x, dim, stream) for stream in range(2)]
        return list(x.chunk(self.count, dim))


SIGNAL = Streams(2, interleaved=True)
LOW_AND_HIGH = Streams(2, interleaved=False)
LOW = Streams(1, interleaved=False)


class Tap(NamedTuple):
    """One value of a filter: what it multiplies, relative to the position of the output."""

    stream: int
    offset: int
    value: float


class Interior(NamedTuple):
    """The outputs of one stream that all have the same filter."""

    start: int
    length: int
    taps: tuple[Tap, ...]


class BandedMap(AxisMap):
    """A short matrix lengthened in its middle.

    Args:
        matrix: ``(m, n)`` of the short axis.
        outputs: how its rows are divided into streams.
        inputs: how its columns are.
        extra: how many values each stream of the long axis has more.

    Example:
        >>> averages = 0.5 * np.kron(np.eye(8), [1.0, 1.0])
        >>> BandedMap(averages, LOW, SIGNAL, extra=1000).shape
        (1008, 2016)
    """

    def __init__(self, matrix: Matrix, outputs: Streams, inputs: Streams, extra: int) -> None:
        m, n = matrix.shape
        self.shape = (m + extra * outputs.count, n + extra * inputs.count)
        self._outputs, self._inputs = outputs, inputs
        stream, position = inputs.split(n)
        edge_rows, edge_outputs = [], []
        interiors = []
        for output in range(outputs.count):
            length = outputs.length(output, m)
            rows = outputs.locate(output, np.arange(length), m)
            start, stop, taps = _interior(matrix[rows], stream, position, inputs)
            interiors.append(Interior(start, stop - start + extra, taps))
            ends = np.r_[0:start, stop:length]
            edge_rows.append(rows[ends])
            moved = np.where(ends >= stop, ends + extra, ends)
            edge_outputs.append(outputs.locate(output, moved, self.shape[0]))
        self._interiors = tuple(interiors)
        edges = matrix[np.concatenate(edge_rows)]
        num_taps = int(np.count_nonzero(edges, axis=1).max(initial=0))
        # The columns that each row reads, in order, then some that it multiplies by 0.
        read = np.argsort(edges == 0, axis=1, kind="stable")[:, :num_taps]
        lengths = np.array([inputs.length(i, n) for i in range(inputs.count)])[stream]
        moved = np.where(position >= lengths // 2, position + extra, position)
        edge_inputs = inputs.locate(stream, moved, self.shape[1])[read]
        values = np.take_along_axis(edges, read, axis=1)
        self.constants = (frozen(values.T), edge_inputs.T, np.concatenate(edge_outputs))

    def apply(self, x: torch.Tensor, dim: int, constants: Constants) -> torch.Tensor:
        """A sum over the filter's taps; at both ends, over as many values of their own."""
        edge_values, edge_inputs, edge_outputs = constants
        size = list(x.shape)
        size[dim] = self.shape[0]
        result = x.new_empty(size)
        sources = [view.contiguous() for view in self._inputs.views(x, dim)]
        targets = self._outputs.views(result, dim)
        # No matmul, and no fused multiply-add: both may round an element according to where it is.
        for target, (start, length, taps) in zip(targets, self._interiors, strict=True):
            total = target.new_zeros(())
            for stream, offset, value in taps:
                total = total + sources[stream].narrow(dim, start + offset, length) * value
            target.narrow(dim, start, length).copy_(total)
        if len(edge_outputs):
            size[dim] = len(edge_outputs)
            total = x.new_zeros(size)
            for values, inputs in zip(edge_values, edge_inputs, strict=True):
                total = total + x.index_select(dim, inputs) * along(values, dim)
            result.index_copy_(dim, edge_outputs, total)
        return result


def _interior(
    rows: Matrix, stream: Indices, position: Indices, inputs: Streams
) -> tuple[int, int, tuple[Tap, ...]]:
    """The rows around the middle one that are shifts of it: first, end, and their filter.

    Args:
        rows: ``(length, n)``, those of one stream.
        stream: ``(n,)``, of every column.
        position: ``(n,)``, of every column in its stream.
        inputs: how the columns are divided into streams.
    """
    length, n = rows.shape
    middle = length // 2
    columns = np.flatnonzero(rows[middle])
    taps = tuple(
        Tap(int(stream[k]), int(position[k]) - middle, float(rows[middle, k])) for k in columns
    )
    shifted = np.zeros_like(rows)
    same = np.ones(length, dtype=np.bool_)
    index = np.arange(length)
    for source, offset, value in taps:
        read = index + offset
        inside = (read >= 0) & (read < inputs.length(source, n))
        same &= inside
        shifted[index[inside], inputs.locate(source, read[inside], n)] = value
    same &= (rows == shifted).all(axis=1)
    differs = np.flatnonzero(~same)
    start = int(differs[differs < middle].max(initial=-1)) + 1
    stop = int(differs[differs > middle].min(initial=length))
    return start, stop, taps
