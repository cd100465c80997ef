"""Networks and whether a row pruned them as ``wavprune.reference.prune`` does.

It needs what the rows need, and no plugin of pytest.
"""

from __future__ import annotations

import re
import time
import warnings
from dataclasses import replace
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

import wavprune
from wavprune import LevelCollapsedWarning, PruneConfig, PruneReport

from .networks import NETWORKS, convolutions
from .pipelines import Row


class Expected(NamedTuple):
    """The result of ``wavprune.reference.prune``.

    Attributes:
        report: its report.
        weights: the pruned weights, by layer.
        undecided: ``(N,)`` by layer: for each kernel, how many coefficients are so close to the
            threshold that rounding decides.
    """

    report: PruneReport
    weights: list[torch.Tensor]
    undecided: list[torch.Tensor]


def checked(row: Row, network: str, model: nn.Module) -> float:
    """Run a row once, compare the result with the reference, and return the seconds it took.

    A row whose backend cannot run here is skipped, with the backend's reason.
    """
    restore(network, model)
    start = time.perf_counter()
    try:
        report = row.run(model)
    except ValueError as error:
        if re.match(r"backend '\w+' cannot", str(error)):
            pytest.skip(str(error))
        raise
    seconds = time.perf_counter() - start
    expected = reference(network, tuple(row.settings.items()))
    layers = zip(
        convolutions(model),
        original(network),
        expected.report,
        expected.weights,
        expected.undecided,
        strict=True,
    )
    for conv, before, stats, weight, undecided in layers:
        pruned = conv.weight.detach().cpu()
        if not row.same_mask:
            # A kept weight may have been 0 before.
            missing = stats.kept - torch.count_nonzero(pruned)
            assert 0 <= missing <= torch.count_nonzero(before == 0), stats.name
            assert torch.equal(pruned, before * (pruned != 0)), stats.name
            continue
        wrong = torch.count_nonzero(differs(pruned, weight) & (undecided == 0))
        assert wrong == 0, stats.name
        if isinstance(report, PruneReport):
            assert abs(report[stats.name].kept - stats.kept) <= undecided.sum(), stats.name
    return seconds


def differs(weight: torch.Tensor, expected: torch.Tensor) -> torch.Tensor:
    """``(N,)``: True for kernels that differ by more than rounding."""
    tolerance = 1e-6 * float(expected.abs().max())
    close = torch.isclose(weight, expected, rtol=1e-5, atol=tolerance)
    return ~close.flatten(0, 1).flatten(1).all(dim=1)


@lru_cache(maxsize=1)
def reference(network: str, settings: tuple[tuple[str, Any], ...]) -> Expected:
    """The expected result of pruning a network with these settings."""
    model = loaded(network)
    restore(network, model)
    with warnings.catch_warnings():
        # The row of bior4.4 is there to show a wavelet that is too long for these kernels.
        warnings.simplefilter("ignore", LevelCollapsedWarning)
        report = wavprune.reference.prune(model, **dict(settings))
    config = PruneConfig(**dict(settings))
    undecided = [
        at_threshold(replace(config, wavelet=stats.wavelet), before, stats.threshold)
        for before, stats in zip(original(network), report, strict=True)
    ]
    weights = [conv.weight.detach().clone() for conv in convolutions(model)]
    return Expected(report, weights, undecided)


def at_threshold(config: PruneConfig, weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """``(N,)``: coefficients of each kernel within a few ulp of the threshold."""
    kernels = weight.flatten(0, 1).flatten(1).double()
    if config.method == "random":
        return torch.zeros(len(kernels), dtype=torch.int64)  # draws are exact
    basis = wavprune.basis_for(config, weight)
    by_importance = config.percentile is None
    operator = basis.importance_operator if by_importance else basis.coefficient_operator
    magnitudes = (kernels @ torch.tensor(operator.analysis).T).abs()
    # Two ways to a data-driven basis round its matrix differently.
    ulps = 16 if basis.data_driven else 4
    near = (magnitudes - threshold).abs() <= ulps * float(np.spacing(np.float32(threshold)))
    return near.sum(dim=1)


@lru_cache
def loaded(network: str) -> nn.Module:
    """The network, shared by all rows of its group."""
    return NETWORKS[network]()


@lru_cache
def original(network: str) -> list[torch.Tensor]:
    """The unpruned weights of a network, by layer."""
    return [conv.weight.detach().clone() for conv in convolutions(NETWORKS[network]())]


def restore(network: str, model: nn.Module) -> None:
    """Undo a pruning in place, so that every round works on the same memory."""
    for conv, weight in zip(convolutions(model), original(network), strict=True):
        conv.weight.detach().copy_(weight)
