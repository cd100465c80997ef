"""Prune the weights of a graph in memory."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import nn

from ..common.skipped import warn_skipped
from ..config import PruneConfig
from ..coverage import Coverage
from ..engine.layers import LayerRef, select_names, unique_layers
from ..errors import WavpruneError
from ..pruned import record_of
from .layers import GraphWeight, find_weights
from .model import Model, as_model, metadata_of, set_metadata
from .module import GraphModule
from .tensors import set_values

if TYPE_CHECKING:
    from onnx import ModelProto

    from ..report import PruneReport


def choose(weights: list[GraphWeight], config: PruneConfig) -> list[GraphWeight]:
    """The weights that ``targets`` and ``ignore`` select: kernels, and matrices by name.

    Raises:
        WavpruneError: there is none, or a pattern matches nothing.
    """
    allowed = {w.layer: w for w in weights if config.targets is not None or w.is_convolution}
    if not allowed:
        hint = "; its matrices are pruned where targets names them" if weights else ""
        raise WavpruneError(f"the graph has no convolution to prune{hint}")
    return [allowed[name] for name in select_names(list(allowed), config)]


def prune_graph(
    proto: ModelProto,
    config: PruneConfig,
    prune: Callable[[list[LayerRef]], PruneReport],
) -> PruneReport:
    """Prune the selected weights of a model in memory, in place; its metadata say how.

    Args:
        proto: the model, with its external data loaded.
        config: whose ``targets`` and ``ignore`` count.
        prune: prunes weights in place.

    Raises:
        WavpruneError: the model is not valid, or as ``prune``; nothing has changed.
    """
    model = as_model(proto)
    weights, skipped = find_weights(model)
    warn_skipped("the graph", skipped)
    chosen = choose(weights, config)
    refs = {weight.tensor: ref_of(model, weight) for weight in chosen}
    # Before anything changes: reading a report, or the metadata, may fail.
    report = prune(unique_layers(refs.values())).wait()
    record = record_in(model, report)
    tensors = [model.tensors[weight.tensor] for weight in chosen]
    report.coverage = Coverage.of_tensors(
        model.sizes(),
        [(tensor.numel, tensor.size) for tensor in tensors],
        {w.layer: len(w.shape) for w in weights if w not in chosen},
        skipped,
    )
    for weight in chosen:
        set_values(model.tensors[weight.tensor].proto, weight.back(refs[weight.tensor].weight))
    set_metadata(proto, record)
    return report


def record_in(model: Model, report: PruneReport) -> dict[str, str]:
    """What a model's metadata say when its layers are pruned as a report says.

    Raises:
        WavpruneError: they have an entry that this version does not write.
    """
    names = {weight.layer for weight in find_weights(model)[0]}
    return record_of(report, names, metadata_of(model.proto))


def ref_of(model: Model, weight: GraphWeight) -> LayerRef:
    """A copy of a weight in torch's order."""
    values = weight.of(model.tensors[weight.tensor].read()).contiguous()
    return LayerRef(weight.layer, values, weight.transposed)


def prune_as_module(proto: ModelProto, prune: Callable[[nn.Module], PruneReport]) -> PruneReport:
    """Prune the network of a graph as a module, and write what has changed into the graph.

    Raises:
        WavpruneError: an operator has no form in torch, or as ``prune``; nothing has changed.
    """
    model = as_model(proto)
    module = GraphModule(model)
    before = {name: values.clone() for name, values in module.tensors().items()}
    report = prune(module).wait()
    record = record_in(model, report)
    after = module.tensors()
    write(model, {name: values for name, values in after.items() if not same(values, before[name])})
    set_metadata(proto, record)
    return report


def same(one: torch.Tensor, other: torch.Tensor) -> bool:
    """True where two tensors have the same bits."""
    return torch.equal(one.reshape(-1).view(torch.uint8), other.reshape(-1).view(torch.uint8))


def write(model: Model, tensors: Mapping[str, torch.Tensor]) -> None:
    """Put other values into tensors of a model in memory.

    Raises:
        WavpruneError: the model has no such tensor, or one of another shape; nothing has changed.
    """
    check(model, tensors)
    for name, values in tensors.items():
        set_values(model.tensors[name].proto, values)


def check(model: Model, tensors: Mapping[str, torch.Tensor]) -> None:
    """Raise WavpruneError where tensors are not those of a model."""
    for name, values in tensors.items():
        known = model.tensors.get(name)
        if known is None or known.shape != tuple(values.shape):
            there = "no such tensor" if known is None else f"one of {known.shape}"
            raise WavpruneError(f"tensor {name!r} is {tuple(values.shape)}; the graph has {there}")
