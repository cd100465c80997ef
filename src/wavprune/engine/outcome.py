"""From what a backend returned to the rows of a report."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

from ..report import LayerStats, Outcome


class LayerFacts(NamedTuple):
    """What a report says of a layer that was known before it was pruned; see ``LayerStats``."""

    name: str
    shape: tuple[int, ...]
    method: str
    wavelet: str
    mode: str | None
    level_requested: int | None
    level_used: int
    backend: str
    coefficients: int
    runner_up: str | None
    runner_up_error: float | None


def outcome_of(
    facts: Sequence[LayerFacts],
    thresholds: Sequence[torch.Tensor],
    rows: Sequence[torch.Tensor],
    seconds: Sequence[float],
    raise_non_finite: Callable[[], None] | None,
) -> Outcome:
    """Fetch what a run did; of weights on a GPU this waits for the device.

    Args:
        facts: one per layer.
        thresholds: ``(layers,)`` per call of the backend.
        rows: what ``apply_`` returned at each call.
        seconds: one per layer.
        raise_non_finite: called where a threshold is NaN and nothing was pruned; None where that
            has been looked at.
    """
    parts = [
        torch.cat([part.unsqueeze(1), result.to(part.device)], dim=1)
        for part, result in zip(thresholds, rows, strict=True)
    ]
    # One copy from the device.
    if len({part.device for part in parts}) == 1:
        parts = [torch.cat(parts)]
    numbers: list[list[float]] = [row for part in parts for row in part.tolist()]
    if raise_non_finite is not None and any(math.isnan(row[0]) for row in numbers):
        raise_non_finite()
    device = str(rows[0].device)
    stats = tuple(
        _stats(fact, device, row, spent)
        for fact, row, spent in zip(facts, numbers, seconds, strict=True)
    )
    return Outcome(stats, sum(row[4] for row in numbers), sum(row[3] for row in numbers))


def _stats(fact: LayerFacts, device: str, row: Sequence[float], seconds: float) -> LayerStats:
    threshold, kept, zeros, squared_error, squared_norm = row
    numel = math.prod(fact.shape)
    return LayerStats(
        **fact._asdict(),
        device=device,
        threshold=threshold,
        kept=int(kept),
        sparsity=1 - kept / numel if numel else 0.0,
        weight_zeros=int(zeros),
        weight_sparsity=zeros / numel if numel else 0.0,
        relative_error=math.sqrt(squared_error / squared_norm) if squared_norm else 0.0,
        seconds=seconds,
    )
