"""Packed files, decoded where their tensors shall be: by the operator of ``csrc/cuda/decode.cpp``.

A warp decodes a stream, so that the time is that of the longest stream. What is checked is what the
CPU checks: here the streams' own checksums, there that each ends as it should, and the CRC-32 of
every tensor. The host waits for these numbers, and for batch norms that are kept.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..engine.device import warn
from .formats.safetensors import DTYPES as TORCH_DTYPES
from .norms import unfold
from .packed_layout import Matrix
from .packed_records import Stream
from .trellis_coder import Classes
from .unpacked import Unpacked

# Where parts of what is copied begin: what the widest load needs.
ALIGNED = 16
# Bytes behind a part that may be read in vain.
PADDING = 4
# What the operator counts in 32 bits: elements, coefficients, entries of a synthesis matrix.
LARGEST = (1 << 31) - 1
LARGEST_STREAM = LARGEST // 2


class RefusedError(Exception):
    """The device found another end of a stream, or another checksum, than is due."""


def is_capable(device: torch.device) -> bool:
    """True where the compiled operators decode on a device."""
    if device.type != "cuda":
        return False
    try:
        from ..backends.native import device_obstacle
    except ImportError:
        return False
    return device_obstacle(device) is None


class Decoded(NamedTuple):
    """Tensors that are being decoded.

    Attributes:
        tensors: by their names.
        found: int32, on the device: of every stream whether it ended otherwise than it should, and
            the CRC-32 of every matrix.
        expected: the same as they should be; None for what nobody asked for.
    """

    tensors: dict[str, torch.Tensor]
    found: torch.Tensor
    expected: list[int | None]


def check(found: torch.Tensor, expected: Sequence[int | None]) -> None:
    """Wait for the device that decodes, and compare what it finds; see ``Decoded``.

    Raises:
        RefusedError: something is not as it should be.
    """
    numbers = found.cpu().numpy().view(np.uint32)[: len(expected)].tolist()
    pairs = zip(numbers, expected, strict=True)
    if any(due is not None and number != due for number, due in pairs):
        raise RefusedError


class OnDevice:
    """Streams of a packed file, in a device's memory as they are in the file.

    Args:
        packed: the file.
        names: of matrices; the streams that hold one are copied.
        device: where to.

    Attributes:
        nbytes: what they take there.

    Raises:
        WavpruneError: a stream is damaged.
    """

    def __init__(self, packed: Unpacked, names: Iterable[str], device: torch.device) -> None:
        self._packed = packed
        streams = dict.fromkeys(packed.stream_of[name].start for name in names)
        self._streams = [s for s in packed.records.streams if s.start in streams]
        assert packed.records.frequencies is not None
        self._frequencies = torch.from_numpy(packed.records.frequencies)
        coded, parts = _Parts(), _Parts()
        self._coded_at = {s.start: coded.add(packed.coded(s)) for s in self._streams}
        self._escapes_at = {s.start: parts.add(s.escapes.data) for s in self._streams}
        self._classes_at: dict[str, tuple[int, int]] = {}
        self._used: dict[str, int] = {}
        bases: dict[int | None, int] = {None: -1}
        for name in (name for stream in self._streams for name in stream.names):
            classes = packed.records.classes[name]
            self._classes_at[name] = parts.add(classes.rows.data), parts.add(classes.columns.data)
            self._used[name] = _used(classes)
            number = self._entry(name).basis
            if number not in bases:
                synthesis = packed.synthesis(number)
                assert synthesis is not None
                bases[number] = parts.add(np.ascontiguousarray(synthesis).data)
        self._bases_at = bases
        self._coded, self._parts = coded.on(device), parts.on(device)
        self.nbytes = self._coded.numel() + self._parts.numel()

    def check(self) -> None:
        """Decode everything once, a stream at a time, and wait for the device.

        Raises:
            RefusedError: something is not as it should be.
        """
        for found, expected in [self.decode(stream.names)[1:] for stream in self._streams]:
            check(found, expected)

    def decode(self, names: Iterable[str]) -> Decoded:
        """Matrices as tensors, before a batch norm is taken out of them; nothing is waited for."""
        wanted = set(names)
        streams: list[list[int]] = []
        matrices: list[list[int]] = []
        results: list[torch.Tensor] = []
        tensors: dict[str, torch.Tensor] = {}
        crcs: list[int | None] = []
        device = self._coded.device
        nothing = torch.empty(0, device=device)
        for stream in self._streams:
            until = max((i + 1 for i, n in enumerate(stream.names) if n in wanted), default=0)
            if not until:
                continue
            streams.append(self._stream_row(stream, until, len(matrices)))
            for name in stream.names[:until]:
                entry = self._entry(name)
                matrices.append(self._matrix_row(name, entry))
                if name in wanted:
                    dtype = TORCH_DTYPES[entry.dtype]
                    tensors[name] = torch.empty(entry.layout.shape, dtype=dtype, device=device)
                results.append(tensors.get(name, nothing))
                crcs.append(entry.crc if name in wanted else None)
        found: torch.Tensor = operator()(
            self._coded,
            self._parts,
            self._frequencies,
            torch.tensor(streams, dtype=torch.int64, device="cpu"),
            torch.tensor(matrices, dtype=torch.int64, device="cpu"),
            results,
        )
        return Decoded(tensors, found, [*(0 for _ in streams), *crcs])

    def _entry(self, name: str) -> Matrix:
        entry = self._packed.records.entries[name]
        assert isinstance(entry, Matrix)
        return entry

    def _stream_row(self, stream: Stream, until: int, first: int) -> list[int]:
        used = 0
        for name in stream.names[:until]:
            used |= self._used[name]
        whole = until == len(stream.names)
        at = stream.start
        return [
            *(self._coded_at[at], stream.words, self._escapes_at[at], len(stream.escapes)),
            *(first, until, whole, used),
        ]

    def _matrix_row(self, name: str, entry: Matrix) -> list[int]:
        layout = entry.layout
        step = int(np.float32(entry.step).view(np.uint32))
        return [
            *(layout.rows, layout.columns, *self._classes_at[name], step),
            *(self._bases_at[entry.basis], layout.kernel, layout.coefficients),
            *(layout.groups, layout.transposed, entry.exponent),
        ]


class _Parts:
    """Bytes that are copied to a device together."""

    def __init__(self) -> None:
        self._parts: list[tuple[int, npt.NDArray[np.uint8]]] = []
        self._size = 0

    def add(self, part: memoryview) -> int:
        """Where a part begins."""
        start = self._size
        # A view of no bytes has no format to be cast from.
        data = np.frombuffer(part, dtype=np.uint8) if part.nbytes else np.zeros(0, dtype=np.uint8)
        self._parts.append((start, data))
        self._size += -(-(len(data) + PADDING) // ALIGNED) * ALIGNED
        return start

    def on(self, device: torch.device) -> torch.Tensor:
        """All of them, uint8."""
        together = np.zeros(self._size, dtype=np.uint8)
        for start, data in self._parts:
            together[start : start + len(data)] = data
        there = torch.empty(self._size, dtype=torch.uint8, device=device)
        # Staged before this returns, so that nothing waits and nothing has to outlive it.
        return there.copy_(torch.from_numpy(together), non_blocking=True)


def operator() -> Any:
    """What decodes."""
    return torch.ops.wavprune.trellis_load_


def _used(classes: Classes) -> int:
    """A bit for each class that an entry of a matrix has."""
    rows, columns = (np.flatnonzero(np.bincount(part)) for part in (classes.rows, classes.columns))
    sums = np.unique(np.minimum(rows[:, None] + columns, classes.number - 1))
    return sum(1 << int(c) for c in sums)


def fits(packed: Unpacked, names: Iterable[str]) -> bool:
    """True where the streams of some matrices are small enough for 32-bit numbers."""
    streams = {packed.stream_of[name].start: packed.stream_of[name] for name in names}
    for stream in streams.values():
        for name in stream.names:
            entry = packed.records.entries[name]
            assert isinstance(entry, Matrix)
            layout = entry.layout
            values = layout.rows * (layout.columns // layout.coefficients) * layout.kernel
            entries = layout.rows * layout.columns
            if max(values, entries, layout.kernel * layout.coefficients) > LARGEST:
                return False
        if stream.words > LARGEST_STREAM:
            return False
    return True


def can_decode(packed: Unpacked, matrices: Sequence[str], device: torch.device) -> bool:
    """True where there are matrices, and a device decodes them itself."""
    return bool(matrices) and is_capable(device) and fits(packed, matrices)


def stored_names(packed: Unpacked, names: Iterable[str]) -> tuple[list[str], list[str]]:
    """The matrices, and the other tensors, that some tensors are made of."""
    links = packed.records.links
    parts = dict.fromkeys(
        part for name in names for part in (links[name].names if name in links else (name,))
    )
    matrices = [name for name in parts if packed.is_matrix(name)]
    return matrices, [name for name in parts if not packed.is_matrix(name)]


def tensors_on(
    packed: Unpacked, names: Sequence[str] | None, device: torch.device
) -> dict[str, torch.Tensor]:
    """Tensors of a file, none of them tied, on a device.

    Args:
        packed: the file.
        names: of the tensors; None means all.
        device: where they shall be; the CPU decodes for one that cannot.

    Raises:
        WavpruneError: one is damaged.
    """
    asked = list(packed.records.entries) if names is None else list(names)
    matrices, others = stored_names(packed, asked)
    refusal: Exception | None = None
    if can_decode(packed, matrices, device):
        try:
            decoded = OnDevice(packed, matrices, device).decode(matrices)
            check(decoded.found, decoded.expected)
            tensors = decoded.tensors | {name: packed.stored(name) for name in others}
            return assembled(packed, asked, tensors, device)
        except (RefusedError, torch.OutOfMemoryError) as error:
            # The CPU says what is wrong; or the device has no room for values in float32.
            refusal = error
    if names is None:
        result = {name: tensor.to(device) for name, tensor in packed.tensors()}
    else:
        result = {name: packed.tensor(name).to(device) for name in asked}
    if refusal is not None:
        warn_of(refusal, device)
    return result


def checked_on_device(
    packed: Unpacked, matrices: Sequence[str], device: torch.device
) -> OnDevice | None:
    """What decodes matrices on a device, after it was right for all of them; None without that.

    Raises:
        WavpruneError: the file is damaged.
    """
    if not can_decode(packed, matrices, device):
        return None
    try:
        placed = OnDevice(packed, matrices, device)
        placed.check()
    except (RefusedError, torch.OutOfMemoryError) as error:
        # The CPU says what is wrong.
        for _ in packed.tensors():
            pass
        warn_of(error, device)
        return None
    return placed


def warn_of(refusal: Exception, device: torch.device) -> None:
    """Warn that a device does not decode a file that the CPU decodes."""
    wrong = isinstance(refusal, RefusedError)
    why = "does not decode a file to the bits that it has" if wrong else "lacks memory to decode it"
    warn(f"{device} {why}; the CPU does, and did")


def assembled(
    packed: Unpacked,
    names: Iterable[str],
    stored: Mapping[str, torch.Tensor],
    device: torch.device,
) -> dict[str, torch.Tensor]:
    """Tensors on a device, from those that the file holds.

    Raises:
        WavpruneError: its batch norms do not fit.
    """
    result: dict[str, torch.Tensor] = {}
    for name in names:
        link = packed.records.links.get(name)
        if link is None:
            result[name] = stored[name].to(device, non_blocking=True)
        elif name not in result:
            parts = {part: stored[part].cpu() for part in link.names if part != link.weight}
            unfolded = unfold(link, {link.weight: stored[link.weight].to(device), **parts})
            result |= {
                part: tensor.to(device, non_blocking=True) for part, tensor in unfolded.items()
            }
    return {name: result[name] for name in names}
