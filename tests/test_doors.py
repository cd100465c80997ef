"""A model that is a single bare layer, which has no name, through every door."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import wavprune
from wavprune import PruneConfig, checkpoint
from wavprune.cli import main

HAAR = PruneConfig(wavelet="haar", sparsity=0.75)
INPUTS = [torch.randn(8, 4, 5, 5, generator=torch.Generator().manual_seed(3))]


def bare() -> nn.Conv2d:
    torch.manual_seed(0)
    return nn.Conv2d(4, 8, 3)


def by_call() -> torch.Tensor:
    """The weight that every door has to give."""
    net = bare()
    wavprune.fast.prune(net, wavelet="haar", sparsity=0.75)
    return net.weight.detach()


def pruner(_: Path) -> torch.Tensor:
    net = bare()
    one = wavprune.Pruner(net, config=HAAR)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    one.attach(optimizer)
    net(INPUTS[0]).square().mean().backward()
    optimizer.step()
    assert len(one.finish()) == 1
    return net.weight.detach()


def reference(_: Path) -> torch.Tensor:
    net = bare()
    wavprune.reference.prune(net, wavelet="haar", sparsity=0.75)
    return net.weight.detach()


def saved(folder: Path, **how: Any) -> torch.Tensor:
    net = how.pop("model", None) or bare()
    checkpoint.save(net, folder / "a.safetensors", values="float32", **how)
    return checkpoint.load(folder / "a.safetensors")["weight"]


def saved_by_report(folder: Path) -> torch.Tensor:
    net = bare()
    return saved(folder, model=net, report=wavprune.fast.prune(net, wavelet="haar", sparsity=0.75))


def saved_globally(folder: Path) -> torch.Tensor:
    return saved(folder, config=PruneConfig(wavelet="haar", sparsity=0.75, scope="global"))


def attached(folder: Path) -> torch.Tensor:
    net = bare()
    expected = checkpoint.save(
        net, folder / "a.safetensors", coder="trellis", step=1e-4, config=HAAR
    )
    checkpoint.attach(net, expected.path)
    identity = torch.eye(4 * 9).reshape(36, 4, 3, 3)
    with torch.no_grad():
        rows = net(identity).reshape(36, 8) - net.bias
    weight: torch.Tensor = rows.T.reshape(8, 4, 3, 3)
    return weight


def files(folder: Path) -> Path:
    save_file(bare().state_dict(), folder / "in.safetensors")
    return folder


def by_command(folder: Path) -> torch.Tensor:
    line = f"prune {files(folder) / 'in.safetensors'} -o {folder / 'out.safetensors'}"
    assert main([*line.split(), "--wavelet", "haar", "--sparsity", "0.75"]) == 0
    return load_file(folder / "out.safetensors")["weight"]


def by_two_commands(folder: Path) -> torch.Tensor:
    by_command(folder)
    line = f"compress {folder / 'out.safetensors'} -o {folder / 'small.safetensors'}"
    assert main([*line.split(), "--values", "float32"]) == 0
    assert main(["inspect", str(folder / "small.safetensors")]) == 0
    line = f"decompress {folder / 'small.safetensors'} -o {folder / 'back.safetensors'}"
    assert main(line.split()) == 0
    return load_file(folder / "back.safetensors")["weight"]


def wrapped(_: Path) -> torch.Tensor:
    net = bare()
    wavprune.fast.prune(nn.DataParallel(net), wavelet="haar", sparsity=0.75)
    return net.weight.detach()


DOORS: list[Callable[[Path], torch.Tensor]] = [
    *(reference, pruner, saved_by_report, saved_globally, attached, by_command, by_two_commands),
    wrapped,
]


@pytest.mark.parametrize("door", DOORS, ids=lambda door: door.__name__)
def test_a_bare_layer_is_pruned_alike(door: Callable[[Path], torch.Tensor], tmp_path: Path) -> None:
    torch.testing.assert_close(door(tmp_path), by_call(), rtol=0, atol=2e-4)


def test_a_bare_layer_is_measured_compared_and_calibrated() -> None:
    net = nn.Conv2d(4, 3, 5)
    labels = torch.arange(8) % 3
    pooled = copy.deepcopy(net)
    pooled.register_forward_hook(lambda _, __, output: output.flatten(1))
    loader = [(INPUTS[0], labels)]
    report = wavprune.fast.prune(copy.deepcopy(pooled), sparsity=0.5)
    assert report.dense_bytes == 4 * (4 * 3 * 25 + 3)
    assert wavprune.evaluate(pooled, loader, report=report).samples == 8
    table = wavprune.compare(
        pooled, loader, sparsities=[0.5], calibration=None, wavelets=["uhaar", "dct"]
    )
    assert len(table) >= 2
    calibrated = wavprune.fast.prune(
        copy.deepcopy(pooled), calibration=INPUTS * 4, calibration_level="select"
    )
    assert calibrated.decision is not None


def test_a_bare_layer_is_stored_from_inputs(tmp_path: Path) -> None:
    net = nn.Conv2d(4, 3, 5)
    path = tmp_path / "a.safetensors"
    saved = checkpoint.save(net, path, calibration=INPUTS * 4, target_kl=0.01)
    assert saved.layers[0].name == "weight"
    back = nn.Conv2d(4, 3, 5)
    back.load_state_dict(checkpoint.load(path))
    with torch.no_grad():
        error = (back(INPUTS[0]) - net(INPUTS[0])).norm() / net(INPUTS[0]).norm()
    assert 0 < float(error) < 0.2


FACTORY = """
import torch

def net():
    torch.manual_seed(0)
    layer = torch.nn.Conv2d(4, 3, 5)
    layer.register_forward_hook(lambda _, __, output: output.flatten(1))
    return layer

def data():
    torch.manual_seed(1)
    return [(torch.randn(8, 4, 5, 5), torch.arange(8) % 3)]
"""


def test_a_sweep_of_a_bare_layer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FACTORY)
    (tmp_path / "sweep.yaml").write_text(
        "models: [{name: bare, factory: 'mine:net'}]\n"
        "data: {factory: 'mine:data'}\n"
        "grid: {method: [dwt, min-weight], sparsity: [0.5]}\n"
    )
    assert main(["sweep", "sweep.yaml", "--jobs", "1"]) == 0
