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

# How a layer's coefficients are computed: where the basis is the identity, they are the weights,
# contiguous or by their strides; else from kernels of at most SMALL_VALUES values, or larger ones.
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
# A program takes up to MAX_TILES tiles of a layer that has work for BUSY_PROGRAMS programs anyway.
MAX_TILES = 8
BUSY_PROGRAMS = 64

# SplitMix64's step; see backends/eager.py.


class LayerEntry(NamedTuple):
    """A layer as Triton kernels read it, one word per field.

    Attributes:
        pointer: address of the weight.
        dtype: index in ``DTYPES``.
        kind: ``CONTIGUOUS``, ``STRIDED``, ``SMALL`` or ``LARGE``.
        num_values: of a kernel.
        kernel_width: columns of a kernel.
        in_channels: input channels of the weight.
        out_stride: of the weight, like the three that follow.
        in_stride: likewise.
        row_stride: likewise.
        column_stride: likewise.
        num_items: what tiles consist of: weights where the basis is the identity, else kernels.
        tiles: tiles per program, at most.
        num_coefficients: ranked coefficients of a kernel.
        analysis: index of the analysis matrix in the table.
        synthesis: index of the synthesis matrix in the table.
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
    in_channels: int
    out_stride: int
    in_stride: int
    row_stride: int
    column_stride: int
    num_items: int
    tiles: int
    num_coefficients: int
    analysis: int
    synthesis: int
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
    """

    layer: Layer
    job: int = 0
    result: int = 0


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


def table_of(members: Sequence[Member], jobs: Sequence[JobEntry], in_float64: bool) -> Table:
    """The table of a launch.

    Args:
        members: the layers, all on one device.
        jobs: all jobs that they belong to.
        in_float64: True where float64 computes, else float32 does.
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
        entries.append(_layer_entry(member, num_programs, offset, in_float64))
        num_programs += entries[-1].num_programs
    programs = np.repeat(np.arange(len(entries)), [entry.num_programs for entry in entries])
    layer_words = np.array(entries, dtype=np.int64).reshape(-1, len(LayerEntry._fields))
    job_words = np.array(jobs, dtype=np.int64).ravel()
    layer_words[:, _MATRIX_FIELDS] += num_programs + layer_words.size + job_words.size
    words = np.concatenate([programs, layer_words.ravel(), job_words, *matrices])
    return Table(words, num_programs, len(entries))


def _layer_entry(
    member: Member, first_program: int, matrices: tuple[int, int], in_float64: bool
) -> LayerEntry:
    layer, weight = member.layer, member.layer.weight
    outs, ins, kh, kw = weight.shape
    out_stride, in_stride, row_stride, column_stride = weight.stride()
    tile_items, num_items, max_tiles = TILE_SIZE[in_float64] // 2, outs * ins, MAX_TILES
    if layer.operator.identity:
        kind = CONTIGUOUS if weight.is_contiguous() else STRIDED
        num_items *= kh * kw
    elif kh * kw <= SMALL_VALUES:
        kind = SMALL
        tile_items = 2 * tile_items // SMALL_VALUES
    else:
        kind = LARGE
        tile_items //= MAX_VALUES
        max_tiles = 1
    tiles = min(max(num_items // (tile_items * BUSY_PROGRAMS), 1), max_tiles)
    return LayerEntry(
        pointer=weight.data_ptr(),
        dtype=DTYPES.index(weight.dtype),
        kind=kind,
        num_values=kh * kw,
        kernel_width=kw,
        in_channels=ins,
        out_stride=out_stride,
        in_stride=in_stride,
        row_stride=row_stride,
        column_stride=column_stride,
        num_items=num_items,
        tiles=tiles,
        num_coefficients=layer.num_coefficients,
        analysis=matrices[0],
        synthesis=matrices[1],
        job=member.job,
        is_random=layer.seed is not None,
        seed=layer.seed or 0,
        first_index=layer.first_channel * math.prod(weight.shape[1:]),
        first_program=first_program,
        num_programs=-(-num_items // (tile_items * tiles)),
        result=member.result,
    )


def _packed(matrix: npt.NDArray[np.float64], in_float64: bool) -> Words:
    """A matrix in the dtype that computes, row by row, in whole 64-bit words."""
    values = matrix.ravel().astype(np.float64 if in_float64 else np.float32)
    if not in_float64:
        values = np.append(values, np.zeros(values.size % 2, dtype=np.float32))
    words: Words = values.view(np.int64)
    return words


def max_offset(layer: Layer) -> int:
    """Elements between two weights of a tile, at most; Triton kernels count them in 32 bits."""
    weight = layer.weight
    if weight.is_contiguous() and layer.operator.identity:
        return 0
    outs, ins, kh, kw = weight.shape
    # Output channels that a tile may reach into.
    reached = min(outs, TILE_SIZE[False] // max(ins, 1) + 2)
    extent = zip((reached, ins, kh, kw), weight.stride(), strict=True)
    return sum(max(size - 1, 0) * stride for size, stride in extent)


def computes_in_float64(layer: Layer) -> bool:
    """True where the Triton kernels compute in float64."""
    return layer.ranking_dtype == torch.float64
