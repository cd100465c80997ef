"""Pruning half of every ``Conv2d``: every backend, and the alternatives.

Run with ``pytest benchmarks/ --benchmark-only``. Each row is checked against
``wavprune.reference.prune`` before it is timed; ``conftest.py`` prints the ratios.
"""

from __future__ import annotations

import pytest
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

from .checks import checked, loaded, original, restore
from .networks import NETWORKS
from .pipelines import ROWS, Row, peak_bytes

# A row whose check fails is not timed, and pytest-benchmark would warn about that.
pytestmark = pytest.mark.filterwarnings("ignore:Benchmark fixture was not used at all")

# Seconds to spend on a row, and the least and most rounds.
BUDGET = 3.0
ROUNDS = (3, 15)

# Rows with the same reference run one after the other, because only the last one is cached.
IN_ORDER = sorted(ROWS.values(), key=lambda row: sorted(map(str, row.settings.items())))


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
) -> None:
    """Time a row that takes about ``seconds``, from the same weights in every round."""
    benchmark.group = network
    benchmark.extra_info["row"] = row.name
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        row.run,
        args=(model,),
        setup=lambda: restore(network, model),
        rounds=int(min(max(BUDGET / seconds, ROUNDS[0]), ROUNDS[1])),
    )


def largest_layer_bytes(network: str) -> int:
    """Bytes of the largest weight."""
    return max(weight.nbytes for weight in original(network))
