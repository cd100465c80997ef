"""Triton kernels for NVIDIA and AMD: all layers in one launch per pass, and the host never waits.

A threshold takes three passes over float32 weights, and six over float64 ones and over random
numbers, which rank in float64. Pruning takes one more, which also writes: float32 weights are read
four times and written once.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...common.cache import ByteCache
from ...errors import WavpruneError
from ..protocol import SHARDED, Backend, Job, Layer, Measured, Selection, mark_changed
from .tables import (
    BINS,
    DIGITS,
    HEADER,
    MAX_VALUES,
    JobEntry,
    Member,
    Table,
    computes_in_float64,
    job_entry,
    max_offset,
    table_of,
)

NO_MASKS = "the 'triton' backend has no masks; 'native' and 'eager' have"


class TritonBackend:
    """The steps as Triton kernels, many layers in one launch."""

    name = "triton"
    # Any number of weights in one call: it needs 50 KiB per layer, whatever their size.
    call_limit = 1 << 60
    can_stream = True
    # Layers that compute in float32 and in float64 take a launch each.
    is_atomic = False
    has_masks = False
    can_capture = True

    def unsupported(self, layer: Layer) -> str | None:
        """Why this backend cannot prune this layer, or None."""
        device = layer.device
        if layer.group is not None:
            return SHARDED
        if device.type != ("cpu" if _interpreted() else "cuda"):
            return f"Triton runs on CUDA and ROCm devices, not on {device}"
        basis = layer.basis
        if not basis.is_dense or (basis.num_values > MAX_VALUES and not layer.operator.identity):
            size = "x".join(map(str, basis.kernel))
            return (
                f"the Triton code takes kernels of at most {MAX_VALUES} values, not {size}; "
                "'eager' takes larger ones"
            )
        if max_offset(layer) >= 1 << 31:
            return (
                f"with strides of {layer.weight.stride()} its values are too far apart for the "
                "Triton code, which counts in 32 bits; 'eager' takes any strides"
            )
        return None

    def threshold(self, jobs: Sequence[Job]) -> torch.Tensor:
        """One exact threshold per job; see ``Backend``."""
        devices = list(dict.fromkeys(layer.device for job in jobs for layer in job.layers))
        result = torch.empty(len(jobs), dtype=torch.float64, device=devices[0])
        for in_float64 in (False, True):
            indices = [
                i for i, job in enumerate(jobs) if computes_in_float64(job.layers[0]) == in_float64
            ]
            if indices:
                chosen = [jobs[i] for i in indices]
                entries = [job_entry(jobs[i], result=i) for i in indices]
                _select(chosen, entries, in_float64, devices, result)
        return result

    def measure(self, jobs: Sequence[Job]) -> Measured | None:
        """Not offered; see ``Backend``."""
        del jobs
        return None

    def masks(self, layers: Sequence[Layer], thresholds: torch.Tensor) -> list[torch.Tensor]:
        """Not offered; see ``Backend.has_masks``."""
        raise NotImplementedError(NO_MASKS)

    def apply_(self, layers: Sequence[Layer], selection: Selection) -> torch.Tensor:
        """Prune each layer's weight in place, at thresholds; see ``Backend``."""
        if not isinstance(selection, torch.Tensor):
            raise NotImplementedError(NO_MASKS)
        device = layers[0].device
        thresholds = selection.to(device, torch.float64).contiguous()
        sums = torch.empty(len(layers), 4, dtype=torch.float64, device=device)
        for in_float64 in (False, True):
            members = [
                Member(layer, result=i)
                for i, layer in enumerate(layers)
                if computes_in_float64(layer) == in_float64
            ]
            if members:
                launch = _uploaded(table_of(members, [], in_float64), device, layers)
                _prune(launch, thresholds, in_float64, sums)
        mark_changed(layers)
        return sums

    def project_(self, layers: Sequence[Layer], masks: Sequence[torch.Tensor]) -> None:
        """Not offered; see ``Backend.has_masks``."""
        raise NotImplementedError(NO_MASKS)


class _Launch(NamedTuple):
    """A table on its device."""

    table: torch.Tensor
    num_programs: int
    num_layers: int


