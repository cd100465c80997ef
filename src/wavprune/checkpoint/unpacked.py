"""A packed file, read: ``packed.py`` backwards, for bytes from anywhere."""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from ..errors import WavpruneError
from . import trellis_tables
from .binary import Reader
from .compressor import Decompressor
from .decoding import checksum
from .file_slice import FileSlice
from .formats.safetensors import BITS
from .formats.safetensors import DTYPES as TORCH_DTYPES
from .norms import NormLink, read_logs, unfold
from .packed_layout import (
    ALIAS,
    ALL_DTYPES,
    FILLED,
    LOGS,
    RAW,
    TENSOR,
    Layout,
    Matrix,
    crc_of,
    streams,
)
from .records import DTYPES, HIGHEST_EXPONENT, LOWEST_EXPONENT
from .stored_basis import StoredBasis, basis_from_json
from .trellis import LARGEST_INDEX, Floats, Ints
from .trellis_coder import COLUMNS, Classes, Coded, Decoder, decoding_tables

# Records and classes have at most so many bytes for each of the file, and this more.
HEAD_RATIO, HEAD_ALWAYS = 256, 1 << 16
# Elements of a vector on a grid.
MOST_LOGS = 1 << 20
MOST_AXES = 8
DAMAGED = "its checksum differs: the file is damaged"


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


