from __future__ import annotations

import copy
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from wavprune import checkpoint
from wavprune.calibration.network import Network
from wavprune.checkpoint import study, twice, ways
from wavprune.checkpoint.study import Study
from wavprune.engine.layers import LayerRef

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
    """Its last layer reads the samples of a batch together, in one row more or in rows of both."""

    def __init__(self, rows: str) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rows = rows
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        self.linear = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.conv(x)).flatten(2)
        if self.rows == "places first":
            out: torch.Tensor = self.linear(hidden.permute(2, 0, 1)).mean(0)
        elif self.rows == "one more":
            mean = hidden.mean(2)
            out = self.linear(torch.cat([mean, mean.mean(0, keepdim=True)]))[:-1]
        elif self.rows == "one by one":
            out = torch.stack([self.linear(one) for one in hidden.mean(2)])
        else:
            assert self.rows == "crops first"
            crops = torch.cat([x[:, :, 2:], x[:, :, :-2]])
            out = self.linear(torch.relu(self.conv(crops)).mean((2, 3)))
            out = out.reshape(2, len(x), -1).mean(0)
        return out


@pytest.mark.parametrize(
    ("net", "batches"),
    [
        *(
            (Mixing(rows), [images(20), images(20)])
            for rows in ("places first", "one more", "one by one", "crops first")
        ),
        # Inputs of several shapes.
        (deep(), [images(20), images(20)[:, :, :10], images(20)[:, :, :10, :8]]),
    ],
    ids=["places first", "one more", "one by one", "crops first", "several shapes"],
)
def test_networks_that_cannot_run_twice_in_a_batch(
    tmp_path: Path, net: nn.Module, batches: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ways, "in_sequence", None)
    saved = checkpoint.save(net, tmp_path / PATH, calibration=batches, target_kl=0.01)
    assert saved.measured_kl is not None
    assert saved.measured_kl <= 0.011
    net.load_state_dict(checkpoint.load(saved.path))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("net", "runs"), [(deep(), True), (Mixing("places first"), False)], ids=["apart", "mixed"]
)
def test_what_rounding_does_is_no_mixing(net: nn.Module, runs: bool, dtype: torch.dtype) -> None:
    net = copy.deepcopy(net).to(dtype).eval()
    layers = {
        name: module.get_parameter("weight")
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    }
    network = Network(net, [LayerRef(name, weight) for name, weight in layers.items()])
    with torch.no_grad():
        together = twice.in_one_batch(network, [images(8).to(dtype)], layers.keys())
    assert (together is not None) == runs


def test_large_layers_run_with_fewer_inputs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    original = ways.in_sequence

    def spy(study: Study, c: float) -> ways.QuantisedNetwork:
        assert study.together is not None
        sizes.append(len(study.together))
        return original(study, c)

    monkeypatch.setattr(ways, "in_sequence", spy)
    # What a layer reads of an input of both networks: 16 kernels of 3 x 3 at 24 places.
    monkeypatch.setattr(twice, "MOST_BYTES", 50 * 2 * 16 * 9 * 24 * 4)
    batches = torch.split(images(), 40)
    checkpoint.save(deep(), tmp_path / PATH, calibration=batches, target_kl=0.01)
    assert set(sizes) == {50}


def try_of(quantise: Any, size: int, divergence: torch.Tensor) -> ways._Try:
    study: Any = SimpleNamespace(weights=1000)
    tried = ways.Tried(1.0, ways.QuantisedNetwork({}, {}, 0.0), divergence.double())
    return ways._Try(ways.Way(study, quantise), tried, size)


def test_what_a_few_inputs_cannot_tell_apart() -> None:
    torch.manual_seed(0)
    each = torch.distributions.Exponential(100.0).sample((64,))
    noise = 1 + 0.4 * torch.randn(64)
    first = try_of(1, 500, each)
    like = try_of(2, 500, each * noise)
    for factor in (1.5, 10, 1000):
        far = try_of(3, 500, each * noise * factor)
        assert far.cost() - first.cost() > far.uncertainty(first)
    assert abs(like.cost() - first.cost()) < 2 * like.uncertainty(first)
    assert try_of(4, 500, torch.full((64,), torch.nan)).cost() == torch.inf


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
