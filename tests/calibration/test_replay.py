from __future__ import annotations

import pytest
import torch
from torch import nn

from wavprune import PruneConfig
from wavprune.calibration.calls import Call
from wavprune.calibration.network import Measuring, Network, Repairing, Values
from wavprune.calibration.replay import Resumed, record
from wavprune.engine.layers import select_layers

from .test_prune import Net, data, net

LAYERS = ("stem", "depthwise", "pointwise", "grouped")


class Peeking(Net):
    """What a batch norm reads goes elsewhere, too."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        first = self.stem(x)
        x = self.norm(first).relu_() + first
        x = self.norm2(self.pointwise(self.depthwise(x).relu_())).relu_()
        logits: torch.Tensor = self.fc(self.grouped(x).mean((2, 3)))
        return logits


@torch.no_grad()
@pytest.mark.parametrize("layer", LAYERS)
@pytest.mark.parametrize("most_bytes", [0, 40_000, 1 << 30])
@pytest.mark.parametrize("kind", [Net, Peeking])
def test_a_resumed_run_has_the_bits_of_a_whole_one(
    kind: type[nn.Module], most_bytes: int, layer: str
) -> None:
    model, x = net(kind), data()[0]
    network = Network(model, select_layers(model, PruneConfig()))
    sites = network.sites(x)
    found = record(network, sites, x, most_bytes)
    assert torch.equal(found.outputs, network.outputs([x])[0])
    site = sites[layer]
    norms = frozenset([site.norm] if site.norm else [])
    weight = model.get_parameter(f"{layer}.weight").detach() * 0.5
    measuring = Measuring(network, sites)
    network.run(measuring, x)
    whole = Repairing(network, Values({layer: weight}), measuring.moments, sites, norms)
    resumed = Resumed(network, Values({layer: weight}), found, sites, norms)
    assert torch.equal(network.run(resumed, x), network.run(whole, x))


@torch.no_grad()
def test_layers_before_are_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    model, x = net(), data()[0]
    network = Network(model, select_layers(model, PruneConfig()))
    sites = network.sites(x)
    found = record(network, sites, x, 1 << 30)
    run, called = Call.run, []

    def counted(self: Call, *args: torch.Tensor, **kwargs: torch.Tensor) -> torch.Tensor:
        called.append(self.weight.shape[0])
        return run(self, *args, **kwargs)

    monkeypatch.setattr(Call, "run", counted)
    weight = model.get_parameter("grouped.weight").detach()
    network.run(Resumed(network, Values({"grouped": weight}), found, sites), x)
    assert called == [12]
