"""Tied weights in compressed files: stored once, equal under every name."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

import wavprune
from tests.support import checkpoints
from wavprune import PruneConfig, checkpoint


def network() -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(16, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.Linear(8, 8))
    net[2].weight = net[0].weight
    net.append(nn.Linear(8, 8))
    net[4].weight = net[3].weight
    return net


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"targets": ("0",)},
        {"targets": ("2",)},
        {"targets": ("*",)},
        {"ignore": ("0",)},
        {"config": PruneConfig(sparsity=0.75)},
        {"config": PruneConfig(sparsity=0.75, ignore=("2",))},
        {"config": PruneConfig(method="random", sparsity=0.75)},
    ],
    ids=str,
)
@pytest.mark.parametrize("kind", ["module", "file"])
def test_tied_weights_stay_one(tmp_path: Path, how: dict[str, Any], kind: str) -> None:
    net = network()
    source: Any = net
    if kind == "file":
        source = tmp_path / "in.pt"
        torch.save(net.state_dict(), source)
    saved = checkpoint.save(source, tmp_path / "x.safetensors", bits=4, **how)
    assert len(saved.layers) == (2 if how.get("targets") == ("*",) else 1)
    assert saved.uncompressed == 4 * (16 * 16 * 9 + 16 + 16 + 64 + 8 + 8)
    state = checkpoint.load(saved.path)
    assert list(state) == list(net.state_dict())
    for name, other in (("0.weight", "2.weight"), ("3.weight", "4.weight")):
        assert state[name] is state[other]
    other_net = network()
    other_net.load_state_dict(state)
    assert torch.equal(other_net.get_parameter("0.weight"), state["0.weight"])
    assert not torch.equal(state["0.weight"], net.get_parameter("0.weight"))


@pytest.mark.parametrize("batchnorm", ["fold", "keep"])
def test_calibrated_files_hold_tied_weights_once(tmp_path: Path, batchnorm: str) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        *(nn.Conv2d(6, 6, 3, padding=1), nn.ReLU(), nn.Conv2d(6, 6, 3, padding=1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(6, 6), nn.ReLU(), nn.Linear(6, 6)),
    )
    net[2].weight, net[7].weight = net[0].weight, net[5].weight
    saved = checkpoint.save(
        net,
        tmp_path / "x.safetensors",
        calibration=list(torch.randn(4, 12, 6, 8, 8)),
        target_kl=1e-4,
        batchnorm=batchnorm,
    )
    weights = [layer.name for layer in saved.layers if len(layer.shape) > 1]
    assert weights == ["0", "5"]
    state = checkpoint.load(saved.path)
    assert state["0.weight"] is state["2.weight"]
    assert state["5.weight"] is state["7.weight"]
    other = copy.deepcopy(net)
    other.load_state_dict(state)
    assert torch.equal(other.get_parameter("2.weight"), state["0.weight"])


def test_a_report_of_tied_weights(tmp_path: Path) -> None:
    net = network()
    report = wavprune.fast.prune(net, sparsity=0.75)
    saved = checkpoint.save(net, tmp_path / "x.safetensors", report=report, values="float32")
    assert [layer.kept for layer in saved.layers] == [layer.kept for layer in report]
    state = checkpoint.load(saved.path)
    assert torch.allclose(state["2.weight"], net.get_parameter("0.weight"), atol=1e-6)


def test_decompressing_writes_every_name(tmp_path: Path) -> None:
    saved = checkpoint.save(network(), tmp_path / "x.safetensors")
    checkpoint.decompress(saved.path, tmp_path / "y.safetensors")
    checkpoints.assert_same(load_file(tmp_path / "y.safetensors"), checkpoint.load(saved.path))
