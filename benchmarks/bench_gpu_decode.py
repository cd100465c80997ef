"""Packed checkpoints decoded on a GPU and on the CPU: million weights a second.

    pytest -m gpu benchmarks/bench_gpu_decode.py

Random weights in the shapes of EfficientNet-Lite0 and ResNet-18, compressed to four bits each by
``checkpoint.save(coder="trellis")``; every row's tensors are those of the CPU, bit for bit.
``python -m benchmarks.bench_gpu_decode`` prints what decoding must take, which needs no GPU: the
steps of the longest stream, at the latency of the instructions that follow from each other. It
needs torch, numpy, PyWavelets, pytest, safetensors and zstandard.
"""

from __future__ import annotations

import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import NamedTuple

import pytest
import torch

from wavprune import checkpoint
from wavprune.checkpoint.loading import open_packed
from wavprune.checkpoint.on_device import OnDevice, check
from wavprune.checkpoint.unpacked import Unpacked

from .bench_gpu import aligned, show
from .bench_gpu import median as on_device

# Of the chain of a step: a load from shared memory, two exchanges between lanes, and arithmetic, at
# the latencies that are measured on Hopper (docs/gpu.md); and the clock that it has under load.
CYCLES, CLOCK = 135, 1.755e9
ROUNDS = 10
BITS = 4
REPORT = "WAVPRUNE_GPU_DECODE_REPORT"

# Of each stage: kernel, expansion, input and output channels, blocks.
STAGES = (
    *((3, 1, 32, 16, 1), (3, 6, 16, 24, 2), (5, 6, 24, 40, 2), (3, 6, 40, 80, 3)),
    *((5, 6, 80, 112, 3), (5, 6, 112, 192, 4), (3, 6, 192, 320, 1)),
)


def efficientnet_lite0() -> list[tuple[int, ...]]:
    """The shapes of its 50 weights, in their order."""
    shapes: list[tuple[int, ...]] = [(32, 3, 3, 3)]
    for kernel, expansion, first, outs, blocks in STAGES:
        for block in range(blocks):
            ins = outs if block else first
            wide = expansion * ins
            if expansion > 1:
                shapes.append((wide, ins, 1, 1))
            shapes += [(wide, 1, kernel, kernel), (outs, wide, 1, 1)]
    return [*shapes, (1280, 320, 1, 1), (1000, 1280)]


