"""Safetensors files: their header, strictly checked, and their tensors, read one by one.

Pruning changes neither shapes nor dtypes, so a pruned safetensors file is its input with other
bytes where the pruned tensors lie. It is therefore copied, the copy is mapped into memory, and the
mapped tensors are pruned in place: header, metadata and all other tensors stay as they are, and
the operating system holds no more of the file than it likes.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ...common.files import check_regular, describe_content, read_exactly
from ...engine.layers import LayerRef
from ...errors import WavpruneError
from .names import Weight, weights_of

METADATA = "__metadata__"
LARGEST_HEADER = 100_000_000
COPIED_AT_ONCE = 1 << 22
LARGEST_NUMBER = (1 << 63) - 1
# Bits of one value of each dtype that the format has.
BITS = {
    "BOOL": 8,
    "F4": 4,
    "F6_E2M3": 6,
    "F6_E3M2": 6,
    **dict.fromkeys(("U8", "I8", "F8_E5M2", "F8_E4M3", "F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("I16", "U16", "F16", "BF16"), 16),
    **dict.fromkeys(("I32", "U32", "F32"), 32),
    **dict.fromkeys(("I64", "U64", "F64", "C64"), 64),
}
# Those that torch has with one element for each value.
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "F8_E8M0": torch.float8_e8m0fnu,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Entry(NamedTuple):
    """A tensor of a safetensors file.

    Attributes:
        dtype: as safetensors calls it, such as ``"F32"``.
        shape: of the tensor.
        start: where its bytes begin in the file.
        stop: where they end.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    @property
    def size(self) -> int:
        """How many bytes it has."""
        return self.stop - self.start


class SafetensorsFile:
    """A safetensors file; see ``formats.WeightFile``.

    Attributes:
        tensors: by name, in the order of the header.
        metadata: of the header.
        header_room: bytes that the header of a copy gets, which ``note`` then writes; None copies
            the header as it is.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors, self.metadata = read_header(path)
        self.weights, self.skipped = weights_of(
            {name: tensor.shape for name, tensor in self.tensors.items()}
        )
        self._by_layer = {weight.layer: weight for weight in self.weights}
        self.header_room: int | None = None

    @property
    def prefix(self) -> str:
        """What stands before every name: nothing."""
        return ""

    def dtype(self, layer: str) -> str:
        """The dtype of a layer's weight, as safetensors calls it."""
        return self.tensors[self._by_layer[layer].key].dtype

    def sizes(self) -> list[tuple[int, int]]:
        """Elements and bytes of every tensor."""
        return [(math.prod(entry.shape), entry.size) for entry in self.tensors.values()]

    @contextmanager
    def open(self, layers: Sequence[str], copy: Path | None) -> Iterator[list[LayerRef]]:
        """The weights of some layers: mapped in the copy, else read; see ``WeightFile``."""
        entries = {layer: self.tensors[self._by_layer[layer].key] for layer in layers}
        for layer, entry in entries.items():
            if entry.dtype not in DTYPES:
                raise WavpruneError(
                    f"layer {layer!r}: its weight has dtype {entry.dtype}; ignore that layer"
                )
        if copy is None:
            yield [LayerRef(layer, read_tensor(self.path, e)) for layer, e in entries.items()]
            return
        content, moved = self._copied(copy, self.header_room)
        refs, unaligned = [], []
        for layer, entry in entries.items():
            dtype = DTYPES[entry.dtype]
            values = content[entry.start + moved : entry.stop + moved]
            if (entry.start + moved) % dtype.itemsize:
                mapped, values = values, values.clone()
                unaligned.append((mapped, values))
            refs.append(LayerRef(layer, values.view(dtype).view(entry.shape)))
        yield refs
        for mapped, values in unaligned:
            mapped.copy_(values)

    def rewrite(
        self, copy: Path, tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]
    ) -> None:
        """Make a copy of the file, with other values in some tensors, and metadata beside its own.

        Args:
            copy: the file to write.
            tensors: by name.
            metadata: replaces entries of the same name.
        """
        if metadata:
            self.make_room(metadata)
        content, moved = self._copied(copy, self.header_room)
        if metadata:
            self.note(copy, metadata)
        for name, entry in self.tensors.items():
            if name in tensors:
                values = tensors[name].detach().cpu().to(DTYPES[entry.dtype]).contiguous()
                part = values.view(-1).view(torch.uint8)
                content[entry.start + moved : entry.stop + moved] = part

    def make_room(self, metadata: Mapping[str, str], more: int = 0) -> None:
        """Give copies room for such metadata beside its own, and for more bytes than these."""
        self.header_room = _aligned(len(self._header_text(metadata)) + more)

    def note(self, copy: Path, metadata: Mapping[str, str]) -> None:
        """Write metadata beside its own into the header of a copy that was made with room."""
        text = self._header_text(metadata)
        assert self.header_room is not None
        assert len(text) <= self.header_room, (len(text), self.header_room)
        with copy.open("r+b") as file:
            size = self.header_room.to_bytes(8, "little")
            file.write(size + text + b" " * (self.header_room - len(text)))

    def _header_text(self, metadata: Mapping[str, str]) -> bytes:
        # Libraries look for the format as soon as there is metadata.
        own = self.metadata or {"format": "pt"}
        start = min((entry.start for entry in self.tensors.values()), default=0)
        content: dict[str, Any] = {METADATA: {**own, **metadata}}
        for name, entry in self.tensors.items():
            content[name] = {
                "dtype": entry.dtype,
                "shape": entry.shape,
                "data_offsets": [entry.start - start, entry.stop - start],
            }
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False).encode()

    def _copied(self, copy: Path, room: int | None) -> tuple[torch.Tensor, int]:
        """The bytes of a copy of the file, mapped, and by how many its tensors have moved.

        Args:
            copy: the file to write.
            room: bytes of its header, which is to be written; None copies the header too.
        """
        if room is None:
            shutil.copyfile(self.path, copy)
            if read_header(copy) != (self.tensors, self.metadata):
                raise WavpruneError(f"{self.path} changed while it was read")
            moved = 0
        else:
            with self.path.open("rb") as source, copy.open("wb") as target:
                before = 8 + int.from_bytes(source.read(8), "little")
                if read_header(self.path) != (self.tensors, self.metadata):
                    raise WavpruneError(f"{self.path} changed while it was read")
                source.seek(before)
                target.seek(8 + room)
                shutil.copyfileobj(source, target, COPIED_AT_ONCE)
            moved = 8 + room - before
            last = max((entry.stop for entry in self.tensors.values()), default=before)
            if copy.stat().st_size != last + moved:
                raise WavpruneError(f"{self.path} changed while it was read")
        mapped = torch.from_file(
            str(copy), shared=True, size=copy.stat().st_size, dtype=torch.uint8
        )
        return mapped, moved


