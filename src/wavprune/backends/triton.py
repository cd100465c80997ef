"""Triton kernels for NVIDIA and AMD: all layers in one launch a pass, nothing read by the host.

A threshold takes three passes over float32 weights and six over float64 ones (and over random
draws, which rank in float64); pruning takes one more, which also writes. So float32 weights are
read four times and written once.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..bases import Operator
from . import Backend, Batch, Target
from .eager import percentile_rank

Words = npt.NDArray[np.int64]

# Values of the largest kernel: 8x8. The identity has no matrices, and so no limit.
MAX_VALUES = 64
# The lowest bit and the bits of each digit of a bit pattern without its sign.
DIGITS = {
    False: ((20, 11), (10, 10), (0, 10)),
    True: ((52, 11), (41, 11), (30, 11), (20, 10), (10, 10), (0, 10)),
}
# What one tile holds; how many of them a program takes, of layers that keep a device busy so.
TILE = {False: 2048, True: 1024}
MOST_TILES = 8
BUSY = 64
DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2, torch.float64: 3}


class _Member(NamedTuple):
    """A batch, and where it belongs: its job, and the place of its threshold and its sums."""

    batch: Batch
    job: int
    place: int


class _Job(NamedTuple):
    """Which order statistic of its ranks a job wants.

    Attributes:
        rank: among the coefficients, 0 the smallest.
        nothing: True where nothing is to be kept.
        zero: True where the wanted rank is one of the structural zeros before them.
        fraction: of the way to the next order statistic.
        place: where the threshold goes.
    """

    rank: int
    nothing: bool
    zero: bool
    fraction: float
    place: int


class _Group(NamedTuple):
    """Layers on one device that go through a launch together."""

    table: torch.Tensor
    programs: int
    rows: int


@dataclass(frozen=True)
class _InTurn:
    """Groups of one layer each, of batches that are on the device only while they are looked at."""

    jobs: Sequence[tuple[Sequence[Batch], Target]]
    wanted: Sequence[_Job]
    wide: bool

    def __iter__(self) -> Iterator[_Group]:
        for j, job in enumerate(self.wanted):
            for batch in self.jobs[job.place][0]:
                member = _Member(batch, j, job.place)
                yield _group([member], self.wanted, self.wide, batch.weight.device)


class TritonBackend:
    """The five steps as Triton kernels, many layers in one launch."""

    name = "triton"
    one_at_a_time = True
    # Any number of weights in one call: it needs 50 KiB a layer, whatever their size.
    unit = 1 << 60

    def unsupported(self, batch: Batch) -> str | None:
        """Why this backend cannot prune this batch, or None."""
        device = batch.weight.device
        if device.type != ("cpu" if _interpreted() else "cuda"):
            return f"the Triton kernels run on a CUDA or ROCm device, not on {device}"
        kh, kw = batch.basis.kernel
        if kh * kw > MAX_VALUES and not batch.operator.identity:
            return (
                f"the Triton kernels go up to {MAX_VALUES} values a kernel, not {kh}x{kw}; "
                "backend 'eager' runs those on the device"
            )
        if _span(batch) >= 1 << 31:
            return (
                f"strides of {batch.weight.stride()} put neighbours too far apart for the Triton "
                "kernels; backend 'eager' runs those on the device"
            )
        return None

    def threshold(self, jobs: Sequence[tuple[Sequence[Batch], Target]]) -> torch.Tensor:
        """One exact threshold for each job; see ``Backend``."""
        # By index, not in turn: what is not on the device need not come for this.
        known = [[batches[i] for i in range(len(batches))] for batches, _ in jobs]
        resident = all(isinstance(batches, list | tuple) for batches, _ in jobs)
        devices = _devices(batch for batches in known for batch in batches)
        result = torch.empty(len(jobs), dtype=torch.float64, device=devices[0])
        for wide in (False, True):
            chosen = [i for i, batches in enumerate(known) if _wide(batches[0]) == wide]
            if not chosen:
                continue
            wanted = [_job(known[i], jobs[i][1], place=i) for i in chosen]
            groups: Iterable[_Group] = _InTurn(jobs, wanted, wide)
            if resident:
                members = [_Member(batch, j, i) for j, i in enumerate(chosen) for batch in known[i]]
                groups = [_group(_on(members, device), wanted, wide, device) for device in devices]
            select(groups, wanted, wide, devices, result)
        return result

    def apply_(self, batches: Sequence[Batch], thresholds: torch.Tensor) -> torch.Tensor:
        """Prune each batch's weight in place; see ``Backend``."""
        devices = _devices(batches)
        members = [_Member(batch, 0, i) for i, batch in enumerate(batches)]
        parts = []
        for device in devices:
            # Every row is written where there is one device; of several, each writes its own.
            make = torch.empty if len(devices) == 1 else torch.zeros
            sums = make(len(batches), 4, dtype=torch.float64, device=device)
            cuts = thresholds.to(device, torch.float64).contiguous()
            for wide in (False, True):
                here = [m for m in _on(members, device) if _wide(m.batch) == wide]
                if here:
                    _prune(_group(here, [], wide, device), cuts, wide, sums)
            parts.append(sums)
        # Autograd must see the change, as it sees one by any operator of torch.
        torch.autograd.graph.increment_version([batch.weight for batch in batches])
        for part in parts[1:]:
            parts[0] += part.to(devices[0])
        return parts[0]


