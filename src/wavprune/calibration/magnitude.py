"""Magnitude's own selection, in the problems' terms: what every candidate is compared with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..config import PruneConfig
from ..engine.layers import LayerRef
from ..engine.plan import kept_counts
from .admm import top
from .problem import Problem


def budget_of(refs: Sequence[LayerRef], config: PruneConfig) -> dict[str, int]:
    """How many coefficients each layer keeps; for scope "global" only their sum counts."""
    return dict(zip((ref.name for ref in refs), kept_counts(refs, config, None), strict=True))


def magnitude_masks(
    problems: Mapping[str, Problem], budget: Mapping[str, int], shared: bool
) -> dict[str, torch.Tensor]:
    """The masks of the coefficients of largest importance.

    Args:
        problems: by name.
        budget: how many each layer keeps.
        shared: True where only the sum counts.
    """
    scores = {name: problem.C.double().abs() for name, problem in problems.items()}
    if not shared:
        return {
            name: top([score], min(budget[name], score.numel()))[0]
            for name, score in scores.items()
        }
    total = sum(score.numel() for score in scores.values())
    masks = top(list(scores.values()), min(sum(budget.values()), total))
    return dict(zip(scores, masks, strict=True))
