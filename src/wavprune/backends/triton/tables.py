"""The tables that tell Triton kernels about layers and jobs: a buffer of 64-bit words per launch.

In this order::

    programs         index of the layer that each program works on
    LayerEntry ...   one per layer: its memory, its kernels, where its matrices are
    JobEntry ...     one per job: which order statistic it needs
    matrices         A as (K, M') and S as (M', K), in the dtype that computes
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..eager import percentile_rank
from ..protocol import Job, Layer

Words = npt.NDArray[np.int64]

# How a layer's coefficients are computed: where the basis is the identity, they are the weights, in
# the order of memory or by their strides; else from kernels of at most SMALL_VALUES values, or
# larger ones.
CONTIGUOUS, STRIDED, SMALL, LARGE = range(4)
SMALL_VALUES = 16
# Values of the largest kernel: 8x8. The identity has no matrices, and so no limit.
MAX_VALUES = 64
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

# Of a float's bit pattern without its sign: the lowest bit of each digit, and its number of bits.
# Keyed by whether float64 computes.
DIGITS = {
    False: ((20, 11), (10, 10), (0, 10)),
    True: ((52, 11), (41, 11), (30, 11), (20, 10), (10, 10), (0, 10)),
}
# The state of a job: prefix and rank after each pass, in the last word of the header the least key
# above, then a histogram per digit.
HEADER = 16
BINS = 2048

# Coefficients per tile, by whether float64 computes. Half as many for all but small kernels, which
# take more registers per coefficient.
TILE_SIZE = {False: 2048, True: 1024}
# A tile of large kernels that are marked has whole words of the mask.
MARKED_LARGE = 16
# Output channels of a tile, at most, where those are neighbors in memory.
BRICK = 16
# A program takes up to MAX_TILES tiles of a layer that has work for BUSY_PROGRAMS programs anyway.
MAX_TILES = 8
BUSY_PROGRAMS = 64

# SplitMix64's step; see backends/eager.py.


class LayerEntry(NamedTuple):
    """A layer as Triton kernels read it, one word per field.

    Its axes are those that tiles walk along, from the fastest, so that neighbors in a tile are
    neighbors in memory: of kernels the two channels, of weights all four axes. An item is what
    tiles consist of: a weight where the basis is the identity, else a kernel.

    Attributes:
        pointer: address of the weight.
        dtype: index in ``DTYPES``.
        kind: ``CONTIGUOUS``, ``STRIDED``, ``SMALL`` or ``LARGE``.
        num_values: of a kernel.
        kernel_width: columns of a kernel.
        row_stride: of the weight.
        column_stride: likewise.
        size0: of the fastest axis, and so on.
        stride0: along that axis in memory, and so on.
        step0: along that axis between the flat indices of items, and so on.
        brick: output channels of a tile that is a rectangle of channels; 0 where tiles are runs.
        kernels_adjacent: 1 where neighboring kernels are closer in memory than neighboring values.
        num_items: of the layer.
        num_tiles: of the layer.
        tiles: tiles per program, at most.
        num_coefficients: ranked coefficients of a kernel.
        analysis: index of the analysis matrix in the table.
        synthesis: index of the synthesis matrix in the table.
        mask: address of the mask; 0 where there is none.
        job: index of its job.
        is_random: 1 where random numbers rank the weights.
        seed: of the random numbers.
        first_index: index in the whole weight of this part's first value.
        first_program: index of its first program.
        num_programs: programs that work on it.
        result: index of its threshold and of its sums.
    """

    pointer: int
    dtype: int
    kind: int
    num_values: int
    kernel_width: int
    row_stride: int
    column_stride: int
    size0: int
    size1: int
    size2: int
    size3: int
    stride0: int
    stride1: int
    stride2: int
    stride3: int
    step0: int
    step1: int
    step2: int
    step3: int
    brick: int
    kernels_adjacent: int
    num_items: int
    num_tiles: int
    tiles: int
    num_coefficients: int
    analysis: int
    synthesis: int
    mask: int
    job: int
    is_random: int
    seed: int
    first_index: int
    first_program: int
    num_programs: int
    result: int


_MATRIX_FIELDS = [LayerEntry._fields.index(name) for name in ("analysis", "synthesis")]


class JobEntry(NamedTuple):
    """The order statistic that a job needs, as Triton kernels read it, one word per field.

    Attributes:
        rank: of the order statistic among the coefficients, from 0 for the smallest.
        keeps_nothing: 1 where nothing is to be kept.
        is_zero: 1 where the order statistic is one of the structural zeros.
        fraction: of the way to the next order statistic, the bits of a float64.
        result: index of its threshold.
    """

    rank: int
    keeps_nothing: int
    is_zero: int
    fraction: int
    result: int


class Member(NamedTuple):
    """A layer in a launch.

    Attributes:
        layer: the layer, with its values.
        job: index of its job; 0 in a launch that prunes.
        result: index of its threshold and of its sums; 0 in a launch that counts.
        mask: what is kept of it, in a launch that reads or writes masks.
    """

    layer: Layer
    job: int = 0
    result: int = 0
    mask: torch.Tensor | None = None


class Table(NamedTuple):
    """The words of a launch, and how many programs and layers it has."""

    words: Words
    num_programs: int
    num_layers: int


def job_entry(job: Job, result: int) -> JobEntry:
    """Which order statistic a job needs; the values of its layers are not read.

    Args:
        job: the job.
        result: index of its threshold.
    """
    total = sum(layer.num_kernels * layer.num_coefficients for layer in job.layers)
    if job.budget.percentile is None:
        keep = job.budget.keep or 0
        return JobEntry(max(total - keep, 0), keep == 0 or total == 0, False, 0, result)
    zeros = sum(layer.num_kernels * layer.num_dropped for layer in job.layers)
    rank, fraction = percentile_rank(total + zeros, job.budget.percentile)
    if rank + 1 < zeros:
        fraction = 0.0
    fraction_bits = int(np.float64(fraction).view(np.int64))
    return JobEntry(max(rank - zeros, 0), total == 0, rank < zeros, fraction_bits, result)


def table_of(
    members: Sequence[Member],
    jobs: Sequence[JobEntry],
    in_float64: bool,
    marks: bool = False,
) -> Table:
    """The table of a launch.

    Args:
        members: the layers, all on one device.
        jobs: all jobs that they belong to.
        in_float64: True where float64 computes, else float32 does.
        marks: True where masks are written: then tiles are runs of items in the order of their flat
            indices, so that each has whole words of the mask.
    """
    entries: list[LayerEntry] = []
    matrices: list[Words] = []
    offsets: dict[Hashable, tuple[int, int]] = {}
    num_programs = num_words = 0
    for member in members:
        operator = member.layer.operator
        if operator.key not in offsets and not operator.identity:
            pair = [_packed(m.T, in_float64) for m in (operator.analysis, operator.synthesis)]
            offsets[operator.key] = (num_words, num_words + pair[0].size)
            num_words += pair[0].size + pair[1].size
            matrices += pair
        offset = offsets.get(operator.key, (0, 0))
        entries.append(_layer_entry(member, num_programs, offset, in_float64, marks))
        num_programs += entries[-1].num_programs
    programs = np.repeat(np.arange(len(entries)), [entry.num_programs for entry in entries])
    layer_words = np.array(entries, dtype=np.int64).reshape(-1, len(LayerEntry._fields))
    job_words = np.array(jobs, dtype=np.int64).ravel()
    layer_words[:, _MATRIX_FIELDS] += num_programs + layer_words.size + job_words.size
    words = np.concatenate([programs, layer_words.ravel(), job_words, *matrices])
    return Table(words, num_programs, len(entries))


class Axis(NamedTuple):
    """An axis of a weight that tiles walk along.

    Attributes:
        size: its length.
        stride: between neighbors along it, in memory.
        step: between neighbors along it, among the flat indices.
    """

    size: int
    stride: int
    step: int


_NO_AXIS = Axis(1, 0, 0)


def _layer_entry(
    member: Member,
    first_program: int,
    matrices: tuple[int, int],
    in_float64: bool,
    marks: bool,
) -> LayerEntry:
    layer, weight = member.layer, member.layer.weight
    outs, ins, kh, kw = weight.shape
    out_stride, in_stride, row_stride, column_stride = weight.stride()
    tile_items, num_items, max_tiles = TILE_SIZE[in_float64] // 2, outs * ins, MAX_TILES
    brick = 0
    if layer.operator.identity:
        num_items *= kh * kw
        # Magnitudes may be ranked in any order.
        any_order = member.mask is None and layer.seed is None
        walked = _walked(weight, by_memory=not marks)
        in_order = weight.is_contiguous() or (any_order and _is_dense(walked))
        kind = CONTIGUOUS if in_order else STRIDED
    else:
        walked = [Axis(ins, in_stride, 1), Axis(outs, out_stride, ins), _NO_AXIS, _NO_AXIS]
        if kh * kw <= SMALL_VALUES:
            kind = SMALL
            tile_items = 2 * tile_items // SMALL_VALUES
        else:
            kind = LARGE
            tile_items = MARKED_LARGE if marks else tile_items // MAX_VALUES
            max_tiles = 1
        if min(outs, ins) > 1 and out_stride < in_stride and not marks:
            walked[:2] = walked[1::-1]
            brick = min(tile_items, BRICK)
    if brick:
        num_tiles = -(-outs // brick) * -(-ins // (tile_items // brick))
    else:
        num_tiles = -(-num_items // tile_items)
    tiles = min(max(num_tiles // BUSY_PROGRAMS, 1), max_tiles)
    neighbor = out_stride if brick or ins == 1 else in_stride
    within = [s for s, size in ((row_stride, kh), (column_stride, kw)) if size > 1]
    return LayerEntry(
        pointer=weight.data_ptr(),
        dtype=DTYPES.index(weight.dtype),
        kind=kind,
        num_values=kh * kw,
        kernel_width=kw,
        row_stride=row_stride,
        column_stride=column_stride,
        **{
            f"{name}{i}": value
            for i, axis in enumerate(walked)
            for name, value in axis._asdict().items()
        },
        brick=brick,
        kernels_adjacent=bool(within) and neighbor < min(within),
        num_items=num_items,
        num_tiles=num_tiles,
        tiles=tiles,
        num_coefficients=layer.num_coefficients,
        analysis=matrices[0],
        synthesis=matrices[1],
        mask=0 if member.mask is None else member.mask.data_ptr(),
        job=member.job,
        is_random=layer.seed is not None,
        seed=layer.seed or 0,
        first_index=layer.first_channel * math.prod(weight.shape[1:]),
        first_program=first_program,
        num_programs=-(-num_tiles // tiles),
        result=member.result,
    )


def _walked(weight: torch.Tensor, by_memory: bool) -> list[Axis]:
    """The axes of a weight from the fastest, in the order of memory or of the flat indices."""
    axes, step = [], 1
    for size, stride in zip(reversed(weight.shape), reversed(weight.stride()), strict=True):
        axes.append(Axis(size, stride, step))
        step *= size
    # What has one element comes last: its stride means nothing.
    return sorted(axes, key=lambda axis: (axis.size == 1, axis.stride)) if by_memory else axes


def _is_dense(axes: Sequence[Axis]) -> bool:
    """True where these axes, from the fastest, leave no gaps in memory."""
    extent = 1
    for axis in axes:
        if axis.size > 1 and axis.stride != extent:
            return False
        extent *= axis.size
    return True


def _packed(matrix: npt.NDArray[np.float64], in_float64: bool) -> Words:
    """A matrix in the dtype that computes, row by row, in whole 64-bit words."""
    values = matrix.ravel().astype(np.float64 if in_float64 else np.float32)
    if not in_float64:
        values = np.append(values, np.zeros(values.size % 2, dtype=np.float32))
    words: Words = values.view(np.int64)
    return words


def max_offset(weight: torch.Tensor) -> int:
    """Elements between two weights of a tile, at most; Triton kernels count them in 32 bits."""
    if weight.is_contiguous():
        return TILE_SIZE[False] * MAX_VALUES
    pairs = zip(weight.shape, weight.stride(), strict=True)
    return max(sum(max(size - 1, 0) * stride for size, stride in pairs), weight.numel())


def computes_in_float64(layer: Layer) -> bool:
    """True where the Triton kernels compute in float64."""
    return layer.ranking_dtype == torch.float64
