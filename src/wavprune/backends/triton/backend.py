"""Triton kernels for NVIDIA and AMD: all layers in one launch a pass, nothing read by the host.

A threshold takes three passes over float32 weights and six over float64 ones (and over random
draws, which rank in float64); pruning takes one more, which also writes. So float32 weights are
read four times and written once.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch

from ..protocol import Backend, Batch, Target
from .tables import (
    BINS,
    DIGITS,
    HEAD,
    MAX_VALUES,
    Group,
    Job,
    Member,
    group_of,
    is_wide,
    job_of,
    span,
)


@dataclass(frozen=True)
class _InTurn:
    """Groups of one layer each, of batches that are on the device only while they are looked at."""

    jobs: Sequence[tuple[Sequence[Batch], Target]]
    wanted: Sequence[Job]
    wide: bool

    def __iter__(self) -> Iterator[Group]:
        for j, job in enumerate(self.wanted):
            for batch in self.jobs[job.place][0]:
                member = Member(batch, j, job.place)
                yield group_of([member], self.wanted, self.wide, batch.weight.device)


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
        factored = batch.basis.factors is not None
        if factored or (kh * kw > MAX_VALUES and not batch.operator.identity):
            return (
                f"the Triton kernels go up to {MAX_VALUES} values a kernel, not {kh}x{kw}; "
                "backend 'eager' runs those on the device"
            )
        if span(batch) >= 1 << 31:
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
            chosen = [i for i, batches in enumerate(known) if is_wide(batches[0]) == wide]
            if not chosen:
                continue
            wanted = [job_of(known[i], jobs[i][1], place=i) for i in chosen]
            groups: Iterable[Group] = _InTurn(jobs, wanted, wide)
            if resident:
                members = [Member(batch, j, i) for j, i in enumerate(chosen) for batch in known[i]]
                groups = [
                    group_of(_on(members, device), wanted, wide, device) for device in devices
                ]
            select(groups, wanted, wide, devices, result)
        return result

    def apply_(self, batches: Sequence[Batch], thresholds: torch.Tensor) -> torch.Tensor:
        """Prune each batch's weight in place; see ``Backend``."""
        devices = _devices(batches)
        members = [Member(batch, 0, i) for i, batch in enumerate(batches)]
        parts = []
        for device in devices:
            # Every row is written where there is one device; of several, each writes its own.
            make = torch.empty if len(devices) == 1 else torch.zeros
            sums = make(len(batches), 4, dtype=torch.float64, device=device)
            cuts = thresholds.to(device, torch.float64).contiguous()
            for wide in (False, True):
                here = [m for m in _on(members, device) if is_wide(m.batch) == wide]
                if here:
                    _prune(group_of(here, [], wide, device), cuts, wide, sums)
            parts.append(sums)
        # Autograd must see the change, as it sees one by any operator of torch.
        torch.autograd.graph.increment_version([batch.weight for batch in batches])
        for part in parts[1:]:
            parts[0] += part.to(devices[0])
        return parts[0]


def select(
    groups: Iterable[Group],
    wanted: Sequence[Job],
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
    size = HEAD + len(digits) * BINS
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
    jobs = group_of([], wanted, wide, devices[0]).table
    state = states[devices[0]]
    last = len(digits) - 1
    _launch(kernels.conclude, len(wanted), jobs, state, result, size, last, before, WIDE=wide)


def share(states: Sequence[torch.Tensor], digit: int) -> None:
    """Give every device the counts of all, where there are several.

    Args:
        states: ``(jobs, size)``, one a device.
        digit: which was counted.
    """
    counts = slice(HEAD + digit * BINS, HEAD + (digit + 1) * BINS)
    first = states[0]
    for other in states[1:]:
        first[:, counts] += other[:, counts].to(first.device)
        # A device without layers of a job has zeros there.
        first[:, :HEAD] = torch.maximum(first[:, :HEAD], other[:, :HEAD].to(first.device))
    for other in states[1:]:
        other[:, counts] = first[:, counts].to(other.device)


def _prune(group: Group, thresholds: torch.Tensor, wide: bool, sums: torch.Tensor) -> None:
    kernels = _kernels()
    partials = sums.new_empty(group.programs, 4)
    table, programs, layers = group.table, group.programs, len(thresholds)
    _launch(kernels.prune, programs, table, thresholds, partials, programs, layers, WIDE=wide)
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


def _on(members: Sequence[Member], device: torch.device) -> list[Member]:
    return [member for member in members if member.batch.weight.device == device]


def _devices(batches: Iterable[Batch]) -> list[torch.device]:
    return list(dict.fromkeys(batch.weight.device for batch in batches))


@cache
def _kernels() -> Any:
    """The module of the kernels: importing it needs triton."""
    from . import kernels as triton_kernels

    return triton_kernels


def _interpreted() -> bool:
    return bool(_kernels().triton.knobs.runtime.interpret)


def make() -> Backend:
    """The backend, for the registry.

    Raises:
        ImportError: triton is not installed, or there is no device that it compiles for.
    """
    if importlib.util.find_spec("triton") is None:
        raise ImportError("triton is not installed; pip install 'wavprune[triton]'")
    # Importing it takes a while: not for a machine that it has nothing to do on.
    asked = bool(os.environ.get("TRITON_INTERPRET"))
    if not torch.cuda.is_available() and not (asked and _interpreted()):
        raise ImportError("torch sees no CUDA or ROCm device, and Triton compiles for nothing else")
    return TritonBackend()
