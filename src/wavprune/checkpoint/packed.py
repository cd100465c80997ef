"""Version 3 of the format: one tensor of bytes that holds a whole model.

The file is a safetensors file with a single ``U8`` tensor, ``wavprune``, since the header of JSON
that a tensor takes is more than many tensors of a small model take. ``docs/format.md`` has its
layout. Matrices are indices of a trellis (``trellis.py``), in streams of at most some matrices, so
that one can be read without the others; everything else is as it was, a fill value, or the name of
the tensor that it is tied to.
"""

from __future__ import annotations

import json
import math
import shutil
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from . import trellis_tables
from .binary import Writer
from .compressor import bytes_of, zstandard
from .container import COMPACT, KEY
from .decoding import checksum
from .formats.safetensors import BITS, COPIED_AT_ONCE
from .index_store import Indices, Scratch
from .norms import NormLink, write_logs
from .packed_layout import (
    ALIAS,
    ALL_DTYPES,
    FILLED,
    LOGS,
    MATRIX,
    METADATA,
    RAW,
    TENSOR,
    Matrix,
    streams,
)
from .stored_basis import StoredBasis, basis_to_json
from .trellis_coder import SYMBOLS, Bytes, encode

# The highest level takes milliseconds for a large part, and saves some ten bytes.
LEVEL, LEVEL_OF_LARGE, LARGE = 19, 15, 1 << 13
# Bytes of raw tensors, of the first ones, that are not read again.
KEPT = 1 << 20
# Elements that are compared at once.
COMPARED = 1 << 16
# Gives the bytes of a tensor, each time it is called.
Pieces = Callable[[], Iterable[memoryview]]


