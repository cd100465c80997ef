"""One axis of PyWavelets' wavelets: matrices of a short one, filters along a long one."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import pywt
import torch

from .axes import LONGEST_DENSE_AXIS, Axis, AxisMap, DenseMap, non_zero, orthonormal
from .banded import LOW, LOW_AND_HIGH, SIGNAL, BandedMap
from .matrices import Matrix, frozen

# Unit impulses of a long axis are transformed in batches of this many values.
VALUES_AT_ONCE = 1 << 20


class _Level(NamedTuple):
    """What an ``Axis`` needs to know of a level; see there."""

    analysis: AxisMap
    synthesis: AxisMap
    coarse: int
    reach: Matrix
    norms: Matrix
    orthonormal: bool | None = None


def wavelet_axis(name: str, n: int, mode: str, levels: int) -> list[Axis]:
    """The levels of PyWavelets' ``wavedec`` and ``waverec`` on ``n`` values, the finest first."""
    build = _short_axis if n <= LONGEST_DENSE_AXIS else _long_axis
    built = build(name, n, mode, levels)
    # Two filter taps are Haar's; on three values a pair and what is left over.
    form = "pairs" if (n, levels, pywt.Wavelet(name).dec_len) == (3, 1, 2) else None
    axes: list[Axis] = []
    start = built[-1].coarse if built else 0
    for analysis, synthesis, coarse, reach, norms, is_orthonormal in reversed(built):
        axis = Axis(analysis, synthesis, coarse, start, reach, norms, form, is_orthonormal)
        axes.insert(0, axis)
        start += coarse
    return axes


def single_value() -> Axis:
    """A level along an axis of one value, which is its own approximation and has no detail."""
    one = frozen(np.ones((1, 1)))
    return Axis(DenseMap(one), DenseMap(one), 1, 1, one[0], one[0], orthonormal=True)


