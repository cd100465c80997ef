"""Biases after pruning: matched to the unpruned model, where no batch norm takes up the shift."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from ..calibration.network import Measuring, Network, Repairing, Values
from ..common.loaders import batches, check_loader, inputs_of
from ..engine.ambient import neutral
from ..engine.layers import LayerRef, named_layers
from ..engine.running import check_model, running, write_all
from ..errors import WavpruneError


def match_biases(
    model: nn.Module,
    reference: nn.Module,
    loader: Iterable[Any],
    device: str | torch.device | None = None,
) -> tuple[str, ...]:
    """Give the outputs of every layer with a bias the mean that they have in the unpruned model.

    That is what ``match_batchnorm`` does for layers before batch norms. Where these were folded
    into the layers, as exporters to ONNX do, the bias takes up the shift. All inputs run as one
    batch, and each bias is set before the layers that read its outputs run.

    Args:
        model: the pruned model; its biases change in place. Those of layers that a batch norm
            reads, that run more than once or that share their bias stay as they are.
        reference: the unpruned model.
        loader: batches of inputs ``(N, ...)``, alone, first in a tuple, or as ``pixel_values``;
            labels are ignored.
        device: where to run; None means where each model lives.

    Returns:
        The layers whose biases were set.

    Raises:
        TypeError: an argument has the wrong type.
        WavpruneError: the loader is empty, its inputs differ in shape, or the models have other
            layers. No bias has changed.

    Example:
        >>> import copy, wavprune
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(36, 2))
        >>> pruned, data = copy.deepcopy(net), [torch.randn(64, 1, 5, 5)]
        >>> report = wavprune.fast.prune(pruned, sparsity=0.8)
        >>> match_biases(pruned, net, data)
        ('0', '3')
        >>> mean, unpruned = (m(data[0]).mean(0) for m in (pruned, net))
        >>> torch.allclose(mean, unpruned, atol=1e-5)
        True
    """
    check_model(model)
    check_model(reference)
    check_loader(loader)
    inputs = [inputs_of(batch).detach() for batch in batches(loader)]
    if len({batch.shape[1:] for batch in inputs}) > 1:
        raise WavpruneError("loader: its inputs differ in shape; allowed: inputs of one shape")
    refs, own = _layers(reference), _layers(model)
    shapes, others = ({ref.name: ref.weight.shape for ref in found} for found in (refs, own))
    if shapes != others:
        wrong = min(name for name in shapes | others if shapes.get(name) != others.get(name))
        raise WavpruneError(
            f"reference: its layer {wrong!r} is {_shown(shapes, wrong)}; the pruned model's is "
            f"{_shown(others, wrong)}"
        )
    with neutral(), running(reference, device) as home:
        joined = torch.cat([batch.to(home) for batch in inputs])
        network = Network(reference, refs)
        sites = network.sites(joined[:1])
        measured = Measuring(network, sites)
        network.run(measured, joined)
        with running(model, device) as run_device:
            pruned = Network(model, own)
            values = Values(dict(pruned.weights))
            repairing = Repairing(pruned, values, measured.moments, sites, frozenset())
            pruned.run(repairing, joined.to(run_device))
            changes = [(pruned.biases[name], bias) for name, bias in values.biases.items()]
    write_all(changes)
    return tuple(values.biases)


def _layers(model: nn.Module) -> list[LayerRef]:
    """The weights of layers that may be called."""
    weights = {name: m._parameters.get("weight") for name, m in named_layers(model).items()}
    return [
        LayerRef(name, weight)
        for name, weight in weights.items()
        if weight is not None and weight.ndim > 1
    ]


def _shown(shapes: dict[str, torch.Size], name: str) -> str:
    return str(tuple(shapes[name])) if name in shapes else "missing"
