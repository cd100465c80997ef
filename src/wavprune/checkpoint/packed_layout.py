"""What a packed file is made of: its constants, and tensors as matrices."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from .decoding import checksum, in_range
from .formats.safetensors import BITS
from .formats.safetensors import DTYPES as TORCH_DTYPES
from .records import PACKED_VERSION
from .synthesis import synthesise
from .trellis import Floats
from .trellis_coder import COLUMNS

TENSOR = "wavprune"
METADATA = f'{{"version":{PACKED_VERSION}}}'
RAW, ALIAS, MATRIX, FILLED, LOGS = range(5)
# Weights of a stream, about.
STREAM = 1 << 18
# Values of a large matrix that are in memory twice.
BLOCK = 1 << 20
ALL_DTYPES = tuple(BITS)


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
        """The inverse of ``split``, of some columns too."""
        if self.transposed:
            matrix = matrix.reshape(self.groups, self.shape[1], -1, self.coefficients)
            matrix = matrix.transpose(0, 2, 1, 3)
        return np.ascontiguousarray(matrix.reshape(-1, self.coefficients))

    def blocks(self) -> list[tuple[int, int]]:
        """The first and last columns of blocks of whole kernels, and of whole groups of columns."""
        wide = math.lcm(COLUMNS, self.coefficients)
        wide *= max(1, BLOCK // (wide * self.rows))
        return [(a, min(a + wide, self.columns)) for a in range(0, self.columns, wide)]

    def block(self, tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
        """A view of a tensor: the kernels of some columns, in the order of ``join``."""
        first, last = start // self.coefficients, stop // self.coefficients
        flat = tensor.view(-1)
        if self.transposed:
            return flat.view(self.groups, -1, self.shape[1], self.kernel)[:, first:last]
        return flat.view(self.rows, -1, self.kernel)[:, first:last]


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

    @property
    def is_direct(self) -> bool:
        """True where its values are the tensor's, row by row."""
        plain = self.dtype == "F32" and self.basis is None and not self.exponent
        return plain and not self.layout.transposed

    def tensor(self, coefficients: Floats, synthesis: Floats | None) -> torch.Tensor:
        """The tensor of decoded coefficients ``(R, C)``; ``synthesis`` None is the identity."""
        return self.kernels(coefficients, synthesis).reshape(self.layout.shape)

    def empty(self) -> torch.Tensor:
        """A tensor for ``put``."""
        return torch.empty(self.layout.shape, dtype=TORCH_DTYPES[self.dtype])

    def put(self, tensor: torch.Tensor, start: int, stop: int, kernels: torch.Tensor) -> None:
        """Set the part of a tensor that columns ``start`` to ``stop`` give."""
        part = self.layout.block(tensor, start, stop)
        part.copy_(kernels.view(part.shape))

    def kernels(self, coefficients: Floats, synthesis: Floats | None) -> torch.Tensor:
        """The kernels of decoded columns, one after the other."""
        values = self.layout.join(coefficients)
        if synthesis is not None:
            values = synthesise(np.ascontiguousarray(values.T), synthesis)
        if self.exponent or self.dtype == "F16":
            values = in_range(values, self.dtype, self.exponent)
        return torch.from_numpy(values).to(TORCH_DTYPES[self.dtype])


def is_packed(text: str) -> bool:
    """True for the metadata of a file of this version."""
    return text == METADATA


def crc_of(tensor: torch.Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes."""
    return checksum(tensor.reshape(-1).view(torch.uint8).numpy())


def streams(matrices: Sequence[Any], size: Callable[[Any], int]) -> list[list[Any]]:
    """Runs of matrices of about ``STREAM`` weights."""
    result: list[list[Any]] = []
    filled = STREAM
    for matrix in matrices:
        if filled >= STREAM:
            result.append([])
            filled = 0
        result[-1].append(matrix)
        filled += size(matrix)
    return result
