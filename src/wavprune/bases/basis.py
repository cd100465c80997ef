"""A basis: how the kernels of a layer become coefficients, and coefficients kernels.

For a kernel of ``K`` values, ``c = A @ w`` are its ``M`` coefficients and ``w = S @ c`` brings it
back. A separable basis is kept as the factors of these two matrices, a pair of small matrices per
level; the dense ones are derived.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..errors import WavpruneError
from .factors import Axes, Factors
from .matrices import NEGLIGIBLE, Matrix, frozen

Kernel = tuple[int, int]

# Larger kernels, and dense matrices of more entries than this, exist as factors only.
DENSE_VALUES = 1024
DENSE_ENTRIES = 1 << 22


class LevelCollapsedWarning(UserWarning):
    """The wavelet is too long for the kernel: no transform ran."""


class Request(NamedTuple):
    """Which basis: what a family needs to know to build one.

    Attributes:
        name: the wavelet, or a name of this library's own.
        kernel: ``(kh, kw)``.
        mode: PyWavelets' boundary mode; ignored by a basis without a boundary.
        level: how many levels; None means the deepest that exists.
        force_level: use ``level`` even where PyWavelets calls it too deep for the kernel.
        axes: what is transformed where it is not the two axes of ``kernel``: ``(n,)`` of ``n x 1``
            and ``1 x n``, ``(kd, kh, kw)`` of ``kd x (kh * kw)``.
    """

    name: str
    kernel: Kernel
    mode: str = "periodization"
    level: int | None = None
    force_level: bool = False
    axes: tuple[int, ...] | None = None

    @property
    def size(self) -> str:
        """The kernel size as people write it, such as ``3x3``."""
        is_volume = self.axes is not None and len(self.axes) == 3
        return "x".join(map(str, self.axes if self.axes and is_volume else self.kernel))


# How the compiled code runs an operator: the first number of its plan.
IDENTITY, SEPARABLE, GENERAL, PAIRS_3X3, MERGES_3X3 = 0.0, 1.0, 2.0, 3.0, 4.0
# Of separable operators, by the form of their axes; see ``Axis``.
_KINDS = {None: SEPARABLE, "pairs": PAIRS_3X3, "merges": MERGES_3X3}


@dataclass(frozen=True, eq=False)
class Operator:
    """The coefficients of a basis that can be non-zero, ready to multiply.

    Equal by what it computes, so that caches can be keyed by it.

    Attributes:
        key: what two equal operators share.
        kernel: ``(kh, kw)``.
        analysis: ``(M', K)``, one row per coefficient.
        synthesis: ``(K, M')``.
        rows: ``(M',)``, which of the basis's M coefficients these are.
        scale: ``(M',)``, what each row of the basis's ``A`` was multiplied by.
        dropped: ``M - M'``: coefficients left out because they are always 0.
        identity: True where both matrices are the identity.
        axes: the factors of both matrices where each is one Kronecker product, else None.
        form: the family's name for axes that need no multiplications, else None; see ``Axes``.
    """

    key: Hashable
    kernel: Kernel
    analysis: Matrix
    synthesis: Matrix
    rows: npt.NDArray[np.intp]
    scale: Matrix
    dropped: int
    identity: bool
    axes: Axes | None = None
    form: str | None = None

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, Operator) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def num_coefficients(self) -> int:
        """``M'``."""
        return len(self.rows)

    @cached_property
    def plan(self) -> torch.Tensor:
        """How the compiled code runs it, ``[kind, kh, kw, Mh, Mw, ...]``; see ``wavprune.ops``."""
        kernel, axes = self.kernel, self.axes
        if self.identity:
            return _packed(IDENTITY, kernel, kernel, ())
        if axes is not None:
            grid = (len(axes.row_analysis), len(axes.column_analysis))
            between = max(kernel[0] * grid[1], grid[0] * kernel[1])
            # The compiled code has no room for axes that shrink on one side and grow on the other.
            if between <= max(kernel[0] * kernel[1], grid[0] * grid[1]):
                return _packed(_KINDS[axes.form], kernel, grid, axes[:4])
        grid = (self.num_coefficients, 1)
        return _packed(GENERAL, kernel, grid, (self.analysis, self.synthesis))


def _packed(
    kind: float, kernel: Kernel, grid: tuple[int, int], matrices: Sequence[Matrix]
) -> torch.Tensor:
    head = np.array([kind, *kernel, *grid], dtype=np.float64)
    return torch.from_numpy(np.concatenate([head, *(matrix.ravel() for matrix in matrices)]))


@dataclass(frozen=True, eq=False)
class Basis:
    """A basis of the kernels of one layer. Equal by value.

    Attributes:
        name: the wavelet, or ``"uhaar"``, ``"dct"``, ``"klt"``, ``"identity"``.
        kernel: ``(kh, kw)``.
        mode: PyWavelets' boundary mode; None where the basis has no boundary.
        level_requested: the level that was asked for; None means the deepest that exists.
        level_used: the level that ran; 0 means that no transform ran.
        level_max: the deepest level that exists on this kernel.
        grid: ``(Mh, Mw)``, how ``pywt.coeffs_to_array`` arranges the ``M = Mh * Mw`` coefficients.
        bands: name of each band -> its slices of ``grid``: ``a2``, ``h2``, ``v2``, ``d2``, ...
        factors: the per-axis factors; None where the basis is not separable.
        matrix: the analysis matrix ``(K, K)`` of an orthonormal basis that is not separable.
        data_driven: True where the basis was computed from the layer's own weights.
        too_deep: PyWavelets' own warning about a forced level, else None.
        axes: as in ``Request``, where the basis is another for it.
    """

    name: str
    kernel: Kernel
    mode: str | None
    level_requested: int | None
    level_used: int
    level_max: int
    grid: tuple[int, int]
    bands: Mapping[str, tuple[slice, slice]] = field(repr=False)
    factors: Factors | None = field(default=None, repr=False)
    matrix: Matrix | None = field(default=None, repr=False)
    data_driven: bool = False
    too_deep: str | None = None
    axes: tuple[int, ...] | None = None

    @cached_property
    def key(self) -> Hashable:
        """What two equal bases share."""
        own = None
        if self.matrix is not None:
            own = hashlib.blake2b(self.matrix.tobytes(), digest_size=16).digest()
        settings = (self.mode, self.level_requested, self.level_used)
        return (self.name, self.kernel, self.axes, *settings, own)

    def __eq__(self, other: object) -> bool:
        return self.key == other.key if isinstance(other, Basis) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.key)

    @property
    def num_values(self) -> int:
        """``K``, the values of a kernel."""
        return self.kernel[0] * self.kernel[1]

    @property
    def separable(self) -> bool:
        """True where the basis is kept as per-axis factors."""
        return self.factors is not None

    @property
    def has_boundary(self) -> bool:
        """True where the boundary mode matters."""
        return self.mode is not None

    @property
    def stored_values(self) -> int:
        """How many values a file must store for the basis itself."""
        return 0 if not self.data_driven or self.matrix is None else self.matrix.size

    @cached_property
    def is_dense(self) -> bool:
        """True where the kernel is small enough for dense matrices."""
        num_coefficients = self.grid[0] * self.grid[1]
        return (
            self.num_values <= DENSE_VALUES and self.num_values * num_coefficients <= DENSE_ENTRIES
        )

    @property
    def analysis(self) -> Matrix:
        """``A``, ``(M, K)``, one row per coefficient, in the order of ``grid``.

        Raises:
            WavpruneError: the kernel is too large; there are only the ``factors``.
        """
        return self._matrices[0]

    @property
    def synthesis(self) -> Matrix:
        """``S``, ``(K, M)``.

        Raises:
            WavpruneError: the kernel is too large; there are only the ``factors``.
        """
        return self._matrices[1]

    @cached_property
    def _matrices(self) -> tuple[Matrix, Matrix]:
        if self.matrix is not None:
            return self.matrix, frozen(self.matrix.T)
        assert self.factors is not None
        if not self.is_dense:
            size = "x".join(map(str, self.kernel))
            raise WavpruneError(
                f"a {size} kernel has no matrices of {self.name!r}, only their factors; allowed: "
                f"kernels of at most {DENSE_VALUES} values"
            )
        return self.factors.dense()

    @cached_property
    def structural(self) -> npt.NDArray[np.bool_]:
        """``(M,)``: True where the coefficient is 0 for every kernel."""
        if self.factors is not None:
            return ~self.factors.reachable.ravel()
        return np.zeros(self.grid[0] * self.grid[1], dtype=np.bool_)

    @cached_property
    def coefficients(self) -> int:
        """Coefficients of one kernel that can be non-zero."""
        return int(np.count_nonzero(~self.structural))

    @property
    def is_identity(self) -> bool:
        """True where coefficients are the weights themselves."""
        return self.factors is not None and self.factors.is_identity

    @property
    def expansive(self) -> bool:
        """True where a kernel has more coefficients than weights."""
        return self.coefficients > self.num_values

    @property
    def orthonormal(self) -> bool:
        """True where ``S = A.T`` and ``A @ A.T = I`` on the non-structural coefficients."""
        return self.factors is None or self.factors.orthonormal

    @property
    def collapsed(self) -> bool:
        """True where a transform was asked for, the kernel has room, and none ran."""
        return self.level_used == 0 and self.has_boundary and self.kernel != (1, 1)

    @cached_property
    def coefficient_operator(self) -> Operator:
        """The matrices as they are, for a threshold on ``|c|``."""
        return self._operator("coefficient", ~self.structural, np.ones(len(self.structural)))

    @cached_property
    def importance_operator(self) -> Operator:
        """The matrices with ``||S[:, m]||`` moved into ``A``, for a threshold on importance.

        What removing coefficient m costs in the weight is ``|c_m| * ||S[:, m]||``. Scaled this
        way, the magnitude of a coefficient is its importance.
        """
        norms = np.linalg.norm(self.synthesis, axis=0)
        used = ~self.structural & (norms > NEGLIGIBLE * norms.max())
        return self._operator("importance", used, norms)

    @cached_property
    def whole_operator(self) -> Operator:
        """The matrices with all rows, structural zeros too: what ``dwt2`` and ``idwt2`` compute."""
        everything = np.ones(len(self.structural), dtype=np.bool_)
        return self._operator("whole", everything, np.ones(len(everything)))

    def _operator(self, kind: str, used: npt.NDArray[np.bool_], scale: Matrix) -> Operator:
        scale = scale[used]
        axes = None
        if self.factors is not None:
            axes = self.factors.kronecker(used.reshape(self.grid), scaled=kind == "importance")
        return Operator(
            key=(kind, self.key),
            kernel=self.kernel,
            analysis=frozen(self.analysis[used] * scale[:, None]),
            synthesis=frozen(self.synthesis[:, used] / scale),
            rows=np.flatnonzero(used),
            scale=frozen(scale),
            dropped=int(np.count_nonzero(~used)),
            identity=self.is_identity,
            axes=axes,
            form=None if axes is None else axes.form,
        )