def _select(
    jobs: Sequence[Job],
    entries: Sequence[JobEntry],
    in_float64: bool,
    devices: Sequence[torch.device],
    result: torch.Tensor,
) -> None:
    """Find all thresholds: a pass over all layers for each digit.

    Args:
        jobs: jobs that compute in the same dtype.
        entries: one per job.
        in_float64: True where float64 computes, else float32 does.
        devices: where the layers are; the first resolves the thresholds.
        result: float64, on the first device; written where the entries say.
    """
    kernels = _kernels()
    digits = DIGITS[in_float64]
    state_size = HEADER + len(digits) * BINS
    states = {
        device: torch.zeros(len(jobs), state_size, dtype=torch.int64, device=device)
        for device in devices
    }
    present = _present(jobs, entries, in_float64, devices)
    bits_before = 0
    for digit, (shift, bits) in enumerate(digits):
        for launch in chain(present, _streamed(jobs, entries, in_float64)):
            _run(
                kernels.count_digits, launch.num_programs, launch.table,
                states[launch.table.device], launch.num_programs, launch.num_layers, state_size,
                digit, shift, bits, bits_before, IN_FLOAT64=in_float64,
            )  # fmt: skip
        share_counts(list(states.values()), digit)
        bits_before = bits
    layers = [layer for job in jobs for layer in job.layers]
    table = _uploaded(table_of([], entries, in_float64), devices[0], layers).table
    _run(
        kernels.resolve_thresholds, len(jobs), table, states[devices[0]], result, state_size,
        len(digits) - 1, bits_before, IN_FLOAT64=in_float64,
    )  # fmt: skip


def _present(
    jobs: Sequence[Job],
    entries: Sequence[JobEntry],
    in_float64: bool,
    devices: Sequence[torch.device],
) -> list[_Launch]:
    """A launch per device, of the layers that stay there."""
    members = [
        Member(layer, job=j)
        for j, job in enumerate(jobs)
        if job.stream is None
        for layer in job.layers
    ]
    launches = []
    for device in devices:
        here = [member for member in members if member.layer.device == device]
        if here:
            table = table_of(here, entries, in_float64)
            launches.append(_uploaded(table, device, [member.layer for member in here]))
    return launches


def _streamed(
    jobs: Sequence[Job], entries: Sequence[JobEntry], in_float64: bool
) -> Iterator[_Launch]:
    """A launch per layer, of the layers that come and go."""
    for j, job in enumerate(jobs):
        if job.stream is not None:
            for layer in job.visit():
                table = table_of([Member(layer, job=j)], entries, in_float64)
                yield _uploaded(table, layer.device, [layer])


def share_counts(states: Sequence[torch.Tensor], digit: int) -> None:
    """Give every device the counts of all devices.

    Args:
        states: ``(jobs, state_size)``, one per device.
        digit: which digit was counted.
    """
    counts = slice(HEADER + digit * BINS, HEADER + (digit + 1) * BINS)
    first = states[0]
    for other in states[1:]:
        first[:, counts] += other[:, counts].to(first.device)
        # A device without layers of a job has zeros there.
        first[:, :HEADER] = torch.maximum(first[:, :HEADER], other[:, :HEADER].to(first.device))
    for other in states[1:]:
        other[:, counts] = first[:, counts].to(other.device)


def _prune(launch: _Launch, thresholds: torch.Tensor, in_float64: bool, sums: torch.Tensor) -> None:
    kernels = _kernels()
    table, num_programs, num_layers = launch
    partials = sums.new_empty(num_programs, 4)
    _run(
        kernels.prune_layers, num_programs, table, thresholds, partials, num_programs,
        len(thresholds), IN_FLOAT64=in_float64,
    )  # fmt: skip
    _run(kernels.sum_partials, num_layers, table, partials, sums, num_programs)


def _run(kernel: Any, num_programs: int, *arguments: Any, **constants: Any) -> None:
    """Launch a Triton kernel on the current stream of its first argument's device."""
    if num_programs:
        with _current(arguments[0].device):
            kernel[(num_programs,)](*arguments, **constants, **options())


