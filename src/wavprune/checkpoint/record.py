"""What a compressed file says of its layers, and a strict reading of it.

``__metadata__["wavprune"]`` of the file is JSON::

    {"version": 1, "metadata": {...}, "layers": {name: record}, "checksums": {name: crc32}}

``metadata`` is that of the file that was compressed, ``checksums`` are of every tensor's bytes in
this file. A layer's tensor is a vector of bytes: its parts one after the other, ``scales``,
``matrix``, ``values``, ``high``, ``mask``; absent ones have no bytes.
"""

from __future__ import annotations

import dataclasses
import json
import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from ..bases.basis import Kernel, Operator, named_basis
from ..config import MODES, OWN_BASES, WAVELETS
from .coders import ANS, ZSTD
from .synthesis import Floats

VERSION = 1
PARTS = ("scales", "matrix", "values", "high", "mask")
# Symbols in one row of a chunk: what is decoded at a time.
CHUNK = 1 << 18
FLOATS: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
SYMBOLS = "symbols"
DTYPES = ("F64", "F32", "F16", "BF16")
BITS, SQUEEZED, NONE = "bits", ZSTD, "none"
LARGEST_KERNEL = 1024


class BasisName(NamedTuple):
    """What rebuilds a basis.

    Attributes:
        name: of the basis; of ``"klt"`` the file holds the matrix.
        kernel: ``(kh, kw)``.
        mode: PyWavelets' boundary mode.
        level: the level asked for.
        force: whether that level was forced.
        importance: True where ``||S[:, m]||`` is moved into the coefficients.
    """

    name: str
    kernel: Kernel
    mode: str | None = None
    level: int | None = None
    force: bool = False
    importance: bool = True

    @property
    def operator(self) -> Operator:
        """The matrices of every basis but ``"klt"``.

        Raises:
            ValueError: there is no such basis.
        """
        mode = self.mode or "periodization"
        basis = named_basis(self.name, self.kernel, mode, self.level, self.force)
        return basis.importance_operator if self.importance else basis.coefficient_operator


@dataclass(frozen=True)
class Record:
    """How a layer's weight is stored.

    Attributes:
        dtype: of the weight, as safetensors calls it.
        shape: of the weight.
        basis: of its kernels.
        values: ``"float32"``, ``"float16"`` or ``"symbols"``: whole numbers, times ``scales``.
        coder: of the values.
        mask: ``"bits"``, ``"zstd"`` or, where every coefficient is among the values, ``"none"``.
        kept: how many values there are.
        largest: the alphabet of ``"ans"``, else 0.
        sizes: bytes of each part.
        matrix_crc: CRC-32 of the synthesis matrix in float32.
        crc: CRC-32 of the weight.
    """

    dtype: str
    shape: tuple[int, ...]
    basis: BasisName
    values: str
    coder: str
    mask: str
    kept: int
    sizes: tuple[int, ...]
    matrix_crc: int
    crc: int
    largest: int = 0
    M: int = field(default=1)

    @property
    def numel(self) -> int:
        """How many weights the layer has."""
        return math.prod(self.shape)

    @property
    def kernels(self) -> int:
        """How many kernels it has."""
        return self.numel // math.prod(self.basis.kernel)

    @property
    def coefficients(self) -> int:
        """How many coefficients all kernels have."""
        return self.kernels * self.M

    @cached_property
    def chunks(self) -> list[tuple[int, int]]:
        """First kernel and number of kernels of each chunk, in which values are coded."""
        return chunks_of(self.kernels, self.M)

    def to_json(self) -> list[Any]:
        """Its fields, in order."""
        return [list(value) if isinstance(value, tuple) else value for value in self]

    def __iter__(self) -> Any:
        return (getattr(self, each.name) for each in dataclasses.fields(self))


