"""What a compressed file says of its layers, and a strict reading of it.

``__metadata__["wavprune"]`` of the file is JSON::

    {"version": 2, "metadata": {...}, "bases": [...], "layers": {name: record},
     "aliases": {name: name}, "checksums": {name: crc32}}

``metadata`` is that of the file that was compressed; ``aliases`` are tied weights, which are stored
once; ``checksums`` are of every tensor's bytes in this file, in the order of the model. A layer's
tensor is a vector of bytes: its parts one after the other, ``scales``, ``matrix``, ``values``,
``high``, ``mask``; absent ones have no bytes. Version 1 is read by ``version1.py``.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from ..bases import kernel_shape
from ..common.checks import is_count
from ..errors import WavpruneError
from .coders import CODERS
from .compressor import ZSTD
from .stored_basis import StoredBasis, basis_from_json, basis_to_json

VERSION = 2
# Of files that hold a single tensor (packed_layout.py).
PACKED_VERSION = 3
PARTS = ("scales", "matrix", "values", "high", "mask")
# Coefficients of one chunk: what is coded and decoded at a time.
CHUNK = 1 << 18
FLOATS: dict[str, np.dtype[Any]] = {"float32": np.dtype("<f4"), "float16": np.dtype("<f2")}
SYMBOLS = "symbols"
DTYPES = ("F64", "F32", "F16", "BF16")
BITS, COMPRESSED, NONE = "bits", ZSTD, "none"
# float64 has exponents in this range, denormal numbers included.
LOWEST_EXPONENT, HIGHEST_EXPONENT = -1100, 1100
FIELDS = (
    *("dtype", "shape", "basis", "values", "coder", "mask", "kept", "sizes", "crc"),
    *("parameter", "exponent"),
)


@dataclass(frozen=True)
class Record:
    """How a layer's weight is stored.

    Attributes:
        dtype: of the weight, as safetensors calls it.
        shape: of the weight.
        basis: of its kernels; None stores the weights themselves.
        values: ``"float32"``, ``"float16"`` or ``"symbols"``: whole numbers, times ``scales``.
        coder: of the values.
        mask: ``"bits"``, ``"zstd"`` or, where every coefficient is among the values, ``"none"``.
        kept: how many values there are.
        sizes: bytes of each part.
        crc: CRC-32 of the weight.
        parameter: the coder's own number.
        exponent: what is decoded is the weight over 2 to this power.
        clamped: True where decoded values beyond the dtype's range become its largest ones; files
            of version 1 make them infinite.
    """

    dtype: str
    shape: tuple[int, ...]
    basis: StoredBasis | None
    values: str
    coder: str
    mask: str
    kept: int
    sizes: tuple[int, ...]
    crc: int
    parameter: int = 0
    exponent: int = 0
    clamped: bool = True

    @property
    def numel(self) -> int:
        """How many weights the layer has."""
        return math.prod(self.shape)

    @property
    def K(self) -> int:  # noqa: N802  # the design's letter
        """How many values a kernel has."""
        return 1 if self.basis is None else self.basis.K

    @property
    def M(self) -> int:  # noqa: N802  # the design's letter
        """How many coefficients a kernel has."""
        return 1 if self.basis is None else self.basis.coefficients

    @property
    def kernels(self) -> int:
        """How many kernels it has."""
        return self.numel // self.K

    @property
    def coefficients(self) -> int:
        """How many coefficients all kernels have."""
        return self.kernels * self.M

    @cached_property
    def chunks(self) -> list[tuple[int, int]]:
        """The start and the number of kernels of each chunk."""
        return chunks_of(self.kernels, self.M)

    @property
    def mask_size(self) -> int:
        """Bytes of the bits of a mask."""
        step = chunk_step(self.M)
        whole, rest = divmod(self.kernels, step)
        return whole * -(-step * self.M // 8) + -(-rest * self.M // 8)

    @property
    def working_bytes(self) -> int:
        """The memory that decoding takes beside the weight and a chunk, and what it decodes."""
        basis = 0 if self.basis is None else self.basis.working_bytes
        itemsize = FLOATS[self.values].itemsize if self.values in FLOATS else 2
        mask = 0 if self.mask == NONE else self.mask_size
        return basis + mask + self.kept * itemsize + 12 * max(0, 16 * self.M - CHUNK)


def chunk_step(M: int) -> int:
    """How many kernels are coded together, for at most ``CHUNK`` coefficients or 16 kernels."""
    return max(16, CHUNK // M // 16 * 16)


def chunks_of(kernels: int, M: int) -> list[tuple[int, int]]:
    """The start and the number of kernels of each chunk."""
    step = chunk_step(M)
    return [(start, min(step, kernels - start)) for start in range(0, kernels, step)]


@dataclass(frozen=True)
class Contents:
    """What a compressed file says of itself.

    Attributes:
        metadata: of the file that was compressed.
        layers: how each is stored.
        aliases: tied weights: name -> name of the tensor that is stored.
        checksums: CRC-32 of every tensor of the file, in the order of the model, aliases among
            them with the checksum of what they stand for.
    """

    metadata: dict[str, str]
    layers: dict[str, Record]
    aliases: dict[str, str]
    checksums: dict[str, int]

    def to_json(self) -> str:
        """As ``parse`` takes it."""
        numbers: dict[StoredBasis, int] = {}
        layers = {}
        for name, record in self.layers.items():
            basis = record.basis
            index = None if basis is None else numbers.setdefault(basis, len(numbers))
            layers[name] = [
                record.dtype,
                list(record.shape),
                index,
                record.values,
                record.coder,
                record.mask,
                record.kept,
                list(record.sizes),
                record.crc,
                record.parameter,
                record.exponent,
            ]
        content = {
            "version": VERSION,
            "metadata": self.metadata,
            "bases": [basis_to_json(basis) for basis in numbers],
            "layers": layers,
            "aliases": self.aliases,
            "checksums": self.checksums,
        }
        return json.dumps(content, separators=(",", ":"), ensure_ascii=False)


def parse(text: str) -> Contents:
    """The contents of a file, from its metadata.

    Raises:
        WavpruneError: they are not what this or an earlier version writes.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WavpruneError(f"its metadata is no JSON: {error}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if type(version) is not int or not 1 <= version <= VERSION:
        raise WavpruneError(
            f"it is of version {version!r} of the format; this wavprune reads versions 1 to "
            f"{PACKED_VERSION}"
        )
    metadata, checksums = content.get("metadata"), content.get("checksums")
    aliases = content.get("aliases", {})
    if not _is_map(metadata, str) or not _is_map(checksums, int):
        raise WavpruneError("its metadata lacks the tensors' checksums")
    layers = content.get("layers")
    if not isinstance(layers, dict) or not _is_map(aliases, str):
        raise WavpruneError("its metadata lacks the layers")
    for name in layers:
        if name not in checksums or name in aliases:
            raise WavpruneError(f"it does not hold the bytes of {name!r}")
    if version == 1:
        from .version1 import record_from_json as from_version1

        records = {name: from_version1(name, entry) for name, entry in layers.items()}
        return Contents(metadata, records, {}, checksums)
    entries = content.get("bases")
    if not isinstance(entries, list):
        raise WavpruneError("its metadata lacks the bases")  # a bad file
    holders = _holders(layers, len(entries))
    bases = [basis_from_json(*pair) for pair in zip(entries, holders, strict=True)]
    for name, alias in aliases.items():
        if name not in checksums or alias not in checksums or alias in aliases:
            raise WavpruneError(f"its tensor {name!r} stands for {alias!r}, which it does not hold")
    records = {name: _record(name, entry, bases) for name, entry in layers.items()}
    return Contents(metadata, records, aliases, checksums)


def _is_map(value: Any, kind: type) -> bool:
    return isinstance(value, dict) and all(type(entry) is kind for entry in value.values())


def _holders(layers: dict[str, Any], count: int) -> list[str]:
    """The tensor that holds each basis: that of the first layer in it."""
    holders: dict[int, str] = {}
    for name, entry in layers.items():
        if not isinstance(entry, list) or len(entry) != len(FIELDS):
            raise WavpruneError(f"layer {name!r}: its record is not one of {len(FIELDS)} entries")
        number = entry[FIELDS.index("basis")]
        if is_count(number, high=count - 1):
            holders.setdefault(number, name)
    if len(holders) < count:
        raise WavpruneError("its metadata has bases of no layer")
    return [holders[number] for number in range(count)]


def _record(name: str, entry: list[Any], bases: list[StoredBasis]) -> Record:
    fields = dict(zip(FIELDS, entry, strict=True))
    check = checker(name, fields)
    check_common(fields, check)
    number = fields["basis"]
    check("basis", number is None or is_count(number, high=len(bases) - 1))
    basis = None if number is None else bases[number]
    if basis is not None:
        check("basis", kernel_shape(fields["shape"]).kernel == tuple(basis.kernel))
    exponent = fields["exponent"]
    check("exponent", type(exponent) is int and LOWEST_EXPONENT <= exponent <= HIGHEST_EXPONENT)
    record = checked_record(fields, basis, check, exponent=exponent)
    expected = basis.size if basis is not None and basis.tensor == name else 0
    check("sizes", record.sizes[PARTS.index("matrix")] == expected)
    return record


Check = Callable[[str, bool], None]


def checked_record(
    fields: Mapping[str, Any], basis: StoredBasis | None, check: Check, **more: Any
) -> Record:
    """A record of fields that ``check_common`` has seen.

    Args:
        fields: those that every version has.
        basis: the layer's; None is the identity.
        check: raises where a field is wrong.
        more: what a version has beside them.
    """
    record = Record(
        dtype=fields["dtype"],
        shape=tuple(fields["shape"]),
        basis=basis,
        values=fields["values"],
        coder=fields["coder"],
        mask=fields["mask"],
        kept=fields["kept"],
        sizes=tuple(fields["sizes"]),
        crc=fields["crc"],
        parameter=fields["parameter"],
        **more,
    )
    check_kept(record, check)
    return record


def checker(name: str, fields: dict[str, Any]) -> Check:
    """A function that raises unless a field is allowed, and says what it is."""

    def check(field: str, allowed: bool) -> None:
        if not allowed:
            said = str(fields[field])
            shown = repr(fields[field]) if len(said) <= 100 else f"{said[:100]}..."
            raise WavpruneError(f"layer {name!r}: its record says {field}={shown}")

    return check


def check_common(fields: dict[str, Any], check: Check) -> None:
    """Check the fields that all versions have."""
    shape, sizes = fields["shape"], fields["sizes"]
    check("dtype", fields["dtype"] in DTYPES)
    check(
        "shape", isinstance(shape, list) and len(shape) in range(2, 6) and all(map(is_count, shape))
    )
    check("shape", 0 < math.prod(shape) < 1 << 62)
    check("values", fields["values"] in (*FLOATS, SYMBOLS))
    check("coder", isinstance(fields["coder"], str))
    check("coder", fields["coder"] in CODERS if fields["values"] == SYMBOLS else True)
    check("coder", fields["coder"] == ZSTD if fields["values"] != SYMBOLS else True)
    check("mask", fields["mask"] in (BITS, COMPRESSED, NONE))
    check("sizes", isinstance(sizes, list) and len(sizes) == len(PARTS))
    check("sizes", all(map(is_count, sizes)))
    for field in ("kept", "crc", "parameter"):
        check(field, is_count(fields[field]))


def check_kept(record: Record, check: Check) -> None:
    """Check the number of values."""
    limit = record.coefficients
    check("kept", record.kept == limit if record.mask == NONE else record.kept <= limit)