@cache
def options(nvidia: bool | None = None) -> dict[str, Any]:
    """How the Triton kernels are compiled.

    Args:
        nvidia: True for NVIDIA, False for AMD; None means the one that torch is built for.
    """
    if nvidia is None:
        nvidia = torch.version.hip is None
    # Which products and sums the compiler fuses would differ between Triton kernels. 128 registers
    # leave room for four programs per multiprocessor; AMD's compiler gets there by itself.
    return {"num_warps": 4, "enable_fp_fusion": False, **({"maxnreg": 128} if nvidia else {})}


@contextmanager
def _current(device: torch.device) -> Iterator[None]:
    if device.type == "cpu":
        yield
    else:
        with torch.cuda.device(device):
            yield


class _Upload(NamedTuple):
    table: torch.Tensor
    ready: torch.cuda.Event


class CapturedTables:
    """Tables that CUDA graphs read at every replay, kept as long as the weights exist.

    Nothing tells when a graph is gone; but one whose weights are gone cannot be replayed.
    """

    def __init__(self) -> None:
        self._kept: dict[tuple[int, tuple[Any, ...]], torch.Tensor] = {}
        self._lock = Lock()

    def keep(self, table: torch.Tensor, layers: Iterable[Layer]) -> None:
        """Keep a table while the weights of these layers exist."""
        storages = (layer.weight.untyped_storage() for layer in layers)
        # torch has no types for it
        weights = tuple(StorageWeakRef(storage) for storage in storages)  # type: ignore[no-untyped-call]
        with self._lock:
            self._kept = {
                key: kept
                for key, kept in self._kept.items()
                if not any(weight.expired() for weight in key[1])
            }
            self._kept[id(table), weights] = table

    def __len__(self) -> int:
        return len(self._kept)


# By content: a model that is pruned again and again is described to its device once.
_UPLOADS = ByteCache[_Upload](16 << 20, lambda upload: upload.table.nbytes)
_CAPTURED = CapturedTables()


def _uploaded(table: Table, device: torch.device, layers: Sequence[Layer]) -> _Launch:
    """A table on its device, by a copy that the host does not wait for.

    Args:
        table: what to copy.
        device: where to.
        layers: those that it is about.

    Raises:
        WavpruneError: a graph is being captured, and the same call did not run before.
    """
    words = torch.from_numpy(table.words)
    if device.type == "cpu":
        return _Launch(words, *table[1:])
    key = (device, table.words.tobytes())

    def copy() -> _Upload:
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
        upload = _Upload(words.pin_memory().to(device, non_blocking=True), ready)
        ready.record(torch.cuda.current_stream())
        return upload

    with torch.cuda.device(device):
        if torch.cuda.is_current_stream_capturing():
            known = _UPLOADS.peek(key)
            if known is None:
                raise WavpruneError(
                    "pruning in a captured CUDA graph needs the same call on the same weights once "
                    "before the capture: it compiles the Triton kernels and copies the table of "
                    "the layers to the device, which a capture does not allow"
                )
            # The device was synchronized when the capture began: the copy is done.
            _CAPTURED.keep(known.table, layers)
            return _Launch(known.table, *table[1:])
        upload = _UPLOADS.get(key, copy)
        stream = torch.cuda.current_stream()
        stream.wait_event(upload.ready)
        upload.table.record_stream(stream)
    return _Launch(upload.table, *table[1:])


@cache
def _kernels() -> Any:
    """The module of the Triton kernels: importing it needs triton."""
    from . import kernels

    return kernels


def _interpreted() -> bool:
    return bool(_kernels().triton.knobs.runtime.interpret)


def make() -> Backend:
    """The backend, for the registry.

    Raises:
        ImportError: triton is not installed, or torch sees no device that it compiles for.
    """
    if importlib.util.find_spec("triton") is None:
        raise ImportError("triton is not installed; pip install 'wavprune[triton]'")
    # Checked before triton is imported, which takes long.
    asked = bool(os.environ.get("TRITON_INTERPRET"))
    if not torch.cuda.is_available() and not (asked and _interpreted()):
        raise ImportError("torch sees no CUDA or ROCm device, and Triton compiles for nothing else")
    return TritonBackend()