class Packer:
    """Collects the tensors of a model, in their order."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._metadata = metadata
        self._names: list[str] = []
        self._entries = Writer()
        self._raw: list[tuple[Pieces, int]] = []
        self._kept = 0
        self._matrices: list[Indices] = []
        self._links: list[NormLink] = []
        self._bases: dict[tuple[StoredBasis, bytes], int] = {}

    def raw(self, name: str, dtype: str, shape: Sequence[int], pieces: Pieces) -> None:
        """A tensor as it is; one of a single value takes only that.

        Args:
            name: its name.
            dtype: as safetensors calls it.
            shape: its shape.
            pieces: gives its bytes, whole elements at a time: now and, of large tensors, when the
                file is written.
        """
        size = BITS[dtype] // 8 if BITS[dtype] % 8 == 0 else 0
        value, filled, crc, length = b"", bool(size), 0, 0
        kept: list[memoryview] = []
        for piece in filter(len, pieces()):
            data = np.frombuffer(piece, dtype=np.uint8)
            value = value or data[:size].tobytes()
            filled = filled and _is_filled(data, value)
            crc = checksum(data, crc)
            length += len(data)
            if self._kept + length <= KEPT:
                kept.append(memoryview(bytes(piece)))
        filled = filled and length > size
        self._begin(name, FILLED if filled else RAW, dtype, shape)
        if filled:
            self._entries.raw(value)
        else:
            self._entries.raw(crc.to_bytes(4, "little"))
            if self._kept + length <= KEPT:
                self._kept += length
                self._raw.append((lambda: kept, length))
            else:
                self._raw.append((pieces, length))

    def logs(self, name: str, dtype: str, values: torch.Tensor) -> None:
        """A vector on the grid of ``norms.py``."""
        self._begin(name, LOGS, dtype, values.shape)
        write_logs(self._entries, values)

    def link(self, link: NormLink) -> None:
        """A batch norm that is folded into a layer, with the tensors that unfold it."""
        self._links.append(link)

    def alias(self, name: str, stands_for: str) -> None:
        """A tied tensor."""
        self._names.append(name)
        self._entries.numbers([ALIAS, self._names.index(stands_for)])

    def basis(self, basis: StoredBasis | None, payload: bytes) -> int | None:
        """The index of a basis."""
        if basis is None:
            return None
        return self._bases.setdefault((basis, payload), len(self._bases))

    def matrix(self, name: str, record: Matrix, indices: Indices) -> None:
        """A tensor as indices."""
        layout = record.layout
        self._begin(name, MATRIX, record.dtype, layout.shape)
        self._entries.number(2 * layout.groups + layout.transposed)
        self._entries.number(0 if record.basis is None else record.basis + 1)
        self._entries.raw(np.array(record.step, dtype="<f4").tobytes())
        self._entries.signed(record.exponent)
        self._entries.raw(record.crc.to_bytes(4, "little"))
        self._matrices.append(indices)

    def _begin(self, name: str, kind: int, dtype: str, shape: Sequence[int]) -> None:
        self._names.append(name)
        self._entries.numbers([kind, ALL_DTYPES.index(dtype), len(shape), *shape])

    def finish(self, folder: Path, *, compiled: bool = True) -> Packed:
        """Code what was collected.

        Args:
            folder: where large streams wait on disk.
            compiled: use the compiled operators, where they are there; the bytes are the same.
        """
        total = np.zeros((2 * trellis_tables.CLASSES, SYMBOLS), dtype=np.int64)
        tallies = [self._tally(indices, total, compiled) for indices in self._matrices]
        table_bytes, frequencies = trellis_tables.choose(total)
        # Of a table that nobody uses, they are infinite.
        bits = np.where(total > 0, trellis_tables.bits_of(frequencies), 0)
        sizes = [math.ceil(float(np.vdot(bits[used], tally)) / 8) for used, tally in tallies]
        head = Writer()
        head.blob(json.dumps(dict(self._metadata), separators=(",", ":")).encode())
        head.text("\0".join(self._names))
        head.number(len(self._names))
        bases = [[*basis_to_json(basis), payload.hex()] for basis, payload in self._bases]
        head.text(json.dumps(bases, separators=(",", ":")))
        head.raw(bytes(self._entries.data))
        head.number(len(self._links))
        for link in self._links:
            head.numbers(map(self._names.index, link.names))
            head.raw(np.array(link.eps, dtype="<f8").tobytes())
        waiting = Scratch(folder)
        for stream in streams(self._matrices, lambda indices: indices.size):
            parts = (part for indices in reversed(stream) for part in indices.parts_reversed())
            room = sum(indices.size for indices in stream)
            coded = encode(parts, room, frequencies, compiled=compiled)
            head.numbers([len(coded.words), len(coded.escapes)])
            head.several_signed(coded.escapes)
            crc = 0
            for values in (coded.states.astype("<u4"), coded.words.astype("<u2", copy=False)):
                crc = checksum(values, crc)
                waiting.file.write(bytes_of(values))
            waiting.file.write(crc.to_bytes(4, "little"))
        head.raw(table_bytes if self._matrices else b"")
        heads = [bytes(head.data), _classes_bytes(self._matrices)]
        compressed = list(map(_compressed, heads))
        block = Writer()
        for part, small in zip(heads, compressed, strict=True):
            block.numbers([len(part), len(small)])
        for small in compressed:
            block.raw(small)
        block.raw(zlib.crc32(bytes(block.data)).to_bytes(4, "little"))
        return Packed(bytes(block.data), waiting, waiting.file.tell(), self._raw, sizes)

    @staticmethod
    def _tally(
        indices: Indices, total: npt.NDArray[np.int64], compiled: bool
    ) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.int64]]:
        """Which tables code a matrix, and how often each symbol; added to those of all matrices."""
        parts = [trellis_tables.counts(*part, compiled=compiled) for part in indices.parts()]
        tally: npt.NDArray[np.int64] = np.add.reduce(parts)
        used = np.flatnonzero(tally.any(axis=1))
        total[used] += tally[used]
        return used, tally[used]


class Packed(NamedTuple):
    """The bytes of a file's tensor.

    Attributes:
        heads: its first part.
        streams: a file of the second.
        coded: how many bytes that has.
        raw: what gives the bytes of each raw tensor in pieces, and how many they are.
        sizes: about how many bytes each matrix takes.
    """

    heads: bytes
    streams: Scratch
    coded: int
    raw: Sequence[tuple[Pieces, int]]
    sizes: Sequence[int]

    @property
    def size(self) -> int:
        """How many bytes there are."""
        return len(self.heads) + self.coded + sum(size for _, size in self.raw)

    def write(self, file: BinaryIO) -> None:
        """Write the whole file of this tensor."""
        file.write(header_of(self.size))
        file.write(self.heads)
        self.streams.file.seek(0)
        shutil.copyfileobj(self.streams.file, file, COPIED_AT_ONCE)
        for pieces, _ in self.raw:
            for piece in pieces():
                file.write(piece)


def header_of(size: int) -> bytes:
    """What comes before a tensor of some bytes in its file."""
    entry = {"dtype": "U8", "shape": [size], "data_offsets": [0, size]}
    header = json.dumps({"__metadata__": {KEY: METADATA}, TENSOR: entry}, **COMPACT).encode()
    header += b" " * (-len(header) % 8)
    return len(header).to_bytes(8, "little") + header


def _is_filled(data: Bytes, value: bytes) -> bool:
    """Whether all elements are the same as one."""
    size, one = len(value), np.frombuffer(value, dtype=np.uint8)
    step = COMPARED * size
    # Most differ in the last one.
    if data[-size:].tobytes() != value:
        return False
    return all(
        not (data[start : start + step].reshape(-1, size) != one).any()
        for start in range(0, len(data), step)
    )


def _compressed(part: bytes) -> bytes:
    level = LEVEL if len(part) < LARGE else LEVEL_OF_LARGE
    result: bytes = zstandard().ZstdCompressor(level=level).compress(part)
    return result


def _classes_bytes(matrices: Sequence[Indices]) -> bytes:
    result = bytearray()
    for indices in matrices:
        for values in (indices.classes.rows, indices.classes.columns):
            constant = len(values) > 1 and not (values != values[0]).any()
            result.append(constant)
            result += values[: 1 if constant else len(values)].tobytes()
    return bytes(result)
