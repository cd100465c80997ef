"""Compressed checkpoints, read tensor by tensor."""

from __future__ import annotations

import os
import warnings
import zlib
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..common.atomic import replaced
from ..engine.ambient import neutral
from ..engine.device import present_device
from ..errors import WavpruneError
from .compressor import bytes_of
from .container import KEY, tensor_writer
from .decoding import decode, parts_of
from .file_slice import FileSlice
from .formats.safetensors import COPIED_AT_ONCE, DTYPES, Entry, read_header
from .on_device import tensors_on
from .packed_layout import TENSOR, is_packed
from .records import Contents, Record, parse
from .saving import output_path
from .stored_basis import Floats, StoredBasis
from .unpacked import Unpacked

# A file that says it holds more bytes than this for each of its own is not believed.
RATIO = 1024
ALWAYS = 1 << 26
# Matrices up to this size stay until the file is read, for the next layer of that basis.
CACHED_MATRIX = 1 << 16
# Packed files up to this size are read at once.
SMALL_FILE = 1 << 25


class OpenFile(NamedTuple):
    """A file of version 1 or 2.

    Attributes:
        path: where it is.
        entries: its tensors, in the order of their bytes.
        contents: what it says of itself.
        matrices: of bases, as they are read.
    """

    path: Path
    entries: dict[str, Entry]
    contents: Contents
    matrices: dict[StoredBasis, Floats]

    def stored(self, name: str) -> str:
        """The tensor that a name stands for."""
        return self.contents.aliases.get(name, name)


@neutral()
def load(
    path: str | os.PathLike[str],
    *,
    names: Collection[str] | None = None,
    max_bytes: int | None = None,
    device: str | torch.device = "cpu",
) -> dict[str, torch.Tensor]:
    """The state dict of a compressed file.

    Args:
        path: a file that ``save`` or ``wavprune compress`` wrote.
        names: of the tensors to load, without decoding the others; None means all.
        max_bytes: how many bytes all tensors together may have, and what decoding any of them may
            take beside, where that is more than 64 MiB. None means 1,024 times those of the file
            and 64 MiB more, so that a small file cannot fill the memory.
        device: where the tensors shall be. CUDA decodes files of ``calibration`` or
            ``coder="trellis"`` itself, where the compiled operators have their CUDA part; else the
            CPU decodes and they are copied.

    Returns:
        Ordinary tensors, with the bits that the ``SaveReport`` has the checksums of.
        Tied weights are one tensor. What has a dtype that torch lacks comes as its bytes, with a
        warning.

    Raises:
        WavpruneError: there is no such file, it is broken in any way, of a later version, or too
            large; or there is no such device here.
        ImportError: the extra ``checkpoint`` is not installed.
    """
    there = present_device(device)
    packed = open_packed(path, max_bytes)
    if packed is not None:
        return _load_packed(Path(path), packed, names, there)
    file = open_file(path, max_bytes)
    asked = _asked(file.path, file.contents.checksums, names)
    stored = dict.fromkeys(file.stored(name) for name in asked)
    with file.path.open("rb") as data:
        tensors = {
            name: _tensor(file, name, data).to(there) for name in file.entries if name in stored
        }
    _warn_foreign(file.path, {name: file.entries[name].dtype for name in tensors})
    return {name: tensors[file.stored(name)] for name in asked}


def _asked(path: Path, known: Iterable[str], names: Collection[str] | None) -> list[str]:
    """The names that were asked for, in the order of the model."""
    if isinstance(names, str):
        raise TypeError(f"names must be several names, not the str {names!r}")
    every = list(known)
    if names is None:
        return every
    unknown = [name for name in names if name not in every]
    if unknown:
        raise WavpruneError(
            f"{path}: names has {unknown[0]!r}, which it does not hold; allowed: "
            f"{', '.join(every[:8])}{', ...' if len(every) > 8 else ''}"
        )
    return [name for name in every if name in names]


def _warn_foreign(path: Path, dtypes: dict[str, str]) -> None:
    foreign = [name for name, dtype in dtypes.items() if dtype not in DTYPES]
    if foreign:
        warnings.warn(
            f"{path}: torch lacks the dtypes of {', '.join(foreign)}; they are given as bytes",
            stacklevel=4,
        )


def _load_packed(
    path: Path, packed: Unpacked, names: Collection[str] | None, device: torch.device
) -> dict[str, torch.Tensor]:
    asked = _asked(path, packed.names, names)
    stored = dict.fromkeys(packed.aliases.get(name, name) for name in asked)
    with named(path):
        tensors = tensors_on(packed, None if names is None else list(stored), device)
    _warn_foreign(path, {name: packed.kind(name)[0] for name in asked})
    return {name: tensors[packed.aliases.get(name, name)] for name in asked}


