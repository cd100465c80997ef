"""Pruning half of every ``Conv2d`` on a GPU: measured and computed times.

Run with ``make gpu``. Each row is checked against ``wavprune.reference.prune`` before it is timed.
``python -m benchmarks.bench_gpu`` prints the computed times, which needs no GPU: the bytes that a
row must move, over the bandwidth in the card's data sheet. It needs no package that wavprune can do
without; rows of others are skipped where those are missing.
"""

from __future__ import annotations

import copy
import json
import os
import statistics
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import nn

from wavprune import LayerRef, PruneConfig, backends, prune_layers
from wavprune.engine.projection import project_layers, projection_plan

from .checks import checked, loaded, restore
from .networks import NETWORKS, convolutions
from .pipelines import ROWS, Row

ROUNDS = 20
PEERS = ("l1_unstructured", "global_unstructured", "ptwt haar + kthvalue", "abs + kthvalue + mul_")
CASES = ("haar", "haar global", "uhaar", "min-weight", "random")
# The backends whose memory traffic is known.
COMPUTED = ("native", "triton")
COPY = "copy from device to device"
PROJECTION = "projection"
REPLAYED = "replayed as a graph"
# Orders of the axes in memory other than that of the sizes.
LAYOUTS = {"channels_last": (0, 2, 3, 1), "tensorflow": (2, 3, 1, 0)}
# Where the figures are written; benchmarks/gpu_report.py sets it.
REPORT = "WAVPRUNE_GPU_REPORT"

# Bytes per second in the data sheet, and the name that ``torch.cuda.get_device_name`` gives.
BANDWIDTHS = {
    "A100 80 GB": (2.039e12, "A100-SXM4-80GB"),
    "A100 40 GB PCIe": (1.555e12, "A100-PCIE-40GB"),
    "H100 SXM": (3.35e12, "H100 80GB HBM3"),
    "H100 PCIe": (2.0e12, "H100 PCIe"),
    "H200": (4.8e12, "H200"),
}

# Of a float32 weight's bytes, those of its mask.
MASK = 1 / 32
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
    if row.split()[0] not in COMPUTED:
        return None
    if PROJECTION in row:
        # One read and one write of each weight, and a bit for each coefficient.
        return (2 + MASK) * weight_bytes / bandwidth
    passes = COUNTING_PASSES["float64" if "random" in row else "float32"]
    return (passes + 2) * weight_bytes / bandwidth


def weight_bytes(network: nn.Module) -> int:
    """Bytes of all convolutions."""
    return sum(conv.weight.nbytes for conv in convolutions(network))


def tables() -> list[str]:
    """The computed figures for ResNet-18: memory traffic by CUDA kernel, times by card."""
    size = weight_bytes(NETWORKS["ResNet-18"]())
    kernels: list[Sequence[str]] = [("CUDA kernel", "launches", "weights read", "written", "MB")]
    for kernel in PRUNE:
        moved = (kernel.reads + kernel.writes) * size
        kernels.append((kernel.kernel, *map(str, kernel[1:]), f"{moved / 1e6:.1f}"))
    cards: list[Sequence[str]] = [
        (
            "card",
            "count_digits, per pass",
            "prune_rows",
            "select and prune",
            "mark",
            "project",
            COPY,
        )
    ]
    for card, (bandwidth, _) in BANDWIDTHS.items():
        once = size / bandwidth
        total = computed_seconds("native haar", size, bandwidth)
        project = computed_seconds(f"native {PROJECTION}", size, bandwidth)
        floor = computed_seconds(COPY, size, bandwidth)
        times = (once, 2 * once, total, (1 + MASK) * once, project, floor)
        cards.append((card, *(f"{1e6 * (s or 0):.0f} us" for s in times)))
    return [aligned(kernels), aligned(cards)]


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """A table in plain text, its first row the heading."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0])]
        cells += [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines) + "\n"


def rows() -> list[Row]:
    """The rows that run on a GPU; those with one reference follow each other."""
    ours = [ROWS[f"{backend} {case}"] for backend in (*COMPUTED, "eager") for case in CASES]
    peers = [ROWS[name] for name in PEERS]
    return sorted((*ours, *peers), key=lambda row: sorted(map(str, row.settings.items())))


def relaid(model: nn.Module, layout: str | None) -> nn.Module:
    """The same model with its weights in another order in memory."""
    for conv in convolutions(model) if layout is not None else ():
        order = LAYOUTS[str(layout)]
        back = [order.index(axis) for axis in range(4)]
        conv.weight.data = conv.weight.detach().permute(order).contiguous().permute(back)
    return model


def on_gpu(network: str) -> nn.Module:
    """A copy of the network; the test is skipped where the network is not installed."""
    try:
        return copy.deepcopy(loaded(network)).cuda()
    except ImportError as error:
        pytest.skip(f"{network}: {error}")


class Results(dict[str, dict[str, float]]):
    """Seconds of every network and row; written down as they come, so that none is lost."""

    def add(self, network: str, row: str, seconds: float) -> None:
        """One more row."""
        self.setdefault(network, {})[row] = seconds
        if path := os.environ.get(REPORT):
            figures = {
                network: [row._asdict() for row in compared(network, rows)]
                for network, rows in self.items()
            }
            Path(path).write_text(json.dumps(figures, indent=1))


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[Results]:
    """Printed at the end."""
    measured = Results()
    yield measured
    for network, seconds in measured.items():
        show(
            request.config, f"{network} on {torch.cuda.get_device_name()}", table(network, seconds)
        )


def show(config: pytest.Config, title: str, text: str) -> None:
    """Print past what pytest captures."""
    reporter = config.pluginmanager.getplugin("terminalreporter")
    with config.pluginmanager.getplugin("capturemanager").global_and_fixture_disabled():
        reporter.section(title)
        reporter.write(text)


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """ptwt transforms by convolutions, whose inputs TF32 would round to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)


