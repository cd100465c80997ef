"""The share of a model that some of its layers are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import nn

from ..coverage import NOT_SELECTED, Coverage, Skipped
from .layers import CONVOLUTIONS, LayerRef, named_layers

OTHER_KIND = "not of a kind that is pruned"


def coverage_of_weights(refs: Sequence[LayerRef]) -> Coverage:
    """The coverage of weights that came without a model: all of what is known."""
    sizes = [ref.weight.numel() for ref in refs]
    stored = sum(size * ref.weight.element_size() for size, ref in zip(sizes, refs, strict=True))
    return Coverage(sum(sizes), sum(sizes), stored, 0, len(refs))


def coverage_of(model: nn.Module, refs: Sequence[LayerRef]) -> Coverage:
    """The share of a model that its selected layers are, and which layers were not selected.

    Args:
        model: any module; its state dict is not made, which may gather what is sharded.
        refs: the selected layers, each weight once.
    """
    own = coverage_of_weights(refs)
    selected = {id(ref.weight) for ref in refs}
    parameters = {id(parameter): parameter for parameter in model.parameters()}
    buffers = {id(buffer): buffer for buffer in _stored_buffers(model)}
    tensors = [*parameters.values(), *buffers.values()]
    stored = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    skipped = []
    for name, module in named_layers(model).items():
        for parameter in module._parameters.values():
            if parameter is not None and parameter.ndim > 1 and id(parameter) not in selected:
                prunable = isinstance(module, (*CONVOLUTIONS, nn.Linear))
                reason = NOT_SELECTED if prunable else OTHER_KIND
                skipped.append(Skipped(name, type(module).__name__, reason))
                break
    return Coverage(
        pruned=own.pruned,
        parameters=sum(parameter.numel() for parameter in parameters.values()),
        bytes=stored,
        other_bytes=stored - own.bytes,
        tensors=len(tensors),
        skipped=tuple(skipped),
    )


def _stored_buffers(model: nn.Module) -> Iterator[torch.Tensor]:
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                yield buffer