def open_packed(
    path: str | os.PathLike[str],
    max_bytes: int | None,
    aliases: bool = False,
    in_memory: bool = False,
) -> Unpacked | None:
    """A file of version 3, by its path; None where it is of another.

    Args:
        path: of the file.
        max_bytes: as for ``load``.
        aliases: see ``Unpacked``.
        in_memory: read all its bytes now; of a large file, else, those of a tensor in its turn.

    Raises:
        WavpruneError: as for ``load``.
    """
    path = Path(path)
    entries, metadata = read_header(path)
    with named(path):
        if not is_packed(metadata.get(KEY, "")):
            return None
        entry = entries.get(TENSOR)
        if list(entries) != [TENSOR] or entry is None or entry.dtype != "U8":
            raise WavpruneError(f"it does not hold the bytes of {TENSOR!r}")
        data = FileSlice(path, entry.start, entry.size)
        limit = _limit(path, max_bytes)
        at_once = in_memory or len(data) <= SMALL_FILE
        return Unpacked(data[:] if at_once else data, limit, aliases)


def _limit(path: Path, max_bytes: int | None) -> int:
    return RATIO * path.stat().st_size + ALWAYS if max_bytes is None else max_bytes


@neutral()
def decompress(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
) -> int:
    """Write the state dict of a compressed file as an ordinary safetensors file.

    No more than one tensor is in memory at a time. Tied weights are written under each name.

    Args:
        path: as for ``load``.
        output: the ``.safetensors`` file to write, which appears when it is complete.
        max_bytes: as for ``load``, tied weights counted under each name.

    Returns:
        The bytes of the new file.

    Raises:
        WavpruneError: as for ``load``; or ``output`` is no ``.safetensors`` file.
    """
    target = output_path("output", output)
    packed = open_packed(path, max_bytes, aliases=True)
    if packed is not None:
        return _decompress_packed(Path(path), packed, target)
    file = open_file(path, max_bytes, aliases=True)
    with (
        replaced(target) as new,
        tensor_writer(new) as writer,
        file.path.open("rb") as data,
        new.open("wb") as out,
    ):
        names = [*file.entries, *file.contents.aliases]
        for name in sorted(names, key=lambda name: -_itemsize(file, name)):
            for part in _bytes_of(file, file.stored(name), data):
                writer.write(part)
            writer.close(name, *_kind(file, name))
        return writer.finish(out, file.contents.metadata)


def _decompress_packed(path: Path, packed: Unpacked, target: Path) -> int:
    with (
        replaced(target) as new,
        tensor_writer(new) as writer,
        named(path),
        new.open("wb") as out,
    ):
        names: dict[str, list[str]] = {name: [name] for name in packed.names}
        for name, stands_for in packed.aliases.items():
            del names[name]
            names[stands_for].append(name)
        # Wide elements first, so that each begins at a multiple of its size.
        for size in (8, 4, 2, 1):
            for name, tensor in packed.tensors(size):
                part = bytes_of(tensor.reshape(-1).view(torch.uint8).numpy())
                for each in names[name]:
                    writer.write(part)
                    writer.close(each, *packed.kind(name))
        return writer.finish(out, packed.metadata)


def open_file(
    path: str | os.PathLike[str], max_bytes: int | None, aliases: bool = False
) -> OpenFile:
    """A file of version 1 or 2, by its path.

    Raises:
        WavpruneError: as for ``load``.
    """
    path = Path(path)
    entries, metadata = read_header(path)
    entries = dict(sorted(entries.items(), key=lambda item: item[1].start))
    with named(path):
        if KEY not in metadata:
            raise WavpruneError(f"its metadata has no {KEY!r}: it is not compressed")
        contents = parse(metadata[KEY])
        if contents.checksums.keys() != entries.keys() | contents.aliases.keys():
            raise WavpruneError("its checksums are not of the tensors that it holds")
        twice = entries.keys() & contents.aliases.keys()
        if twice:
            raise WavpruneError(f"it holds the bytes of {min(twice)!r}, and says it does not")
        for name in contents.layers:
            if name not in entries or entries[name].dtype != "U8" or len(entries[name].shape) != 1:
                raise WavpruneError(f"it does not hold the bytes of {name!r}")
        file = OpenFile(path, entries, contents, {})
        _check_memory(file, max_bytes, aliases)
    return file


