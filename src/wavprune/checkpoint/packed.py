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
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import WavpruneError
from . import trellis_tables
from .binary import Reader, Writer
from .compressor import Decompressor, zstandard
from .decoding import checksum, in_range
from .formats.safetensors import BITS
from .formats.safetensors import DTYPES as TORCH_DTYPES
from .records import DTYPES, HIGHEST_EXPONENT, LOWEST_EXPONENT
from .stored_basis import StoredBasis, basis_from_json, basis_to_json
from .synthesis import synthesise
from .trellis import COLUMNS, Classes, Coded, Decoder, Floats, Ints, decoding_tables, encode

VERSION = 3
TENSOR = "wavprune"
METADATA = f'{{"version":{VERSION}}}'
RAW, ALIAS, MATRIX, FILLED = range(4)
# Weights of a stream, about.
STREAM = 1 << 18
LEVEL = 19
ALL_DTYPES = tuple(BITS)
LARGEST_HEAD = 1 << 28
MOST_AXES = 8


@dataclass(frozen=True)
class Layout:
    """How a tensor becomes a matrix whose columns are what one output is made of.

    Attributes:
        shape: of the tensor.
        groups: of a convolution.
        transposed: True for a transposed convolution.
        kernel: values of a kernel; 1 for a matrix or a vector.
        coefficients: of a kernel.
    """

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False
    kernel: int = 1
    coefficients: int = 1

    @property
    def rows(self) -> int:
        """``R``: outputs."""
        if len(self.shape) == 1:
            return self.shape[0]
        return self.groups * self.shape[1] if self.transposed else self.shape[0]

    @property
    def columns(self) -> int:
        """``C``."""
        return math.prod(self.shape) // self.kernel * self.coefficients // self.rows

    def split(self, values: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """Values ``(A * B, M)``, ``A`` and ``B`` the first axes of the shape, as ``(R, C)``."""
        if self.transposed:
            values = values.reshape(self.groups, -1, self.shape[1], self.coefficients)
            values = values.transpose(0, 2, 1, 3)
        return np.ascontiguousarray(values.reshape(self.rows, self.columns))

    def join(self, matrix: npt.NDArray[Any]) -> npt.NDArray[Any]:
        """The inverse of ``split``."""
        if self.transposed:
            matrix = matrix.reshape(self.groups, self.shape[1], -1, self.coefficients)
            matrix = matrix.transpose(0, 2, 1, 3)
        return np.ascontiguousarray(matrix.reshape(-1, self.coefficients))


@dataclass(frozen=True)
class Matrix:
    """A tensor that is stored as indices.

    Attributes:
        dtype: as safetensors calls it.
        layout: of the tensor.
        basis: of its kernels, an index of the file's bases; None is the identity.
        step: what indices' values are multiplied by, a float32.
        exponent: what is decoded is the tensor over 2 to this power.
        crc: CRC-32 of the tensor.
    """

    dtype: str
    layout: Layout
    basis: int | None
    step: float
    exponent: int
    crc: int

    def tensor(self, coefficients: Floats, synthesis: Floats | None) -> torch.Tensor:
        """The tensor of decoded coefficients ``(R, C)``; ``synthesis`` None is the identity."""
        values = self.layout.join(coefficients)
        if synthesis is not None:
            values = synthesise(np.ascontiguousarray(values.T), synthesis)
        weights = in_range(values, self.dtype, self.exponent)
        return torch.from_numpy(weights).to(TORCH_DTYPES[self.dtype]).reshape(self.layout.shape)


def is_packed(text: str) -> bool:
    """True for the metadata of a file of this version."""
    return text == METADATA


def crc_of(tensor: torch.Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes."""
    return checksum(tensor.reshape(-1).view(torch.uint8).numpy())


class Packer:
    """Collects the tensors of a model, in their order."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        self._metadata = metadata
        self._names: list[str] = []
        self._entries = Writer()
        self._raw: list[npt.NDArray[np.uint8]] = []
        self._matrices: list[tuple[Ints, Classes]] = []
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
        streams = [
            encode(part, frequencies, compiled=compiled) for part in _streams(self._matrices)
        ]
        head = Writer()
        head.blob(json.dumps(dict(self._metadata), separators=(",", ":")).encode())
        head.text("\0".join(self._names))
        head.number(len(self._names))
        bases = [[*basis_to_json(basis), payload.hex()] for basis, payload in self._bases]
        head.text(json.dumps(bases, separators=(",", ":")))
        head.raw(bytes(self._entries.data))
        for coded in streams:
            head.numbers([len(coded.words), len(coded.escapes)])
            for index in coded.escapes.tolist():
                head.signed(index)
        head.raw(table_bytes if self._matrices else b"")
        parts = [bytes(head.data), _classes_bytes(self._matrices)]
        packed = [zstandard().ZstdCompressor(level=LEVEL).compress(part) for part in parts]
        block = Writer()
        for part, small in zip(parts, packed, strict=True):
            block.numbers([len(part), len(small)])
        for small in packed:
            block.raw(small)
        block.raw(zlib.crc32(bytes(block.data)).to_bytes(4, "little"))
        for coded in streams:
            block.raw(coded.states.astype("<u4").tobytes())
            block.raw(coded.words.astype("<u2").tobytes())
        for data in self._raw:
            block.raw(data.tobytes())
        return bytes(block.data), sizes


def _streams(matrices: Sequence[Any], size: Callable[[Any], int] | None = None) -> list[list[Any]]:
    """Runs of matrices of about ``STREAM`` weights."""
    result: list[list[Any]] = []
    filled = STREAM
    for matrix in matrices:
        if filled >= STREAM:
            result.append([])
            filled = 0
        result[-1].append(matrix)
        filled += matrix[0].size if size is None else size(matrix)
    return result


def _classes_bytes(matrices: Sequence[tuple[Ints, Classes]]) -> bytes:
    result = bytearray()
    for _, classes in matrices:
        for values in (classes.rows, classes.columns):
            constant = len(values) > 1 and not (values != values[0]).any()
            result.append(constant)
            result += values[: 1 if constant else len(values)].tobytes()
    return bytes(result)


def _read_classes(reader: Reader, length: int) -> npt.NDArray[np.uint8]:
    constant = reader.number(1)
    values = np.frombuffer(reader.raw(1 if constant else length), dtype=np.uint8)
    if (values >= trellis_tables.CLASSES).any():
        raise WavpruneError(f"it has classes of more than {trellis_tables.CLASSES - 1}")
    return np.repeat(values, length) if constant else values.copy()


@dataclass(frozen=True)
class _Raw:
    dtype: str
    shape: tuple[int, ...]
    crc: int
    start: int
    size: int


@dataclass(frozen=True)
class _Filled:
    dtype: str
    shape: tuple[int, ...]
    value: bytes


class Unpacked:
    """The tensors of a file's bytes.

    Args:
        data: the file's tensor.
        max_bytes: how many bytes all tensors together may have.
        aliases: count tied tensors under each name.
        compiled: decode by the compiled operators, where they are there.

    Attributes:
        names: of all tensors, in the order of the model.
        aliases: tied tensors: name -> the one that it stands for.
        metadata: of the file that was compressed.

    Raises:
        WavpruneError: the bytes are not those of a model, or it is too large.
    """

    def __init__(
        self,
        data: bytes | memoryview,
        max_bytes: int,
        aliases: bool = False,
        compiled: bool = True,
    ) -> None:
        self._data = memoryview(data)
        self._compiled = compiled
        reader, classes, start = _heads(self._data)
        self.metadata: dict[str, str] = _json(reader.blob(), dict)
        text = reader.text()
        self.names = text.split("\0") if text else []
        count = reader.number(len(self.names) or 1)
        if count != len(self.names):
            # One tensor without a name.
            self.names = [""] * count
        if len(set(self.names)) != len(self.names):
            raise WavpruneError("it names a tensor twice")
        self._bases = [_basis(entry) for entry in _json(reader.text().encode(), list)]
        self._synthesis: dict[int, Floats] = {}
        self.aliases: dict[str, str] = {}
        self._entries: dict[str, _Raw | _Filled | Matrix] = {}
        raw: list[str] = []
        for name in self.names:
            self._read_entry(name, reader, raw)
        matrices = [
            (name, entry) for name, entry in self._entries.items() if isinstance(entry, Matrix)
        ]
        self._check(max_bytes, aliases)
        streams = _streams(matrices, lambda pair: pair[1].layout.rows * pair[1].layout.columns)
        self._streams: dict[str, tuple[int, list[str]]] = {}
        self._coded: list[tuple[int, int, Ints]] = []
        for number, part in enumerate(streams):
            words, escapes = reader.number(), reader.number(len(self._data))
            listed = [reader.signed() for _ in range(escapes)]
            self._coded.append((start, words, np.array(listed, dtype=np.int32)))
            start += 4 * COLUMNS + 2 * words
            self._streams |= {name: (number, [n for n, _ in part]) for name, _ in part}
        self._tables = np.zeros(0, dtype=np.uint32)
        if matrices:
            self._tables = decoding_tables(trellis_tables.read(reader))
        reader.end()
        self._classes = {}
        for name, entry in matrices:
            rows, columns = entry.layout.rows, entry.layout.columns
            pair = _read_classes(classes, rows), _read_classes(classes, columns)
            self._classes[name] = Classes(*pair, trellis_tables.CLASSES)
        classes.end()
        for name in raw:
            found = self._entries[name]
            assert isinstance(found, _Raw)
            self._entries[name] = replace(found, start=start)
            start += found.size
        if start != len(self._data):
            raise WavpruneError(f"it has {len(self._data):,} bytes where {start:,} are due")

    def _read_entry(self, name: str, reader: Reader, raw: list[str]) -> None:
        kind = reader.number(FILLED)
        if kind == ALIAS:
            stands_for = self.names[reader.number(len(self.names) - 1)]
            if stands_for not in self._entries:
                raise WavpruneError(f"its tensor {name!r} stands for one that it does not hold")
            self.aliases[name] = stands_for
            return
        dtype = ALL_DTYPES[reader.number(len(ALL_DTYPES) - 1)]
        shape = tuple(reader.number() for _ in range(reader.number(MOST_AXES)))
        if math.prod(shape) >= 1 << 48:
            raise WavpruneError(f"its tensor {name!r} is said to be {shape}")
        if kind == RAW:
            crc = int.from_bytes(reader.raw(4), "little")
            size = -(-math.prod(shape) * BITS[dtype] // 8)
            self._entries[name] = _Raw(dtype, shape, crc, 0, size)
            raw.append(name)
        elif kind == FILLED:
            if BITS[dtype] % 8 or dtype not in TORCH_DTYPES:
                raise WavpruneError(f"its tensor {name!r} of {dtype} has a fill value")
            self._entries[name] = _Filled(dtype, shape, reader.raw(BITS[dtype] // 8))
        else:
            self._entries[name] = self._read_matrix(name, dtype, shape, reader)

    def _read_matrix(self, name: str, dtype: str, shape: tuple[int, ...], reader: Reader) -> Matrix:
        grouped = reader.number()
        number = reader.number(len(self._bases))
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
            basis = self._bases[number - 1][0]
            allowed = basis.kernel == shape[2:]
            coefficients = basis.coefficients
        if allowed and (transposed or groups > 1):
            allowed = len(shape) > 1 and shape[0] % groups == 0
        if not allowed:
            raise WavpruneError(f"its matrix {name!r} cannot be one: {dtype} of {shape}")
        layout = Layout(shape, groups, bool(transposed), kernel, coefficients)
        return Matrix(dtype, layout, number - 1 if number else None, step, exponent, crc)

    def _check(self, max_bytes: int, aliases: bool) -> None:
        size = 0
        tied = [self._entries[name] for name in self.aliases.values()] if aliases else []
        for entry in (*self._entries.values(), *tied):
            if isinstance(entry, Matrix):
                layout = entry.layout
                itemsize = TORCH_DTYPES[entry.dtype].itemsize
                # With the coefficients before the synthesis.
                size += max(math.prod(layout.shape) * itemsize, 4 * layout.rows * layout.columns)
            else:
                size += -(-math.prod(entry.shape) * BITS[entry.dtype] // 8)
        for basis, _ in self._bases:
            size += basis.working_bytes
        if size > max_bytes:
            raise WavpruneError(
                f"it says that its tensors have {size:,} bytes; allowed: up to {max_bytes:,}, or "
                "what max_bytes says"
            )

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The dtype and the shape of a tensor."""
        entry = self._entries[self.aliases.get(name, name)]
        if isinstance(entry, Matrix):
            return entry.dtype, entry.layout.shape
        return entry.dtype, entry.shape

    def tensors(self, itemsize: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """All tensors but the tied ones, as bytes where torch lacks the dtype.

        Args:
            itemsize: only those whose elements have so many bytes.

        Raises:
            WavpruneError: one is damaged.
        """

        def asked(dtype: str) -> bool:
            # What torch lacks has elements of a byte or less, but for complex numbers.
            known = TORCH_DTYPES.get(dtype)
            return itemsize is None or itemsize == (1 if known is None else min(8, known.itemsize))

        for name, entry in self._entries.items():
            if not isinstance(entry, Matrix) and asked(entry.dtype):
                yield name, self._plain(name, entry)
        done: set[int] = set()
        for number, names in self._streams.values():
            if number not in done:
                done.add(number)
                if any(asked(self.kind(name)[0]) for name in names):
                    for name, tensor in self._decoded(number, names):
                        if asked(self.kind(name)[0]):
                            yield name, tensor

    def tensor(self, name: str) -> torch.Tensor:
        """One tensor, without decoding what is in other streams.

        Raises:
            WavpruneError: it is damaged.
        """
        name = self.aliases.get(name, name)
        entry = self._entries[name]
        if not isinstance(entry, Matrix):
            return self._plain(name, entry)
        number, names = self._streams[name]
        for found, tensor in self._decoded(number, names):
            if found == name:
                return tensor
        raise AssertionError(name)

    def _plain(self, name: str, entry: _Raw | _Filled) -> torch.Tensor:
        dtype = TORCH_DTYPES.get(entry.dtype)
        if isinstance(entry, _Filled):
            assert dtype is not None
            one = torch.frombuffer(bytearray(entry.value), dtype=torch.uint8).view(dtype)
            return one.expand(entry.shape).clone() if entry.shape else one.reshape(())
        part = self._data[entry.start : entry.start + entry.size]
        if zlib.crc32(part) != entry.crc:
            raise WavpruneError(f"its tensor {name!r} is damaged: its checksum differs")
        if not entry.size:
            return torch.empty(entry.shape if dtype else (0,), dtype=dtype or torch.uint8)
        values = torch.frombuffer(bytearray(part), dtype=torch.uint8)
        return values if dtype is None else values.view(dtype).view(entry.shape)

    def _decoded(self, number: int, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        start, count, escapes = self._coded[number]
        part = self._data[start : start + 4 * COLUMNS + 2 * count]
        if len(part) != 4 * COLUMNS + 2 * count:
            raise WavpruneError("its coded values end early")
        states = np.frombuffer(part[: 4 * COLUMNS], dtype="<u4").astype(np.uint32)
        words = np.frombuffer(part[4 * COLUMNS :], dtype="<u2").astype(np.uint16)
        decoder = Decoder(Coded(states, words, escapes), self._tables, self._compiled)
        for name in names:
            entry = self._entries[name]
            assert isinstance(entry, Matrix)
            coefficients = decoder.read(self._classes[name], entry.step)
            tensor = entry.tensor(coefficients, self._matrix(entry.basis))
            if crc_of(tensor) != entry.crc:
                raise WavpruneError(f"its tensor {name!r} is damaged: its checksum differs")
            yield name, tensor
        decoder.end()

    def _matrix(self, number: int | None) -> Floats | None:
        if number is None:
            return None
        if number not in self._synthesis:
            basis, payload = self._bases[number]
            self._synthesis[number] = basis.matrix(payload)
        return self._synthesis[number]


def _heads(data: memoryview) -> tuple[Reader, Reader, int]:
    """Readers of the records and of the classes, and where the rest begins."""
    sizes = Reader(bytes(data[:40]))
    pairs = [(sizes.number(LARGEST_HEAD), sizes.number(len(data))) for _ in range(2)]
    start = sizes.position
    stop = start + sum(small for _, small in pairs)
    if int.from_bytes(data[stop : stop + 4], "little") != zlib.crc32(data[:stop]):
        raise WavpruneError("its records are damaged: their checksum differs")
    readers = []
    for size, small in pairs:
        part = Decompressor(data[start : start + small])
        readers.append(Reader(part.read(size)))
        part.end()
        start += small
    return readers[0], readers[1], stop + 4


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
