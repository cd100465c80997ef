from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn

import onnx
import wavprune
from tests.support import graphs
from tests.support.networks import LIKE
from wavprune import checkpoint
from wavprune.onnx import export, to_torch, update
from wavprune.report import PruneReport


def fine_tuned(network: nn.Module, inputs: torch.Tensor) -> PruneReport:
    """Prune a network while it learns for a few steps, as ``Pruner`` does it."""
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.01)
    convolutions = any(isinstance(module, nn.Conv2d) for module in network.modules())
    config = wavprune.PruneConfig(wavelet="dct")
    if not convolutions:
        config = wavprune.PruneConfig(method="min_weight", targets=("*",))
    pruner = wavprune.Pruner(network, config=config, schedule=wavprune.schedule.Constant(0.7))
    pruner.attach(optimizer)
    labels = torch.arange(len(inputs)) % 10
    for _ in range(3):
        optimizer.zero_grad()
        loss: torch.Tensor = nn.functional.cross_entropy(network(inputs), labels)
        torch.autograd.backward(loss)
        optimizer.step()
    network.eval()
    return pruner.finish()


NETWORKS = {"demo": wavprune.demo.resnet, "demo, MLP": wavprune.demo.mlp, **LIKE}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_was_pruned_fine_tuned_and_decompressed_runs_alike_in_onnxruntime(
    name: str, tmp_path: Path
) -> None:
    network = NETWORKS[name]()
    size = (1, 8, 8) if name.startswith("demo") else (3, 64, 64)
    inputs = torch.randn(6, *size, generator=torch.Generator().manual_seed(0))
    report = fine_tuned(network, inputs)
    saved = checkpoint.save(network, tmp_path / "net.safetensors", report=report, bits=8)
    back = NETWORKS[name]()
    back.load_state_dict(checkpoint.load(saved.path))
    with torch.no_grad():
        trained, expected = network(inputs), back(inputs)
    # An export takes seconds; the last one went through all three.
    models = [(network, trained), (back, expected)] if name == "demo, MLP" else [(back, expected)]
    for model, outputs in models:
        assert export(model, tmp_path / "net.onnx", inputs[:2]) < 1e-5
        # Another size of batches than that of the export.
        found = graphs.run(tmp_path / "net.onnx", inputs)
        np.testing.assert_allclose(found, outputs, atol=1e-5 * float(outputs.abs().max()))
    # The values were stored with 8 bits, which the outputs show.
    assert not torch.equal(trained, expected)
    graph = to_torch(tmp_path / "net.onnx")
    with torch.no_grad():
        torch.testing.assert_close(graph(inputs), expected, atol=1e-4, rtol=1e-4)


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
