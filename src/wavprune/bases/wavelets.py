"""PyWavelets' discrete wavelets, in every boundary mode and to every level.

The factors are what PyWavelets itself answers to unit impulses along one axis, so they agree with
it for every wavelet, mode and level.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import pywt

from ..config import WAVELETS
from ..errors import WavpruneError
from .axes import LONGEST_DENSE_AXIS
from .basis import Basis, Kernel, Request
from .factors import Factors
from .matrices import NEGLIGIBLE
from .registry import Family, register
from .transform import Array, Transform
from .wavelet_axes import VALUES_AT_ONCE, lengthened, shorter_axis, single_value, wavelet_axis


class Wavelets(Family):
    """``pywt.wavedec2`` and ``pywt.waverec2``; ``wavedec`` and ``waverec`` of ``n x 1`` kernels."""

    def max_level(self, name: str, kernel: Kernel) -> int:
        """``pywt.dwt_max_level`` of the shorter axis."""
        return int(pywt.dwt_max_level(min(kernel), pywt.Wavelet(name).dec_len))

    def build(self, request: Request) -> Basis:
        """The basis; see ``Family``."""
        name, kernel, mode, level, force, line = request
        transformed = kernel if line is None else (line[0], line[0])
        deepest = self.max_level(name, transformed)
        used = deepest if level is None else level if force else min(level, deepest)
        limit = max(deepest, deepest_forced(kernel))
        if used > limit:
            raise WavpruneError(
                f"level={level} with force_level=True on {request.size} kernels: there is nothing "
                f"left to transform after {limit} levels; allowed: 1 to {limit}"
            )
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                for n in transformed:
                    pywt.wavedec(np.zeros((1, n)), name, mode=mode, level=used)
            except ValueError as error:
                raise WavpruneError(
                    f"PyWavelets cannot transform {request.size} kernels by {name!r} in mode "
                    f"{mode!r} to level {used}: {error}"
                ) from error
        factors = wavelet_factors(name, kernel, mode, used, line is not None)
        return Basis(
            name=name,
            kernel=kernel,
            mode=mode,
            level_requested=level,
            level_used=used,
            level_max=deepest,
            grid=factors.grid,
            bands=coefficient_bands(factors),
            factors=factors,
            too_deep=str(caught[0].message) if caught else None,
            axes=line,
        )

    def transform(self, basis: Basis, kernels: Array) -> Transform:
        """PyWavelets itself."""
        del kernels
        return _PyWavelets(basis) if basis.axes is None else _AlongOneAxis(basis)


def deepest_forced(kernel: Kernel) -> int:
    """The deepest level that may be forced: 5, or one more than halves the longer axis down to 1.

    Example:
        >>> deepest_forced((3, 3)), deepest_forced((32, 32))
        (5, 6)
    """
    return max(5, (max(kernel) - 1).bit_length() + 1)


def wavelet_factors(
    name: str, kernel: Kernel, mode: str, level: int, one_axis: bool = False
) -> Factors:
    """PyWavelets' ``wavedec2`` and ``waverec2``, from what it answers to unit impulses.

    Args:
        name: any of ``pywt.wavelist(kind="discrete")``.
        kernel: ``(kh, kw)``.
        mode: any of ``pywt.Modes.modes``.
        level: how many levels, 0 or more.
        one_axis: True leaves an axis of a single value as it is: then it is ``wavedec`` and
            ``waverec`` of the other one.

    Example:
        >>> wavelet_factors("db4", (784, 128), "periodization", 3).grid
        (784, 128)
    """
    axes = [
        [single_value()] * level if one_axis and n == 1 else wavelet_axis(name, n, mode, level)
        for n in kernel
    ]
    grid = tuple(
        axis[0].start + axis[0].analysis.shape[0] - axis[0].coarse if axis else n
        for axis, n in zip(axes, kernel, strict=True)
    )
    return Factors(kernel, (grid[0], grid[1]), tuple(zip(*axes, strict=True)))


def coefficient_bands(factors: Factors) -> dict[str, tuple[slice, slice]]:
    """The slices of the bands of ``wavedec2`` in the grid, the coarsest first.

    Of one axis there are approximations and one band of details a level.
    """
    levels = len(factors.levels)
    if not levels:
        return {"a0": (slice(0, factors.kernel[0]), slice(0, factors.kernel[1]))}
    bands = {f"a{levels}": factors.slices(levels - 1)[0][1]}
    for level in reversed(range(levels)):
        *_, vertical, horizontal, diagonal = (target for _, target in factors.slices(level))
        for letter, band in zip("hvd", (horizontal, vertical, diagonal), strict=True):
            bands[f"{letter}{level + 1}"] = band
    return {name: band for name, band in bands.items() if all(b.stop > b.start for b in band)}


def unpack(packed: Any, bands: Mapping[str, tuple[slice, slice]]) -> list[Any]:
    """The coefficient list of ``waverec2`` from packed coefficients ``(..., Mh, Mw)``."""
    levels = (len(bands) - 1) // 3

    def band(name: str) -> Any:
        rows, columns = bands[name]
        return packed[..., rows, columns]

    details = [tuple(band(f"{k}{i}") for k in "hvd") for i in range(levels, 0, -1)]
    return [band(f"a{levels}"), *details]


class _PyWavelets(Transform):
    scales = True

    def __init__(self, basis: Basis) -> None:
        self.basis = basis

    def forward(self, kernels: Array) -> Array:
        coeffs = self._decompose(kernels)
        packed, _ = pywt.coeffs_to_array(coeffs, axes=(-2, -1))
        result: Array = packed
        return result

    def inverse(self, packed: Array) -> Array:
        kh, kw = self.basis.kernel
        coeffs = unpack(packed, self.basis.bands)
        whole = pywt.waverec2(coeffs, self.basis.name, mode=self.basis.mode, axes=(-2, -1))
        result: Array = whole[:, :kh, :kw]
        return result

    def nonzero(self) -> Array:
        """``(Mh, Mw)``: False at the structural zeros, where every unit impulse leaves nothing."""
        reach = self._products("reach")
        result: Array = reach > NEGLIGIBLE * reach.max()
        return result

    def norms(self) -> Array:
        """``(Mh, Mw)``: the norm of the kernel that each single coefficient makes."""
        norms = self._products("norms")
        return np.where(norms > NEGLIGIBLE * norms.max(), norms, 0)

    def _products(self, part: str) -> Array:
        """``(Mh, Mw)``: the transform is separable, and so is the size of what it makes of one."""
        basis = self.basis
        levels = range(1, basis.level_used + 1) or [0]
        axes = [{i: _bands(basis, n, i) for i in levels} for n in basis.kernel]
        result = np.zeros(basis.grid)
        for name, (rows, columns) in basis.bands.items():
            letters = {"a": (0, 0), "h": (1, 0), "v": (0, 1), "d": (1, 1)}[name[0]]
            sizes = [
                getattr(axis[int(name[1:])][k], part) for axis, k in zip(axes, letters, strict=True)
            ]
            result[rows, columns] = np.outer(*sizes)
        return result

    def _decompose(self, kernels: Array) -> list[Any]:
        basis = self.basis
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Level value")
            coeffs: list[Any] = pywt.wavedec2(
                kernels, basis.name, mode=basis.mode, level=basis.level_used, axes=(-2, -1)
            )
        return coeffs


class _AlongOneAxis(_PyWavelets):
    """``n x 1`` or ``1 x n`` kernels."""

    def __init__(self, basis: Basis) -> None:
        super().__init__(basis)
        self._axis = 1 if basis.kernel[0] > 1 else 2

    def forward(self, kernels: Array) -> Array:
        basis = self.basis
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Level value")
            coeffs = pywt.wavedec(
                kernels, basis.name, mode=basis.mode, level=basis.level_used, axis=self._axis
            )
        return np.concatenate(coeffs, axis=self._axis)

    def inverse(self, packed: Array) -> Array:
        basis = self.basis
        kh, kw = basis.kernel
        coeffs = [packed[:, rows, columns] for rows, columns in basis.bands.values()]
        whole: Array = pywt.waverec(coeffs, basis.name, mode=basis.mode, axis=self._axis)
        return whole[:, :kh, :kw]

    def _products(self, part: str) -> Array:
        basis, length = self.basis, max(self.basis.kernel)
        levels = {i: _bands(basis, length, i) for i in range(1, basis.level_used + 1)}
        if not levels:
            return np.ones(basis.grid)
        _, *details = basis.bands
        parts = [getattr(levels[basis.level_used][0], part)]
        parts += [getattr(levels[int(name[1:])][1], part) for name in details]
        return np.concatenate(parts).reshape(basis.grid)


class _Band(NamedTuple):
    """One band of one axis; ``(m,)`` each, as in ``Axis``."""

    reach: Array
    norms: Array


def _bands(basis: Basis, n: int, level: int) -> list[_Band]:
    """The approximations of a level along an axis of n values, and its details."""
    taps = pywt.Wavelet(basis.name).dec_len
    short = n if n <= LONGEST_DENSE_AXIS else shorter_axis(n, level, taps)
    step = max(VALUES_AT_ONCE // short, 1)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Level value")
        coeffs: list[Array] = []
        reaches: list[Array] = []
        for impulses in _impulses(short, step):
            coeffs = pywt.wavedec(impulses, basis.name, mode=basis.mode, level=level, axis=0)
            largest = [np.abs(band).max(axis=1) for band in coeffs[:2]]
            reaches = [np.maximum(*pair) for pair in zip(reaches or largest, largest, strict=True)]
    bands = []
    for k, reach in enumerate(reaches):
        norms = []
        for impulses in _impulses(len(reach), step):
            alone = [np.zeros((len(band), impulses.shape[1])) for band in coeffs]
            alone[k] = impulses
            whole = pywt.waverec(alone, basis.name, mode=basis.mode, axis=0)
            norms.append(np.linalg.norm(whole[:short], axis=0))
        extra = (n - short) >> level
        bands.append(_Band(lengthened(reach, extra), lengthened(np.concatenate(norms), extra)))
    return bands


def _impulses(n: int, step: int) -> Iterator[Array]:
    """Unit impulses ``(n, step)``, one per column."""
    for start in range(0, n, step):
        yield np.eye(n, min(step, n - start), -start)


_FAMILY = Wavelets()
for _name in WAVELETS:
    register(_name, _FAMILY)
