"""Batch norms taken into the layers before them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..calibration.network import Network, Site

# How far the outputs of the folded network may be from those of the other, relatively.
TOLERANCE = 1e-3


def fold(network: Network, sites: Mapping[str, Site]) -> dict[str, str]:
    """Fold, in place, every batch norm that reads the outputs of one layer and nothing else.

    A folded batch norm stays where it is, with a variance and a factor that come to 1, so that the
    state dict fits the model; it cannot be fine-tuned from there.

    Args:
        network: whose model is changed.
        sites: where its layers stand.

    Returns:
        The folded ones: name of the layer -> name of its batch norm.
    """
    folded = {}
    for name, site in sites.items():
        norm = None if site.norm is None else network.norms[site.norm]
        if norm is None or site.norm is None or not _can_fold(norm) or site.rows.transposed:
            continue
        layer = network.model.get_submodule(name)
        _fold(layer, norm)
        folded[name] = site.norm
    return folded


def _can_fold(norm: nn.modules.batchnorm._BatchNorm) -> bool:
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return all(tensor is not None for tensor in tensors)


def _fold(layer: nn.Module, norm: nn.modules.batchnorm._BatchNorm) -> None:
    weight, bias = layer.weight, layer._parameters.get("bias")
    assert isinstance(weight, torch.Tensor)
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
    shift = norm.bias.double() - norm.running_mean.double() * scale
    if bias is not None:
        shift = shift + bias.double() * scale
        bias.data.zero_()
    axes = [-1] + [1] * (weight.ndim - 1)
    weight.data.copy_(weight.double() * scale.view(axes))
    norm.bias.data.copy_(shift)
    norm.running_mean.zero_()
    norm.running_var.fill_(1)
    # In float32 it comes to 1 with the eps that batch norms have.
    norm.weight.data.fill_((1 + norm.eps) ** 0.5)


def same_outputs(before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]) -> bool:
    """Whether outputs are equal but for rounding."""
    for old, new in zip(before, after, strict=True):
        if float((new.double() - old.double()).norm()) > TOLERANCE * float(old.double().norm()):
            return False
    return True
