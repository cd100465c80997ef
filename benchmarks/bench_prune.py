"""Half of every ``Conv2d`` pruned, by every backend and by what people use instead.

Run with ``pytest benchmarks/ --benchmark-only``. No row is timed before its result is checked
against ``wavprune.reference.prune``; the ratios are printed last, by ``conftest.py``.
"""

from __future__ import annotations

import re
import time
import warnings
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import wavprune
from wavprune import LevelCollapsedWarning, PruneConfig, PruneReport

from .networks import NETWORKS, convolutions
from .pipelines import ROWS, Row, peak_bytes

# A row whose check fails is never timed; its failure alone says so.
pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all")

# Seconds of timing a row; the slowest get the fewest rounds.
BUDGET = 3.0
ROUNDS = (3, 15)

# Rows that must agree with the same result follow each other, so that one reference is kept.
IN_ORDER = sorted(ROWS.values(), key=lambda row: sorted(map(str, row.settings.items())))


class Expected(NamedTuple):
    """What the reference made of a network.

    Attributes:
        report: its report.
        weights: its pruned weights.
        undecided: for each kernel of each layer, how many of its coefficients are so close to
            the threshold that rounding decides.
    """

    report: PruneReport
    weights: list[torch.Tensor]
    undecided: list[torch.Tensor]


@pytest.mark.parametrize("row", IN_ORDER, ids=lambda row: row.name)
@pytest.mark.parametrize("network", NETWORKS)
def test_prune(benchmark: BenchmarkFixture, network: str, row: Row) -> None:
    seconds = checked(row, network, loaded(network))
    benchmark.name = row.name
    if row.memory:
        benchmark.extra_info["peak_bytes"] = peak_bytes(network, row.name)
        benchmark.extra_info["largest_layer_bytes"] = largest_layer_bytes(network)
    measure(benchmark, row, network, loaded(network), seconds)


def measure(
    benchmark: BenchmarkFixture,
    row: Row,
    network: str,
    model: nn.Module,
    seconds: float,
    place: str = "",
) -> None:
    """Time a row that takes about so many seconds, from the same weights in every round."""
    benchmark.group = network + place
    benchmark.extra_info["row"] = row.name
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        row.run,
        args=(model,),
        setup=lambda: restore(network, model),
        rounds=int(min(max(BUDGET / seconds, ROUNDS[0]), ROUNDS[1])),
    )


def checked(row: Row, network: str, model: nn.Module) -> float:
    """Run a row once and compare; how many seconds it took.

    A backend that cannot do this skips the row with its own reason.
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
            # A weight that was 0 before may be among those kept; it doesn't show.
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
    """Which kernels differ by more than rounding."""
    tolerance = 1e-6 * float(expected.abs().max())
    close = torch.isclose(weight, expected, rtol=1e-5, atol=tolerance)
    return ~close.flatten(0, 1).flatten(1).all(dim=1)


@lru_cache(maxsize=1)
def reference(network: str, settings: tuple[tuple[str, Any], ...]) -> Expected:
    """What a network must look like, pruned with these settings."""
    model = loaded(network)
    restore(network, model)
    with warnings.catch_warnings():
        # bior4.4 is too long for these kernels; that is the point of its row.
        warnings.simplefilter("ignore", LevelCollapsedWarning)
        report = wavprune.reference.prune(model, **dict(settings))
    config = PruneConfig(**dict(settings))
    undecided = [
        at_threshold(config, before, stats.threshold)
        for before, stats in zip(original(network), report, strict=True)
    ]
    weights = [conv.weight.detach().clone() for conv in convolutions(model)]
    return Expected(report, weights, undecided)


def at_threshold(config: PruneConfig, weight: torch.Tensor, threshold: float) -> torch.Tensor:
    """How many coefficients of each kernel lie within 4 ulp of the threshold."""
    kernels = weight.flatten(0, 1).flatten(1).double()
    if config.method == "random":
        return torch.zeros(len(kernels), dtype=torch.int64)  # draws are exact
    basis = wavprune.basis_for(config, weight)
    by_importance = config.percentile is None
    operator = basis.importance_operator if by_importance else basis.coefficient_operator
    magnitudes = (kernels @ torch.tensor(operator.analysis).T).abs()
    near = (magnitudes - threshold).abs() <= 4 * float(np.spacing(np.float32(threshold)))
    return near.sum(dim=1)


@lru_cache
def loaded(network: str) -> nn.Module:
    """The network that every row of its group prunes."""
    return NETWORKS[network]()


@lru_cache
def original(network: str) -> list[torch.Tensor]:
    """Its weights, unpruned."""
    return [conv.weight.detach().clone() for conv in convolutions(NETWORKS[network]())]


def restore(network: str, model: nn.Module) -> None:
    """Undo a pruning in place, so that every round finds the same memory."""
    for conv, weight in zip(convolutions(model), original(network), strict=True):
        conv.weight.detach().copy_(weight)


def largest_layer_bytes(network: str) -> int:
    """The size of the largest weight."""
    return max(weight.nbytes for weight in original(network))
