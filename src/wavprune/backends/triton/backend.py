"""Triton kernels for NVIDIA and AMD: all layers in one launch per pass, and the host never waits.

A threshold takes three passes over float32 weights, and six over float64 ones and over random
numbers, which rank in float64. Pruning takes one more, which also writes: float32 weights are read
four times and written once. A projection reads and writes them once; a mask takes one pass that
reads.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from itertools import chain
from threading import Lock
from typing import Any, NamedTuple

import torch
from torch.multiprocessing.reductions import StorageWeakRef

from ...bases import Operator
from ...common.cache import ByteCache
from ...errors import WavpruneError
from ..protocol import SHARDED, Backend, Job, Layer, Measured, Selection, mark_changed
from .tables import (
    BINS,
    DIGITS,
    HEADER,
    MAX_VALUES,
    Member,
    Table,
    computes_in_float64,
    job_entry,
    max_offset,
    table_of,
)


class TritonBackend:
    """The steps as Triton kernels, many layers in one launch."""

    name = "triton"
    # Any number of weights in one call: it needs 50 KiB per layer, whatever their size.
    call_limit = 1 << 60
    can_stream = True
    # One launch changes all layers of a dtype and device.
    is_atomic = True
    has_masks = True
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
        if max_offset(layer.weight) >= 1 << 31:
            return (
                f"with strides of {layer.weight.stride()} its values are too far apart for the "
                "Triton code, which counts in 32 bits; 'eager' takes any strides"
            )
        return None

    def threshold(self, jobs: Sequence[Job]) -> torch.Tensor:
        """One exact threshold per job; see ``Backend``."""
        devices = list(dict.fromkeys(layer.device for job in jobs for layer in job.layers))
        result = torch.empty(len(jobs), dtype=torch.float64, device=devices[0])
        for in_float64, indices in _by_precision([job.layers[0] for job in jobs]):
            _select([jobs[i] for i in indices], indices, in_float64, devices, result)
        return result

    def measure(self, jobs: Sequence[Job]) -> Measured | None:
        """Not offered; see ``Backend``."""
        del jobs
        return None

    def masks(self, layers: Sequence[Layer], thresholds: torch.Tensor) -> list[torch.Tensor]:
        """Which coefficients are kept; see ``Backend``."""
        masks = [
            torch.empty(layer.mask_bytes, dtype=torch.uint8, device=layer.device)
            for layer in layers
        ]
        cuts = thresholds.to(layers[0].device, torch.float64).contiguous() if layers else thresholds
        kernel = _module("pruning").mark_layers
        for in_float64, (table, num_programs, _) in _launches(layers, masks, marks=True):
            _run(kernel, num_programs, table, cuts, num_programs, IN_FLOAT64=in_float64)
        return masks

    def apply_(self, layers: Sequence[Layer], selection: Selection) -> torch.Tensor:
        """Prune each layer's weight in place; see ``Backend``."""
        device, kernels = layers[0].device, _module("pruning")
        sums = torch.empty(len(layers), 4, dtype=torch.float64, device=device)
        thresholds = masks = None
        if isinstance(selection, torch.Tensor):
            thresholds = selection.to(device, torch.float64).contiguous()
        else:
            masks = selection
        for in_float64, launch in _launches(layers, masks):
            table, num_programs, num_layers = launch
            if thresholds is None:
                partials = _prune_by_masks(launch, in_float64)
            else:
                partials = sums.new_empty(num_programs, 4)
                _run(
                    kernels.prune_layers, num_programs, table, thresholds, partials, num_programs,
                    len(layers), IN_FLOAT64=in_float64,
                )  # fmt: skip
            _run(kernels.sum_partials, num_layers, table, partials, sums, num_programs)
        mark_changed(layers)
        return sums

    def project_(self, layers: Sequence[Layer], masks: Sequence[torch.Tensor]) -> None:
        """Set the coefficients that are not kept to 0, in place; see ``Backend``."""
        for in_float64, launch in _launches(layers, masks):
            _prune_by_masks(launch, in_float64)
        mark_changed(layers)