def select(
    groups: Iterable[_Group],
    wanted: Sequence[_Job],
    wide: bool,
    devices: Sequence[torch.device],
    result: torch.Tensor,
) -> None:
    """Find all thresholds: a pass over all groups for each digit.

    Args:
        groups: the layers, by what is on a device together; gone through once a pass.
        wanted: a threshold each, of layers in any of the groups.
        wide: True computes in float64.
        devices: where the groups are; the first concludes.
        result: float64, on the first device; written at the jobs' places.
    """
    kernels = _kernels()
    digits = DIGITS[wide]
    size = kernels.HEAD.value + len(digits) * kernels.BINS.value
    states = {
        device: torch.zeros(len(wanted), size, dtype=torch.int64, device=device)
        for device in devices
    }
    before = 0
    for digit, (shift, bits) in enumerate(digits):
        for group in groups:
            _launch(
                kernels.count, group.programs, group.table, states[group.table.device],
                group.programs, group.rows, size, digit, shift, bits, before, WIDE=wide,
            )  # fmt: skip
        share(list(states.values()), digit)
        before = bits
    jobs = _group([], wanted, wide, devices[0]).table
    state = states[devices[0]]
    last = len(digits) - 1
    _launch(kernels.conclude, len(wanted), jobs, state, result, size, last, before, WIDE=wide)


def share(states: Sequence[torch.Tensor], digit: int) -> None:
    """Give every device the counts of all, where there are several.

    Args:
        states: ``(jobs, size)``, one a device.
        digit: which was counted.
    """
    kernels = _kernels()
    head, bins = kernels.HEAD.value, kernels.BINS.value
    counts = slice(head + digit * bins, head + (digit + 1) * bins)
    first = states[0]
    for other in states[1:]:
        first[:, counts] += other[:, counts].to(first.device)
        # A device without layers of a job has zeros there.
        first[:, :head] = torch.maximum(first[:, :head], other[:, :head].to(first.device))
    for other in states[1:]:
        other[:, counts] = first[:, counts].to(other.device)


def _prune(group: _Group, thresholds: torch.Tensor, wide: bool, sums: torch.Tensor) -> None:
    kernels = _kernels()
    partials = sums.new_empty(group.programs, 4)
    table, programs = group.table, group.programs
    _launch(kernels.prune, programs, table, thresholds, partials, programs, WIDE=wide)
    _launch(kernels.total, group.rows, table, partials, sums, programs)


def _launch(kernel: Any, programs: int, *arguments: Any, **constants: Any) -> None:
    """On the current stream of the device that holds the first argument."""
    if programs:
        with _current(arguments[0].device):
            kernel[(programs,)](*arguments, **constants, **options())


@cache
def options(nvidia: bool | None = None) -> dict[str, Any]:
    """How the kernels are compiled.

    Args:
        nvidia: for NVIDIA, else for AMD; None asks torch which of them it is built for.
    """
    if nvidia is None:
        nvidia = torch.version.hip is None
    # Contraction would be the compiler's choice, in each kernel another. 128 registers leave room
    # for four programs on a multiprocessor; AMD's compiler needs no telling.
    return {"num_warps": 4, "enable_fp_fusion": False, **({"maxnreg": 128} if nvidia else {})}


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        yield
    else:
        with torch.cuda.device(device):
            yield


def _job(batches: Sequence[Batch], target: Target, place: int) -> _Job:
    total = sum(batch.kernels * len(batch.operator.analysis) for batch in batches)
    if target.percentile is None:
        keep = target.keep or 0
        return _Job(max(total - keep, 0), keep == 0 or total == 0, False, 0.0, place)
    zeros = sum(batch.kernels * batch.operator.dropped for batch in batches)
    rank, fraction = percentile_rank(total + zeros, target.percentile)
    if rank + 1 < zeros:
        fraction = 0.0
    return _Job(max(rank - zeros, 0), total == 0, rank < zeros, fraction, place)


