"""How many bytes a pruned model takes in a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..bases import family_of
from ..common.tensors import memory_key
from ..errors import WavpruneError
from ..report import LayerStats, PruneReport


def stored_bytes(model: nn.Module, report: PruneReport | None = None) -> int:
    """The bytes that a file of this model's state dict must hold.

    A pruned layer is stored as one bit per coefficient, which says whether it was kept, and the
    kept values in the weight's own dtype; a basis that was computed from the layer (``"klt"``)
    stores its ``K x K`` matrix too. Where the dense weight is smaller than that, it is stored
    dense::

        min(numel * itemsize, ceil(coefficients / 8) + kept * itemsize [+ K * K * itemsize])

    Structural zeros are not stored. Every other entry of the state dict is stored dense, and a
    tensor that several entries share is stored once. Entropy coding and a file's own header are
    left out, as they do not depend on the method.

    Args:
        model: the model whose state dict is stored.
        report: what was pruned in it; None counts every entry as dense.

    Returns:
        Bytes.

    Raises:
        WavpruneError: the report names a layer that the model does not have, or of another shape.

    Example:
        >>> import wavprune
        >>> net = nn.Conv2d(8, 16, 3, bias=False)
        >>> stored_bytes(net)
        4608
        >>> net = nn.Sequential(net)
        >>> stored_bytes(net, wavprune.fast.prune(net, sparsity=0.75))
        1296
    """
    state = model.state_dict()
    counted: set[object] = set()
    total = 0
    if report is not None:
        for key, stats in _pruned_layers(state, report).items():
            counted.add(memory_key(state[key]))
            total += layer_bytes(report, stats, state[key].element_size())
    for value in state.values():
        if isinstance(value, torch.Tensor) and memory_key(value) not in counted:
            counted.add(memory_key(value))
            total += value.numel() * value.element_size()
    return total


def layer_bytes(report: PruneReport, stats: LayerStats, itemsize: int) -> int:
    """The bytes of one pruned layer's weight, by the formula of ``stored_bytes``.

    Args:
        report: what was pruned.
        stats: the layer's row in it.
        itemsize: bytes of one value.
    """
    pruned = -(-stats.coefficients // 8) + (stats.kept + basis_values(report, stats)) * itemsize
    return min(stats.numel * itemsize, pruned)


def basis_values(report: PruneReport, stats: LayerStats) -> int:
    """How many values a file must store for the basis of a layer itself.

    Args:
        report: what was pruned.
        stats: the layer's row in it.
    """
    if stats.name in report.bases:
        return report.bases[stats.name].stored_values
    # A report that was read from a file has no bases: a data-driven one stores a K x K matrix.
    return math.prod(stats.shape[2:]) ** 2 if family_of(stats.wavelet).data_driven else 0


def exact_zeros(model: nn.Module, report: PruneReport | None = None) -> tuple[int, int]:
    """How many weights are exactly 0, and how many there are.

    Args:
        model: the model to look at.
        report: look at the layers of this report; None looks at every parameter of two or more
            axes, each once.

    Raises:
        WavpruneError: the report names a layer that the model does not have, or of another shape.
    """
    if report is None:
        weights = [weight.detach() for weight in model.parameters() if weight.ndim > 1]
    else:
        state = model.state_dict()
        weights = [state[key] for key in _pruned_layers(state, report)]
    total = sum(weight.numel() for weight in weights)
    return total - sum(int(weight.count_nonzero()) for weight in weights), total


def _pruned_layers(state: Mapping[str, Any], report: PruneReport) -> dict[str, LayerStats]:
    """State dict key of each pruned weight -> its layer's row in the report."""
    layers = {}
    for stats in report:
        key = f"{stats.name}.weight" if stats.name else "weight"
        if key not in state:
            shown = ", ".join(list(state)[:8]) + (", ..." if len(state) > 8 else "")
            raise WavpruneError(f"report: the model has no {key!r}; it has {shown}")
        if tuple(state[key].shape) != tuple(stats.shape):
            raise WavpruneError(
                f"report: layer {stats.name!r} is {tuple(stats.shape)}, in the model "
                f"{tuple(state[key].shape)}"
            )
        layers[key] = stats
    return layers