class _Launch(NamedTuple):
    """A table on its device."""

    table: torch.Tensor
    num_programs: int
    num_layers: int


def _prune_by_masks(launch: _Launch, in_float64: bool) -> torch.Tensor:
    """Prune by the masks of a table; ``(num_programs, 4)``, what each program changed."""
    table, num_programs, _ = launch
    partials = torch.empty(num_programs, 4, dtype=torch.float64, device=table.device)
    kernel = _module("pruning").prune_by_masks
    _run(kernel, num_programs, table, partials, num_programs, IN_FLOAT64=in_float64)
    return partials


def _by_precision(layers: Sequence[Layer]) -> Iterator[tuple[bool, list[int]]]:
    """Whether float64 computes, and the indices of the layers where that is so."""
    doubles = [computes_in_float64(layer) for layer in layers]
    for in_float64 in (False, True):
        chosen = [i for i, double in enumerate(doubles) if double == in_float64]
        if chosen:
            yield in_float64, chosen


def _launches(
    layers: Sequence[Layer], masks: Sequence[torch.Tensor] | None, marks: bool = False
) -> Iterator[tuple[bool, _Launch]]:
    """A launch for each device and dtype that computes; results are in the order of the layers."""
    for in_float64, chosen in _by_precision(layers):
        members = [
            Member(layers[i], result=i, mask=None if masks is None else masks[i]) for i in chosen
        ]
        for device in dict.fromkeys(layers[i].device for i in chosen):
            here = [member for member in members if member.layer.device == device]
            yield in_float64, _launch(here, (), in_float64, device, marks=marks)


def _select(
    jobs: Sequence[Job],
    results: Sequence[int],
    in_float64: bool,
    devices: Sequence[torch.device],
    result: torch.Tensor,
) -> None:
    """Find all thresholds: a pass over all layers for each digit.

    Args:
        jobs: jobs that compute in the same dtype.
        results: one per job: where in ``result`` its threshold is written.
        in_float64: True where float64 computes, else float32 does.
        devices: where the layers are; the first resolves the thresholds.
        result: float64, on the first device.
    """
    kernels = _module("kernels")
    digits = DIGITS[in_float64]
    state_size = HEADER + len(digits) * BINS
    states = {
        device: torch.zeros(len(jobs), state_size, dtype=torch.int64, device=device)
        for device in devices
    }
    asked = [
        Asked(job, i, (job.budget, i, tuple([_size_key(layer) for layer in job.layers])))
        for job, i in zip(jobs, results, strict=True)
    ]
    present = _present(asked, in_float64, devices)
    bits_before = 0
    for digit, (shift, bits) in enumerate(digits):
        for launch in chain(present, _streamed(asked, in_float64)):
            _run(
                kernels.count_digits, launch.num_programs, launch.table,
                states[launch.table.device], launch.num_programs, launch.num_layers, state_size,
                digit, shift, bits, bits_before, IN_FLOAT64=in_float64,
            )  # fmt: skip
        share_counts(list(states.values()), digit)
        bits_before = bits
    table = _launch([], asked, in_float64, devices[0]).table
    _run(
        kernels.resolve_thresholds, len(jobs), table, states[devices[0]], result, state_size,
        len(digits) - 1, bits_before, IN_FLOAT64=in_float64,
    )  # fmt: skip


class Asked(NamedTuple):
    """A threshold that is asked for.

    Attributes:
        job: what for.
        result: index of the threshold.
        key: all that a table says of it.
    """

    job: Job
    result: int
    key: tuple[Hashable, ...]


def _size_key(layer: Layer) -> tuple[Hashable, ...]:
    """What says how many coefficients a layer has."""
    operator = layer.operator
    return layer.weight.shape, operator.num_coefficients, operator.dropped


