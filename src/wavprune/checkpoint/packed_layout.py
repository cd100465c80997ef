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

TENSOR = "wavprune"
METADATA = f'{{"version":{PACKED_VERSION}}}'
RAW, ALIAS, MATRIX, FILLED, LOGS = range(5)
# Weights of a stream, about.
STREAM = 1 << 18
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
        if self.exponent or self.dtype == "F16":
            values = in_range(values, self.dtype, self.exponent)
        return torch.from_numpy(values).to(TORCH_DTYPES[self.dtype]).reshape(self.layout.shape)


def is_packed(text: str) -> bool:
    """True for the metadata of a file of this version."""
    return text == METADATA


def crc_of(tensor: torch.Tensor) -> int:
    """CRC-32 of a contiguous tensor's bytes."""
    return checksum(tensor.reshape(-1).view(torch.uint8).numpy())


def streams(matrices: Sequence[Any], size: Callable[[Any], int] | None = None) -> list[list[Any]]:
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
