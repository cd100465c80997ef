"""Pruning half of every ``Conv2d`` on a GPU: measured and computed times.

Run with ``make gpu``. Each row is checked against ``wavprune.reference.prune`` before it is timed.
``python -m benchmarks.bench_gpu`` prints the computed times, which needs no GPU: the bytes that a
row must move, over the bandwidth in the card's data sheet.
"""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator
from typing import NamedTuple

import pytest
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from wavprune import backends

from .bench_prune import checked, loaded, restore
from .conftest import rendered
from .networks import NETWORKS, convolutions
from .pipelines import ROWS, Row

ROUNDS = 20
PEERS = ("l1_unstructured", "global_unstructured", "ptwt haar + kthvalue", "abs + kthvalue + mul_")
CASES = ("haar", "haar global", "uhaar", "min-weight", "random")
COPY = "copy from device to device"

# Bytes per second in the data sheet, and the name that ``torch.cuda.get_device_name`` gives.
BANDWIDTHS = {
    "A100 80 GB": (2.039e12, "A100-SXM4-80GB"),
    "A100 40 GB PCIe": (1.555e12, "A100-PCIE-40GB"),
    "H100 SXM": (3.35e12, "H100 80GB HBM3"),
    "H100 PCIe": (2.0e12, "H100 PCIe"),
}

# Passes that count one digit; random pruning ranks float64 values.
COUNTING_PASSES = {"float32": 3, "float64": 6}


class Computed(NamedTuple):
    """The memory traffic of a CUDA kernel.

    Attributes:
        kernel: its name in ``csrc/cuda/kernels.cuh``.
        launches: how many times it runs.
        reads: how often it reads every weight, in all launches together.
        writes: how often it writes every weight.
    """

    kernel: str
    launches: int
    reads: int
    writes: int


PRUNE = (
    Computed("upload", 2, 0, 0),
    Computed("count_digits", 3, 3, 0),
    Computed("prune_rows", 1, 1, 1),
)


def computed_seconds(row: str, weight_bytes: int, bandwidth: float) -> float | None:
    """Lower bound for a row of this library and for the copy; None for other rows."""
    if row == COPY:
        return 2 * weight_bytes / bandwidth
    if row.split()[0] not in ("native", "triton"):
        return None
    passes = COUNTING_PASSES["float64" if row.endswith("random") else "float32"]
    return (passes + 2) * weight_bytes / bandwidth


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all convolutions."""
    return sum(conv.weight.nbytes for conv in convolutions(network))


def tables() -> list[Table]:
    """The computed figures for ResNet-18: memory traffic by CUDA kernel, times by card."""
    size = weight_bytes(NETWORKS["ResNet-18"]())
    kernels = Table("CUDA kernel", "launches", "weights read", "written", "MB", title="computed")
    for kernel in PRUNE:
        moved = (kernel.reads + kernel.writes) * size
        kernels.add_row(*map(str, kernel[:4]), f"{moved / 1e6:.1f}")
    cards = Table("card", "count_digits, per pass", "prune_rows", "select and prune", COPY)
    for card, (bandwidth, _) in BANDWIDTHS.items():
        once = size / bandwidth
        total = computed_seconds("native haar", size, bandwidth)
        floor = computed_seconds(COPY, size, bandwidth)
        cards.add_row(card, *(f"{1e6 * (s or 0):.0f} µs" for s in (once, 2 * once, total, floor)))
    return [kernels, cards]


def rows() -> list[Row]:
    """The rows that run on a GPU."""
    ours = [f"{backend} {case}" for backend in ("triton", "native", "eager") for case in CASES]
    return [ROWS[name] for name in (*ours, *PEERS) if name in ROWS]


Results = dict[str, dict[str, float]]


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[Results]:
    """Seconds of every network and row, printed at the end."""
    measured: Results = {}
    yield measured
    reporter = request.config.pluginmanager.getplugin("terminalreporter")
    for network, seconds in measured.items():
        reporter.section(f"{network} on {torch.cuda.get_device_name()}")
        reporter.write(rendered(compared(network, seconds)))


def compared(network: str, seconds: dict[str, float]) -> Table:
    """Measured times, and those computed from the data sheet and from the measured copy."""
    size = weight_bytes(loaded(network))
    card = next(
        (
            bandwidth
            for bandwidth, name in BANDWIDTHS.values()
            if name in torch.cuda.get_device_name()
        ),
        None,
    )
    copying = 2 * size / seconds[COPY] if COPY in seconds else None
    table = Table("row", "measured", "computed", "at the copy's bandwidth", "times the copy")
    for row, spent in seconds.items():
        least = [computed_seconds(row, size, b) if b else None for b in (card, copying)]
        table.add_row(
            row,
            f"{1e6 * spent:.0f} µs",
            *("" if s is None else f"{1e6 * s:.0f} µs" for s in least),
            f"{spent / seconds[COPY]:.1f}" if COPY in seconds else "",
        )
    return table


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("network", NETWORKS)
class TestOnGpu:
    pytestmark = gpu

    def test_copy(self, network: str, results: Results) -> None:
        weights = [conv.weight.detach().cuda() for conv in convolutions(loaded(network))]
        source = torch.cat([weight.flatten() for weight in weights])
        target = torch.empty_like(source)
        spent = median(lambda: target.copy_(source), lambda: target.zero_())
        assert torch.equal(target, source)
        results.setdefault(network, {})[COPY] = spent

    @pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
    def test_row(self, network: str, row: Row, results: Results) -> None:
        backend = row.name.split()[0]
        if backend in backends.unavailable():
            pytest.skip(backends.unavailable()[backend])
        model = copy.deepcopy(loaded(network)).cuda()
        checked(row, network, model)
        spent = median(lambda: row.run(model), lambda: restore(network, model))
        results.setdefault(network, {})[row.name] = spent


def median(run: Callable[[], object], setup: Callable[[], object]) -> float:
    """Median seconds on the device, from before the first launch to the end of the last."""
    spans: list[float] = []
    for _ in range(ROUNDS):
        setup()
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        spans.append(start.elapsed_time(end) / 1e3)
    return statistics.median(spans)


if __name__ == "__main__":
    for printed in tables():
        Console(width=110).print(printed)
