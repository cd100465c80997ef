"""Pruning in every layout and dtype, beside two reads and one write of the same weights.

Run with ``pytest benchmarks/bench_layouts.py --benchmark-only``. ``tests/test_ops_layouts.py``
checks that all layouts give the same bits.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn

import wavprune
from wavprune import LayerRef, PruneConfig, Pruner

from .conftest import (
    CHANNELS_LAST_STEP,
    CONTIGUOUS_STEP,
    LITE_LAYOUTS,
    RESNET_LAYOUTS,
    WIDE_KERNELS,
)
from .networks import convolutions, efficientnet_lite0, resnet18

pytestmark = pytest.mark.skipif(
    "native" in wavprune.backends.unavailable(), reason="the compiled extension is not built here"
)

ROUNDS = 21

Weights = list[torch.Tensor]

LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda weight: weight.contiguous(),
    "channels_last": lambda weight: weight.contiguous(memory_format=torch.channels_last),
    # As TensorFlow stores it: output channels innermost.
    "outputs innermost": lambda w: w.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
}
METHODS: dict[str, dict[str, Any]] = {
    "haar": {"wavelet": "haar"},
    "uhaar": {"wavelet": "uhaar"},
    "dct": {"wavelet": "dct"},
    "min-weight": {"method": "min_weight"},
}
DTYPES = ("float32", "float64", "float16", "bfloat16")


def weights_of(network: nn.Module, dtype: str, layout: str) -> Weights:
    convert = LAYOUTS[layout]
    kind = getattr(torch, dtype)
    return [convert(conv.weight.detach().to(kind)) for conv in convolutions(network)]


def wide_kernels(size: int) -> nn.Module:
    """Four layers of large square kernels, 2.1M or 4.1M seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.ModuleList(nn.Conv2d(128, 164, size, bias=False) for _ in range(4))


def limit(weights: Weights) -> None:
    """Two reads and one write of every weight."""
    for weight in weights:
        weight.sum()
        weight.mul_(1.0)


def prune(weights: Weights, method: str) -> None:
    config = PruneConfig(backend="native", sparsity=0.5, **METHODS[method])
    wavprune.prune_layers([LayerRef(str(i), weight) for i, weight in enumerate(weights)], config)


def measure(
    benchmark: BenchmarkFixture,
    group: str,
    row: str,
    weights: Weights,
    run: Callable[[Weights], None],
) -> None:
    """Time a row on fresh copies in every round."""

    def fresh() -> tuple[tuple[Weights], dict[str, Any]]:
        return ([weight.clone() for weight in weights],), {}

    benchmark.group, benchmark.extra_info["row"] = group, row
    benchmark.pedantic(run, setup=fresh, rounds=ROUNDS)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("method", ["L", "haar", "uhaar", "min-weight"])
def test_resnet(benchmark: BenchmarkFixture, dtype: str, layout: str, method: str) -> None:
    weights = weights_of(resnet18(), dtype, layout)
    run = limit if method == "L" else partial(prune, method=method)
    measure(benchmark, RESNET_LAYOUTS, f"{dtype} {layout} {method}", weights, run)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("method", ["L", "uhaar", "min-weight"])
def test_efficientnet(benchmark: BenchmarkFixture, layout: str, method: str) -> None:
    weights = weights_of(efficientnet_lite0(), "float32", layout)
    run = limit if method == "L" else partial(prune, method=method)
    measure(benchmark, LITE_LAYOUTS, f"{layout} {method}", weights, run)


@pytest.mark.parametrize("size", [5, 7])
@pytest.mark.parametrize("method", ["L", "uhaar", "dct"])
def test_wide_kernels(benchmark: BenchmarkFixture, size: int, method: str) -> None:
    weights = weights_of(wide_kernels(size), "float32", "contiguous")
    run = limit if method == "L" else partial(prune, method=method)
    measure(benchmark, WIDE_KERNELS, f"{size}x{size} {method}", weights, run)


@pytest.mark.parametrize(
    ("row", "dtype", "layout"),
    [
        (CONTIGUOUS_STEP, torch.float32, torch.contiguous_format),
        (CHANNELS_LAST_STEP, torch.bfloat16, torch.channels_last),
    ],
)
def test_masks(
    benchmark: BenchmarkFixture, row: str, dtype: torch.dtype, layout: torch.memory_format
) -> None:
    network = resnet18().to(dtype)
    network.to(memory_format=layout)  # type: ignore[call-overload]  # torch's stub lacks it
    pruner = Pruner(network, PruneConfig(sparsity=0.8, backend="native"))
    pruner.step()
    benchmark.group, benchmark.extra_info["row"] = RESNET_LAYOUTS, row
    benchmark.pedantic(pruner.step, rounds=ROUNDS, warmup_rounds=1)  # type: ignore[no-untyped-call]