def chunks_of(kernels: int, M: int) -> list[tuple[int, int]]:
    """Kernels that are coded together, so that no more than ``CHUNK`` coefficients are at hand."""
    step = max(16, CHUNK // M // 16 * 16)
    return [(first, min(step, kernels - first)) for first in range(0, kernels, step)]


@dataclass(frozen=True)
class Contents:
    """What a compressed file says of itself.

    Attributes:
        metadata: of the file that was compressed.
        layers: how each is stored.
        checksums: CRC-32 of every tensor of the file.
    """

    metadata: dict[str, str]
    layers: dict[str, Record]
    checksums: dict[str, int]

    def to_json(self) -> str:
        """As ``parse`` takes it."""
        content = {
            "version": VERSION,
            "metadata": self.metadata,
            "layers": {name: record.to_json() for name, record in self.layers.items()},
            "checksums": self.checksums,
        }
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def parse(text: str) -> Contents:
    """The contents of a file, from its metadata.

    Raises:
        ValueError: they are not what this version writes.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its metadata is no JSON: {error}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION:
        raise ValueError(
            f"it is of version {version!r} of the format; this wavprune reads version {VERSION}"
        )
    metadata, checksums = content.get("metadata"), content.get("checksums")
    if not _is_map(metadata, str) or not _is_map(checksums, int):
        raise ValueError("its metadata lacks the tensors' checksums")
    layers = content.get("layers")
    if not isinstance(layers, dict):
        raise ValueError("its metadata lacks the layers")  # noqa: TRY004  # a bad file
    return Contents(
        metadata, {name: _record(name, entry) for name, entry in layers.items()}, checksums
    )


def _is_map(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(type(each) is kind for each in value.values())


def _record(name: str, entry: Any) -> Record:
    names = [each.name for each in dataclasses.fields(Record)]
    if not isinstance(entry, list) or len(entry) != len(names):
        raise ValueError(f"layer {name!r}: its record is not one of {len(names)} entries")
    got = dict(zip(names, entry, strict=True))

    def check(what: str, allowed: bool) -> None:
        if not allowed:
            raise ValueError(f"layer {name!r}: its record says {what}={got[what]!r}")

    def natural(value: Any, most: int = 1 << 62) -> bool:
        return type(value) is int and 0 <= value <= most

    shape, sizes = got["shape"], got["sizes"]
    check("dtype", got["dtype"] in DTYPES)
    check("shape", isinstance(shape, list) and len(shape) in (2, 4) and all(map(natural, shape)))
    check("shape", 0 < math.prod(shape) < 1 << 62)
    basis = got["basis"]
    check("basis", isinstance(basis, list) and len(basis) == len(BasisName._fields))
    wavelet, kernel, mode, level, force, importance = basis
    check("basis", wavelet in (*OWN_BASES, *WAVELETS))
    check("basis", isinstance(kernel, list) and len(kernel) == 2 and all(map(natural, kernel)))
    check("basis", kernel == [1, 1] or kernel == shape[2:])
    check("basis", math.prod(kernel) <= LARGEST_KERNEL)
    check("basis", mode in (None, *MODES) and (level is None or natural(level, 64)))
    check("basis", type(force) is bool and type(importance) is bool)
    check("values", got["values"] in (*FLOATS, SYMBOLS))
    check(
        "coder", got["coder"] in (ZSTD, ANS) if got["values"] == SYMBOLS else got["coder"] == ZSTD
    )
    check("mask", got["mask"] in (BITS, SQUEEZED, NONE))
    check("M", natural(got["M"], 4 * LARGEST_KERNEL) and got["M"] > 0)
    check("sizes", isinstance(sizes, list) and len(sizes) == len(PARTS))
    check("sizes", all(map(natural, sizes)))
    for what in ("kept", "matrix_crc", "crc", "largest"):
        check(what, natural(got[what]))
    got["shape"], got["sizes"] = tuple(shape), tuple(sizes)
    got["basis"] = BasisName(wavelet, (kernel[0], kernel[1]), mode, level, force, importance)
    record = Record(**got)
    limit = record.coefficients
    check("kept", record.kept == limit if record.mask == NONE else record.kept <= limit)
    return record


def matrix_of(operator: Operator) -> Floats:
    """The synthesis matrix that decoding uses, ``(K, M)``."""
    return operator.synthesis.astype(np.float32)


def mask_size(record: Record) -> int:
    """Bytes of the bits of a mask."""
    return sum(-(-count * record.M // 8) for _, count in record.chunks)
