"""Mean and variance of the inputs of every batch norm of a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.utils.hooks import RemovableHandle

from ..common.clock import Part, timed
from ..common.interrupts import always
from ..errors import WavpruneError
from .ambient import without_autocast

# Values of a block.
BLOCK = 1 << 16
FEWEST_ROWS = 8
# Means over so few values take longer than means over as many samples.
SHORT = 32


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


class BatchKey(NamedTuple):
    """What tells one batch of a loader from another.

    Attributes:
        shape: the shape of the model's inputs.
        magnitude: the sum of their magnitudes.
    """

    shape: tuple[int, ...]
    magnitude: float

    @classmethod
    def of(cls, inputs: torch.Tensor) -> BatchKey:
        """The key of a batch."""
        values = inputs.detach().cpu()
        if values.is_floating_point():
            magnitude = torch.linalg.vector_norm(values, 1, dtype=torch.float64)
        else:
            magnitude = values.double().abs().sum()
        return cls(tuple(inputs.shape), float(magnitude))

    def fits(self, inputs: torch.Tensor) -> bool:
        """Whether this is the key of this batch."""
        if self.shape != tuple(inputs.shape):
            return False
        # The order of a sum depends on the number of threads.
        return math.isclose(self.of(inputs).magnitude, self.magnitude, rel_tol=1e-9)


class BatchMoments(NamedTuple):
    """Moments of batches that ran as one.

    Attributes:
        keys: of the batches.
        moments: name of each batch norm -> the moments of its inputs, one entry per call.
    """

    keys: tuple[BatchKey, ...]
    moments: dict[str, list[Moments]]


def batch_norms(model: nn.Module) -> dict[str, BatchNorm]:
    """The batch norms with running statistics; the others use those of their own batch."""
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, BatchNorm) and module.running_mean is not None
    }


def observe(
    model: nn.Module,
    inputs: torch.Tensor,
    observer: Callable[[str, BatchNorm, torch.Tensor], None],
    part: Part = "reference",
) -> Any:
    """Run a batch, and call ``observer`` just before each call of a batch norm.

    Autocast is switched off: the moments belong to the model in its own precision.

    Args:
        model: the model to run.
        inputs: ``(N, ...)``, on its device.
        observer: gets the batch norm's name, the batch norm and its inputs.
        part: what the clock calls the time of the model.

    Returns:
        What the model returns.
    """
    handles: list[RemovableHandle] = []

    def remove() -> None:
        for handle in handles:
            handle.remove()

    with always(remove), without_autocast(inputs.device.type), timed(part):
        for name, norm in batch_norms(model).items():

            def hook(module: nn.Module, args: tuple[Any, ...], name: str = name) -> None:
                with timed("moments"):
                    observer(name, cast(BatchNorm, module), args[0])

            handles.append(norm.register_forward_pre_hook(hook))
        return model(inputs)


def measure_moments(model: nn.Module, inputs: torch.Tensor) -> dict[str, list[Moments]]:
    """Run a batch, and return the moments of the inputs of every batch norm, for each call."""
    moments: dict[str, list[Moments]] = {}

    def measure(name: str, norm: BatchNorm, values: torch.Tensor) -> None:
        moments.setdefault(name, []).append(moments_of(name, values))

    observe(model, inputs, measure)
    return moments


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
    # Two passes over parts of a channel in its own precision, then over the parts in float64: as
    # exact as float64 throughout, and several times as fast.
    channels_last = planes.transpose(1, 2)
    if channels_last.is_contiguous():
        mean, var = _of_columns(channels_last.flatten(0, 1)[..., None])
    elif planes.shape[2] <= SHORT:
        mean, var = _of_columns(planes)
    else:
        mean, var = _of_planes(planes)
    if not bool(torch.isfinite(var).all()):
        raise WavpruneError(f"batch norm {name!r}: its inputs are not finite")
    return Moments(planes.shape[0] * planes.shape[2], mean, var)


def _of_planes(planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance ``(C,)`` of ``(N, C, size)``, from those of each plane."""
    if planes.is_contiguous():
        # Which planes share a block changes nothing, unlike which rows do below.
        centered = (
            _centered(block, 1) for block in _blocks(planes.flatten(0, 1), torch.get_num_threads())
        )
        blocks = [(means[:, 0], squares.mean(1)) for means, squares in centered]
        means, variances = (torch.cat(parts) for parts in zip(*blocks, strict=True))
        means, variances = means.view(planes.shape[:2]), variances.view(planes.shape[:2])
    else:
        means, squares = _centered(planes, 2)
        means, variances = means[..., 0], squares.mean(2)
    means = means.cpu().double()
    return means.mean(0), variances.cpu().double().mean(0) + means.var(0, correction=0)


def _of_columns(planes: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Mean and variance ``(C,)`` of ``(N, C, size)``, from those of each place in a plane."""
    rows = planes.flatten(1)
    moments = []
    for block in _blocks(rows):
        means, squares = _centered(block, 0)
        means, variances = means[0].cpu().double(), squares.mean(0).cpu().double()
        moments.append(Moments(len(block), means, variances))
    places = merged(moments)
    mean, var = places.mean.view(planes.shape[1:]), places.var.view(planes.shape[1:])
    return mean.mean(1), var.mean(1) + mean.var(1, correction=0)


def _blocks(rows: torch.Tensor, threads: int = 1) -> tuple[torch.Tensor, ...]:
    """Rows in blocks that stay in the caches of the CPU while they are read more than once."""
    if rows.device.type != "cpu":
        return (rows,)
    return torch.split(rows, max(BLOCK * threads // max(rows.shape[1], 1), FEWEST_ROWS))


def _centered(values: torch.Tensor, dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The means over an axis, which stays as one of length 1, and the squared distances to them."""
    means = values.mean(dim, keepdim=True)
    return means, (values - means).square_()


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