def resnet_18() -> list[tuple[int, ...]]:
    """The shapes of its 21 weights, in their order."""
    shapes: list[tuple[int, ...]] = [(64, 3, 7, 7)]
    for stage in range(4):
        outs = 64 << stage
        ins = max(outs // 2, 64)
        shapes += [(outs, ins, 3, 3), *[(outs, outs, 3, 3)] * 3]
        if stage:
            shapes.append((outs, ins, 1, 1))
    return [*shapes, (1000, 512)]


NETWORKS: dict[str, Callable[[], list[tuple[int, ...]]]] = {
    "EfficientNet-Lite0": efficientnet_lite0,
    "ResNet-18": resnet_18,
}
# As a file stores them: values as they are, and kernels in a basis.
WAVELETS = ("identity", "uhaar")


@cache
def state_of(network: str) -> dict[str, torch.Tensor]:
    """Seeded random weights, outputs of different magnitude."""
    generator = torch.Generator().manual_seed(0)
    state = {}
    for i, shape in enumerate(NETWORKS[network]()):
        size = torch.randn(shape[0], *(1 for _ in shape[1:]), generator=generator).mul(0.5).exp()
        state[f"{i}.weight"] = torch.randn(shape, generator=generator) * size
    return state


@cache
def file_of(network: str, wavelet: str) -> Path:
    """Its compressed file."""
    path = Path(tempfile.mkdtemp()) / "weights.safetensors"
    options = {"wavelet": wavelet, "target_bits_per_weight": BITS, "targets": ["*"]}
    checkpoint.save(state_of(network), path, coder="trellis", **options)  # type: ignore[arg-type]  # of several types
    return path


def packed_of(path: Path) -> Unpacked:
    """What is read of a file before its streams are."""
    packed = open_packed(path, None)
    assert packed is not None
    return packed


class Floor(NamedTuple):
    """A bound of what decoding a file takes.

    Attributes:
        streams: how many run side by side.
        steps: of the longest one.
        seconds: of these.
    """

    streams: int
    steps: int
    seconds: float


def floor_of(packed: Unpacked) -> Floor:
    """The latency of the longest stream."""

    def steps(name: str) -> int:
        rows, columns = packed.records.classes[name].shape
        return rows * -(-columns // 32)

    streams = packed.records.streams
    longest = max(sum(map(steps, stream.names)) for stream in streams)
    return Floor(len(streams), longest, longest * CYCLES / CLOCK)


class Row(NamedTuple):
    """Seconds and million weights a second.

    Attributes:
        name: what was decoded, and where.
        seconds: the median.
        weights: of the network.
        floor: the seconds that it must take; None on the CPU.
    """

    name: str
    seconds: float
    weights: int
    floor: float | None

    def cells(self) -> tuple[str, ...]:
        """As printed."""
        floor = "" if self.floor is None else f"{1e3 * self.floor:.2f} ms"
        rate = self.weights / self.seconds / 1e6
        return self.name, f"{1e3 * self.seconds:.2f} ms", f"{rate:,.0f}", floor


def median(run: Callable[[], object]) -> float:
    """Median seconds of a call that ends when all is done."""
    spans = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        run()
        spans.append(time.perf_counter() - start)
    return statistics.median(spans)


def loaded_there(path: Path) -> None:
    """A whole call."""
    checkpoint.load(path, device="cuda")
    torch.cuda.synchronize()


def copied_there(path: Path) -> None:
    """The same by the CPU, with a copy at the end."""
    for tensor in checkpoint.load(path).values():
        tensor.cuda()
    torch.cuda.synchronize()


@pytest.fixture(scope="module")
def results(request: pytest.FixtureRequest) -> Iterator[list[Row]]:
    """All rows, printed and written down at the end."""
    rows: list[Row] = []
    yield rows
    head = ("row", "time", "M weights/s", "longest stream")
    text = aligned([head, *(row.cells() for row in rows)])
    show(request.config, f"packed checkpoints on {torch.cuda.get_device_name()}", text)
    if path := os.environ.get(REPORT):
        Path(path).write_text(json.dumps([row._asdict() for row in rows], indent=1))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("network", NETWORKS)
def test_decoding(network: str, wavelet: str, results: list[Row]) -> None:
    pytest.importorskip("zstandard")
    pytest.importorskip("safetensors")
    path = file_of(network, wavelet)
    expected = checkpoint.load(path)
    found = checkpoint.load(path, device="cuda")
    for name, tensor in expected.items():
        assert torch.equal(found[name].cpu(), tensor), name
    packed = packed_of(path)
    placed = OnDevice(packed, packed.names, torch.device("cuda"))
    decoded = placed.decode(packed.names)
    check(decoded.found, decoded.expected)
    weights = sum(tensor.numel() for tensor in expected.values())
    floor = floor_of(packed).seconds
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        cpu = median(partial(checkpoint.load, path))
        copied = median(partial(copied_there, path))
    finally:
        torch.set_num_threads(threads)
    name = f"{network}, {wavelet}"
    results += [
        Row(f"{name}: CPU, whole call", cpu, weights, None),
        Row(f"{name}: CPU, and a copy to the GPU", copied, weights, None),
        Row(f"{name}: GPU, whole call", median(partial(loaded_there, path)), weights, floor),
        Row(
            f"{name}: GPU, its kernels",
            on_device(partial(placed.decode, packed.names)),
            weights,
            floor,
        ),
    ]


def main() -> None:
    """Print what the longest streams must take."""
    rows: list[tuple[str, ...]] = [
        ("network", "weights", "streams", "steps of the longest", "at least", "M weights/s")
    ]
    for network in NETWORKS:
        weights = sum(tensor.numel() for tensor in state_of(network).values())
        floor = floor_of(packed_of(file_of(network, WAVELETS[0])))
        rate = weights / floor.seconds / 1e6
        counts = (f"{weights:,}", str(floor.streams), f"{floor.steps:,}")
        rows.append((network, *counts, f"{1e3 * floor.seconds:.2f} ms", f"{rate:,.0f}"))
    print(aligned(rows))


if __name__ == "__main__":
    main()
