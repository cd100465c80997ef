"""Files of version 1 of the format, which name a basis instead of carrying its matrix.

The matrix is built as wavprune 1 built it, to the bit, whatever becomes of the bases of this
library; the record holds its checksum.
"""

from __future__ import annotations

import math
import warnings
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import pywt

from ..common.checks import is_count
from ..config import MODES, WAVELETS
from ..errors import WavpruneError
from .records import Record, check_common, checked_record, checker
from .stored_basis import Floats, StoredBasis

# The bases of version 1 that PyWavelets does not have.
NOT_PYWAVELETS = ("uhaar", "dct", "klt", "identity")
FIELDS = (
    *("dtype", "shape", "basis", "values", "coder", "mask", "kept", "sizes"),
    *("matrix_crc", "crc", "parameter", "M"),
)
NEGLIGIBLE = 1e-10
LARGEST_KERNEL = 1024
LARGEST_GRID = 4 * LARGEST_KERNEL
MATRIX_PART = 1
Doubles = npt.NDArray[np.float64]


@dataclass(frozen=True)
class NamedBasis(StoredBasis):
    """A basis that the file only names; ``crc`` is that of its matrix in float32."""

    mode: str = "periodization"
    level: int | None = None
    force: bool = False
    importance: bool = True

    @property
    def size(self) -> int:
        """How many bytes the file holds of it: of ``"klt"`` its matrix."""
        return 4 * self.K * self.coefficients if self.name == "klt" else 0

    @property
    def working_bytes(self) -> int:
        """The memory that building the matrices takes."""
        if self.name == "klt":
            return 16 * self.K * self.coefficients
        rows, columns = _grid(self)
        # Analysis and synthesis, and the impulses and PyWavelets' intermediate results.
        return 8 * rows * columns * (4 * self.K + 4 * rows * columns)

    def matrix(self, part: bytes | memoryview) -> Floats:
        """The synthesis matrix ``(K, M)``; see ``StoredBasis``."""
        if len(part) != self.size:
            raise WavpruneError(f"it has {len(part)} bytes of a basis, and needs {self.size}")
        if self.name == "klt":
            matrix = np.frombuffer(part, dtype="<f4").astype(np.float32).reshape(self.K, -1)
        else:
            matrix = _synthesis(self)
        if matrix.shape[1] != self.coefficients:
            raise WavpruneError(
                f"it has {self.coefficients} coefficients a kernel, its basis {self.name!r} "
                f"{matrix.shape[1]}"
            )
        if zlib.crc32(matrix.astype("<f4").tobytes()) != self.crc:
            raise WavpruneError(
                f"its basis {self.name!r} is not, to the last bit, the one it was saved with; that "
                "takes another version of PyWavelets or numpy"
            )
        return matrix


def record_from_json(name: str, entry: Any) -> Record:
    """A record from its fields.

    Raises:
        WavpruneError: they are not those of a record.
    """
    if not isinstance(entry, list) or len(entry) != len(FIELDS):
        raise WavpruneError(f"layer {name!r}: its record is not one of {len(FIELDS)} entries")
    fields = dict(zip(FIELDS, entry, strict=True))
    check = checker(name, fields)
    check_common(fields, check)
    basis = fields["basis"]
    check("basis", isinstance(basis, list) and len(basis) == 6)
    wavelet, kernel, mode, level, force, importance = basis
    check("basis", isinstance(wavelet, str) and wavelet in (*NOT_PYWAVELETS, *WAVELETS))
    check("basis", isinstance(kernel, list) and len(kernel) == 2)
    check("basis", all(is_count(n, 1) for n in kernel))
    check("basis", kernel == [1, 1] or kernel == fields["shape"][2:])
    check("basis", math.prod(kernel) <= LARGEST_KERNEL)
    check("basis", mode is None or (isinstance(mode, str) and mode in MODES))
    check("basis", level is None or is_count(level, high=64))
    check("basis", type(force) is bool and type(importance) is bool)
    check("M", is_count(fields["M"], 1, LARGEST_GRID))
    check("matrix_crc", is_count(fields["matrix_crc"]))
    check("M", wavelet != "klt" or fields["M"] == math.prod(kernel))
    named: NamedBasis | None = NamedBasis(
        wavelet,
        (kernel[0], kernel[1]),
        fields["M"],
        name,
        fields["matrix_crc"],
        mode=mode or "periodization",
        level=level,
        force=force,
        importance=importance,
    )
    assert named is not None
    if wavelet != "klt":
        rows, columns = _grid(named)
        check("basis", rows * columns <= LARGEST_GRID)
    if kernel == [1, 1] and wavelet != "klt":
        check("M", fields["M"] == 1)
        named = None
    check("sizes", fields["sizes"][MATRIX_PART] == (0 if named is None else named.size))
    return checked_record(fields, named, check, clamped=False)


