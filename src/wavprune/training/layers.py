"""The layers of a model in training, and whether they still are the model's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from ..engine.layers import LayerRef, named_layers, unique_layers
from ..engine.sharding import as_sharded

# The shape, strides, dtype and device of a weight: what a plan depends on.
Signature = tuple[Any, ...]


def signatures(refs: Sequence[LayerRef]) -> list[Signature]:
    """One per layer."""
    weights = [ref.weight for ref in refs]
    return [(weight.shape, weight.stride(), weight.dtype, weight.device) for weight in weights]


class WatchedLayers:
    """The pruned layers of a model that is being trained.

    Args:
        model: what is trained.
        refs: its layers, by their names in it.

    Attributes:
        refs: the layers.
        model: the model.
    """

    def __init__(self, model: nn.Module, refs: Sequence[LayerRef]) -> None:
        self.model = model
        self.refs = list(refs)
        modules = named_layers(model)
        self._modules = [modules[ref.name] for ref in refs]
        self._shapes = [ref.weight.shape for ref in refs]
        self._edges = self._edges_to_layers()
        self._signatures = signatures(refs)

    def check(self) -> None:
        """Raise where a layer or its weight is not the model's any more.

        Raises:
            RuntimeError: the model has another layer or weight in its place.
            WavpruneError: a weight cannot be pruned any more.
        """
        if any(parent._modules.get(key) is not child for parent, key, child in self._edges):
            self._follow_modules()
        for ref, module in zip(self.refs, self._modules, strict=True):
            weight = module._parameters.get("weight")
            if weight is not ref.weight:
                # While it computes, fully_shard puts whole weights where the sharded ones were.
                whole = weight is not None and as_sharded(weight) is None
                if not (whole and as_sharded(ref.weight) is not None):
                    raise _replaced(ref, "its weight is not the Parameter any more")
        current = signatures(self.refs)
        if current != self._signatures:
            self._check_weights()
            self._signatures = current

    def _check_weights(self) -> None:
        for ref, shape in zip(self.refs, self._shapes, strict=True):
            if ref.weight.shape != shape:
                raise RuntimeError(
                    f"layer {ref.name!r}: its weight is {tuple(ref.weight.shape)} now and was "
                    f"{tuple(shape)} when this pruner was made; make the Pruner after that"
                )
        unique_layers(self.refs)

    def _follow_modules(self) -> None:
        """Find the layers that moved in the model, such as into a wrapper."""
        modules = list(self.model.modules())
        present = set(map(id, modules))
        owners = {id(module._parameters.get("weight")): module for module in modules}
        for i, (ref, module) in enumerate(zip(self.refs, self._modules, strict=True)):
            if id(module) not in present:
                if id(ref.weight) not in owners:
                    raise _replaced(ref, "it is not the layer of the model any more")
                self._modules[i] = owners[id(ref.weight)]
        self._edges = self._edges_to_layers()

    def _edges_to_layers(self) -> list[tuple[nn.Module, str, nn.Module]]:
        """From the model to its layers: each parent, with the name and identity of its child."""
        inside = set(map(id, self._modules))
        modules = self.model.named_modules(remove_duplicate=False)
        names = {name for name, module in modules if id(module) in inside}
        edges: dict[tuple[int, str], tuple[nn.Module, str, nn.Module]] = {}
        for name in names:
            parent: nn.Module = self.model
            for key in name.split(".") if name else ():
                child = parent._modules[key]
                assert child is not None
                edges[id(parent), key] = (parent, key, child)
                parent = child
        return list(edges.values())


def _replaced(ref: LayerRef, reason: str) -> RuntimeError:
    return RuntimeError(
        f"layer {ref.name!r}: {reason} that this pruner was made for "
        "(load_state_dict(assign=True), fully_shard, parametrizations and assignments replace "
        "it); make the Pruner after that"
    )


def trainable(weights: Sequence[torch.Tensor]) -> bool:
    """True where an optimizer is to train at least one of them."""
    return any(weight.requires_grad for weight in weights)
