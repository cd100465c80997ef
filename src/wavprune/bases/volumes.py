"""Bases of 3-D kernels: one transform of each plane, and one along the depth."""

from __future__ import annotations

import numpy as np

from ..errors import WavpruneError
from .axes import Axis, DenseMap
from .basis import DENSE_VALUES, Basis, Request
from .factors import Factors


def volume_basis(request: Request, depth: Basis, plane: Basis) -> Basis:
    """The product of two bases, with coefficients ``(Md, M)``.

    Args:
        request: what was asked for; ``kernel`` is ``(kd, kh * kw)``, ``axes`` ``(kd, kh, kw)``.
        depth: of ``kd x 1`` kernels.
        plane: of ``kh x kw`` kernels.

    Raises:
        WavpruneError: the kernel is too large for the matrices of its planes.
    """
    if not (depth.is_dense and plane.is_dense):
        raise WavpruneError(
            f"{request.name!r} of {request.size} kernels; allowed: at most {DENSE_VALUES} values "
            "along the depth and in each plane, or wavelet='identity'"
        )
    axes = _axis(depth), _axis(plane)
    grid = axes[0].coarse, axes[1].coarse
    return Basis(
        name=request.name,
        kernel=request.kernel,
        mode=plane.mode or depth.mode,
        level_requested=request.level,
        level_used=max(depth.level_used, plane.level_used),
        level_max=max(depth.level_max, plane.level_max),
        grid=grid,
        bands={"volume": (slice(0, grid[0]), slice(0, grid[1]))},
        factors=Factors(request.kernel, grid, (axes,)),
        axes=request.axes,
        too_deep=plane.too_deep or depth.too_deep,
    )


def _axis(basis: Basis) -> Axis:
    """A whole basis as one axis, whose coefficients are all approximations."""
    A, S = basis.analysis, basis.synthesis
    reach = np.where(basis.structural, 0.0, np.abs(A).max(axis=1))
    norms = np.linalg.norm(S, axis=0)
    return Axis(DenseMap(A), DenseMap(S), len(A), len(A), reach, norms)