def _present(
    asked: Sequence[Asked], in_float64: bool, devices: Sequence[torch.device]
) -> list[_Launch]:
    """A launch per device, of the layers that stay there."""
    members = [
        Member(layer, job=j)
        for j, (job, *_) in enumerate(asked)
        if job.stream is None
        for layer in job.layers
    ]
    launches = []
    for device in devices:
        here = [member for member in members if member.layer.device == device]
        if here:
            launches.append(_launch(here, asked, in_float64, device))
    return launches


def _streamed(asked: Sequence[Asked], in_float64: bool) -> Iterator[_Launch]:
    """A launch per layer, of the layers that come and go."""
    for j, (job, *_) in enumerate(asked):
        if job.stream is not None:
            for layer in job.visit():
                yield _launch([Member(layer, job=j)], asked, in_float64, layer.device)


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
    """A table on its device.

    Attributes:
        launch: the table.
        ready: when it has been copied; None where it needed no copy.
        operators: the bases that it was made of, whose identities are in its key.
    """

    launch: _Launch
    ready: torch.cuda.Event | None
    operators: tuple[Operator, ...]


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


# A model that is pruned again and again is described to its device once.
_UPLOADS = ByteCache[_Upload](16 << 20, lambda upload: upload.launch.table.nbytes)
_CAPTURED = CapturedTables()


def _launch(
    members: Sequence[Member],
    asked: Sequence[Asked],
    in_float64: bool,
    device: torch.device,
    marks: bool = False,
) -> _Launch:
    """The table of some layers and jobs, on its device; see ``table_of``."""
    key = (
        device,
        in_float64,
        marks,
        tuple(map(_member_key, members)),
        tuple([entry.key for entry in asked]),
    )

    def make() -> Table:
        entries = [job_entry(job, result=i) for job, i, _ in asked]
        return table_of(members, entries, in_float64, marks)

    layers = [member.layer for member in members] or [
        layer for job, *_ in asked for layer in job.layers
    ]
    return uploaded(key, make, device, layers)


def _member_key(member: Member) -> tuple[Hashable, ...]:
    """All that a table says of a layer."""
    layer, job, result, mask = member
    weight = layer.weight
    return (
        weight.data_ptr(),
        weight.dtype,
        weight.shape,
        weight.stride(),
        id(layer.operator),
        layer.seed,
        layer.first_channel,
        job,
        result,
        None if mask is None else mask.data_ptr(),
    )


def uploaded(
    key: Hashable, make: Callable[[], Table], device: torch.device, layers: Sequence[Layer]
) -> _Launch:
    """A table on its device, by a copy that the host does not wait for.

    Args:
        key: what tells it from others.
        make: makes the table, where it is not known.
        device: where to.
        layers: those that it is about.

    Raises:
        WavpruneError: a graph is being captured, and the same call did not run before.
    """

    def copy() -> _Upload:
        table = make()
        words = torch.from_numpy(table.words)
        operators = tuple({id(layer.operator): layer.operator for layer in layers}.values())
        if device.type == "cpu":
            return _Upload(_Launch(words, *table[1:]), None, operators)
        ready = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
        there = words.pin_memory().to(device, non_blocking=True)
        ready.record(torch.cuda.current_stream())
        return _Upload(_Launch(there, *table[1:]), ready, operators)

    if device.type == "cpu":
        return _UPLOADS.get(key, copy).launch
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
            _CAPTURED.keep(known.launch.table, layers)
            return known.launch
        upload = _UPLOADS.get(key, copy)
        stream = torch.cuda.current_stream()
        if upload.ready is not None:
            stream.wait_event(upload.ready)
        upload.launch.table.record_stream(stream)
    return upload.launch


@cache
def _module(name: str) -> Any:
    """A module of Triton kernels: importing it needs triton."""
    return importlib.import_module(f".{name}", __package__)


def _interpreted() -> bool:
    return bool(_module("kernels").triton.knobs.runtime.interpret)


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