def _check_memory(file: OpenFile, max_bytes: int | None, aliases: bool) -> None:
    names = [*file.entries, *(file.contents.aliases if aliases else ())]
    size = sum(_size(file, name) for name in names)
    limit = _limit(file.path, max_bytes)
    if size > limit:
        raise WavpruneError(
            f"it says that its tensors have {size:,} bytes; allowed: up to {limit:,}, or what "
            "max_bytes says"
        )
    for name, record in file.contents.layers.items():
        if record.working_bytes > max(limit, ALWAYS):
            raise WavpruneError(
                f"decoding {name!r} takes {record.working_bytes:,} bytes; allowed: up to "
                f"{max(limit, ALWAYS):,}, or what max_bytes says"
            )


def _size(file: OpenFile, name: str) -> int:
    record = file.contents.layers.get(file.stored(name))
    if record is None:
        return file.entries[file.stored(name)].size
    return record.numel * DTYPES[record.dtype].itemsize


def _kind(file: OpenFile, name: str) -> tuple[str, tuple[int, ...]]:
    stored = file.stored(name)
    record = file.contents.layers.get(stored)
    return file.entries[stored][:2] if record is None else (record.dtype, record.shape)


def _itemsize(file: OpenFile, name: str) -> int:
    dtype, _ = _kind(file, name)
    return DTYPES[dtype].itemsize if dtype in DTYPES else 1


@contextmanager
def named(path: Path, name: str | None = None) -> Iterator[None]:
    """Errors that say which file, and which of its tensors."""
    try:
        yield
    except WavpruneError as error:
        of = "" if name is None else f", {name!r}"
        raise WavpruneError(f"{path}{of}: {error}") from error


def read_entry(file: OpenFile, name: str, data: BufferedReader) -> bytearray:
    """The bytes of a tensor of the file, whose checksum is right.

    Raises:
        WavpruneError: it is not, or the file ends.
    """
    entry = file.entries[name]
    content = bytearray(entry.size)
    data.seek(entry.start)
    if data.readinto(content) != len(content):
        raise WavpruneError("the file ended while it was read")
    _check(zlib.crc32(content), file, name)
    return content


def _check(crc: int, file: OpenFile, name: str) -> None:
    if crc != file.contents.checksums[name]:
        raise WavpruneError("its checksum differs: the file is damaged")


def _tensor(file: OpenFile, name: str, data: BufferedReader) -> torch.Tensor:
    with named(file.path, name):
        record = file.contents.layers.get(name)
        if record is not None:
            parts = parts_of(record, memoryview(read_entry(file, name, data)))
            return decode(record, parts, _matrix(file, name, record, parts, data))
        entry = file.entries[name]
        dtype = DTYPES.get(entry.dtype)
        if not entry.size:
            shape = entry.shape if dtype else (0,)
            return torch.empty(shape, dtype=dtype or torch.uint8)
        values = torch.frombuffer(read_entry(file, name, data), dtype=torch.uint8)
        return values if dtype is None else values.view(dtype).view(entry.shape)


def _matrix(
    file: OpenFile, name: str, record: Record, parts: dict[str, memoryview], data: BufferedReader
) -> Floats | None:
    """The synthesis matrix of a layer, from the tensor that holds it."""
    basis = record.basis
    if basis is None:
        return None
    if basis in file.matrices:
        return file.matrices[basis]
    if basis.tensor == name:
        part: bytes | memoryview = parts["matrix"]
    else:
        holder = file.contents.layers[basis.tensor]
        scales, size = holder.sizes[:2]
        if scales + size > file.entries[basis.tensor].size:
            raise WavpruneError(f"{basis.tensor!r} is too short for the basis that it holds")
        data.seek(file.entries[basis.tensor].start + scales)
        part = data.read(size)
    matrix = basis.matrix(part)
    if matrix.size <= CACHED_MATRIX:
        file.matrices[basis] = matrix
    return matrix


def _bytes_of(file: OpenFile, name: str, data: BufferedReader) -> Iterator[Any]:
    """The bytes of a tensor; of one that was not compressed, piece by piece."""
    if name in file.contents.layers:
        yield bytes_of(_tensor(file, name, data).view(-1).view(torch.uint8).numpy())
        return
    entry = file.entries[name]
    crc = 0
    data.seek(entry.start)
    left = entry.size
    while left:
        part = data.read(min(left, COPIED_AT_ONCE))
        if not part:
            raise WavpruneError(f"{file.path}, {name!r}: the file ended while it was read")
        crc = zlib.crc32(part, crc)
        left -= len(part)
        yield part
    with named(file.path, name):
        _check(crc, file, name)
