"""Weights near the ends of their dtype's range."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wavprune import PruneConfig, checkpoint
from wavprune.errors import WavpruneError

HOWS: tuple[dict[str, Any], ...] = (
    {"bits": 8},
    {"bits": 4},
    {"values": "float32"},
    {"values": "float16"},
    {"step": 1e-3},
    {"step": 1e-3, "coder": "trellis"},
)
WAYS: tuple[dict[str, Any], ...] = (
    {},
    {"wavelet": "identity"},
    {"wavelet": "uhaar"},
    {"config": PruneConfig(method="min_weight", sparsity=0.3)},
)


def weights(dtype: torch.dtype, top: float, kernel: int = 3) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(8, 8, kernel, bias=False)).to(dtype)
    weight = net.get_parameter("0.weight")
    with torch.no_grad():
        sign = torch.where(torch.rand(weight.shape) < 0.5, -1.0, 1.0).double()
        size = 0.5 + 0.5 * torch.rand(weight.shape, dtype=torch.float64)
        weight.copy_(sign * top * size)
    return net


@pytest.mark.parametrize("how", HOWS, ids=str)
@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize(
    ("dtype", "top"),
    [
        (torch.float16, 65504.0),
        (torch.float16, 1e-5),
        (torch.bfloat16, 3.3e38),
        (torch.bfloat16, 1e-38),
        (torch.float32, 3.4e38),
        (torch.float32, 1e-30),
        (torch.float64, 1e300),
        (torch.float64, 1e-200),
        (torch.float64, 1e-300),
    ],
    ids=str,
)
def test_weights_stay_finite_and_errors_are_true(
    tmp_path: Path, dtype: torch.dtype, top: float, way: dict[str, Any], how: dict[str, Any]
) -> None:
    net = weights(dtype, top)
    before = net.get_parameter("0.weight").detach().double()
    saved = checkpoint.save(net, tmp_path / "x.safetensors", **way, **how)
    after = checkpoint.load(saved.path)["0.weight"].double()
    assert bool(torch.isfinite(after).all())
    scale = float(before.abs().max())
    error = float((after / scale - before / scale).norm() / (before / scale).norm())
    (layer,) = saved.layers
    assert layer.relative_error == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert saved.relative_error == pytest.approx(error, rel=1e-3, abs=1e-9)
    assert math.isfinite(layer.error)
    if "config" not in way and top != 1e-5:
        assert error < (0.15 if how == {"bits": 4} else 0.04)


def test_a_layer_of_zeros_is_stored(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False))
    nn.init.zeros_(net.get_parameter("0.weight"))
    for how in HOWS:
        saved = checkpoint.save(net, tmp_path / "x.safetensors", **how)
        assert saved.relative_error == 0
        assert not checkpoint.load(saved.path)["0.weight"].any()


def test_denormal_weights_come_back(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False))
    with torch.no_grad():
        net.get_parameter("0.weight").mul_(1e-40)
    saved = checkpoint.save(net, tmp_path / "x.safetensors", values="float32")
    assert saved.relative_error < 1e-4
    assert checkpoint.load(saved.path)["0.weight"].any()


class Scaled(nn.Module):
    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * self.factor


def scaled_network(dtype: torch.dtype, top: float, inputs: float) -> nn.Module:
    """Ordinary outputs of extreme weights."""
    layers = [weights(torch.float64, top) for _ in range(2)]
    back = 1 / top / inputs
    return nn.Sequential(
        *(Scaled(inputs), layers[0], Scaled(back), nn.ReLU()),
        *(Scaled(inputs), layers[1], Scaled(back), nn.Flatten(), nn.Linear(32, 5)),
    ).to(dtype)


@pytest.mark.parametrize(
    ("dtype", "top", "inputs"),
    [
        (torch.float16, 65504.0, 1e-3),
        (torch.bfloat16, 1e-30, 1.0),
        (torch.float32, 1e-30, 1.0),
        (torch.float32, 3e38, 1e-6),
    ],
    ids=str,
)
def test_calibrated_files_of_extreme_weights(
    tmp_path: Path, dtype: torch.dtype, top: float, inputs: float
) -> None:
    net = scaled_network(dtype, top, inputs)
    images = torch.randn(48, 8, 6, 6).to(dtype)
    saved = checkpoint.save(
        net, tmp_path / "x.safetensors", calibration=torch.split(images, 16), target_kl=1e-3
    )
    assert saved.measured_kl is not None
    assert 1e-4 < saved.measured_kl < 1.1e-3
    assert saved.predicted_kl is not None
    assert 0.1 < saved.predicted_kl / saved.measured_kl < 20
    state = checkpoint.load(saved.path)
    for layer in saved.layers[:2]:
        before = net.state_dict()[f"{layer.name}.weight"].double() / top
        after = state[f"{layer.name}.weight"].double() / top
        assert bool(torch.isfinite(after).all())
        error = float((after - before).norm() / before.norm())
        assert error == pytest.approx(layer.relative_error, rel=1e-3)
        assert 1e-4 < error < 0.3


def test_gradients_that_float64_has_no_room_for_are_an_error(tmp_path: Path) -> None:
    net = scaled_network(torch.float64, 1e-200, 1.0)
    images = torch.randn(8, 8, 6, 6, dtype=torch.float64)
    with pytest.raises(WavpruneError, match=r"layer '1\.0': what its errors do .* is not finite"):
        checkpoint.save(net, tmp_path / "x.safetensors", calibration=[images], target_kl=1e-3)
