"""Small checkpoints for the tests of files and of the command line."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import wavprune
from wavprune.checkpoint.formats import open_checkpoint
from wavprune.engine.layers import LayerRef
from wavprune.report import PruneReport

State = dict[str, torch.Tensor]
METADATA = {"format": "pt", "author": "somebody"}
LAYERS = ["first", "second", "third"]
SHARDS = ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors")
CONFIG = '{"model_type": "small"}'


class Net(nn.Module):
    """Three convolutions among tensors that are not to be pruned, one of them 4-D."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.first = nn.Conv2d(3, 8, 3)
        self.second = nn.Conv2d(8, 4, 5, bias=False)
        self.norm = nn.BatchNorm2d(4)
        self.third = nn.Conv2d(4, 4, 1)
        self.head = nn.Linear(4, 2)
        self.position = nn.Parameter(torch.zeros(2, 2, 3, 3))
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.copy_(torch.randn(parameter.shape, generator=generator))


def state(dtype: torch.dtype = torch.float32) -> State:
    return dict(Net().to(dtype).state_dict())


def pruned(settings: Mapping[str, Any], dtype: torch.dtype = torch.float32) -> tuple[State, Any]:
    """What pruning the model in memory gives: the definition of what a file must hold."""
    net = Net().to(dtype)
    report = wavprune.fast.prune(net, **settings)
    return dict(net.state_dict()), report


def save(path: Path, tensors: State | None = None) -> Path:
    save_file(state() if tensors is None else tensors, path, metadata=METADATA)
    return path


def save_raw(path: Path, tensors: Mapping[str, tuple[str, list[int], bytes]], pad: int = 0) -> Path:
    """A safetensors file written by hand, for what the library does not write."""
    header: dict[str, Any] = {}
    place = 0
    for name, (dtype, shape, data) in tensors.items():
        offsets = [place, place + len(data)]
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
        place += len(data)
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + pad)
    content = b"".join(data for _, _, data in tensors.values())
    path.write_bytes(len(text).to_bytes(8, "little") + text + content)
    return path


def save_sharded(directory: Path) -> Path:
    """A model directory of two shards; the first convolution is in the second."""
    directory.mkdir()
    tensors = state()
    second = {name: tensor for name, tensor in tensors.items() if name.startswith("first")}
    first = {name: tensor for name, tensor in tensors.items() if name not in second}
    for shard, content in zip(SHARDS, (first, second), strict=True):
        save(directory / shard, content)
    weight_map = {name: SHARDS[name in second] for name in sorted(tensors, reverse=True)}
    index = {"metadata": {"total_size": 1}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    (directory / "config.json").write_text(CONFIG)
    return directory


def read(path: Path) -> list[LayerRef]:
    """All 4-D weights of a checkpoint, as every command reads them."""
    checkpoint = open_checkpoint(path)
    refs: list[LayerRef] = []
    for file in checkpoint.files:
        layers = [weight.layer for weight in file.weights if len(weight.shape) == 4]
        with file.open(layers, None) as found:
            refs += found
    return refs


def edit_index(directory: Path, change: Mapping[str, Any]) -> None:
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"].update(change)
    path.write_text(json.dumps(index))


def assert_same(found: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    """Equal but for rounding: a matmul rounds otherwise where memory is aligned otherwise."""
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        eps = torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0
        torch.testing.assert_close(found[name], tensor, rtol=4 * eps, atol=4 * eps)


def assert_same_layers(found: PruneReport, expected: PruneReport) -> None:
    """The same rows, in any order, but for the time they took."""
    assert {layer.name for layer in found} == {layer.name for layer in expected}
    for layer in found:
        other = expected[layer.name]
        for field in ("shape", "method", "wavelet", "level_used", "kept"):
            assert getattr(layer, field) == getattr(other, field), (layer.name, field)
        assert layer.threshold == pytest.approx(other.threshold, rel=1e-6), layer.name
        assert layer.relative_error == pytest.approx(other.relative_error, rel=1e-5), layer.name
