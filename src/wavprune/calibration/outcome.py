"""From a chosen candidate to a report like any other."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..config import RunSettings
from ..decision import Decision
from ..engine.auto import Choice
from ..engine.layers import LayerRef
from ..engine.outcome import outcome_of
from ..engine.plan import Plan
from ..engine.run import layer_facts
from ..report import PruneReport

# Everything is computed in plain torch.
BACKEND = "eager"


def report_of(
    plan: Plan,
    refs: Sequence[LayerRef],
    choices: Sequence[Choice],
    kept: Sequence[int],
    masks: Sequence[torch.Tensor],
    weights: Sequence[torch.Tensor],
    seconds: float,
    decision: Decision,
) -> PruneReport:
    """The report of a run.

    Args:
        plan: of the layers.
        refs: the layers, with their weights as they were.
        choices: which option of the plan each layer was pruned as.
        kept: how many coefficients each layer keeps.
        masks: of each layer, packed.
        weights: of each layer, as they will be.
        seconds: what the run took.
        decision: what was chosen.
    """
    home = weights[0].device
    shapes = [ref.weight.shape for ref in refs]
    total = sum(shape.numel() for shape in shapes) or 1
    rows = torch.tensor(
        [_row(ref.weight, weight, k) for ref, weight, k in zip(refs, weights, kept, strict=True)],
        dtype=torch.float64,
        device=home,
    )
    layers = [o[c.option] for o, c in zip(plan.options, choices, strict=True)]
    return PruneReport(
        outcome_of(
            layer_facts(plan, choices, shapes, BACKEND),
            [torch.full((len(refs),), torch.nan, dtype=torch.float64, device=home)],
            [rows],
            [seconds * shape.numel() / total for shape in shapes],
            None,
        ),
        RunSettings.of(plan.config),
        bases={layer.name: layer.basis for layer in layers},
        masks={ref.name: mask for ref, mask in zip(refs, masks, strict=True)},
        decision=decision,
        coverage=plan.coverage,
    )


def _row(before: torch.Tensor, after: torch.Tensor, kept: int) -> list[float]:
    """As ``Backend.apply_`` has it."""
    old, new = before.detach().double(), after.detach().double()
    zeros = int((new == 0).sum())
    return [kept, zeros, float((new - old).square().sum()), float(old.square().sum())]