def _grid(basis: NamedBasis) -> tuple[int, int]:
    """The size of the coefficients' grid."""
    if basis.name in NOT_PYWAVELETS:
        return basis.kernel[0], basis.kernel[1]
    length = pywt.Wavelet(basis.name).dec_len
    sizes = []
    for n in basis.kernel:
        total, current = 0, n
        for _ in range(_levels(basis)):
            current = pywt.dwt_coeff_len(current, length, basis.mode)
            total += current
        sizes.append(total + current)
    return sizes[0], sizes[1]


def _levels(basis: NamedBasis) -> int:
    length = pywt.Wavelet(basis.name).dec_len
    deepest = int(pywt.dwt_max_level(min(basis.kernel), length))
    if basis.level is None:
        return deepest
    return basis.level if basis.force else min(basis.level, deepest)


def _synthesis(basis: NamedBasis) -> Floats:
    A, S = _matrices(basis)
    magnitudes = np.abs(A).max(axis=1)
    used = magnitudes > NEGLIGIBLE * magnitudes.max()
    scale = np.ones(len(A))
    if basis.importance:
        scale = np.linalg.norm(S, axis=0)
        used &= scale > NEGLIGIBLE * scale.max()
    result: Floats = np.ascontiguousarray(S[:, used] / scale[used]).astype(np.float32)
    return result


def _matrices(basis: NamedBasis) -> tuple[Doubles, Doubles]:
    rows, columns = basis.kernel
    if basis.name == "identity":
        return np.eye(basis.K), np.eye(basis.K)
    if basis.name == "dct":
        return _orthonormal(_dct(rows), _dct(columns))
    if basis.name == "uhaar":
        return _orthonormal(_uhaar(rows, basis.level), _uhaar(columns, basis.level))
    return _pywavelets(basis)


def _orthonormal(rows: Doubles, columns: Doubles) -> tuple[Doubles, Doubles]:
    A = np.kron(rows, columns).astype(np.float64)
    return A, np.ascontiguousarray(A.T)


def _pywavelets(basis: NamedBasis) -> tuple[Doubles, Doubles]:
    (kh, kw), K = basis.kernel, basis.K
    impulses = np.eye(K).reshape(K, kh, kw)
    arguments = {"wavelet": basis.name, "mode": basis.mode, "axes": (-2, -1)}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            coeffs = pywt.wavedec2(impulses, level=_levels(basis), **arguments)
        except ValueError as error:
            raise WavpruneError(f"PyWavelets cannot make its basis: {error}") from error
    packed, slices = pywt.coeffs_to_array(coeffs, axes=(-2, -1))
    M = int(packed.shape[1] * packed.shape[2])
    units = np.eye(M).reshape(M, *packed.shape[1:])
    # The slices carry the length of the batch of impulses.
    slices[0] = (slice(0, M), *slices[0][1:])
    for level in slices[1:]:
        for key, place in level.items():
            level[key] = (slice(0, M), *place[1:])
    unpacked = pywt.array_to_coeffs(units, slices, output_format="wavedec2")
    kernels = pywt.waverec2(unpacked, **arguments)[:, :kh, :kw]
    analysis = np.array(packed.reshape(K, M).T, order="C")
    return analysis, np.array(kernels.reshape(M, K).T, order="C")


def _uhaar(length: int, level: int | None) -> Doubles:
    blocks = [(1, row) for row in np.eye(length)]
    details: list[Doubles] = []
    rounds = (length - 1).bit_length()
    for _ in range(rounds if level is None else min(level, rounds)):
        merged, left = [], []
        for (a, p), (b, q) in zip(blocks[::2], blocks[1::2], strict=False):
            merged.append((a + b, (np.sqrt(a) * p + np.sqrt(b) * q) / np.sqrt(a + b)))
            left.append((np.sqrt(b) * p - np.sqrt(a) * q) / np.sqrt(a + b))
        blocks = merged + blocks[len(blocks) - len(blocks) % 2 :]
        details = left + details
    return np.stack([row for _, row in blocks] + details)


def _dct(length: int) -> Doubles:
    frequency, sample = np.mgrid[:length, :length]
    matrix: Doubles = np.sqrt(2 / length) * np.cos(
        np.pi * frequency * (2 * sample + 1) / (2 * length)
    )
    matrix[0] = np.sqrt(1 / length)
    return matrix
