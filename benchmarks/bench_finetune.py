"""The cost of keeping a network pruned in training: a projection and a training step."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from pytest_benchmark.fixture import BenchmarkFixture
from torch import nn
from transformers import ResNetConfig, ResNetForImageClassification

from wavprune import PruneConfig, Pruner

from .conftest import TRAINING

BATCH, SIDE = 64, 32
CONFIGS = {
    "projection, uhaar": PruneConfig(sparsity=0.8),
    "projection, min-weight": PruneConfig(method="min_weight", sparsity=0.8),
}


def resnet18() -> nn.Module:
    """ResNet-18 with seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        config = ResNetConfig(
            layer_type="basic",
            depths=[2, 2, 2, 2],
            hidden_sizes=[64, 128, 256, 512],
            embedding_size=64,
        )
        network: nn.Module = ResNetForImageClassification(config)
    return network


def training_step(network: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], None]:
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(BATCH, 3, SIDE, SIDE, generator=generator)
    labels = torch.randint(0, 2, (BATCH,), generator=generator)

    def step() -> None:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(images).logits, labels)
        torch.autograd.backward(loss)
        optimizer.step()

    return step


def test_training_step(benchmark: BenchmarkFixture) -> None:
    network = resnet18()
    step = training_step(network, torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9))
    benchmark.group, benchmark.extra_info["row"] = TRAINING, "training step"
    benchmark.pedantic(step, rounds=7, warmup_rounds=1)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("row", CONFIGS)
def test_projection(benchmark: BenchmarkFixture, row: str) -> None:
    network = resnet18()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9)
    pruner = Pruner(network, CONFIGS[row])
    pruner.attach(optimizer)
    training_step(network, optimizer)()
    benchmark.group, benchmark.extra_info["row"] = TRAINING, row
    benchmark.pedantic(pruner.step, rounds=21, warmup_rounds=2)  # type: ignore[no-untyped-call]
    report = pruner.finish()
    assert report.sparsity == pytest.approx(0.8, abs=0.001)
    for layer in report:
        if layer.wavelet == "identity":
            assert layer.weight_sparsity >= 0.8 - 0.001
