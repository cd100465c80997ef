"""Every kind of layer that is pruned, through every door."""

from __future__ import annotations

import copy
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.nn import functional

import wavprune
from wavprune import PruneConfig
from wavprune.checkpoint.prune import prune_file
from wavprune.engine.layers import select_layers


class Kinds(nn.Module):
    """One layer of each kind, run one after the other."""

    def __init__(self) -> None:
        super().__init__()
        self.line = nn.Conv1d(2, 8, 8, padding=4)
        self.long = nn.Conv2d(1, 4, (16, 1), padding=(8, 0))
        self.up_line = nn.ConvTranspose1d(8, 6, 4, stride=2)
        self.plane = nn.Conv2d(4, 6, 3, groups=2)
        self.up = nn.ConvTranspose2d(6, 4, 4, stride=2)
        self.volume = nn.Conv3d(1, 4, 3)
        self.up_volume = nn.ConvTranspose3d(4, 4, 2, stride=2)
        self.fc = nn.Linear(4, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.up_line(functional.relu(self.line(x)))
        x = functional.relu(self.plane(functional.relu(self.long(x[:, None]))))
        x = functional.relu(self.up(x))[:, None, :, :, :12]
        x = functional.relu(self.up_volume(functional.relu(self.volume(x))))
        out: torch.Tensor = self.fc(x.mean((2, 3, 4)))
        return out


CONVOLUTIONS = ["line", "long", "up_line", "plane", "up", "volume", "up_volume"]


def kinds() -> Kinds:
    torch.manual_seed(0)
    return Kinds().eval()


def kept_of(numel: int, sparsity: float) -> int:
    return math.ceil((1 - sparsity) * numel)


@pytest.mark.filterwarnings("ignore::wavprune.LevelCollapsedWarning")
@pytest.mark.parametrize("wavelet", ["uhaar", "dct", "klt", "haar", "db4", "identity", "auto"])
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_backends_agree_on_every_kind(wavelet: str, scope: str) -> None:
    results = {}
    for backend in ("reference", "eager", *(["native"] if has_native() else [])):
        net = kinds()
        report = wavprune.fast.prune(
            net, wavelet=wavelet, sparsity=0.75, scope=scope, backend=backend
        )
        assert [layer.name for layer in report] == CONVOLUTIONS
        results[backend] = net.state_dict(), [layer.kept for layer in report]
        if scope == "layer" and wavelet != "haar":
            assert [layer.kept for layer in report] == [
                kept_of(layer.numel, 0.75) for layer in report
            ]
    reference, kept = results.pop("reference")
    for state, other in results.values():
        assert other == kept
        for name, weight in state.items():
            torch.testing.assert_close(weight, reference[name], rtol=0, atol=2e-6)


def has_native() -> bool:
    return "native" not in wavprune.backends.unavailable()


@pytest.mark.parametrize("method", ["dwt", "random"])
def test_a_weight_of_other_strides_is_pruned_as_a_contiguous_one(method: str) -> None:
    net, other = kinds(), kinds()
    for layer, layout in ((other.volume, torch.channels_last_3d), (other.up, torch.channels_last)):
        layer.weight.data = layer.weight.data.to(memory_format=layout)
    strides = other.volume.weight.stride()
    for model in (net, other):
        wavprune.fast.prune(model, method=method, sparsity=0.5)
    assert other.volume.weight.stride() == strides
    for name, weight in net.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], weight, rtol=0, atol=0)


def test_volumes_whose_rows_are_apart_are_refused_by_name() -> None:
    net = kinds()
    net.volume.weight = nn.Parameter(torch.randn(4, 1, 3, 3, 6)[..., :3])
    with pytest.raises(ValueError, match=r"layer 'volume': .* rows do not follow each other"):
        wavprune.fast.prune(net)


@pytest.mark.parametrize("level", ["refit", "select", "full"])
def test_every_kind_is_pruned_from_inputs(level: str) -> None:
    net = kinds()
    with torch.no_grad():
        inputs = torch.randn(96, 2, 12)
        dense = net(inputs)
    report = wavprune.fast.prune(
        net,
        wavelet="dct",
        sparsity=0.5,
        targets=["*"],
        ignore=["fc"],
        calibration=torch.split(inputs, 32),
        calibration_level=level,
    )
    assert [layer.name for layer in report] == CONVOLUTIONS
    assert all(layer.kept == kept_of(layer.numel, 0.5) for layer in report)
    other = kinds()
    wavprune.fast.prune(other, wavelet="dct", sparsity=0.5)
    with torch.no_grad():
        loss, magnitude = ((model(inputs) - dense).square().mean() for model in (net, other))
    assert loss < magnitude


