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
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch

from . import trellis_tables
from .binary import Writer
from .compressor import zstandard
from .decoding import checksum
from .formats.safetensors import BITS
from .norms import NormLink, write_logs
from .packed_layout import ALIAS, ALL_DTYPES, FILLED, LOGS, MATRIX, RAW, Matrix, streams
from .stored_basis import StoredBasis, basis_to_json
from .trellis import Ints
from .trellis_coder import Classes, encode

# The highest level takes milliseconds for a large part, and saves some ten bytes.
LEVEL, LEVEL_OF_LARGE, LARGE = 19, 15, 1 << 13


class Packer:
    """Collects the tensors of a model, in their order."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._metadata = metadata
        self._names: list[str] = []
        self._entries = Writer()
        self._raw: list[npt.NDArray[np.uint8]] = []
        self._matrices: list[tuple[Ints, Classes]] = []
        self._links: list[NormLink] = []
        self._bases: dict[tuple[StoredBasis, bytes], int] = {}

    def raw(self, name: str, dtype: str, shape: Sequence[int], data: npt.NDArray[np.uint8]) -> None:
        """A tensor as it is; one of a single value takes only that."""
        size = BITS[dtype] // 8 if BITS[dtype] % 8 == 0 else 0
        filled = size and len(data) > size and not (data.reshape(-1, size) != data[:size]).any()
        self._begin(name, FILLED if filled else RAW, dtype, shape)
        if filled:
            self._entries.raw(data[:size].tobytes())
        else:
            self._entries.raw(checksum(data).to_bytes(4, "little"))
            self._raw.append(data)

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

    def matrix(self, name: str, record: Matrix, indices: Ints, classes: Classes) -> None:
        """A tensor as indices."""
        layout = record.layout
        self._begin(name, MATRIX, record.dtype, layout.shape)
        self._entries.number(2 * layout.groups + layout.transposed)
        self._entries.number(0 if record.basis is None else record.basis + 1)
        self._entries.raw(np.array(record.step, dtype="<f4").tobytes())
        self._entries.signed(record.exponent)
        self._entries.raw(record.crc.to_bytes(4, "little"))
        self._matrices.append((indices, classes))

    def _begin(self, name: str, kind: int, dtype: str, shape: Sequence[int]) -> None:
        self._names.append(name)
        self._entries.numbers([kind, ALL_DTYPES.index(dtype), len(shape), *shape])

    def finish(self, *, compiled: bool = True) -> tuple[bytes, list[int]]:
        """The bytes of the file's tensor, and about how many each matrix takes."""
        tallies = [trellis_tables.counts(*pair, compiled=compiled) for pair in self._matrices]
        tally = sum(tallies, np.zeros((2 * trellis_tables.CLASSES, 256), dtype=np.int64))
        table_bytes, frequencies = trellis_tables.choose(tally)
        bits = trellis_tables.bits_of(frequencies)
        sizes = [math.ceil(float(bits[tally > 0] @ tally[tally > 0]) / 8) for tally in tallies]
        coded_streams = [
            encode(part, frequencies, compiled=compiled) for part in streams(self._matrices)
        ]
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
        for coded in coded_streams:
            head.numbers([len(coded.words), len(coded.escapes)])
            for index in coded.escapes.tolist():
                head.signed(index)
        head.raw(table_bytes if self._matrices else b"")
        parts = [bytes(head.data), _classes_bytes(self._matrices)]
        packed = list(map(_compressed, parts))
        block = Writer()
        for part, small in zip(parts, packed, strict=True):
            block.numbers([len(part), len(small)])
        for small in packed:
            block.raw(small)
        block.raw(zlib.crc32(bytes(block.data)).to_bytes(4, "little"))
        for coded in coded_streams:
            part = coded.states.astype("<u4").tobytes() + coded.words.astype("<u2").tobytes()
            block.raw(part + zlib.crc32(part).to_bytes(4, "little"))
        for data in self._raw:
            block.raw(data.tobytes())
        return bytes(block.data), sizes


def _compressed(part: bytes) -> bytes:
    level = LEVEL if len(part) < LARGE else LEVEL_OF_LARGE
    result: bytes = zstandard().ZstdCompressor(level=level).compress(part)
    return result


def _classes_bytes(matrices: Sequence[tuple[Ints, Classes]]) -> bytes:
    result = bytearray()
    for _, classes in matrices:
        for values in (classes.rows, classes.columns):
            constant = len(values) > 1 and not (values != values[0]).any()
            result.append(constant)
            result += values[: 1 if constant else len(values)].tobytes()
    return bytes(result)
