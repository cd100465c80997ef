"""What tells the Triton kernels where the layers are: one buffer of 64-bit words a launch.

In this order::

    the programs      the row of the layer that each works on
    a ``Row`` a layer its memory, its kernels, where its matrices are
    a ``Job`` a job   which order statistic it wants
    the matrices      A as (K, M') and S as (M', K), in what computes
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ...bases.basis import Operator
from ..eager import percentile_rank
from ..protocol import Batch, Target

Words = npt.NDArray[np.int64]

# How a layer's coefficients are computed: its weights as they lie in memory; its weights by their
# strides; those of kernels of at most SMALL_ROWS values; those of larger kernels.
FLAT, STRIDED, SMALL, LARGE = range(4)
SMALL_ROWS, LARGE_ROWS = 16, 64
# Values of the largest kernel: 8x8. The identity has no matrices, and so no limit.
MAX_VALUES = LARGE_ROWS
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# The lowest bit and the bits of each digit of a bit pattern without its sign.
DIGITS = {
    False: ((20, 11), (10, 10), (0, 10)),
    True: ((52, 11), (41, 11), (30, 11), (20, 10), (10, 10), (0, 10)),
}
# The state of a job: the prefix and the rank after each pass, in the last word the least key above,
# then a count for each value of each digit.
HEAD = 16
BINS = 2048
# Coefficients of a tile; half as many where one takes more registers: all but small kernels.
TILE = {False: 2048, True: 1024}
# Tiles that a program takes, of layers that keep a device busy all the same.
MOST_TILES = 8
BUSY = 64
# SplitMix64's step; see backends/eager.py.
GAMMA = 0x9E3779B97F4A7C15


class Row(NamedTuple):
    """A layer, as the kernels read it: a word each."""

    pointer: int
    dtype: int
    kind: int
    values: int
    kw: int
    ins: int
    out_stride: int
    in_stride: int
    row_stride: int
    column_stride: int
    units: int
    tiles: int
    coefficients: int
    analysis: int
    synthesis: int
    owner: int
    drawn: int
    seed: int
    first: int
    programs: int
    layer: int


class Job(NamedTuple):
    """Which order statistic of its ranks a job wants, as the kernels read it: a word each.

    Attributes:
        rank: among the coefficients, 0 the smallest.
        nothing: 1 where nothing is to be kept.
        zero: 1 where the wanted rank is one of the structural zeros before them.
        fraction: of the way to the next order statistic, the bits of a float64.
        place: where the threshold goes.
    """

    rank: int
    nothing: int
    zero: int
    fraction: int
    place: int


class Member(NamedTuple):
    """A batch, and where it belongs: its job, and the place of its threshold and its sums."""

    batch: Batch
    job: int
    place: int


class Group(NamedTuple):
    """Layers on one device that go through a launch together."""

    table: torch.Tensor
    programs: int
    rows: int


def job_of(batches: Sequence[Batch], target: Target, place: int) -> Job:
    """What to look for.

    Args:
        batches: those that share the threshold; their values are not looked at.
        target: how much of them to keep.
        place: where the threshold goes.
    """
    total = sum(batch.kernels * batch.ranked for batch in batches)
    if target.percentile is None:
        keep = target.keep or 0
        return Job(max(total - keep, 0), keep == 0 or total == 0, False, 0, place)
    zeros = sum(batch.kernels * batch.dropped for batch in batches)
    rank, fraction = percentile_rank(total + zeros, target.percentile)
    if rank + 1 < zeros:
        fraction = 0.0
    way = int(np.float64(fraction).view(np.int64))
    return Job(max(rank - zeros, 0), total == 0, rank < zeros, way, place)


def group_of(
    members: Sequence[Member], jobs: Sequence[Job], wide: bool, device: torch.device
) -> Group:
    """The table of some layers on a device.

    Args:
        members: the layers, on that device.
        jobs: all jobs that they belong to.
        wide: True computes in float64.
        device: where the table goes.

    Raises:
        RuntimeError: a graph is being captured, and the same call did not run before.
    """
    rows: list[Row] = []
    programs = 0
    for member in members:
        rows.append(_row(member, programs, wide))
        programs += rows[-1].programs
    matrices: list[Words] = []
    places: dict[Operator, tuple[int, int]] = {}
    end = programs + len(rows) * len(Row._fields) + len(jobs) * len(Job._fields)
    for i, member in enumerate(members):
        operator = member.batch.operator
        if operator.identity:
            continue
        if operator not in places:
            pair = [_words(matrix.T, wide) for matrix in (operator.analysis, operator.synthesis)]
            places[operator] = (end, end + pair[0].size)
            end += pair[0].size + pair[1].size
            matrices += pair
        rows[i] = rows[i]._replace(analysis=places[operator][0], synthesis=places[operator][1])
    owners = np.repeat(np.arange(len(rows)), [row.programs for row in rows])
    words = [owners, *(np.array(part, dtype=np.int64).ravel() for part in (rows, jobs))]
    return Group(_uploaded(np.concatenate([*words, *matrices]), device), programs, len(rows))


def _row(member: Member, first: int, wide: bool) -> Row:
    batch = member.batch
    weight = batch.weight
    outs, ins, kh, kw = weight.shape
    values = kh * kw
    out_stride, in_stride, row_stride, column_stride = weight.stride()
    tile, units, most = TILE[wide] // 2, outs * ins, MOST_TILES
    if batch.operator.identity:
        kind = FLAT if weight.is_contiguous() else STRIDED
        units *= values
    elif values <= SMALL_ROWS:
        kind = SMALL
        tile = 2 * tile // SMALL_ROWS
    else:
        kind = LARGE
        tile //= LARGE_ROWS
        most = 1
    tiles = min(max(units // (tile * BUSY), 1), most)
    return Row(
        weight.data_ptr(),
        DTYPES.index(weight.dtype),
        kind,
        values,
        kw,
        ins,
        out_stride,
        in_stride,
        row_stride,
        column_stride,
        units,
        tiles,
        batch.ranked,
        analysis=0,
        synthesis=0,
        owner=member.job,
        drawn=batch.draw is not None,
        seed=_seed(batch),
        first=first,
        programs=-(-units // (tile * tiles)),
        layer=member.place,
    )


def _seed(batch: Batch) -> int:
    """What makes place 0 of the weight draw as its place in the whole weight."""
    if batch.draw is None:
        return 0
    skipped = batch.first * math.prod(batch.weight.shape[1:])
    seed = (batch.draw + skipped * GAMMA) % 2**64
    return seed - 2**64 if seed >> 63 else seed


def _words(matrix: npt.NDArray[np.float64], wide: bool) -> Words:
    """A matrix in what computes, row by row, in whole 64-bit words."""
    values = matrix.ravel().astype(np.float64 if wide else np.float32)
    if not wide:
        values = np.append(values, np.zeros(values.size % 2, dtype=np.float32))
    words: Words = values.view(np.int64)
    return words


def span(batch: Batch) -> int:
    """Elements between two weights of a tile, at most: offsets in it have 32 bits."""
    weight = batch.weight
    if weight.is_contiguous() and batch.operator.identity:
        return 0
    outs, ins, kh, kw = weight.shape
    crossed = min(outs, TILE[False] // max(ins, 1) + 2)
    extent = zip((crossed, ins, kh, kw), weight.stride(), strict=True)
    return sum(max(size - 1, 0) * stride for size, stride in extent)


def is_wide(batch: Batch) -> bool:
    """True where float64 computes: random draws rounded to float32 would tie."""
    return batch.draw is not None or batch.compute_dtype == torch.float64


class _Upload(NamedTuple):
    table: torch.Tensor
    ready: torch.cuda.Event


# Tables on their devices, by content, the latest last: a network pruned again and again is
# described once.
_UPLOADS: OrderedDict[tuple[torch.device, bytes], _Upload] = OrderedDict()
MOST_UPLOADS = 64
# A captured graph reads its tables at every replay, and nothing tells when it is gone.
_CAPTURED: list[torch.Tensor] = []


def _uploaded(words: Words, device: torch.device) -> torch.Tensor:
    """The words on the device, by a copy that the host doesn't wait for.

    Raises:
        RuntimeError: a graph is being captured, and the same call did not run before.
    """
    host = torch.from_numpy(words)
    if device.type == "cpu":
        return host
    key = (device, words.tobytes())
    with torch.cuda.device(device):
        stream = torch.cuda.current_stream()
        capturing = torch.cuda.is_current_stream_capturing()
        upload = _UPLOADS.get(key)
        if upload is None:
            if capturing:
                raise RuntimeError(
                    "pruning in a captured CUDA graph needs the same call on the same weights once "
                    "before the capture: it compiles the kernels and copies what describes the "
                    "layers to the device, which a capture does not allow"
                )
            ready = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
            upload = _Upload(host.pin_memory().to(device, non_blocking=True), ready)
            ready.record(stream)
            _UPLOADS[key] = upload
            while len(_UPLOADS) > MOST_UPLOADS:
                _UPLOADS.popitem(last=False)
        elif capturing:
            # The start of the capture waited for the copy.
            _CAPTURED.append(upload.table)
        else:
            _UPLOADS.move_to_end(key)
            stream.wait_event(upload.ready)
            upload.table.record_stream(stream)
    return upload.table
