"""Safetensors files written one tensor after the other, and read with nothing taken on trust.

A file is a header of JSON, which says where each tensor lies, and then the tensors' bytes. What
wavprune adds is one entry of the header's ``__metadata__``.
"""

from __future__ import annotations

import json
import os
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .formats import Entry, safetensors_header

KEY = "wavprune"
COPIED_AT_ONCE = 1 << 22


class Writer:
    """Tensors of a new file, whose sizes are known only when they have been written."""

    def __init__(self, data: BinaryIO) -> None:
        self._data = data
        self._entries: dict[str, dict[str, Any]] = {}
        self._start = 0
        self.crc = 0

    def write(self, part: bytes | memoryview) -> int:
        """Add bytes to the tensor that ``close`` will name, and return how many."""
        self._data.write(part)
        self.crc = zlib.crc32(part, self.crc)
        return len(part)

    def close(self, name: str, dtype: str, shape: tuple[int, ...] | None = None) -> tuple[int, int]:
        """End a tensor.

        Args:
            name: its name.
            dtype: its dtype.
            shape: its shape; None is that of a vector of bytes.

        Returns:
            How many bytes it has, and their CRC-32.
        """
        stop = self._data.tell()
        size, crc = stop - self._start, self.crc
        self._entries[name] = {
            "dtype": dtype,
            "shape": list((size,) if shape is None else shape),
            "data_offsets": [self._start, stop],
        }
        self._start, self.crc = stop, 0
        return size, crc

    def finish(self, target: BinaryIO, metadata: Mapping[str, str]) -> int:
        """Write the whole file, and return its size."""
        header = json.dumps({"__metadata__": dict(metadata), **self._entries}, **COMPACT).encode()
        header += b" " * (-len(header) % 8)
        target.write(len(header).to_bytes(8, "little") + header)
        self._data.seek(0)
        shutil.copyfileobj(self._data, target, COPIED_AT_ONCE)
        target.flush()
        os.fsync(target.fileno())
        return target.tell()


COMPACT: dict[str, Any] = {"separators": (",", ":"), "ensure_ascii": False}


@contextmanager
def written(target: Path) -> Iterator[Writer]:
    """A writer whose bytes lie beside the target until they are complete, and then go away."""
    path = target.with_name(f"{target.name}.data")
    try:
        with path.open("w+b") as data:
            yield Writer(data)
    finally:
        path.unlink(missing_ok=True)


def read_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file, in the order of their bytes, and its metadata.

    Raises:
        ValueError: the file is no whole safetensors file.
    """
    if not path.is_file():
        raise ValueError(f"{path} is no file; allowed: a .safetensors file")
    entries, metadata = safetensors_header(path)
    return dict(sorted(entries.items(), key=lambda item: item[1].start)), metadata
