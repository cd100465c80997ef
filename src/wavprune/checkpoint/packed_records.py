"""What a packed file says of its tensors, and a strict reading of it."""

from __future__ import annotations

import json
import math
import zlib
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from ..errors import WavpruneError
from . import trellis_tables
from .binary import Reader
from .compressor import Decompressor
from .file_slice import FileSlice
from .formats.safetensors import BITS
from .formats.safetensors import DTYPES as TORCH_DTYPES
from .norms import NormLink, read_logs
from .packed_layout import (
    ALIAS,
    ALL_DTYPES,
    FILLED,
    LOGS,
    RAW,
    TENSOR,
    Layout,
    Matrix,
    streams,
)
from .records import DTYPES, HIGHEST_EXPONENT, LOWEST_EXPONENT
from .stored_basis import StoredBasis, basis_from_json
from .trellis import LARGEST_INDEX, Floats, Ints
from .trellis_coder import COLUMNS, Classes

# Records and classes have at most so many bytes for each of the file, and this more.
HEAD_RATIO, HEAD_ALWAYS = 256, 1 << 16
# Elements of a vector on a grid.
MOST_LOGS = 1 << 20
MOST_AXES = 8
DAMAGED = "its checksum differs: the file is damaged"


@dataclass(frozen=True)
class Raw:
    """A tensor as it is: where its bytes are, and their checksum."""

    dtype: str
    shape: tuple[int, ...]
    crc: int
    start: int
    size: int


@dataclass(frozen=True)
class Filled:
    """A tensor of one value."""

    dtype: str
    shape: tuple[int, ...]
    value: bytes


@dataclass(frozen=True)
class Logs:
    """A vector on the grid of ``norms.py``."""

    dtype: str
    shape: tuple[int, ...]
    values: Floats


Entry = Raw | Filled | Logs | Matrix


class Stream(NamedTuple):
    """Some matrices that are coded one after the other.

    Attributes:
        names: of the matrices.
        start: where its bytes begin.
        words: how many of 16 bits there are.
        escapes: indices that have no symbol.
    """

    names: list[str]
    start: int
    words: int
    escapes: Ints