def _group(
    members: Sequence[_Member], jobs: Sequence[_Job], wide: bool, device: torch.device
) -> _Group:
    """The table of some layers on a device, as triton_kernels.py reads it."""
    kernels = _kernels()
    rows = np.zeros((len(members), kernels.ROW.value), dtype=np.int64)
    wanted = np.zeros((len(jobs), kernels.JOB.value), dtype=np.int64)
    for words, job in zip(wanted, jobs, strict=True):
        words[kernels.RANK.value] = job.rank
        words[kernels.NOTHING.value] = job.nothing
        words[kernels.ZERO.value] = job.zero
        words[kernels.FRACTION.value] = np.float64(job.fraction).view(np.int64)
        words[kernels.PLACE.value] = job.place
    programs = 0
    for words, member in zip(rows, members, strict=True):
        programs += _describe(words, member, programs, wide)
    matrices: list[Words] = []
    places: dict[Operator, tuple[int, int]] = {}
    end = programs + rows.size + wanted.size
    for words, member in zip(rows, members, strict=True):
        operator = member.batch.operator
        if operator.identity:
            continue
        if operator not in places:
            pair = [_words(matrix.T, wide) for matrix in (operator.analysis, operator.synthesis)]
            places[operator] = (end, end + pair[0].size)
            end += pair[0].size + pair[1].size
            matrices += pair
        words[kernels.ANALYSIS.value], words[kernels.SYNTHESIS.value] = places[operator]
    owners = np.repeat(np.arange(len(rows)), rows[:, kernels.PROGRAMS.value])
    table = np.concatenate([owners, rows.ravel(), wanted.ravel(), *matrices])
    return _Group(_uploaded(table, device), programs, len(rows))


def _describe(words: Words, member: _Member, first: int, wide: bool) -> int:
    """Fill in a layer's row; how many programs it takes."""
    kernels = _kernels()
    batch = member.batch
    weight = batch.weight
    values = int(weight.shape[2] * weight.shape[3])
    tile, units, most = TILE[wide], batch.kernels, MOST_TILES
    if batch.operator.identity:
        kind = kernels.FLAT if weight.is_contiguous() else kernels.STRIDED
        units = weight.numel()
        tile //= 2
    elif values <= kernels.SMALL_ROWS.value:
        kind = kernels.SMALL
        tile //= kernels.SMALL_ROWS.value
    else:
        kind = kernels.LARGE
        tile //= 2 * kernels.LARGE_ROWS.value
        most = 1
    tiles = min(max(units // (tile * BUSY), 1), most)
    programs = -(-units // (tile * tiles))
    words[: kernels.ANALYSIS.value] = (
        weight.data_ptr(),
        DTYPES[weight.dtype],
        kind.value,
        values,
        weight.shape[3],
        weight.shape[1],
        *weight.stride(),
        units,
        tiles,
        len(batch.operator.analysis),
    )
    words[kernels.OWNER.value :] = (
        member.job,
        batch.draw is not None,
        batch.draw or 0,
        first,
        programs,
        member.place,
    )
    return programs


def _words(matrix: npt.NDArray[np.float64], wide: bool) -> Words:
    """A matrix in what computes, row by row, in whole 64-bit words."""
    values = matrix.ravel().astype(np.float64 if wide else np.float32)
    if not wide:
        values = np.append(values, np.zeros(values.size % 2, dtype=np.float32))
    words: Words = values.view(np.int64)
    return words


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
            ready = torch.cuda.Event()
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


def _span(batch: Batch) -> int:
    """Elements between two weights of a tile, at most: offsets in it have 32 bits."""
    weight = batch.weight
    if weight.is_contiguous() and batch.operator.identity:
        return 0
    outs, ins, kh, kw = weight.shape
    crossed = min(outs, TILE[False] // max(ins, 1) + 2)
    extent = zip((crossed, ins, kh, kw), weight.stride(), strict=True)
    return sum(max(size - 1, 0) * stride for size, stride in extent)


def _on(members: Sequence[_Member], device: torch.device) -> list[_Member]:
    return [member for member in members if member.batch.weight.device == device]


def _devices(batches: Iterable[Batch]) -> list[torch.device]:
    return list(dict.fromkeys(batch.weight.device for batch in batches))


def _wide(batch: Batch) -> bool:
    """True where float64 computes: random draws rounded to float32 would tie."""
    return batch.draw is not None or batch.compute_dtype == torch.float64


def _kernels() -> Any:
    """The module of the kernels: importing it needs triton."""
    from . import triton_kernels

    return triton_kernels


def _interpreted() -> bool:
    return bool(_kernels().triton.knobs.runtime.interpret)


def make() -> Backend:
    """The backend, for the registry.

    Raises:
        ImportError: triton is not installed, or there is no device that it compiles for.
    """
    try:
        _kernels()
    except ImportError as error:
        raise ImportError(
            f"triton is not there: pip install 'wavprune[triton]' ({error})"
        ) from error
    if not _interpreted() and not torch.cuda.is_available():
        raise ImportError("torch sees no CUDA or ROCm device, and Triton compiles for nothing else")
    return TritonBackend()
