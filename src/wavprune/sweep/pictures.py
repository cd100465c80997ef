"""The data that a run's pictures are drawn from: confusion, histograms of coefficients, kernels."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from ..bases import Basis
from ..bases.factors import FactoredTransform
from ..engine.layers import named_layers
from ..evaluation.trial import Trial
from ..report import LayerStats
from .traits import ranks_magnitudes

BINS = 64
KERNELS = 64
# The modules of a network, by their names.
Modules = Mapping[str, nn.Module]


def picture_data(model: nn.Module, trial: Trial) -> dict[str, Any]:
    """Lists and mappings that are ready for JSON; see ``Store.add``.

    Args:
        model: the unpruned model.
        trial: what became of it, with the pruned copy.
    """
    data: dict[str, Any] = {"confusion": trial.evaluation.confusion}
    if trial.report is not None and trial.model is not None and trial.config is not None:
        layers = tuple(trial.report)
        modules = named_layers(model)
        if ranks_magnitudes(trial.config):
            by_importance = trial.config.percentile is None
            data["histograms"] = [
                _histogram(modules, layer, trial.report.bases[layer.name], by_importance)
                for layer in layers
            ]
        data["kernels"] = _kernels(modules, named_layers(trial.model), layers)
    return data


def _weight(modules: Modules, layer: str) -> torch.Tensor:
    weight = modules[layer].weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().to("cpu", torch.float32)


def _histogram(
    modules: Modules, layer: LayerStats, basis: Basis, by_importance: bool
) -> dict[str, Any]:
    """The distribution of what the coefficients were ranked by: importance or magnitude."""
    ranks = _coefficients(basis, _weight(modules, layer.name), by_importance).abs().flatten()
    counts, edges = torch.histogram(ranks, BINS, range=(0.0, float(ranks.max()) or 1.0))
    return {
        "layer": layer.name,
        "edges": _rounded(edges),
        "counts": counts.long().tolist(),
        "threshold": layer.threshold,
    }


def _coefficients(basis: Basis, weight: torch.Tensor, by_importance: bool) -> torch.Tensor:
    """The coefficients of every kernel, without structural zeros.

    Args:
        basis: that of the weight.
        weight: ``(Cout, Cin/groups, kh, kw)`` or ``(out, in)``, float32 on the CPU.
        by_importance: whether each is scaled by the norm of the kernel that it makes.
    """
    kernels = weight.reshape(-1, *basis.kernel)
    if not basis.is_dense:
        assert basis.factors is not None
        transform = FactoredTransform(basis.factors, by_importance, weight.dtype, weight.device)
        return transform.analyse(kernels)[:, torch.from_numpy(~basis.structural)]
    operator = basis.importance_operator if by_importance else basis.coefficient_operator
    analysis = torch.tensor(operator.analysis, dtype=weight.dtype)
    return kernels.flatten(1) @ analysis.T


def _kernels(
    before: Modules, after: Modules, layers: Sequence[LayerStats]
) -> dict[str, Any] | None:
    """The first kernels of the first layer that has spatial ones."""
    for layer in layers:
        if len(layer.shape) == 4 and layer.shape[2:] != (1, 1):
            dense, pruned = (
                _weight(modules, layer.name).flatten(0, 1)[:KERNELS] for modules in (before, after)
            )
            return {
                "layer": layer.name,
                "before": [_rounded(kernel) for kernel in dense],
                "after": [_rounded(kernel) for kernel in pruned],
            }
    return None


def _rounded(values: torch.Tensor) -> Any:
    """Nested lists with five digits, more than a picture shows."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.5g}") for value in values.tolist()]
