"""Batches of a loader that run as one: a network is matched on all of them in one pass.

Each batch norm then sees the inputs of all batches before it normalizes any of them, so those
behind it get matched inputs already.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from ..common.loaders import inputs_of
from ..engine.moments import (
    BatchKey,
    BatchMoments,
    Moments,
    measure_moments,
    moments_of,
    observe,
    pooled,
)
from ..errors import WavpruneError

# Batches are joined as long as no batch norm gets more than this.
JOINED_BYTES = 1 << 30
# Samples that show whether those of a batch influence each other.
PROBE = 4
# How far, in standard deviations, rounding alone may move moments.
TOLERANCE = 1e-2

# Batches that run as one.
Group = list[Any]


class OtherBatchesError(WavpruneError):
    """The loader yields other batches than those that moments were measured on."""


def joined_inputs(group: Group, device: torch.device) -> torch.Tensor:
    """The inputs ``(N, ...)`` of all batches, on a device."""
    inputs = [inputs_of(batch).to(device) for batch in group]
    return inputs[0] if len(inputs) == 1 else torch.cat(inputs)


def measured(
    model: nn.Module, loader: Iterable[Any], device: torch.device
) -> Iterator[tuple[BatchMoments, Group]]:
    """Join the batches of a loader, and measure the inputs of a model's batch norms on them.

    Args:
        model: the unpruned model.
        loader: its batches.
        device: where the model is.

    Yields:
        The moments, and the batches that they were measured on.
    """
    for group in _joined(model, loader, device):
        keys = tuple(BatchKey.of(inputs_of(batch)) for batch in group)
        yield BatchMoments(keys, measure_moments(model, joined_inputs(group, device))), group


def replayed(
    loader: Iterable[Any], groups: Sequence[BatchMoments]
) -> Iterator[tuple[BatchMoments, Group]]:
    """Join the batches of a loader as they were when moments were measured on them.

    Args:
        loader: its batches.
        groups: the moments.

    Yields:
        The moments, and the batches that they were measured on.

    Raises:
        OtherBatchesError: the loader yields other batches.
    """
    keys = [(i, key) for i, moments in enumerate(groups) for key in moments.keys]
    group: Group = []
    count = 0
    for batch in loader:
        inputs = inputs_of(batch)
        if count == len(keys):
            raise OtherBatchesError(
                f"loader yields more batches than the {count} that the statistics were measured on"
            )
        i, key = keys[count]
        if not key.fits(inputs):
            raise OtherBatchesError(
                f"loader: batch {count}, of shape {tuple(inputs.shape)}, is not the one that the "
                f"statistics were measured on, of shape {key.shape}; allowed: the same batches "
                "in the same order, so neither shuffled nor augmented at random"
            )
        count += 1
        group.append(batch)
        if len(group) == len(groups[i].keys):
            yield groups[i], group
            group = []
    if count < len(keys):
        raise OtherBatchesError(
            f"loader yields {count} batches; the statistics were measured on {len(keys)}"
        )


def _joined(model: nn.Module, loader: Iterable[Any], device: torch.device) -> Iterator[Group]:
    group: Group = []
    samples = 0
    most_samples: int | None = None
    for batch in loader:
        inputs = inputs_of(batch)
        if group:
            first = inputs_of(group[0])
            if most_samples is None:
                most_samples = _samples_at_once(model, first.to(device))
            alike = (first.shape[1:], first.dtype) == (inputs.shape[1:], inputs.dtype)
            if not alike or samples + len(inputs) > most_samples:
                yield group
                group, samples = [], 0
        group.append(batch)
        samples += len(inputs)
    if group:
        yield group


def _samples_at_once(model: nn.Module, inputs: torch.Tensor) -> int:
    """How many samples may run as one batch; 0 where that is not what they give one by one."""
    probe = inputs[:PROBE]
    if len(probe) < 2:
        return 0
    largest = 1
    together: dict[str, list[Moments]] = {}

    def measure(name: str, norm: BatchNorm, values: torch.Tensor) -> None:
        nonlocal largest
        largest = max(largest, values.numel() * values.element_size() // len(probe))
        together.setdefault(name, []).append(moments_of(name, values))

    try:
        observe(model, probe, measure)
        apart = [BatchMoments((), measure_moments(model, part)) for part in torch.split(probe, 1)]
    except Exception:  # whatever it is that a model cannot do with other batch sizes
        return 0
    # The calls of a batch norm share one pair of statistics, which takes several passes.
    if any(len(calls) > 1 for calls in together.values()):
        return 0
    if not _alike(pooled([BatchMoments((), together)]), pooled(apart)):
        return 0
    return JOINED_BYTES // largest


def _alike(one: dict[str, Moments], two: dict[str, Moments]) -> bool:
    if one.keys() != two.keys():
        return False
    for name, moments in one.items():
        scale = TOLERANCE * (moments.var.sqrt() + moments.mean.abs() * TOLERANCE) + 1e-30
        other = two[name]
        if bool(((moments.mean - other.mean).abs() > scale).any()):
            return False
        if bool(((moments.var.sqrt() - other.var.sqrt()).abs() > scale).any()):
            return False
    return True