class Compared(NamedTuple):
    """A row's time in seconds, and its lower bounds; None where there is none.

    Attributes:
        row: its name.
        measured: median on the device.
        computed: at the bandwidth in the card's data sheet.
        at_copy: at the bandwidth that the copy had.
        copies: how many copies the row took.
    """

    row: str
    measured: float
    computed: float | None
    at_copy: float | None
    copies: float | None


def compared(network: str, seconds: dict[str, float]) -> list[Compared]:
    """Measured times, and those computed from the data sheet and from the measured copy."""
    size = weight_bytes(loaded(network))
    name = torch.cuda.get_device_name()
    card = next((bandwidth for bandwidth, part in BANDWIDTHS.values() if part in name), None)
    copied = seconds.get(COPY)
    found = []
    for row, spent in seconds.items():
        bounds = [
            None if bandwidth is None else computed_seconds(row, size, bandwidth)
            for bandwidth in (card, None if copied is None else 2 * size / copied)
        ]
        copies = None if copied is None else spent / copied
        found.append(Compared(row, spent, bounds[0], bounds[1], copies))
    return found


def table(network: str, seconds: dict[str, float]) -> str:
    """The rows in plain text."""
    lines: list[Sequence[str]] = [
        ("row", "measured", "computed", "at the copy's bandwidth", "times the copy")
    ]
    for row in compared(network, seconds):
        times = (row.measured, row.computed, row.at_copy)
        cells = ["" if s is None else f"{1e6 * s:.0f} us" for s in times]
        lines.append((row.row, *cells, "" if row.copies is None else f"{row.copies:.1f}"))
    return aligned(lines)


gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device"),
]


@pytest.mark.parametrize("network", NETWORKS)
class TestOnGpu:
    pytestmark = gpu

    def test_copy(self, network: str, results: Results) -> None:
        weights = [conv.weight.detach() for conv in convolutions(on_gpu(network))]
        source = torch.cat([weight.flatten() for weight in weights])
        target = torch.empty_like(source)
        spent = median(lambda: target.copy_(source), lambda: target.zero_())
        assert torch.equal(target, source)
        results.add(network, COPY, spent)

    @pytest.mark.parametrize("row", rows(), ids=lambda row: row.name)
    def test_row(self, network: str, row: Row, results: Results) -> None:
        self.timed(network, row, None, results)

    @pytest.mark.parametrize("layout", LAYOUTS)
    @pytest.mark.parametrize("name", ["native uhaar", "triton uhaar", "native min-weight"])
    def test_layout(self, network: str, name: str, layout: str, results: Results) -> None:
        self.timed(network, ROWS[name], layout, results)

    @pytest.mark.parametrize("case", CASES)
    def test_replayed(self, network: str, case: str, results: Results) -> None:
        """The device's time alone: the host launches one graph."""
        row = ROWS[f"native {case}"]
        if "native" in backends.unavailable():
            pytest.skip(backends.unavailable()["native"])
        model = on_gpu(network)
        checked(row, network, model)
        pruned = [conv.weight.detach().clone() for conv in convolutions(model)]
        restore(network, model)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            row.run(model)
        spent = median(graph.replay, lambda: restore(network, model))
        for conv, weight in zip(convolutions(model), pruned, strict=True):
            assert torch.equal(conv.weight, weight)
        results.add(network, f"native {case}, {REPLAYED}", spent)

    @pytest.mark.parametrize("layout", [None, *LAYOUTS])
    @pytest.mark.parametrize("backend", COMPUTED)
    def test_projection(
        self, network: str, backend: str, layout: str | None, results: Results
    ) -> None:
        if backend in backends.unavailable():
            pytest.skip(backends.unavailable()[backend])
        model = relaid(on_gpu(network), layout)
        refs = [
            LayerRef(str(i), conv.weight.detach()) for i, conv in enumerate(convolutions(model))
        ]
        config = PruneConfig(wavelet="uhaar", backend=backend)
        restore(network, model)
        report = prune_layers(refs, config, masks=True)
        assert report.masks is not None
        masks = [report.masks[ref.name] for ref in refs]
        expected = [ref.weight.clone() for ref in refs]
        plan = projection_plan(refs, config, [report.bases[ref.name] for ref in refs])
        # Guarded: the caller would undo an error, so that nothing is copied.
        project = partial(project_layers, plan, refs, masks, guarded=True)
        restore(network, model)
        project()
        for ref, weight in zip(refs, expected, strict=True):
            assert torch.equal(ref.weight, weight), ref.name
        spent = median(project, lambda: restore(network, model))
        name = f"{backend} {PROJECTION} uhaar"
        results.add(network, f"{name}, {layout}" if layout else name, spent)

    @staticmethod
    def timed(network: str, row: Row, layout: str | None, results: Results) -> None:
        backend = row.name.split()[0]
        if backend in backends.unavailable():
            pytest.skip(backends.unavailable()[backend])
        if backend == "ptwt":
            pytest.importorskip("ptwt")
        model = relaid(on_gpu(network), layout)
        checked(row, network, model)
        spent = median(lambda: row.run(model), lambda: restore(network, model))
        name = f"{row.name}, {layout}" if layout else row.name
        results.add(network, name, spent)


def median(run: Callable[[], object], setup: Callable[[], object] = lambda: None) -> float:
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
        print(printed)
