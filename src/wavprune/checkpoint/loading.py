"""Compressed checkpoints, read tensor by tensor."""

from __future__ import annotations

import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..atomic import replaced
from .coders import bytes_of
from .container import COPIED_AT_ONCE, KEY, read_header, written
from .decode import decode
from .formats import DTYPES, Entry
from .record import Contents, Record, parse

# A file that says it holds more bytes than this for each of its own is not believed.
RATIO = 1024
ALWAYS = 1 << 26


class _File(NamedTuple):
    path: Path
    entries: dict[str, Entry]
    contents: Contents


def load(path: str | os.PathLike[str], *, max_bytes: int | None = None) -> dict[str, torch.Tensor]:
    """The state dict of a compressed file.

    Args:
        path: a file that ``save`` or ``wavprune compress`` wrote.
        max_bytes: how many bytes all tensors together may have; None means 1,024 times those of the
            file and 64 MiB more, so that a small file cannot fill the memory.

    Returns:
        Ordinary tensors on the CPU, with the bits that the ``SaveReport`` has the checksums of.

    Raises:
        ValueError: there is no such file, it is broken in any way, of another version, or too
            large.
        ImportError: the extra ``checkpoint`` is not installed.
    """
    file = _open(path, max_bytes)
    with file.path.open("rb") as data:
        return {name: _tensor(file, name, data) for name in file.contents.checksums}


def decompress(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
) -> int:
    """Write the state dict of a compressed file as an ordinary safetensors file.

    No more than one tensor is in memory at a time.

    Args:
        path: as for ``load``.
        output: the ``.safetensors`` file to write, which appears when it is complete.
        max_bytes: as for ``load``.

    Returns:
        The bytes of the new file.

    Raises:
        ValueError: as for ``load``; or ``output`` is no ``.safetensors`` file.
    """
    target = Path(output)
    if target.suffix.lower() != ".safetensors" or target.is_dir():
        raise ValueError(f"output must be a file that ends in .safetensors, not {str(output)!r}")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: there is no directory {target.parent}")
    file = _open(path, max_bytes)
    with (
        replaced(target) as new,
        written(new) as writer,
        file.path.open("rb") as data,
        new.open("wb") as out,
    ):
        for name in sorted(file.entries, key=lambda name: -_itemsize(file, name)):
            for part in _bytes_of(file, name, data):
                writer.write(part)
            writer.close(name, *_kind(file, name))
        return writer.finish(out, file.contents.metadata)


def _open(path: str | os.PathLike[str], max_bytes: int | None) -> _File:
    path = Path(path)
    entries, metadata = read_header(path)
    with _named(path):
        if KEY not in metadata:
            raise ValueError(f"its metadata has no {KEY!r}: it is not compressed")
        contents = parse(metadata[KEY])
        if contents.checksums.keys() != entries.keys():
            raise ValueError("its checksums are not of the tensors that it holds")
        for name in contents.layers:
            if name not in entries or entries[name].dtype != "U8" or len(entries[name].shape) != 1:
                raise ValueError(f"it does not hold the bytes of {name!r}")
        size = sum(_size(record) for record in contents.layers.values()) + sum(
            entry.stop - entry.start
            for name, entry in entries.items()
            if name not in contents.layers
        )
        limit = RATIO * path.stat().st_size + ALWAYS if max_bytes is None else max_bytes
        if size > limit:
            raise ValueError(
                f"it says that its tensors have {size:,} bytes; allowed: up to {limit:,}, or what "
                "max_bytes says"
            )
    return _File(path, entries, contents)


def _size(record: Record) -> int:
    return record.numel * DTYPES[record.dtype].itemsize


def _kind(file: _File, name: str) -> tuple[str, tuple[int, ...]]:
    record = file.contents.layers.get(name)
    return file.entries[name][:2] if record is None else (record.dtype, record.shape)


def _itemsize(file: _File, name: str) -> int:
    dtype, _ = _kind(file, name)
    return DTYPES[dtype].itemsize if dtype in DTYPES else 1


@contextmanager
def _named(path: Path, name: str | None = None) -> Iterator[None]:
    """Errors that say which file, and which of its tensors."""
    try:
        yield
    except ValueError as error:
        of = "" if name is None else f", {name!r}"
        raise ValueError(f"{path}{of}: {error}") from error


def _read(file: _File, name: str, data: BufferedReader) -> bytearray:
    entry = file.entries[name]
    content = bytearray(entry.stop - entry.start)
    data.seek(entry.start)
    if data.readinto(content) != len(content):
        raise ValueError("the file ended while it was read")
    _check(zlib.crc32(content), file, name)
    return content


def _check(crc: int, file: _File, name: str) -> None:
    if crc != file.contents.checksums[name]:
        raise ValueError("its checksum differs: the file is damaged")


def _tensor(file: _File, name: str, data: BufferedReader) -> torch.Tensor:
    with _named(file.path, name):
        record = file.contents.layers.get(name)
        if record is not None:
            return decode(record, memoryview(_read(file, name, data)))
        entry = file.entries[name]
        if entry.dtype not in DTYPES:
            raise ValueError(f"torch has no dtype {entry.dtype}")
        if entry.start == entry.stop:
            return torch.empty(entry.shape, dtype=DTYPES[entry.dtype])
        content = _read(file, name, data)
        values = torch.frombuffer(content, dtype=torch.uint8)
        return values.view(DTYPES[entry.dtype]).view(entry.shape)


def _bytes_of(file: _File, name: str, data: BufferedReader) -> Iterator[Any]:
    """The bytes of a tensor; of one that was not compressed, piece by piece."""
    if name in file.contents.layers:
        yield bytes_of(_tensor(file, name, data).view(-1).view(torch.uint8).numpy())
        return
    entry = file.entries[name]
    crc = 0
    data.seek(entry.start)
    left = entry.stop - entry.start
    while left:
        part = data.read(min(left, COPIED_AT_ONCE))
        if not part:
            raise ValueError(f"{file.path}, {name!r}: the file ended while it was read")
        crc = zlib.crc32(part, crc)
        left -= len(part)
        yield part
    with _named(file.path, name):
        _check(crc, file, name)
