"""What checkpoints ask of pruning: bases by layer, masks, and functions along each axis.

Everything that depends on how the engine hands these out is here.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..backends import Budget, Job, Layer, resolve
from ..bases import Basis, basis_for, family_of
from ..bases.factors import Factors
from ..config import PruneConfig
from ..engine.ambient import neutral
from ..engine.layers import LayerRef
from ..engine.run import prune_layers
from ..errors import WavpruneError
from ..report import LayerStats, PruneReport


class Kept(NamedTuple):
    """What is kept of a layer.

    Attributes:
        basis: of its kernels.
        by_importance: True where coefficients are scaled by the norm of what they reconstruct.
        mask: as ``backends.masks`` packs it; None keeps everything.
    """

    basis: Basis
    by_importance: bool = True
    mask: torch.Tensor | None = None


class AxisFunctions(NamedTuple):
    """A separable basis: column m of its ``S`` is an outer product of functions along the axes.

    Attributes:
        tables: ``(n, count)`` for each axis: its functions.
        choices: ``(M, axes)``: which function of each axis a coefficient takes.
    """

    tables: list[npt.NDArray[np.float64]]
    choices: npt.NDArray[np.intp]


def prune_with_masks(ref: LayerRef, config: PruneConfig) -> Kept:
    """Prune a layer in place, and say what was kept."""
    report = prune_layers([ref], config, masks=True)
    assert report.masks is not None
    return Kept(report.bases[ref.name], config.percentile is None, report.masks[ref.name])


def kept_by_report(ref: LayerRef, stats: LayerStats, report: PruneReport) -> Kept:
    """What a report says was kept of a layer that was pruned before.

    Without the report's masks they are found again from the pruned weight.

    Raises:
        WavpruneError: that is not possible in this basis.
    """
    by_importance = report.settings.percentile is None
    basis = report.bases.get(stats.name)
    if basis is not None and report.masks is not None and stats.name in report.masks:
        return Kept(basis, by_importance, report.masks[stats.name].cpu())
    if basis is None:
        basis = _named_basis(ref, stats, report)
    if basis is None or basis.expansive:
        raise WavpruneError(
            f"layer {ref.name!r}: what was kept cannot be told from weights that were pruned in "
            f"{stats.wavelet!r}; give the weights before that, and config"
        )
    return Kept(basis, by_importance, largest(ref, basis, by_importance, stats.kept))


def largest(ref: LayerRef, basis: Basis, by_importance: bool, count: int) -> torch.Tensor:
    """The mask of the largest coefficients."""
    dtype = torch.float64 if ref.weight.dtype == torch.float64 else torch.float32
    layer = Layer(ref.name, ref.kernels(basis.kernel), basis, by_importance, dtype)
    with neutral([ref.weight]):
        backend = resolve("auto", [layer], masks=True)
        threshold = backend.threshold([Job((layer,), Budget(keep=count))])
        (mask,) = backend.masks([layer], threshold)
    return mask


def _named_basis(ref: LayerRef, stats: LayerStats, report: PruneReport) -> Basis | None:
    """The basis of a report that was read from JSON; None where only its weights would tell."""
    if family_of(stats.wavelet).data_driven:
        return None
    return basis_by_name(
        ref, stats.wavelet, stats.level_requested, stats.mode, report.settings.force_level
    )


def basis_by_name(
    ref: LayerRef, wavelet: str, level: int | None, mode: str | None, force_level: bool
) -> Basis:
    """The basis of a layer whose name and settings are known, and which no weight tells."""
    if wavelet == "identity":
        return basis_for(PruneConfig(method="min_weight"), ref.weight)
    config = PruneConfig(
        wavelet=wavelet, level=level, mode=mode or "periodization", force_level=force_level
    )
    return basis_for(config, ref.weight)


def axis_functions(basis: Basis) -> AxisFunctions | None:
    """The functions along each axis, or None where the basis has no such factors."""
    return None if basis.factors is None else _functions(basis.factors)


def _functions(factors: Factors) -> AxisFunctions:
    index = np.zeros((*factors.grid, 2), dtype=np.intp)
    columns: list[list[npt.NDArray[np.float64]]] = [[], []]
    counts = [0, 0]
    coarse: list[npt.NDArray[np.float64]] = [np.eye(n) for n in factors.kernel]
    for level, axes in enumerate(factors.levels):
        for axis in (0, 1):
            functions = coarse[axis] @ axes[axis].synthesis.matrix()
            columns[axis].append(functions)
            coarse[axis] = functions[:, : axes[axis].coarse]
        for (rows, cols), (grid_rows, grid_cols) in factors.slices(level):
            block = index[grid_rows, grid_cols]
            block[..., 0] = counts[0] + np.arange(rows.start, rows.stop)[:, None]
            block[..., 1] = counts[1] + np.arange(cols.start, cols.stop)
        counts = [counts[axis] + columns[axis][-1].shape[1] for axis in (0, 1)]
    if not factors.levels:
        columns = [[eye] for eye in coarse]
        index[...] = np.moveaxis(np.indices(factors.grid), 0, -1)
    tables = [np.concatenate(parts, axis=1) for parts in columns]
    return AxisFunctions(tables, index.reshape(-1, 2))
