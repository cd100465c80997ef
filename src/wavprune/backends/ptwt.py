"""The transform through ptwt's ``wavedec2`` and ``waverec2``; the other steps are ``eager``'s.

For comparison: ptwt pads and convolves where ``eager`` multiplies by one small matrix.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, get_args

import torch

from ..bases.basis import DENSE_VALUES, Basis, unpack
from ..config import OWN_BASES
from .eager import EagerBackend
from .protocol import Backend, Batch

try:
    import ptwt
except ImportError as error:
    raise ImportError("ptwt is not installed; pip install 'wavprune[ptwt]'") from error

MODES: tuple[str, ...] = get_args(ptwt.constants.BoundaryMode)


class PtwtBackend(EagerBackend):
    """``eager`` with ptwt's convolutions in place of its matmuls."""

    name = "ptwt"
    # ptwt gets whole layers: it pays for building its filters at every call.
    chunk = 1 << 22

    def unsupported(self, batch: Batch) -> str | None:
        """Why ptwt cannot transform this batch, or None."""
        basis = batch.basis
        if basis.factors is not None:
            size = "x".join(map(str, basis.kernel))
            return f"ptwt gets kernels of at most {DENSE_VALUES} values, not {size}"
        return None if batch.operator.identity else _missing(basis)

    def analyse(self, batch: Batch, kernels: torch.Tensor) -> torch.Tensor:
        """Coefficients ``(n, M')`` of kernels ``(n, kh, kw)``."""
        operator = batch.operator
        if operator.identity:
            return super().analyse(batch, kernels)
        coeffs = _decompose(batch.basis, kernels)
        packed = kernels.new_zeros(len(kernels), *batch.basis.grid)
        for part, place in zip(_flat(coeffs), batch.basis.bands.values(), strict=True):
            packed[:, place[0], place[1]] = part
        rows, scale = _row_table(batch, kernels)
        return packed.flatten(1)[:, rows] * scale

    def synthesise(self, batch: Batch, coefficients: torch.Tensor) -> torch.Tensor:
        """Kernels ``(n, K)`` of coefficients ``(n, M')``."""
        basis = batch.basis
        if batch.operator.identity:
            return super().synthesise(batch, coefficients)
        rows, scale = _row_table(batch, coefficients)
        packed = coefficients.new_zeros(len(coefficients), basis.grid[0] * basis.grid[1])
        packed[:, rows] = coefficients / scale
        first, *details = unpack(packed.view(-1, *basis.grid), basis.bands)
        levels = [ptwt.constants.WaveletDetailTuple2d(*entry) for entry in details]
        whole = ptwt.waverec2((first, *levels), basis.name)
        return whole[:, : basis.kernel[0], : basis.kernel[1]].flatten(1)


def _row_table(batch: Batch, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    operator = batch.operator
    rows = torch.from_numpy(operator.rows).to(like.device)
    return rows, torch.tensor(operator.scale, dtype=like.dtype, device=like.device)


def _decompose(basis: Basis, kernels: torch.Tensor) -> Any:
    mode: Any = basis.mode
    return ptwt.wavedec2(kernels, basis.name, mode=mode, level=basis.level_used)


def _flat(coeffs: Any) -> list[torch.Tensor]:
    return [coeffs[0], *(band for entry in coeffs[1:] for band in entry)]


@lru_cache(maxsize=256)
def _missing(basis: Basis) -> str | None:
    if basis.name in OWN_BASES:
        return f"ptwt has no basis {basis.name!r}; it has PyWavelets' discrete wavelets"
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
