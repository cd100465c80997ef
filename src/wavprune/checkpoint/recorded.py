"""What a file's metadata says was kept of its layers, checked against the weights as they are."""

from __future__ import annotations

import math

import numpy as np
import torch

from ..bases import Basis, Request, family_of, kernel_shape
from ..bases.matrices import frozen
from ..engine.layers import LayerRef
from ..errors import WavpruneError
from ..pruned import PrunedLayer
from .formats.safetensors import DTYPES
from .layer import Layer
from .selection import Kept, basis_by_name, largest

# How far the matrix of a recorded basis may be from an orthonormal one.
ORTHONORMAL = 1e-4
# What float32 arithmetic adds to the rounding of a dtype, in units of its own.
ARITHMETIC = 64


class ChangedLayerWarning(UserWarning):
    """A file says how a layer was pruned, and that is no longer so."""


def kept_by_record(ref: LayerRef, pruned: PrunedLayer) -> Kept:
    """What a file's metadata says was kept of a layer.

    Raises:
        WavpruneError: it does not say it of such a weight, or that is not possible in this basis.
    """
    basis = _recorded_basis(ref, pruned)
    if basis.level_used != pruned.level_used:
        raise WavpruneError(f"its {pruned.wavelet!r} has no level {pruned.level_used}")
    if basis.expansive:
        raise WavpruneError(
            f"what was kept cannot be told from weights that were pruned in {pruned.wavelet!r} "
            f"with mode={pruned.mode!r}"
        )
    if pruned.kept > ref.weight.numel():
        raise WavpruneError(f"it keeps {pruned.kept} of {ref.weight.numel()} coefficients")
    return Kept(basis, pruned.by_importance, largest(ref, basis, pruned.by_importance, pruned.kept))


def _recorded_basis(ref: LayerRef, pruned: PrunedLayer) -> Basis:
    if not pruned.matrix:
        if family_of(pruned.wavelet).data_driven:
            raise WavpruneError(f"the matrix of its basis {pruned.wavelet!r} is not recorded")
        return basis_by_name(
            ref, pruned.wavelet, pruned.level_requested, pruned.mode, pruned.force_level
        )
    kernel, axes = kernel_shape(ref.weight.shape)
    request = Request(
        pruned.wavelet,
        kernel,
        pruned.mode or "periodization",
        pruned.level_requested,
        pruned.force_level,
        axes,
    )
    family = family_of(pruned.wavelet)
    matrix = np.frombuffer(pruned.matrix, dtype="<f4").astype(np.float64)
    size = math.isqrt(matrix.size)
    if not family.data_driven or size * size != matrix.size or size != math.prod(kernel):
        raise WavpruneError(f"its {pruned.wavelet!r} has a matrix of {matrix.size} values")
    matrix = matrix.reshape(size, size)
    if not np.abs(matrix @ matrix.T - np.eye(size)).max() < ORTHONORMAL:
        raise WavpruneError(f"the matrix of its basis {pruned.wavelet!r} is not orthonormal")
    return family.restore(request, frozen(matrix))


def still_pruned(layer: Layer) -> bool:
    """True where a layer's coefficients that are not kept are 0, but for rounding.

    A weight is rounded to its dtype, at most by half an epsilon of its magnitude, and by about a
    quarter on average; the arithmetic adds some of float32's.

    Args:
        layer: with what is kept.
    """
    assert layer.keep is not None
    least = torch.finfo(torch.float32).eps
    eps = max(torch.finfo(DTYPES[layer.dtype]).eps, least) + ARITHMETIC * least
    analysis = np.ones((1, 1), np.float32) if layer.analysis is None else layer.analysis
    row_sum = float(np.abs(analysis).sum(axis=1).max())
    row_norm = float(np.linalg.norm(analysis, axis=1).max())
    left = total = 0.0
    for start, coefficients in layer._replace(keep=None).chunks():
        count = coefficients.shape[1]
        dropped = np.where(layer.keep(start, count), np.float32(0), coefficients)
        kernels = layer.weights(start, count)
        peaks = np.abs(kernels).max(axis=1)
        if (np.abs(dropped).max(axis=0) > eps * row_sum * peaks).any():
            return False
        left += float(np.vdot(dropped, dropped))
        total += float(np.vdot(kernels, kernels))
    return left <= (0.5 * eps * row_norm) ** 2 * total
