from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import onnx
import wavprune
from tests.support import graphs
from wavprune import checkpoint
from wavprune.onnx import export, to_torch, update


def test_a_pruned_and_a_decompressed_network_run_alike_in_onnxruntime(tmp_path: Path) -> None:
    network = wavprune.demo.resnet()
    wavprune.fast.prune(network, sparsity=0.8)
    images, _ = next(iter(wavprune.demo.digits("test", batch_size=7)))
    assert export(network, tmp_path / "net.onnx", images[:2]) < 1e-5
    with torch.no_grad():
        expected = network(images)
    # Another size of batches than that of the export.
    np.testing.assert_allclose(graphs.run(tmp_path / "net.onnx", images), expected, atol=1e-4)
    checkpoint.save(network, tmp_path / "net.safetensors", bits=8)
    network.load_state_dict(checkpoint.load(tmp_path / "net.safetensors"))
    assert export(network, tmp_path / "back.onnx", images[:2]) < 1e-5
    assert not np.array_equal(graphs.run(tmp_path / "back.onnx", images), expected)


def test_a_network_that_was_trained_on_goes_back_into_its_graph(tmp_path: Path) -> None:
    model = graphs.network()
    network = to_torch(model)
    network.train()
    x = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    network(x).square().mean().backward()
    torch.optim.SGD(network.parameters(), 0.01).step()
    update(model, network)
    network.eval()
    with torch.no_grad():
        np.testing.assert_allclose(graphs.run(model, x), network(x), atol=1e-4)
    assert not np.allclose(graphs.run(graphs.network(), x), graphs.run(model, x))
    other = to_torch(
        graphs.model_of([onnx.helper.make_node("Conv", ["x", "w"], ["y"])], {"w": (2, 3, 3, 3)})
    )
    before = graphs.arrays(model)
    with pytest.raises(ValueError, match=r"tensor 'w' is \(2, 3, 3, 3\); the graph has no such"):
        update(model, other)
    assert all(np.array_equal(before[name], found) for name, found in graphs.arrays(model).items())


class Branching(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x if x.sum() > 0 else -x


def test_what_cannot_be_exported_is_one_line_and_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="Branching cannot be exported: ") as error:
        export(Branching(), tmp_path / "net.onnx", torch.ones(2, 3))
    assert "\n" not in str(error.value)
    with pytest.raises(ValueError, match=r"must be a file that ends in \.onnx"):
        export(nn.Flatten(), tmp_path / "net.pt", torch.ones(2, 3))
    assert list(tmp_path.iterdir()) == []


def test_a_large_model_gets_external_data(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wavprune.onnx.exporting.INLINE", 1000)
    layer = nn.Conv2d(3, 16, 3)
    assert (
        export(nn.Sequential(layer, nn.ReLU()), tmp_path / "net.onnx", torch.randn(2, 3, 8, 8))
        < 1e-5
    )
    assert (tmp_path / "net.onnx.data").stat().st_size >= 4 * 16 * 27
    assert (tmp_path / "net.onnx").stat().st_size < 4 * 16 * 27 + 10_000
    found = graphs.arrays(onnx.load(tmp_path / "net.onnx"))
    np.testing.assert_array_equal(found["0.weight"], layer.weight.detach())