class Records:
    """The records of a file's bytes.

    Args:
        data: the file's tensor.
        max_bytes: how many bytes all tensors together may have.
        aliases: count tied tensors under each name.

    Attributes:
        metadata: of the file that was compressed.
        names: of all tensors, in the order of the model.
        aliases: tied tensors: name -> the one that it stands for.
        entries: how each of the others is stored.
        links: the batch norms that are unfolded from layers, by the name of each of their tensors.
        bases: with the bytes of their matrices.
        streams: of the matrices.
        frequencies: of the tables that code them.
        classes: of each matrix.

    Raises:
        WavpruneError: the bytes are not those of a model, or it is too large.
    """

    def __init__(self, data: memoryview | FileSlice, max_bytes: int, aliases: bool) -> None:
        size = len(data)
        *heads, start = heads_of(data)
        reader, classes = map(Reader, heads)
        self.metadata: dict[str, str] = _json(reader.blob(), dict)
        if not all(isinstance(value, str) for value in self.metadata.values()):
            raise WavpruneError("its metadata is not a map of strings")
        self.names = _names(reader, size)
        self.bases = [_basis(entry) for entry in _json(reader.text().encode(), list)]
        self.aliases: dict[str, str] = {}
        self.entries: dict[str, Entry] = {}
        for name in self.names:
            self._read_entry(name, reader)
        self.links: dict[str, NormLink] = {}
        for _ in range(reader.number(len(self.names))):
            self._read_link(reader)
        matrices = [
            (name, entry) for name, entry in self.entries.items() if isinstance(entry, Matrix)
        ]
        self._check(max_bytes, aliases)
        parts = streams(matrices, lambda pair: pair[1].layout.rows * pair[1].layout.columns)
        self.streams: list[Stream] = []
        for part in parts:
            words, escapes = reader.number(), reader.number(size)
            listed = reader.several_signed(escapes, LARGEST_INDEX).astype(np.int32)
            self.streams.append(Stream([name for name, _ in part], start, words, listed))
            start += 4 * COLUMNS + 2 * words + 4
        self.frequencies: Ints | None = trellis_tables.read(reader) if matrices else None
        reader.end()
        self.classes: dict[str, Classes] = {}
        for name, entry in matrices:
            rows, columns = entry.layout.rows, entry.layout.columns
            pair = _read_classes(classes, rows), _read_classes(classes, columns)
            self.classes[name] = Classes(*pair, trellis_tables.CLASSES)
        classes.end()
        for name, found in self.entries.items():
            if isinstance(found, Raw):
                self.entries[name] = replace(found, start=start)
                start += found.size
        if start != size:
            raise WavpruneError(f"it has {size:,} bytes where {start:,} are due")

    def _read_entry(self, name: str, reader: Reader) -> None:
        kind = reader.number(LOGS)
        if kind == ALIAS:
            stands_for = self.names[reader.number(len(self.names) - 1)]
            if stands_for not in self.entries:
                raise WavpruneError(f"its tensor {name!r} stands for one that it does not hold")
            self.aliases[name] = stands_for
            return
        dtype = ALL_DTYPES[reader.number(len(ALL_DTYPES) - 1)]
        shape = tuple(reader.number() for _ in range(reader.number(MOST_AXES)))
        # Of an empty tensor too: torch cannot have it with too long other axes.
        if math.prod(n for n in shape if n) >= 1 << 48:
            raise WavpruneError(f"its tensor {name!r} is said to be {shape}")
        if kind == RAW:
            crc = int.from_bytes(reader.raw(4), "little")
            size = -(-math.prod(shape) * BITS[dtype] // 8)
            self.entries[name] = Raw(dtype, shape, crc, 0, size)
        elif kind == FILLED:
            if BITS[dtype] % 8 or dtype not in TORCH_DTYPES:
                raise WavpruneError(f"its tensor {name!r} of {dtype} has a fill value")
            self.entries[name] = Filled(dtype, shape, reader.raw(BITS[dtype] // 8))
        elif kind == LOGS:
            if dtype not in DTYPES or len(shape) != 1 or shape[0] > MOST_LOGS:
                raise WavpruneError(f"its tensor {name!r} of {dtype} is no vector on a grid")
            self.entries[name] = Logs(dtype, shape, read_logs(reader, shape[0]))
        else:
            self.entries[name] = self._read_matrix(name, dtype, shape, reader)

    def _read_link(self, reader: Reader) -> None:
        weight, gamma, var, mean, bias = names = [
            self.names[reader.number(len(self.names) - 1)] for _ in range(5)
        ]
        eps = float(np.frombuffer(reader.raw(8), dtype="<f8")[0])
        link = NormLink(weight, gamma, var, mean, bias, eps)
        taken = len(set(names)) < 5 or not self.links.keys().isdisjoint(names)
        if taken or not self.entries.keys() >= set(names) or not 0 <= eps < math.inf:
            raise WavpruneError("its batch norms are not those of its layers")
        if any(isinstance(self.entries[name], Matrix) for name in (gamma, var)):
            raise WavpruneError(f"the batch norm of {weight!r} is not on a grid")
        self.links |= dict.fromkeys(names, link)

    def _read_matrix(self, name: str, dtype: str, shape: tuple[int, ...], reader: Reader) -> Matrix:
        grouped = reader.number()
        number = reader.number(len(self.bases))
        step = float(np.frombuffer(reader.raw(4), dtype="<f4")[0])
        exponent = reader.signed()
        crc = int.from_bytes(reader.raw(4), "little")
        groups, transposed = divmod(grouped, 2)
        allowed = dtype in DTYPES and 1 <= len(shape) <= 5 and math.prod(shape) > 0
        allowed &= groups >= 1 and LOWEST_EXPONENT <= exponent <= HIGHEST_EXPONENT
        allowed &= math.isfinite(step) and step > 0
        kernel = math.prod(shape[2:]) if len(shape) > 2 else 1
        coefficients = kernel
        if allowed and number:
            basis = self.bases[number - 1][0]
            # A kernel of one axis has a basis of (1, k).
            allowed = kernel == basis.K
            coefficients = basis.coefficients
        if allowed and (transposed or groups > 1):
            allowed = len(shape) > 1 and shape[0] % groups == 0
        if not allowed:
            raise WavpruneError(f"its matrix {name!r} cannot be one: {dtype} of {shape}")
        layout = Layout(shape, groups, bool(transposed), kernel, coefficients)
        return Matrix(dtype, layout, number - 1 if number else None, step, exponent, crc)

    def _check(self, max_bytes: int, aliases: bool) -> None:
        size = 0
        tied = [self.entries[name] for name in self.aliases.values()] if aliases else []
        for entry in (*self.entries.values(), *tied):
            if isinstance(entry, Matrix):
                layout = entry.layout
                itemsize = TORCH_DTYPES[entry.dtype].itemsize
                # With the coefficients before the synthesis.
                size += max(math.prod(layout.shape) * itemsize, 4 * layout.rows * layout.columns)
            else:
                size += -(-math.prod(entry.shape) * BITS[entry.dtype] // 8)
        for basis, _ in self.bases:
            size += basis.working_bytes
        if size > max_bytes:
            raise WavpruneError(
                f"it says that its tensors have {size:,} bytes; allowed: up to {max_bytes:,}, or "
                "what max_bytes says"
            )


def _names(reader: Reader, size: int) -> list[str]:
    text = reader.text()
    if text.count("\0") > size:
        raise WavpruneError("it has more names than bytes")
    names = text.split("\0") if text else []
    count = reader.number(len(names) or 1)
    if count != len(names):
        if text:
            raise WavpruneError(f"it names {len(names)} tensors, and has {count}")
        # One tensor without a name.
        names = [""] * count
    if len(set(names)) != len(names):
        raise WavpruneError("it names a tensor twice")
    return names


def _read_classes(reader: Reader, length: int) -> npt.NDArray[np.uint8]:
    constant = reader.number(1)
    values = np.frombuffer(reader.raw(1 if constant else length), dtype=np.uint8)
    if (values >= trellis_tables.CLASSES).any():
        raise WavpruneError(f"it has classes of more than {trellis_tables.CLASSES - 1}")
    return np.repeat(values, length) if constant else values.copy()


def heads_of(data: memoryview | FileSlice) -> tuple[bytes, bytes, int]:
    """Records and classes, decompressed, and where the rest of a file's tensor begins.

    Raises:
        WavpruneError: they are damaged, or larger than they may be.
    """
    sizes = Reader(bytes(data[:40]))
    most = HEAD_RATIO * len(data) + HEAD_ALWAYS
    pairs = [(sizes.number(most), sizes.number(len(data))) for _ in range(2)]
    start = sizes.position
    stop = start + sum(small for _, small in pairs)
    if int.from_bytes(data[stop : stop + 4], "little") != zlib.crc32(data[:stop]):
        raise WavpruneError(DAMAGED)
    parts = []
    for size, small in pairs:
        part = Decompressor(data[start : start + small])
        parts.append(part.read(size))
        part.end()
        start += small
    return parts[0], parts[1], stop + 4


def _json(data: bytes, kind: type) -> Any:
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise WavpruneError(f"its records are no JSON: {error}") from error
    if not isinstance(value, kind):
        raise WavpruneError("its records are not of the kind that they should be")
    return value


def _basis(entry: Any) -> tuple[StoredBasis, bytes]:
    if not isinstance(entry, list) or not entry or not isinstance(entry[-1], str):
        raise WavpruneError("its records lack the bytes of a basis")
    try:
        payload = bytes.fromhex(entry[-1])
    except ValueError as error:
        raise WavpruneError("its records lack the bytes of a basis") from error
    return basis_from_json(entry[:-1], TENSOR), payload