def _aligned(size: int) -> int:
    return -(-size // 8) * 8


def read_tensor(path: Path, entry: Entry) -> torch.Tensor:
    """A tensor of a safetensors file; its bytes, where torch has no such dtype.

    Raises:
        WavpruneError: the file was cut off.
    """
    dtype = DTYPES.get(entry.dtype)
    if not entry.size:
        return torch.empty(entry.shape if dtype else 0, dtype=dtype or torch.uint8)
    data = torch.frombuffer(read_exactly(path, entry.start, entry.size), dtype=torch.uint8)
    return data if dtype is None else data.view(dtype).view(entry.shape)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file, in the order of its header, and its metadata.

    Raises:
        WavpruneError: the file is no whole safetensors file.
    """
    check_regular(path)
    known = describe_content(path)
    if known is not None:
        raise WavpruneError(f"{path} cannot be read as a safetensors file: it is {known}")
    try:
        return _read_header(path)
    except WavpruneError as error:
        raise WavpruneError(f"{path} cannot be read as a safetensors file: {error}") from error


def _read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    total = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        size = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or size > min(LARGEST_HEADER, total - 8):
            raise WavpruneError(f"its header has {size:,} bytes, the file {total:,}")
        text = file.read(size)
    if len(text) < size or not text.startswith(b"{"):
        raise WavpruneError("it does not begin with a JSON header")
    try:
        header = json.loads(text.decode(), object_pairs_hook=_without_duplicates)
    except RecursionError as error:
        raise WavpruneError("its header nests too deep") from error
    except WavpruneError:
        raise
    except ValueError as error:
        raise WavpruneError(f"its header is not JSON: {error}") from error
    metadata = header.pop(METADATA, None) or {}
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise WavpruneError("its metadata is not a map of strings")
    entries = {name: _entry(name, content, 8 + size) for name, content in header.items()}
    end = 8 + size
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise WavpruneError(f"tensor {name!r} does not begin where the one before it ends")
        end = entry.stop
    if end != total:
        raise WavpruneError(f"its tensors end at byte {end:,}, the file at {total:,}")
    return entries, metadata


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) < len(pairs):
        raise WavpruneError("its header has an entry twice")
    return result


def _entry(name: str, content: Any, offset: int) -> Entry:
    fields: dict[str, Any] = content if isinstance(content, dict) else {}
    dtype, shape, offsets = (fields.get(field, "") for field in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or dtype not in BITS:
        raise WavpruneError(
            f"tensor {name!r} has dtype {str(dtype)[:40]!r}; known: {', '.join(BITS)}"
        )
    if not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        raise WavpruneError(f"tensor {name!r} has no shape or no place in the file")
    if 8 * math.prod(n for n in shape if n) > LARGEST_NUMBER:
        raise WavpruneError(f"tensor {name!r} has an impossible shape, {str(shape)[:100]}")
    start, stop = offsets
    size = stop - start
    bits = math.prod(shape) * BITS[dtype]
    if 8 * size != bits:
        raise WavpruneError(
            f"tensor {name!r} has {size:,} bytes, and {dtype} of {'x'.join(map(str, shape))} needs "
            f"{-(-bits // 8):,}"
        )
    return Entry(dtype, tuple(shape), offset + start, offset + stop)


def _naturals(value: Any) -> bool:
    return isinstance(value, list) and all(
        type(number) is int and 0 <= number <= LARGEST_NUMBER for number in value
    )


def reader_of(path: Path, entry: Entry) -> Callable[[], torch.Tensor]:
    """A function that reads a tensor."""
    return lambda: read_tensor(path, entry)


__all__ = [
    "BITS",
    "COPIED_AT_ONCE",
    "DTYPES",
    "DTYPE_NAMES",
    "METADATA",
    "Entry",
    "SafetensorsFile",
    "Weight",
    "read_header",
    "read_tensor",
    "reader_of",
]
