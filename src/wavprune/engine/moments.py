"""Mean and variance of the inputs of every batch norm of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils.hooks import RemovableHandle

from ..errors import WavpruneError
from .running import always


class Moments(NamedTuple):
    """Of the inputs of one batch norm, float64 on the CPU.

    Attributes:
        num_values: values per channel.
        mean: ``(C,)``.
        var: ``(C,)``, the population variance.
    """

    num_values: int
    mean: torch.Tensor
    var: torch.Tensor


class BatchMoments(NamedTuple):
    """Moments of one batch.

    Attributes:
        shape: the shape of the model's inputs.
        magnitude: the sum of their magnitudes: with the shape, it tells one batch from another.
        moments: name of each batch norm -> the moments of its inputs, one entry per call.
    """

    shape: tuple[int, ...]
    magnitude: float
    moments: dict[str, list[Moments]]

    def measured_on(self, inputs: torch.Tensor) -> bool:
        """Whether these are the moments of this batch."""
        # The order of a sum depends on the number of threads.
        same = math.isclose(magnitude_of(inputs), self.magnitude, rel_tol=1e-9)
        return same and self.shape == tuple(inputs.shape)


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """The batch norms with running statistics; the others use those of their own batch."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    }


def observe(
    model: nn.Module, inputs: torch.Tensor, observer: Callable[[str, BatchNorm, Moments], None]
) -> None:
    """Run a batch, and call ``observer`` just before each call of a batch norm.

    Autocast is switched off: the moments belong to the model in its own precision.

    Args:
        model: the model to run.
        inputs: ``(N, ...)``, on its device.
        observer: gets the batch norm's name, the batch norm and the moments of its inputs.
    """
    handles: list[RemovableHandle] = []

    def remove() -> None:
        for handle in handles:
            handle.remove()

    with always(remove), torch.autocast(inputs.device.type, enabled=False):
        for name, norm in batch_norms(model).items():

            def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                observer(name, cast(BatchNorm, module), moments_of(name, args[0]))

            handles.append(norm.register_forward_pre_hook(hook))
        model(inputs)


def measure_moments(model: nn.Module, inputs: torch.Tensor) -> BatchMoments:
    """Run a batch, and return the moments of the inputs of every batch norm."""
    moments: dict[str, list[Moments]] = {}
    observe(model, inputs, lambda name, _, call: moments.setdefault(name, []).append(call))
    return BatchMoments(tuple(inputs.shape), magnitude_of(inputs), moments)


def magnitude_of(inputs: torch.Tensor) -> float:
    """The sum of the magnitudes, in float64."""
    return float(inputs.cpu().double().abs().sum())


def pooled(batches: Sequence[BatchMoments]) -> dict[str, Moments]:
    """The moments of all calls of each batch norm together."""
    calls: dict[str, list[Moments]] = {}
    for batch in batches:
        for name, moments in batch.moments.items():
            calls.setdefault(name, []).extend(moments)
    return {name: merged(moments) for name, moments in calls.items()}


def moments_of(name: str, inputs: torch.Tensor) -> Moments:
    """The moments of one call's inputs.

    Args:
        name: of the batch norm, for the message.
        inputs: ``(N, C, ...)``.

    Raises:
        WavpruneError: an input is not finite.
    """
    # (N, C, spatial size), 1 where there is no spatial axis.
    planes = inputs.detach().reshape(*inputs.shape[:2], -1)
    if planes.dtype not in (torch.float32, torch.float64):
        planes = planes.float()
    # Two passes over a plane in its own precision, then over the planes in float64: as exact as
    # float64 throughout, and several times as fast.
    plane_means = planes.mean(2, keepdim=True)
    plane_vars = (planes - plane_means).square_().mean(2).cpu().double()
    plane_means = plane_means[..., 0].cpu().double()
    mean = plane_means.mean(0)
    var = plane_vars.mean(0) + plane_means.var(0, correction=0)
    if not bool(torch.isfinite(var).all()):
        raise WavpruneError(f"batch norm {name!r}: its inputs are not finite")
    return Moments(planes.shape[0] * planes.shape[2], mean, var)


def merged(calls: Sequence[Moments]) -> Moments:
    """The moments of several calls together."""
    num_values = sum(call.num_values for call in calls)
    shares = torch.tensor(
        [[call.num_values / num_values] for call in calls], dtype=torch.float64, device="cpu"
    )
    means = torch.stack([call.mean for call in calls])
    mean = (shares * means).sum(0)
    variances = torch.stack([call.var for call in calls])
    return Moments(num_values, mean, (shares * (variances + (means - mean) ** 2)).sum(0))