def _matrices(name: str, n: int, mode: str) -> tuple[Matrix, Matrix]:
    """One level on ``n`` values: ``A`` ``(2m, n)`` and ``S`` ``(n, 2m)``."""
    A = np.concatenate(pywt.dwt(np.eye(n), name, mode, axis=0))
    ones = np.eye(len(A) // 2)
    halves = (pywt.idwt(ones, None, name, mode, axis=0), pywt.idwt(None, ones, name, mode, axis=0))
    return A, np.concatenate(halves, axis=1)[:n]


def _short_axis(name: str, n: int, mode: str, levels: int) -> list[_Level]:
    built = []
    forward, backward = None, None
    for _ in range(levels):
        A, S = _matrices(name, n if forward is None else len(forward), mode)
        m = len(A) // 2
        whole = A if forward is None else A @ forward
        back = S if backward is None else backward @ S
        reach, norms = np.abs(whole).max(axis=1), np.linalg.norm(back, axis=0)
        built.append(
            _Level(DenseMap(frozen(A)), DenseMap(frozen(S)), m, frozen(reach), frozen(norms))
        )
        forward, backward = whole[:m], back[:, :m]
    return built


def _long_axis(name: str, n: int, mode: str, levels: int) -> list[_Level]:
    filters = _Filters(name, mode)
    built = []
    size = n
    for level in range(1, levels + 1):
        reach, norms = filters.reach_and_norms(n, level)
        coarse = len(reach) // 2
        built.append(
            _Level(
                filters.map(size, "analysis"),
                filters.map(size, "synthesis"),
                coarse,
                frozen(reach),
                frozen(norms),
                filters.orthonormal(size, non_zero(reach)),
            )
        )
        size = coarse
    return built


class _Filters:
    """One wavelet in one mode along long axes.

    A level on ``n`` values is the level on a few values, lengthened by its own middle: both ends
    depend only on the filter and on whether ``n`` is odd.
    """

    def __init__(self, name: str, mode: str) -> None:
        self._name, self._mode = name, mode
        self._taps = pywt.Wavelet(name).dec_len
        self._short: dict[int, tuple[Matrix, Matrix]] = {}

    def map(self, n: int, part: str) -> AxisMap:
        """A map of one level.

        Args:
            n: how many values the level transforms.
            part: ``"analysis"``, ``"synthesis"``, ``"adjoint"`` (of the analysis), or the last
                two of the approximations alone: ``"coarse synthesis"``, ``"coarse adjoint"``.
        """
        A, S = self._matrices(n)
        extra = (n - A.shape[1]) // 2
        m = len(A) // 2
        matrix, outputs, inputs = {
            "analysis": (A, LOW_AND_HIGH, SIGNAL),
            "synthesis": (S, SIGNAL, LOW_AND_HIGH),
            "adjoint": (A.T, SIGNAL, LOW_AND_HIGH),
            "coarse synthesis": (S[:, :m], SIGNAL, LOW),
            "coarse adjoint": (A[:m].T, SIGNAL, LOW),
        }[part]
        return BandedMap(matrix, outputs, inputs, extra) if extra else DenseMap(frozen(matrix))

    def orthonormal(self, n: int, used: npt.NDArray[np.bool_]) -> bool:
        """Whether one level is, on the coefficients ``used`` ``(2m,)``."""
        A, S = self._matrices(n)
        short = [shortened(band, len(A) // 2) for band in np.split(used, 2)]
        return orthonormal(A, S, np.concatenate(short))

    def reach_and_norms(self, n: int, level: int) -> tuple[Matrix, Matrix]:
        """``(2m,)`` each, of the levels up to this one together; see ``Axis``."""
        short = shorter_axis(n, level, self._taps)
        sizes = [short]
        for _ in range(level):
            sizes.append(int(pywt.dwt_coeff_len(sizes[-1], self._taps, self._mode)))
        m = sizes.pop()
        cpu = torch.device("cpu")
        to_values = {
            part: [
                self.map(size, part if i == level - 1 else f"coarse {part}").bind(
                    torch.float64, cpu
                )
                for i, size in enumerate(sizes)
            ]
            for part in ("adjoint", "synthesis")
        }
        reach, norms = np.empty(2 * m), np.empty(2 * m)
        step = max(1, VALUES_AT_ONCE // short)
        for start in range(0, 2 * m, step):
            stop = min(start + step, 2 * m)
            rows = cols = torch.zeros(stop - start, 2 * m, dtype=torch.float64, device=cpu)
            rows.diagonal(start).fill_(1)
            for adjoint in reversed(to_values["adjoint"]):
                rows = adjoint(rows, -1)
            for synthesis in reversed(to_values["synthesis"]):
                cols = synthesis(cols, -1)
            reach[start:stop] = rows.abs().amax(dim=1).numpy()
            norms[start:stop] = np.linalg.norm(cols.numpy(), axis=1)
        extra = (n - short) >> level
        both = [
            np.concatenate([lengthened(band, extra) for band in np.split(values, 2)])
            for values in (reach, norms)
        ]
        return both[0], both[1]

    def _matrices(self, n: int) -> tuple[Matrix, Matrix]:
        short = shorter_axis(n, 1, self._taps)
        if short not in self._short:
            self._short[short] = _matrices(self._name, short, self._mode)
        return self._short[short]


def shorter_axis(n: int, level: int, taps: int) -> int:
    """The length of an axis that transforms as one of ``n`` values, but for a longer middle.

    At each level it is odd where the long one is, and the coefficients at one end depend on
    nothing at the other.
    """
    step = 1 << level
    return n - max(n // step - 4 * taps - 4, 0) * step


def lengthened(values: Matrix, extra: int) -> Matrix:
    """``(m + extra,)``: the middle value of ``(m,)`` repeated."""
    middle = len(values) // 2
    return np.insert(values, middle, np.full(extra, values[middle]))


def shortened(values: npt.NDArray[np.bool_], length: int) -> npt.NDArray[np.bool_]:
    """``(length,)``: the ends of ``(m,)``, without the middle."""
    middle = length // 2
    return np.concatenate([values[:middle], values[len(values) - (length - middle) :]])
