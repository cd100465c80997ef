"""What the batch norms of a model see: mean and variance of their inputs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm


class Moments(NamedTuple):
    """Of the inputs of one batch norm, float64 on the CPU.

    Attributes:
        number: values a channel.
        mean: ``(C,)``.
        var: ``(C,)``, the population's.
    """

    number: int
    mean: torch.Tensor
    var: torch.Tensor


class Seen(NamedTuple):
    """What the batch norms of a model saw of one batch.

    Attributes:
        shape: the shape of the model's inputs.
        total: the sum of their magnitudes: with the shape, it tells one batch from another.
        moments: of the inputs of each batch norm, by its name, one entry a call.
    """

    shape: tuple[int, ...]
    total: float
    moments: dict[str, list[Moments]]


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """The batch norms that have running statistics: the others read their own batch."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    }


def watch(
    model: nn.Module, inputs: torch.Tensor, see: Callable[[str, BatchNorm, Moments], None]
) -> None:
    """Run a batch, and show ``see`` the inputs of every batch norm just before it takes them."""
    with ExitStack() as stack:
        for name, norm in batch_norms(model).items():

            def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                see(name, cast(BatchNorm, module), _moments(name, args[0]))

            stack.callback(norm.register_forward_pre_hook(hook).remove)
        model(inputs)


def measured(model: nn.Module, inputs: torch.Tensor) -> Seen:
    """Run a batch, and return what every batch norm saw of it."""
    found: dict[str, list[Moments]] = {}
    watch(model, inputs, lambda name, _, moments: found.setdefault(name, []).append(moments))
    return Seen(tuple(inputs.shape), total_of(inputs), found)


def total_of(inputs: torch.Tensor) -> float:
    """The sum of the magnitudes, in double."""
    return float(inputs.cpu().double().abs().sum())


def pooled(batches: Sequence[Seen]) -> dict[str, Moments]:
    """The moments of all calls of each batch norm together."""
    calls: dict[str, list[Moments]] = {}
    for batch in batches:
        for name, moments in batch.moments.items():
            calls.setdefault(name, []).extend(moments)
    return {name: _merged(moments) for name, moments in calls.items()}


def _moments(name: str, inputs: torch.Tensor) -> Moments:
    # (N, C, values of a plane): one where there is no plane.
    planes = inputs.detach().reshape(*inputs.shape[:2], -1)
    if planes.dtype not in (torch.float32, torch.float64):
        planes = planes.float()
    # Twice over a plane in its own precision, then over all planes in double: as exact as double
    # throughout, and several times as fast.
    means = planes.mean(2, keepdim=True)
    variances = (planes - means).square_().mean(2).cpu().double()
    means = means[..., 0].cpu().double()
    mean = means.mean(0)
    var = variances.mean(0) + means.var(0, correction=0)
    if not bool(torch.isfinite(var).all()):
        raise ValueError(f"batch norm {name!r}: its inputs are not finite")
    return Moments(planes.shape[0] * planes.shape[2], mean, var)


def _merged(moments: Sequence[Moments]) -> Moments:
    number = sum(each.number for each in moments)
    shares = torch.tensor([[each.number / number] for each in moments], dtype=torch.float64)
    means = torch.stack([each.mean for each in moments])
    mean = (shares * means).sum(0)
    within = torch.stack([each.var for each in moments])
    return Moments(number, mean, (shares * (within + (means - mean) ** 2)).sum(0))
