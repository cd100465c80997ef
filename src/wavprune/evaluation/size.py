"""How many bytes a pruned model takes in a file."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from ..report import LayerStats, PruneReport


def stored_bytes(model: nn.Module, report: PruneReport | None = None) -> int:
    """The bytes that a file of this model's state dict must hold.

    A pruned layer is stored as one bit a coefficient, which says whether it was kept, and the kept
    values in the weight's own dtype; the ``klt`` basis stores its ``K x K`` matrix too. Where the
    dense weight is smaller than that, it is stored dense::

        min(numel * itemsize, ceil(coefficients / 8) + kept * itemsize [+ K * K * itemsize])

    Structural zeros are no coefficients, so they cost nothing. Every other entry of the state dict
    is stored dense, and a tensor that several entries share is stored once. Entropy coding and a
    file's own header are left out: they are the same question for every method.

    Args:
        model: the model whose state dict is stored.
        report: what was pruned in it; None counts every entry as dense.

    Returns:
        Bytes.

    Raises:
        ValueError: the report names a layer that the model does not have, or of another shape.

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
    seen: set[object] = set()
    total = 0
    for key, stats in _pruned(state, report).items():
        seen.add(_place(key, state[key]))
        total += layer_bytes(stats, state[key].element_size())
    for key, value in state.items():
        place = _place(key, value)
        if isinstance(value, torch.Tensor) and place not in seen:
            seen.add(place)
            total += value.numel() * value.element_size()
    return total


def layer_bytes(stats: LayerStats, itemsize: int) -> int:
    """The bytes of one pruned layer's weight, by the formula of ``stored_bytes``.

    Args:
        stats: the layer's row in a report.
        itemsize: bytes of one value.
    """
    pruned = -(-stats.coefficients // 8) + stats.kept * itemsize
    if stats.wavelet == "klt":
        pruned += math.prod(stats.shape[2:]) ** 2 * itemsize
    return min(stats.numel * itemsize, pruned)


def exact_zeros(model: nn.Module, report: PruneReport | None = None) -> tuple[int, int]:
    """How many weights are exactly 0, and of how many.

    Args:
        model: the model to look at.
        report: look at the layers of this report; None looks at every parameter of two or more
            axes, each once.

    Raises:
        ValueError: the report names a layer that the model does not have, or of another shape.
    """
    if report is None:
        weights = [weight.detach() for weight in model.parameters() if weight.ndim > 1]
    else:
        state = model.state_dict()
        weights = [state[key] for key in _pruned(state, report)]
    total = sum(weight.numel() for weight in weights)
    return total - sum(int(weight.count_nonzero()) for weight in weights), total


def _pruned(state: Mapping[str, Any], report: PruneReport | None) -> dict[str, LayerStats]:
    found = {}
    for stats in report or ():
        key = f"{stats.name}.weight" if stats.name else "weight"
        if key not in state:
            raise ValueError(f"report: the model has no {key!r}; it has {_some(state)}")
        if tuple(state[key].shape) != tuple(stats.shape):
            raise ValueError(
                f"report: layer {stats.name!r} is {tuple(stats.shape)}, in the model "
                f"{tuple(state[key].shape)}"
            )
        found[key] = stats
    return found


def _some(state: Mapping[str, Any]) -> str:
    return ", ".join(list(state)[:8]) + (", ..." if len(state) > 8 else "")


def _place(key: str, value: Any) -> object:
    if not isinstance(value, torch.Tensor) or value.layout != torch.strided or not value.numel():
        return key
    # A tensor on the meta device has no address of its own.
    address = value.data_ptr()
    return (address, value.shape, value.stride(), value.device) if address else key
