"""The orthonormal discrete cosine transform, DCT-II, of both axes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import numpy as np
import numpy.typing as npt
import torch

from .axes import (
    LONGEST_DENSE_AXIS,
    Axis,
    AxisMap,
    Constants,
    along,
    every_second,
    fast_orthonormal_axis,
    orthonormal_axis,
)
from .basis import Basis, Kernel, Request
from .factors import single_level
from .matrices import Matrix, frozen
from .registry import Family, register
from .separable import separable_basis
from .transform import Array, AxisTransform, Transform


class Cosine(Family):
    """DCT-II; Ahmed, Natarajan and Rao (1974), "Discrete cosine transform"."""

    def max_level(self, name: str, kernel: Kernel) -> int:
        """1, but 0 where there is no spatial axis."""
        del name
        return int(kernel != (1, 1))

    def build(self, request: Request) -> Basis:
        """The basis; see ``Family``."""
        rows, columns = (_axis(n) for n in request.kernel)
        factors = single_level(rows, columns)
        spans = [_Frequencies(n) for n in request.kernel]
        level = self.max_level(request.name, request.kernel)
        return separable_basis(request, level, level, factors, spans)

    def transform(self, basis: Basis, kernels: Array) -> Transform:
        """The cosines themselves."""
        del basis, kernels
        return _Cosine()


def dct_matrix(length: int) -> Matrix:
    """Orthonormal DCT-II matrix ``(length, length)``; its transpose is the inverse.

    Example:
        >>> dct_matrix(2).round(3).tolist()
        [[0.707, 0.707], [0.707, -0.707]]
    """
    frequency, position = np.mgrid[:length, :length]
    matrix = np.sqrt(2 / length) * np.cos(np.pi * frequency * (2 * position + 1) / (2 * length))
    matrix[0] = np.sqrt(1 / length)
    return frozen(matrix)


def _axis(length: int) -> Axis:
    if length <= LONGEST_DENSE_AXIS:
        return orthonormal_axis(dct_matrix(length))
    reach = np.full(length, np.sqrt(2 / length))
    return fast_orthonormal_axis(FastCosine(length), FastCosine(length, inverse=True), reach)


class _Frequencies(Mapping[str, slice]):
    """``f0``, ``f1``, ...: the bands of an axis are its single coefficients."""

    def __init__(self, length: int) -> None:
        self._length = length

    def __getitem__(self, name: str) -> slice:
        index = int(name[1:]) if name[:1] == "f" and name[1:].isdecimal() else self._length
        if index >= self._length:
            raise KeyError(name)
        return slice(index, index + 1)

    def __iter__(self) -> Iterator[str]:
        return (f"f{index}" for index in range(self._length))

    def __len__(self) -> int:
        return self._length


class FastCosine(AxisMap):
    """DCT-II by one FFT of the same length; Makhoul (1980), "A fast cosine transform".

    Args:
        length: of the axis.
        inverse: True for the synthesis.
    """

    def __init__(self, length: int, inverse: bool = False) -> None:
        self.shape = (length, length)
        self._inverse = inverse
        angle = np.pi * np.arange(length // 2 + 1) / (2 * length)
        scale = np.full(len(angle), np.sqrt(2 / length))
        scale[0] = np.sqrt(1 / length)
        if inverse:
            scale = 1 / scale
        self.constants = (frozen(scale * np.cos(angle)), frozen(scale * np.sin(angle)))

    def apply(self, x: torch.Tensor, dim: int, constants: Constants) -> torch.Tensor:
        """O(n log n)."""
        cosine, sine = (along(constant, dim) for constant in constants)
        n = self.shape[0]
        half = n // 2 + 1
        # The coefficients k and n - k are the parts of one complex number.
        if not self._inverse:
            reordered = torch.cat([every_second(x, dim, 0), every_second(x, dim, 1).flip(dim)], dim)
            spectrum = _rfft(reordered, dim)
            low = spectrum.real * cosine + spectrum.imag * sine
            high = spectrum.real * sine - spectrum.imag * cosine
            return torch.cat([low, high.narrow(dim, 1, n - half).flip(dim)], dim)
        real = x.narrow(dim, 0, half)
        imaginary = torch.zeros_like(real)
        imaginary.narrow(dim, 1, half - 1).copy_(x.narrow(dim, n - half + 1, half - 1).flip(dim))
        spectrum = torch.complex(real * cosine + imaginary * sine, real * sine - imaginary * cosine)
        reordered = _irfft(spectrum, n, dim)
        result = torch.empty_like(x, memory_format=torch.contiguous_format)
        evens = n - n // 2
        every_second(result, dim, 0).copy_(reordered.narrow(dim, 0, evens))
        every_second(result, dim, 1).copy_(reordered.narrow(dim, evens, n // 2).flip(dim))
        return result


# On the CPU numpy's FFT: torch's (MKL) rounds one kernel differently alone than among others.
def _rfft(x: torch.Tensor, dim: int) -> torch.Tensor:
    if x.device.type == "cpu":
        return torch.from_numpy(np.fft.rfft(x.numpy(), axis=dim))
    spectrum: torch.Tensor = torch.fft.rfft(x, dim=dim)
    return spectrum


def _irfft(spectrum: torch.Tensor, n: int, dim: int) -> torch.Tensor:
    if spectrum.device.type == "cpu":
        return torch.from_numpy(np.fft.irfft(spectrum.numpy(), n, axis=dim))
    x: torch.Tensor = torch.fft.irfft(spectrum, n=n, dim=dim)
    return x


class _Cosine(AxisTransform):
    """A sum over cosines; along a long axis, by the FFT of the axis and as many zeros."""

    @staticmethod
    def _scale(n: int) -> Array:
        return np.asarray(np.sqrt(np.where(np.arange(n) == 0, 1, 2) / n))

    def _table(self, n: int, dtype: npt.DTypeLike) -> Array:
        k, i = np.ogrid[:n, :n]
        table = np.cos(np.pi * k * (2 * i + 1) / (2 * n)) * self._scale(n)[:, None]
        return np.asarray(table, dtype=dtype)

    def _phases(self, n: int, dtype: npt.DTypeLike) -> Array:
        phases = self._scale(n) * np.exp(-0.5j * np.pi * np.arange(n) / n)
        return np.asarray(phases, dtype=np.result_type(dtype, np.complex64))

    def along(self, x: Array) -> Array:
        n = x.shape[-1]
        if n <= LONGEST_DENSE_AXIS:
            return np.asarray(np.einsum("nri,ki->nrk", x, self._table(n, x.dtype)))
        spectrum = np.fft.rfft(x, 2 * n, axis=-1)[..., :n]
        return np.asarray((spectrum * self._phases(n, x.dtype)).real, dtype=x.dtype)

    def back(self, x: Array) -> Array:
        n = x.shape[-1]
        if n <= LONGEST_DENSE_AXIS:
            return np.asarray(np.einsum("nrk,ki->nri", x, self._table(n, x.dtype)))
        spectrum = np.fft.fft(x * self._phases(n, x.dtype), 2 * n, axis=-1)[..., :n]
        return np.asarray(spectrum.real, dtype=x.dtype)


register("dct", Cosine())
