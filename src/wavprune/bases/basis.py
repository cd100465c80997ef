"""A basis is two matrices: analysis ``A`` (M, K) and synthesis ``S`` (K, M), in float64.

For a kernel of ``K = kh * kw`` values, ``c = A @ w`` are its M coefficients and ``w = S @ c``
brings it back. The matrices of PyWavelets' transforms are what PyWavelets itself answers to unit
impulses, so they agree with it for every wavelet, boundary mode and level. Of kernels too large for
that there are only the factors of these matrices (``factored.py``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt
import pywt
import torch

from ..config import AUTO, PruneConfig
from .factors import Factors, kronecker_factors, wavelet_factors
from .matrices import (
    NEGLIGIBLE,
    Matrix,
    dct_matrix,
    frozen,
    klt_matrix,
    merges,
    uhaar_matrix,
    uhaar_spans,
)

Kernel = tuple[int, int]

# Kernels of more values than this have their basis in factors.
DENSE_VALUES = 1024


class LevelCollapsedWarning(UserWarning):
    """The wavelet is too long for the kernel: no transform ran."""


@dataclass(frozen=True, eq=False, slots=True)
class Operator:
    """The coefficients of a basis that can be non-zero, ready to multiply.

    Hashes by identity, so that a backend can cache what it derives from it.

    Attributes:
        analysis: ``(M', K)``, one row a coefficient.
        synthesis: ``(K, M')``.
        rows: ``(M',)``, which of the basis's M coefficients these are.
        scale: ``(M',)``, what each row of the basis's ``A`` was multiplied by.
        dropped: ``M - M'``: the coefficients left out because they are always 0.
        identity: True where both matrices are the identity.
    """

    analysis: Matrix
    synthesis: Matrix
    rows: npt.NDArray[np.intp]
    scale: Matrix
    dropped: int
    identity: bool


@dataclass(frozen=True, eq=False)
class Basis:
    """A basis of the kernels of one layer.

    Attributes:
        name: the wavelet, or ``"uhaar"``, ``"dct"``, ``"klt"``, ``"identity"``.
        kernel: ``(kh, kw)``.
        mode: PyWavelets' boundary mode; None where the basis has no boundary.
        level_requested: the level that was asked for; None means the deepest that exists.
        level_used: the level that ran; 0 means that no transform ran.
        level_max: the deepest level that exists on this kernel.
        grid: ``(Mh, Mw)``, how ``pywt.coeffs_to_array`` arranges the ``M = Mh * Mw`` coefficients.
        parts: ``(A, S)``, or the factors of both where ``K > DENSE_VALUES``.
        bands: name of each band -> its place in ``grid``: ``a2``, ``h2``, ``v2``, ``d2``, ``h1``...
        too_deep: PyWavelets' own warning about a forced level, else None.
    """

    name: str
    kernel: Kernel
    mode: str | None
    level_requested: int | None
    level_used: int
    level_max: int
    grid: tuple[int, int]
    parts: tuple[Matrix, Matrix] | Factors = field(repr=False)
    bands: dict[str, tuple[slice, slice]] = field(repr=False)
    too_deep: str | None = None

    @property
    def factors(self) -> Factors | None:
        """What there is instead of the matrices of a large kernel, else None."""
        return self.parts if isinstance(self.parts, Factors) else None

    @property
    def analysis(self) -> Matrix:
        """``A``, ``(M, K)``, one row a coefficient, in the order of ``grid``.

        Raises:
            ValueError: the kernel is too large; there are only the ``factors``.
        """
        return self._matrices[0]

    @property
    def synthesis(self) -> Matrix:
        """``S``, ``(K, M)``.

        Raises:
            ValueError: the kernel is too large; there are only the ``factors``.
        """
        return self._matrices[1]

    @property
    def _matrices(self) -> tuple[Matrix, Matrix]:
        if isinstance(self.parts, tuple):
            return self.parts
        size = "x".join(map(str, self.kernel))
        raise ValueError(
            f"a {size} kernel has no matrices of {self.name!r}, only their factors; allowed: "
            f"kernels of at most {DENSE_VALUES} values"
        )

    @cached_property
    def structural(self) -> npt.NDArray[np.bool_]:
        """``(M,)``: True where the coefficient is 0 for every kernel."""
        if self.factors is not None:
            return ~self.factors.reachable.ravel()
        rows = np.abs(self.analysis).max(axis=1)
        negligible: npt.NDArray[np.bool_] = rows <= NEGLIGIBLE * rows.max()
        return negligible

    @cached_property
    def coefficients(self) -> int:
        """Coefficients of one kernel that can be non-zero."""
        return int(np.count_nonzero(~self.structural))

    @property
    def expansive(self) -> bool:
        """True where a kernel has more coefficients than weights."""
        return self.coefficients > self.kernel[0] * self.kernel[1]

    @cached_property
    def orthonormal(self) -> bool:
        """True where ``S = A.T`` and ``A @ A.T = I`` on the non-structural coefficients."""
        if self.factors is not None:
            return self.factors.orthonormal
        A = self.analysis[~self.structural]
        S = self.synthesis[:, ~self.structural]
        return bool(
            len(A) == A.shape[1]
            and np.allclose(A, S.T, atol=1e-10)
            and np.allclose(A @ A.T, np.eye(len(A)), atol=1e-10)
        )

    @property
    def collapsed(self) -> bool:
        """True where a transform was asked for, the kernel has room, and none ran."""
        return self.level_used == 0 and self.name != "identity" and self.kernel != (1, 1)

    @cached_property
    def coefficient_operator(self) -> Operator:
        """The matrices as they are, for a threshold on ``|c|``."""
        return self._operator(~self.structural, np.ones(len(self.structural)))

    @cached_property
    def importance_operator(self) -> Operator:
        """The matrices with ``||S[:, m]||`` moved into ``A``, for a threshold on importance.

        What removing coefficient m costs in the weight is ``|c_m| * ||S[:, m]||``. Scaled this
        way, the magnitude of a coefficient is its importance.
        """
        norms = np.linalg.norm(self.synthesis, axis=0)
        return self._operator(~self.structural & (norms > NEGLIGIBLE * norms.max()), norms)

    def _operator(self, used: npt.NDArray[np.bool_], scale: Matrix) -> Operator:
        scale = scale[used]
        A = self.analysis[used] * scale[:, None]
        S = self.synthesis[:, used] / scale
        return Operator(
            analysis=frozen(A),
            synthesis=frozen(S),
            rows=np.flatnonzero(used),
            scale=frozen(scale),
            dropped=int(np.count_nonzero(~used)),
            identity=A.shape == S.shape and bool(np.array_equal(A, np.eye(len(A)))),
        )


def basis_for(config: PruneConfig, weight: torch.Tensor) -> Basis:
    """The basis of one layer.

    Args:
        config: method, wavelet, level, mode and force_level are read.
        weight: ``(Cout, Cin/groups, kh, kw)``, or ``(out, in)``: a matrix is one kernel, and
            without a transform ``out * in`` kernels of one value. The values matter to ``"klt"``
            alone.

    Returns:
        The basis, shared by all layers of this kernel size (but for ``"klt"``).

    Raises:
        ValueError: the basis does not exist for this weight: ``"klt"`` of a matrix, which is one
            kernel; or ``"auto"``, which is none.

    Example:
        >>> basis_for(PruneConfig(wavelet="haar"), torch.zeros(8, 4, 3, 3)).grid
        (4, 4)
    """
    kernel = (int(weight.shape[-2]), int(weight.shape[-1]))
    name = config.wavelet if config.method == "dwt" else "identity"
    if kernel == (1, 1) or (weight.ndim == 2 and (name == "identity" or not weight.numel())):
        return named_basis("identity", (1, 1))
    if name == AUTO:
        raise ValueError(
            f"wavelet={AUTO!r} is a choice among bases, which pruning makes; name one of them"
        )
    if name != "klt":
        return named_basis(name, kernel, config.mode, config.level, config.force_level)
    if weight.ndim == 2:
        raise ValueError(
            f"'klt' finds the principal components of many kernels, and a {kernel[0]}x{kernel[1]} "
            "matrix is one; allowed for it: every other basis"
        )
    return klt_basis(kernel, klt_matrix(weight), config.level)


def named_basis(
    name: str,
    kernel: Kernel,
    mode: str = "periodization",
    level: int | None = None,
    force_level: bool = False,
) -> Basis:
    """The basis of that name for kernels of that size; every name but the data-driven ``"klt"``."""
    build = dense_basis if kernel[0] * kernel[1] <= DENSE_VALUES else factored_basis
    return build(name, kernel, mode, level, force_level)


@lru_cache(maxsize=512)
def dense_basis(
    name: str, kernel: Kernel, mode: str, level: int | None, force_level: bool
) -> Basis:
    """The basis with its matrices, which take ``K * K`` values each."""
    if name in _OWN:
        return _OWN[name](kernel, level, True)
    return _pywavelets(name, kernel, mode, level, force_level, True)


@lru_cache(maxsize=16)
def factored_basis(
    name: str, kernel: Kernel, mode: str, level: int | None, force_level: bool
) -> Basis:
    """The basis with its factors, which take about ``kh * kh + kw * kw`` values."""
    if name in _OWN:
        return _OWN[name](kernel, level, False)
    return _pywavelets(name, kernel, mode, level, force_level, False)


def max_level(name: str, kernel: Kernel) -> int:
    """The deepest level that exists for this basis on kernels of this size.

    Example:
        >>> max_level("haar", (3, 3)), max_level("bior4.4", (3, 3)), max_level("uhaar", (3, 3))
        (1, 0, 2)
    """
    if name == "uhaar":
        return max(merges(n) for n in kernel)
    if name in ("dct", "klt"):
        return int(kernel != (1, 1))
    if name == "identity":
        return 0
    return int(pywt.dwt_max_level(min(kernel), pywt.Wavelet(name).dec_len))


def _pywavelets(
    name: str, kernel: Kernel, mode: str, level: int | None, force: bool, dense: bool
) -> Basis:
    deepest = max_level(name, kernel)
    used = deepest if level is None else level if force else min(level, deepest)
    K = kernel[0] * kernel[1]
    impulses = np.eye(K).reshape(K, *kernel) if dense else np.zeros((1, *kernel))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            coeffs = pywt.wavedec2(impulses, name, mode=mode, level=used, axes=(-2, -1))
        except ValueError as error:
            raise ValueError(
                f"PyWavelets cannot transform {kernel[0]}x{kernel[1]} kernels by {name!r} in mode "
                f"{mode!r} to level {used}: {error}"
            ) from error
    packed, _ = pywt.coeffs_to_array(coeffs, axes=(-2, -1))
    grid = (int(packed.shape[1]), int(packed.shape[2]))
    bands = coefficient_bands(coeffs)
    parts: tuple[Matrix, Matrix] | Factors
    if dense:
        M = grid[0] * grid[1]
        units = unpack(np.eye(M).reshape(M, *grid), bands)
        kernels = pywt.waverec2(units, name, mode=mode, axes=(-2, -1))[:, : kernel[0], : kernel[1]]
        parts = frozen(packed.reshape(K, M).T), frozen(kernels.reshape(M, K).T)
    else:
        parts = wavelet_factors(name, kernel, mode, used)
    return Basis(
        name=name,
        kernel=kernel,
        mode=mode,
        level_requested=level,
        level_used=used,
        level_max=deepest,
        grid=grid,
        parts=parts,
        bands=bands,
        too_deep=str(caught[0].message) if caught else None,
    )


def coefficient_bands(coeffs: list[Any]) -> dict[str, tuple[slice, slice]]:
    """Where ``pywt.coeffs_to_array`` puts each band of a ``wavedec2`` over the last two axes."""
    # The slices of a batch would carry the length of the batch; one kernel's do not.
    single = [
        tuple(band.reshape(-1, *band.shape[-2:])[0] for band in entry)
        if isinstance(entry, tuple)
        else entry.reshape(-1, *entry.shape[-2:])[0]
        for entry in coeffs
    ]
    _, slices = pywt.coeffs_to_array(single)
    levels = len(coeffs) - 1
    bands: dict[str, tuple[slice, slice]] = {f"a{levels}": tuple(slices[0])}
    for i, places in enumerate(slices[1:]):
        for letter, key in (("h", "da"), ("v", "ad"), ("d", "dd")):
            bands[f"{letter}{levels - i}"] = tuple(places[key])
    return bands


def unpack(packed: Any, bands: dict[str, tuple[slice, slice]]) -> list[Any]:
    """The coefficient list of ``waverec2`` from packed coefficients ``(..., Mh, Mw)``."""
    levels = (len(bands) - 1) // 3

    def band(name: str) -> Any:
        rows, columns = bands[name]
        return packed[..., rows, columns]

    details = [tuple(band(f"{k}{i}") for k in "hvd") for i in range(levels, 0, -1)]
    return [band(f"a{levels}"), *details]


def _separable(
    name: str,
    kernel: Kernel,
    level: int | None,
    used: int,
    parts: tuple[Matrix, Matrix] | Factors,
    spans: Sequence[dict[str, slice]],
) -> Basis:
    bands = {
        f"{row},{column}": (rows, columns)
        for row, rows in spans[0].items()
        for column, columns in spans[1].items()
    }
    return Basis(
        name=name,
        kernel=kernel,
        mode=None,
        level_requested=level,
        level_used=used,
        level_max=max_level(name, kernel),
        grid=kernel,
        parts=parts,
        bands=bands,
    )


def _product(rows: Matrix, columns: Matrix, dense: bool) -> tuple[Matrix, Matrix] | Factors:
    if not dense:
        return kronecker_factors(rows, columns)
    A = np.kron(rows, columns)
    return frozen(A), frozen(A.T)


def _identity(kernel: Kernel, level: int | None, dense: bool) -> Basis:
    parts: tuple[Matrix, Matrix] | Factors
    if dense:
        parts = frozen(np.eye(kernel[0] * kernel[1])), frozen(np.eye(kernel[0] * kernel[1]))
    else:
        parts = Factors(kernel, kernel, ())
    return _separable("identity", kernel, level, 0, parts, [{"w": slice(0, n)} for n in kernel])


def _dct(kernel: Kernel, level: int | None, dense: bool) -> Basis:
    parts = _product(dct_matrix(kernel[0]), dct_matrix(kernel[1]), dense)
    spans = [{f"f{i}": slice(i, i + 1) for i in range(n)} for n in kernel]
    return _separable("dct", kernel, level, max_level("dct", kernel), parts, spans)


def _uhaar(kernel: Kernel, level: int | None, dense: bool) -> Basis:
    deepest = max_level("uhaar", kernel)
    used = deepest if level is None else min(level, deepest)
    parts = _product(uhaar_matrix(kernel[0], used), uhaar_matrix(kernel[1], used), dense)
    spans = [uhaar_spans(n, used) for n in kernel]
    return _separable("uhaar", kernel, level, used, parts, spans)


_OWN: dict[str, Callable[[Kernel, int | None, bool], Basis]] = {
    "identity": _identity,
    "dct": _dct,
    "uhaar": _uhaar,
}


def klt_basis(kernel: Kernel, A: Matrix, level: int | None) -> Basis:
    """The basis of principal components that a layer has: ``A`` (K, K), orthonormal."""
    return Basis(
        name="klt",
        kernel=kernel,
        mode=None,
        level_requested=level,
        level_used=1,
        level_max=1,
        grid=kernel,
        parts=(A, frozen(A.T)),
        bands={"klt": (slice(0, kernel[0]), slice(0, kernel[1]))},
    )
