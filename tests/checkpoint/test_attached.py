from __future__ import annotations

import copy
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.support.packed import save_with_norms
from wavprune import checkpoint
from wavprune.checkpoint.unpacked import Unpacked
from wavprune.errors import WavpruneError


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 8, 1),
    )
    net[4].weight = net[3].weight
    return net.eval()


def inputs() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return list(torch.split(torch.randn(16, 3, 8, 8), 8))


def asked_for(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of tensors that the CPU decodes from now on."""
    asked: list[str] = []
    stored = Unpacked.stored

    def counted(self: Unpacked, name: str) -> torch.Tensor:
        asked.append(name)
        return stored(self, name)

    monkeypatch.setattr(Unpacked, "stored", counted)
    return asked


@pytest.mark.parametrize("how", ["trellis", "fold", "keep"])
def test_outputs_are_those_of_the_loaded_model(tmp_path: Path, how: str) -> None:
    net = network()
    path = tmp_path / "a.safetensors"
    if how == "trellis":
        checkpoint.save(net, path, coder="trellis", step=0.01)
    else:
        checkpoint.save(net, path, calibration=inputs(), target_kl=0.01, batchnorm=how)
    loaded, attached = copy.deepcopy(net), copy.deepcopy(net)
    loaded.load_state_dict(checkpoint.load(path))
    memory = checkpoint.attach(attached, path)
    images = inputs()[0]
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(attached(images), loaded(images))
    assert memory.cached_bytes == 0
    # Biases and the batch norm are all that is left.
    assert all(parameter.ndim == 1 for parameter in attached.parameters())
    dense = sum(4 * parameter.numel() for parameter in loaded.parameters())
    assert memory.compressed_bytes < 0.25 * dense


def test_the_cache_keeps_what_was_used_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network()
    path = tmp_path / "a.safetensors"
    checkpoint.save(net, path, coder="trellis", step=0.01)
    size = 4 * 32 * 32 * 9
    memory = checkpoint.attach(net, path, cache_bytes=size + 100)
    asked = asked_for(monkeypatch)
    with torch.no_grad():
        net(inputs()[0])
    # The tied one is decoded once; the small ones push it out.
    assert asked == ["0.weight", "3.weight", "5.weight"]
    assert memory.cached_bytes <= size + 100


def test_each_layer_with_a_batch_norm_is_decoded_once_to_attach(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    net = save_with_norms(path)
    asked = asked_for(monkeypatch)
    checkpoint.attach(net, path)
    assert asked.count("0.weight") == 1
    assert asked.count("3.weight") == 0


def test_files_of_other_models_leave_the_model_alone(tmp_path: Path) -> None:
    net = network()
    path = tmp_path / "a.safetensors"
    checkpoint.save(nn.Sequential(nn.Conv2d(3, 8, 3)), path, coder="trellis", step=0.01)
    with pytest.raises(WavpruneError, match=r"holds '0\.weight' of \(8, 3, 3, 3\); the model has"):
        checkpoint.attach(net, path)
    checkpoint.save(net, path)
    with pytest.raises(WavpruneError, match="is of an earlier version"):
        checkpoint.attach(net, path)
    checkpoint.save(net[:3], path, coder="trellis", step=0.01)
    with pytest.raises(WavpruneError, match=r"has not '3\.bias' of the model"):
        checkpoint.attach(net, path)
    assert isinstance(net[0].weight, nn.Parameter)
    with torch.no_grad():
        net(inputs()[0])


def test_damage_beside_the_layers_names_the_file(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    net = network()
    checkpoint.save(net, path, coder="trellis", step=0.01)
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(WavpruneError, match=r"a\.safetensors: its checksum differs"):
        checkpoint.attach(net, path)
    assert isinstance(net[0].weight, nn.Parameter)
