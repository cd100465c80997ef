from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wavprune import checkpoint
from wavprune.checkpoint import study

PATH = "small.safetensors"


def deep() -> nn.Sequential:
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for channels in (3, 16, 16, 16):
        layers += [nn.Conv2d(channels, 16, 3, padding=1), nn.ReLU()]
    net = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(64, 8))
    with torch.no_grad():
        for module in net.modules():
            if isinstance(module, nn.Conv2d):
                module.weight.mul_(2)
    return net.eval()


def images(count: int = 240) -> torch.Tensor:
    # Neighbors are alike, as in photographs.
    torch.manual_seed(1)
    return nn.functional.avg_pool2d(torch.randn(count, 3, 14, 14), 3, 1) * 3


def divergence(net: nn.Module, path: Path, x: torch.Tensor) -> float:
    after = copy.deepcopy(net)
    after.load_state_dict(checkpoint.load(path))
    with torch.no_grad():
        p, q = net(x).double().log_softmax(1), after(x).double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


def test_later_layers_make_up_for_earlier_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net, x = deep(), images(400)
    options: dict[str, Any] = {"calibration": torch.split(x[:240], 40), "target_bytes": 4000}
    saved = checkpoint.save(net, tmp_path / PATH, **options)
    monkeypatch.setattr(study, "in_one_batch", lambda *_: None)
    other = checkpoint.save(net, tmp_path / "b.safetensors", **options)
    assert saved.bytes == pytest.approx(other.bytes, rel=0.02)
    assert saved.measured_kl is not None
    assert other.measured_kl is not None
    assert saved.measured_kl < other.measured_kl
    # On inputs that nothing saw.
    ours, theirs = (divergence(net, report.path, x[240:]) for report in (saved, other))
    assert ours < 0.8 * theirs


class Mixing(nn.Module):
    """Its last layer reads the samples of a batch together, an odd number of rows."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        mean = torch.relu(self.conv(x)).mean((2, 3))
        both = torch.cat([mean, mean.mean(0, keepdim=True)])
        out: torch.Tensor = self.linear(both)[:-1]
        return out


@pytest.mark.parametrize(
    ("net", "batches"),
    [
        (Mixing(), [images(20), images(20)]),
        # Inputs of several shapes.
        (deep(), [images(20), images(20)[:, :, :10], images(20)[:, :, :10, :8]]),
    ],
    ids=["samples together", "several shapes"],
)
def test_networks_that_cannot_run_twice_in_a_batch(
    tmp_path: Path, net: nn.Module, batches: list[torch.Tensor]
) -> None:
    saved = checkpoint.save(net, tmp_path / PATH, calibration=batches, target_kl=0.01)
    assert saved.measured_kl is not None
    assert saved.measured_kl <= 0.011
    net.load_state_dict(checkpoint.load(saved.path))


@pytest.mark.parametrize("wide", [False, True])
def test_the_network_is_as_it_was(
    tmp_path: Path, wide: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where a layer's inputs are taken in blocks."""
    if wide:
        monkeypatch.setattr("wavprune.calibration.statistics.LARGEST", 40)
    net = deep()
    before = copy.deepcopy(net.state_dict())
    saved = checkpoint.save(
        net, tmp_path / PATH, calibration=torch.split(images(), 40), target_kl=0.01
    )
    assert saved.measured_kl == pytest.approx(0.01, rel=0.4)
    assert divergence(net, saved.path, images()) < 0.02
    for name, tensor in net.state_dict().items():
        assert torch.equal(tensor, before[name])