@dataclass(frozen=True)
class _Logs:
    dtype: str
    shape: tuple[int, ...]
    values: Floats


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
        data: bytes | memoryview | FileSlice,
        max_bytes: int,
        aliases: bool = False,
        compiled: bool = True,
    ) -> None:
        self._data = data if isinstance(data, FileSlice) else memoryview(data)
        self._compiled = compiled
        *heads, start = heads_of(self._data)
        reader, classes = map(Reader, heads)
        self.metadata: dict[str, str] = _json(reader.blob(), dict)
        if not all(isinstance(value, str) for value in self.metadata.values()):
            raise WavpruneError("its metadata is not a map of strings")
        text = reader.text()
        if text.count("\0") > len(self._data):
            raise WavpruneError("it has more names than bytes")
        self.names = text.split("\0") if text else []
        count = reader.number(len(self.names) or 1)
        if count != len(self.names):
            if text:
                raise WavpruneError(f"it names {len(self.names)} tensors, and has {count}")
            # One tensor without a name.
            self.names = [""] * count
        if len(set(self.names)) != len(self.names):
            raise WavpruneError("it names a tensor twice")
        self._bases = [_basis(entry) for entry in _json(reader.text().encode(), list)]
        self._synthesis: dict[int, Floats] = {}
        self.aliases: dict[str, str] = {}
        self._entries: dict[str, _Raw | _Filled | _Logs | Matrix] = {}
        raw: list[str] = []
        for name in self.names:
            self._read_entry(name, reader, raw)
        self._links: dict[str, NormLink] = {}
        for _ in range(reader.number(len(self.names))):
            self._read_link(reader)
        matrices = [
            (name, entry) for name, entry in self._entries.items() if isinstance(entry, Matrix)
        ]
        self._check(max_bytes, aliases)
        parts = streams(matrices, lambda pair: pair[1].layout.rows * pair[1].layout.columns)
        self._streams: dict[str, tuple[int, list[str]]] = {}
        self._coded: list[tuple[int, int, Ints]] = []
        for number, part in enumerate(parts):
            words, escapes = reader.number(), reader.number(len(self._data))
            listed = reader.several_signed(escapes, LARGEST_INDEX).astype(np.int32)
            self._coded.append((start, words, listed))
            start += 4 * COLUMNS + 2 * words + 4
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
        kind = reader.number(LOGS)
        if kind == ALIAS:
            stands_for = self.names[reader.number(len(self.names) - 1)]
            if stands_for not in self._entries:
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
            self._entries[name] = _Raw(dtype, shape, crc, 0, size)
            raw.append(name)
        elif kind == FILLED:
            if BITS[dtype] % 8 or dtype not in TORCH_DTYPES:
                raise WavpruneError(f"its tensor {name!r} of {dtype} has a fill value")
            self._entries[name] = _Filled(dtype, shape, reader.raw(BITS[dtype] // 8))
        elif kind == LOGS:
            if dtype not in DTYPES or len(shape) != 1 or shape[0] > MOST_LOGS:
                raise WavpruneError(f"its tensor {name!r} of {dtype} is no vector on a grid")
            self._entries[name] = _Logs(dtype, shape, read_logs(reader, shape[0]))
        else:
            self._entries[name] = self._read_matrix(name, dtype, shape, reader)

    def _read_link(self, reader: Reader) -> None:
        weight, gamma, var, mean, bias = names = [
            self.names[reader.number(len(self.names) - 1)] for _ in range(5)
        ]
        eps = float(np.frombuffer(reader.raw(8), dtype="<f8")[0])
        link = NormLink(weight, gamma, var, mean, bias, eps)
        taken = len(set(names)) < 5 or not self._links.keys().isdisjoint(names)
        if taken or not self._entries.keys() >= set(names) or not 0 <= eps < math.inf:
            raise WavpruneError("its batch norms are not those of its layers")
        if any(isinstance(self._entries[name], Matrix) for name in (gamma, var)):
            raise WavpruneError(f"the batch norm of {weight!r} is not on a grid")
        self._links |= dict.fromkeys(names, link)

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

    @property
    def data(self) -> memoryview | FileSlice:
        """The bytes of the file's tensor."""
        return self._data

    @property
    def size(self) -> int:
        """How many they are."""
        return len(self._data)

    def is_matrix(self, name: str) -> bool:
        """True where a tensor is stored as indices."""
        return isinstance(self._entries[name], Matrix)

    def kind(self, name: str) -> tuple[str, tuple[int, ...]]:
        """The dtype and the shape of a tensor."""
        entry = self._entries[self.aliases.get(name, name)]
        if isinstance(entry, Matrix):
            return entry.dtype, entry.layout.shape
        return entry.dtype, entry.shape

    @property
    def links(self) -> list[NormLink]:
        """The batch norms that are unfolded from layers."""
        return list(dict.fromkeys(self._links.values()))

    def plain(self, name: str) -> tuple[int, int]:
        """How a tensor that is no matrix is stored, ``RAW``, ``FILLED`` or ``LOGS``, and its bytes.

        Those of logarithms are about.
        """
        entry = self._entries[name]
        assert not isinstance(entry, Matrix)
        if isinstance(entry, _Filled):
            return FILLED, len(entry.value)
        return (RAW, entry.size) if isinstance(entry, _Raw) else (LOGS, entry.values.size)

    def matrices(self) -> Iterator[tuple[str, StoredBasis | None, Floats, int]]:
        """Every matrix: its name, basis, coefficients ``(R, C)`` and bytes in its stream.

        Raises:
            WavpruneError: one is damaged.
        """
        streams = dict(self._streams.values())
        for number, names in streams.items():
            decoder, before = self._decoder(number), 0
            for name in names:
                entry = self._entries[name]
                assert isinstance(entry, Matrix)
                basis = None if entry.basis is None else self._bases[entry.basis][0]
                coefficients = decoder.read(self._classes[name], entry.step)
                yield name, basis, coefficients, 2 * (decoder.words_read - before)
                before = decoder.words_read

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

        waiting: dict[str, torch.Tensor] = {}
        for name, tensor in self._stored(asked):
            link = self._links.get(name)
            if link is None:
                yield name, tensor
                continue
            waiting[name] = tensor
            if waiting.keys() >= set(link.names):
                unfolded = unfold(link, {part: waiting.pop(part) for part in link.names})
                yield from unfolded.items()
        # A batch norm may have another dtype than its layer.
        for name in waiting:
            yield name, self.tensor(name)

    def _stored(self, asked: Callable[[str], bool]) -> Iterator[tuple[str, torch.Tensor]]:
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
        link = self._links.get(name)
        if link is not None:
            return unfold(link, {part: self._one(part) for part in link.names})[name]
        return self._one(name)

    def _one(self, name: str) -> torch.Tensor:
        entry = self._entries[name]
        if not isinstance(entry, Matrix):
            return self._plain(name, entry)
        number, names = self._streams[name]
        for found, tensor in self._decoded(number, names):
            if found == name:
                return tensor
        raise AssertionError(name)

    def _plain(self, name: str, entry: _Raw | _Filled | _Logs) -> torch.Tensor:
        dtype = TORCH_DTYPES.get(entry.dtype)
        if isinstance(entry, _Logs):
            return torch.from_numpy(entry.values).to(dtype)
        if isinstance(entry, _Filled):
            assert dtype is not None
            one = torch.frombuffer(bytearray(entry.value), dtype=torch.uint8).view(dtype)
            return one.expand(entry.shape).clone() if entry.shape else one.reshape(())
        part = self._data[entry.start : entry.start + entry.size]
        if _crc(part) != entry.crc:
            raise WavpruneError(DAMAGED)
        if not entry.size:
            return torch.empty(entry.shape if dtype else (0,), dtype=dtype or torch.uint8)
        # What was read from a file is in memory of its own.
        own = part if isinstance(self._data, FileSlice) else bytearray(part)
        values = torch.frombuffer(own, dtype=torch.uint8)
        return values if dtype is None else values.view(dtype).view(entry.shape)

    def _decoder(self, number: int) -> Decoder:
        start, count, escapes = self._coded[number]
        stop = start + 4 * COLUMNS + 2 * count
        part = self._data[start:stop]
        if _crc(part) != int.from_bytes(self._data[stop : stop + 4], "little"):
            raise WavpruneError(DAMAGED)
        states = np.frombuffer(part[: 4 * COLUMNS], dtype="<u4").astype(np.uint32)
        words = np.frombuffer(part[4 * COLUMNS :], dtype="<u2")
        return Decoder(Coded(states, words, escapes), self._tables, self._compiled)

    def _decoded(self, number: int, names: Sequence[str]) -> Iterator[tuple[str, torch.Tensor]]:
        decoder = self._decoder(number)
        for name in names:
            entry = self._entries[name]
            assert isinstance(entry, Matrix)
            tensor = self._assembled(entry, self._classes[name], decoder)
            if crc_of(tensor) != entry.crc:
                raise WavpruneError(f"its tensor {name!r} is not the one that was saved")
            yield name, tensor
        decoder.end()

    def _assembled(self, entry: Matrix, classes: Classes, decoder: Decoder) -> torch.Tensor:
        synthesis = self._matrix(entry.basis)
        blocks = entry.layout.blocks()
        if entry.is_direct:
            tensor = entry.empty()
            decoder.read(classes, entry.step, tensor.view(classes.shape).numpy())
            return tensor
        if len(blocks) == 1:
            return entry.tensor(decoder.read(classes, entry.step), synthesis)
        tensor = entry.empty()
        for start, stop in blocks:
            part = decoder.read(classes.columns_of(start, stop), entry.step)
            entry.put(tensor, start, stop, entry.kernels(part, synthesis))
        return tensor

    def _matrix(self, number: int | None) -> Floats | None:
        if number is None:
            return None
        if number not in self._synthesis:
            basis, payload = self._bases[number]
            self._synthesis[number] = basis.matrix(payload)
        return self._synthesis[number]


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


def _crc(part: memoryview) -> int:
    return checksum(np.frombuffer(part, dtype=np.uint8))


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