def test_a_file_has_the_same_layers_as_its_model(tmp_path: Path) -> None:
    net = kinds()
    save_file(net.state_dict(), tmp_path / "in.safetensors")
    report = prune_file(
        tmp_path / "in.safetensors", tmp_path / "out.safetensors", PruneConfig(sparsity=0.5)
    )
    assert {layer.name for layer in report} == set(CONVOLUTIONS)
    wavprune.fast.prune(net, sparsity=0.5)
    for name, weight in load_file(tmp_path / "out.safetensors").items():
        assert torch.equal(weight, net.state_dict()[name])


@pytest.mark.parametrize("wavelet", ["dct", "klt", "haar"])
def test_every_kind_is_compressed_and_comes_back(wavelet: str, tmp_path: Path) -> None:
    net, again = kinds(), kinds()
    report = wavprune.fast.prune(net, wavelet=wavelet, sparsity=0.5)
    wavprune.checkpoint.save(net, tmp_path / "small.safetensors", report=report, bits=8)
    again.load_state_dict(wavprune.checkpoint.load(tmp_path / "small.safetensors"))
    for name in CONVOLUTIONS:
        weight, other = (model.state_dict()[f"{name}.weight"] for model in (net, again))
        assert float((other - weight).norm() / weight.norm()) < 0.02


def test_masks_hold_in_training() -> None:
    net = kinds()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    pruner = wavprune.Pruner(net, PruneConfig(wavelet="dct", sparsity=0.75))
    pruner.attach(optimizer)
    for _ in range(2):
        optimizer.zero_grad()
        net(torch.randn(4, 2, 12)).square().mean().backward()
        optimizer.step()
    report = pruner.finish()
    kept = [layer.kept for layer in report]
    assert kept == [kept_of(layer.numel, 0.75) for layer in report]


def _compiled(net: nn.Module) -> nn.Module:
    compiled = torch.compile(net, backend="eager")
    assert isinstance(compiled, nn.Module)
    return compiled


@pytest.mark.parametrize(
    "wrap",
    [
        lambda net: nn.DataParallel(net),
        lambda net: _compiled(net),
        lambda net: nn.DataParallel(_compiled(net)),
        lambda net: _compiled(nn.DataParallel(net)),
    ],
)
def test_wrappers_change_no_name_and_no_random_mask(wrap: object) -> None:
    plain, wrapped = kinds(), kinds()
    model = wrap(wrapped)  # type: ignore[operator]
    names = [ref.name for ref in select_layers(model, PruneConfig())]
    assert names == CONVOLUTIONS
    wavprune.fast.prune(plain, method="random", sparsity=0.5)
    report = wavprune.fast.prune(model, method="random", sparsity=0.5, targets="*", ignore="fc")
    assert [layer.name for layer in report] == CONVOLUTIONS
    for name, weight in plain.state_dict().items():
        assert torch.equal(wrapped.state_dict()[name], weight)


def test_a_compiled_part_keeps_its_names() -> None:
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.Sequential(nn.Conv2d(2, 2, 3)))
    expected = [ref.name for ref in select_layers(net, PruneConfig())]
    net[1] = torch.compile(copy.deepcopy(net[1]), backend="eager")  # type: ignore[assignment]
    assert [ref.name for ref in select_layers(net, PruneConfig())] == expected == ["0", "1.0"]
    pruner = wavprune.Pruner(net, PruneConfig(sparsity=0.5))
    assert list(pruner.layer_names) == expected


def test_patterns_run_along_input_channels_which_transposed_ones_have_apart() -> None:
    net = kinds()
    wavprune.fast.prune(net, method="min_weight", pattern="1:2", targets=["line", "plane", "fc"])
    assert int((net.plane.weight != 0).sum()) == net.plane.weight.numel() // 2
    with pytest.raises(ValueError, match=r"layer 'up': .* it is a transposed convolution"):
        wavprune.fast.prune(net, method="min_weight", pattern="1:2", targets="up")
