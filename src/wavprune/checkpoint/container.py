"""Safetensors files, written one tensor after the other.

A file is a header of JSON, which says where each tensor lies, and then the tensors' bytes. What
wavprune adds is one entry of the header's ``__metadata__``.
"""

from __future__ import annotations

import json
import shutil
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

from .formats import COMPRESSED
from .formats.safetensors import COPIED_AT_ONCE, METADATA

KEY = COMPRESSED
COMPACT: dict[str, Any] = {"separators": (",", ":"), "ensure_ascii": False}


class Writer:
    """Tensors of a new file, whose sizes are known only when they have been written."""

    def __init__(self, data: BinaryIO) -> None:
        self._data = data
        self._entries: dict[str, dict[str, Any]] = {}
        self._start = 0
        self.crc = 0

    def write(self, part: bytes | memoryview) -> int:
        """Add bytes to the current tensor, which ``close`` will name; returns how many."""
        self._data.write(part)
        self.crc = zlib.crc32(part, self.crc)
        return len(part)

    def close(self, name: str, dtype: str, shape: tuple[int, ...] | None = None) -> tuple[int, int]:
        """End a tensor.

        Args:
            name: its name.
            dtype: its dtype.
            shape: its shape; None for a vector of bytes.

        Returns:
            The number of its bytes, and their CRC-32.
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
        header = json.dumps({METADATA: dict(metadata), **self._entries}, **COMPACT).encode()
        header += b" " * (-len(header) % 8)
        target.write(len(header).to_bytes(8, "little") + header)
        self._data.seek(0)
        shutil.copyfileobj(self._data, target, COPIED_AT_ONCE)
        return target.tell()


@contextmanager
def tensor_writer(target: Path) -> Iterator[Writer]:
    """A writer that collects tensors in a file beside the target, which is removed at the end."""
    path = target.with_name(f"{target.name}.data")
    try:
        with path.open("w+b") as data:
            yield Writer(data)
    finally:
        path.unlink(missing_ok=True)
