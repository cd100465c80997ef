"""The decoder in C, built by the system's compiler, and called by ctypes."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import zstandard

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "csrc" / "decoder"
SOURCE = FOLDER / "wavprune_decoder.c"
EXAMPLE = ROOT / "examples" / "decoder" / "decode.c"
FUZZ = ROOT / "tests" / "decoder" / "fuzz.c"
COMPILER = shutil.which(os.environ.get("CC", "cc"))
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
C99 = ["-std=c99", *WARNINGS, "-Wconversion"]
CXX17 = ["-x", "c++", "-std=c++17", *WARNINGS]
SANITIZERS = ["-g", "-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
DAMAGED, NEEDS_ZSTD, NEEDS_ROOM, NO_TENSOR = 2, 3, 4, 5


def compile_(target: Path, sources: Iterable[Path], flags: Iterable[str]) -> Path:
    """Compile sources; warnings are errors."""
    assert COMPILER is not None
    command = [COMPILER, *flags, "-ffp-contract=off", f"-I{FOLDER}", *map(str, sources)]
    run = subprocess.run([*command, "-o", str(target)], capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    return target


def decode(program: Path, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Run a compiled program; what it prints is UTF-8."""
    command = [str(program), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, encoding="utf-8")


class _Info(ctypes.Structure):
    _fields_ = (
        ("dtype", ctypes.c_char_p),
        ("axes", ctypes.c_int),
        ("shape", ctypes.c_uint64 * 8),
        ("size", ctypes.c_uint64),
        ("room", ctypes.c_uint64),
        ("same_as", ctypes.c_uint64),
        ("name_length", ctypes.c_uint64),
    )


class Tensor(NamedTuple):
    """What the decoder says of a tensor."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    room: int
    same_as: int


_Decompress = ctypes.CFUNCTYPE(
    ctypes.c_size_t,
    *(ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_void_p, ctypes.c_size_t),
)


def _zstandard(context: int, out: int, room: int, frame: int, size: int) -> int:
    data = zstandard.ZstdDecompressor().decompress(ctypes.string_at(frame, size), room)
    ctypes.memmove(out, data, len(data))
    return len(data)


_decompress = _Decompress(_zstandard)


class DecoderError(Exception):
    """A status that is not 0."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Decoder:
    """A file's bytes, opened.

    Args:
        library: the compiled decoder.
        data: of the file.
        zstd: give it a decompressor.
        cache: bytes of its cache; 0 leaves it with its own.
    """

    def __init__(self, library: Path, data: bytes, *, zstd: bool = True, cache: int = 0) -> None:
        self._library = ctypes.CDLL(str(library))
        self._data, self._state = data, ctypes.create_string_buffer(4096)
        needed = ctypes.c_size_t()
        size = ctypes.c_size_t(len(data))
        self._call("wavprune_heads_size", data, size, ctypes.byref(needed))
        self.heads_size = needed.value
        self._heads = ctypes.create_string_buffer(needed.value)
        decompressor = _decompress if zstd else _Decompress()
        arguments = (self._heads, needed, decompressor, None)
        self._call("wavprune_open", self._state, data, size, *arguments)
        self._cache = ctypes.create_string_buffer(cache)
        if cache:
            self._library.wavprune_cache(self._state, self._cache, ctypes.c_size_t(cache))

    def _call(self, function: str, *arguments: object) -> None:
        status = getattr(self._library, function)(*arguments)
        if status:
            raise DecoderError(status)

    def __len__(self) -> int:
        return ctypes.c_uint64.from_buffer(self._state).value

    def tensor(self, index: int) -> Tensor:
        """What the file says of a tensor."""
        info = _Info()
        number = ctypes.c_uint64(index)
        self._call("wavprune_tensor_at", self._state, number, ctypes.byref(info))
        name = ctypes.create_string_buffer(info.name_length)
        self._call("wavprune_name", self._state, number, name, ctypes.c_size_t(info.name_length))
        shape = tuple(info.shape[: info.axes])
        facts = (info.dtype.decode(), shape, info.size, info.room, info.same_as)
        return Tensor(name.raw.decode(), *facts)

    def read(self, index: int, room: int | None = None) -> bytes:
        """The bytes of a tensor, from a buffer of ``room`` bytes."""
        tensor = self.tensor(index)
        room = tensor.room if room is None else room
        out = ctypes.create_string_buffer(room)
        self._call("wavprune_read", self._state, ctypes.c_uint64(index), out, ctypes.c_size_t(room))
        return out.raw[: tensor.size]

    def read_into(self, index: int, out: bytearray) -> None:
        """The same, without an array of its own."""
        buffer = (ctypes.c_char * len(out)).from_buffer(out)
        room = ctypes.c_size_t(len(out))
        self._call("wavprune_read", self._state, ctypes.c_uint64(index), buffer, room)
