"""The transform through ptwt's ``wavedec2`` and ``waverec2``; the other steps are ``eager``'s.

For comparison: ptwt pads and convolves where ``eager`` multiplies by one small matrix.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, get_args

import torch

from ..bases import Basis
from ..bases.basis import DENSE_VALUES
from ..bases.wavelets import unpack
from ..common.optional import require
from ..config import WAVELETS
from .eager import EagerBackend
from .protocol import SHARDED, Backend, Layer

ptwt = require("ptwt", extra="ptwt")

MODES: tuple[str, ...] = get_args(ptwt.constants.BoundaryMode)


class PtwtBackend(EagerBackend):
    """``eager`` with ptwt's convolutions in place of its matmuls."""

    name = "ptwt"
    # ptwt gets whole layers: it pays for building its filters at every call.
    chunk = 1 << 22

    def unsupported(self, layer: Layer) -> str | None:
        """Why ptwt cannot transform this layer, or None."""
        basis = layer.basis
        if layer.group is not None:
            return SHARDED
        if not basis.is_dense:
            size = "x".join(map(str, basis.kernel))
            return f"ptwt gets kernels of at most {DENSE_VALUES} values, not {size}"
        return None if layer.operator.identity else _missing(basis)

    def analyse(self, layer: Layer, kernels: torch.Tensor) -> torch.Tensor:
        """Coefficients ``(n, M')`` of kernels ``(n, kh, kw)``."""
        operator = layer.operator
        if operator.identity:
            return super().analyse(layer, kernels)
        coeffs = _decompose(layer.basis, kernels)
        packed = kernels.new_zeros(len(kernels), *layer.basis.grid)
        for band, target in zip(_bands(coeffs), layer.basis.bands.values(), strict=True):
            packed[:, target[0], target[1]] = band
        rows, scale = _row_table(layer, kernels)
        return packed.flatten(1)[:, rows] * scale

    def synthesise(self, layer: Layer, coefficients: torch.Tensor) -> torch.Tensor:
        """Kernels ``(n, K)`` of coefficients ``(n, M')``."""
        basis = layer.basis
        if layer.operator.identity:
            return super().synthesise(layer, coefficients)
        rows, scale = _row_table(layer, coefficients)
        packed = coefficients.new_zeros(len(coefficients), basis.grid[0] * basis.grid[1])
        packed[:, rows] = coefficients / scale
        first, *details = unpack(packed.view(-1, *basis.grid), basis.bands)
        levels = [ptwt.constants.WaveletDetailTuple2d(*entry) for entry in details]
        whole: torch.Tensor = ptwt.waverec2((first, *levels), basis.name)
        return whole[:, : basis.kernel[0], : basis.kernel[1]].flatten(1)


def _row_table(layer: Layer, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    operator = layer.operator
    rows = torch.from_numpy(operator.rows).to(like.device)
    return rows, torch.tensor(operator.scale, dtype=like.dtype, device=like.device)


def _decompose(basis: Basis, kernels: torch.Tensor) -> Any:
    mode: Any = basis.mode
    return ptwt.wavedec2(kernels, basis.name, mode=mode, level=basis.level_used)


def _bands(coeffs: Any) -> list[torch.Tensor]:
    return [coeffs[0], *(band for entry in coeffs[1:] for band in entry)]


@lru_cache(maxsize=256)
def _missing(basis: Basis) -> str | None:
    if basis.name not in WAVELETS:
        return f"ptwt has no basis {basis.name!r}; it has PyWavelets' discrete wavelets"
    if basis.axes is not None:
        return "ptwt's wavedec2 transforms two axes of a kernel, not one or three"
    if basis.mode not in MODES:
        return f"ptwt has no mode {basis.mode!r}; it has {', '.join(MODES)}"
    try:
        _decompose(basis, torch.zeros(1, *basis.kernel))
    except RuntimeError as error:
        size = "x".join(map(str, basis.kernel))
        return (
            f"ptwt cannot extend a {size} kernel for {basis.name!r} in mode {basis.mode!r} "
            f"({str(error).splitlines()[0]})"
        )
    return None


def make() -> Backend:
    """The backend, for the registry."""
    return PtwtBackend()
