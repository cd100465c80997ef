"""Bytes of a file that are read when they are asked for."""

from __future__ import annotations

from pathlib import Path

from ..errors import WavpruneError


class FileSlice:
    """Some bytes of a file, of which slices are read as memory has them.

    Args:
        path: of the file.
        start: where they begin.
        size: how many they are.

    Example:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp(), "x")
        >>> _ = path.write_bytes(b"abcdef")
        >>> bytes(FileSlice(path, 1, 4)[1:3])
        b'cd'
    """

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._path, self._start, self._size = path, start, size

    def __len__(self) -> int:
        return self._size

    def __getitem__(self, part: slice) -> memoryview:
        start, stop, _ = part.indices(self._size)
        data = bytearray(max(0, stop - start))
        with self._path.open("rb", buffering=0) as file:
            file.seek(self._start + start)
            at = memoryview(data)
            while at:
                count = file.readinto(at)
                if not count:
                    raise WavpruneError("the file ended while it was read")
                at = at[count:]
        return memoryview(data)
