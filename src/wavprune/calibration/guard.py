"""How far a pruned network is from the unpruned one, and which candidate is taken."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch.nn import functional

from ..common.outputs import are_logits

MAGNITUDE = "magnitude"


class Reference:
    """The outputs of the unpruned network, to compare with.

    Args:
        outputs: of each batch.

    Attributes:
        measure: ``"kl"`` where the outputs are logits ``(N, C)``, else ``"relative error"``.
    """

    def __init__(self, outputs: Sequence[torch.Tensor]) -> None:
        self._outputs = [out.detach().float() for out in outputs]
        self.measure = "kl" if are_logits(self._outputs) else "relative error"

    def losses(self, outputs: Sequence[torch.Tensor]) -> torch.Tensor:
        """One for each sample, float64 on the CPU: KL, or the squared relative error."""
        pairs = zip(outputs, self._outputs, strict=True)
        return torch.cat(
            [distances(self.measure, out.detach(), dense) for out, dense in pairs]
        ).cpu()


def distances(measure: str, outputs: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    """How far each output is from that of the unpruned network, in float64.

    Args:
        measure: as ``Reference`` has it.
        outputs: ``(N, ...)``, of the pruned network.
        dense: of the unpruned one.
    """
    return (_kl if measure == "kl" else _relative)(outputs.float(), dense.float())


class Verdict(NamedTuple):
    """Which candidate is taken.

    Attributes:
        chosen: its name.
        reason: why.
        losses: the mean loss of each candidate.
        errors: the standard error of each one's difference to magnitude.
    """

    chosen: str
    reason: str
    losses: dict[str, float]
    errors: dict[str, float]


def decide(losses: Mapping[str, torch.Tensor]) -> Verdict:
    """The candidate of the smallest mean loss, if it is surely better than magnitude.

    Surely is by more than a standard error of the difference, sample by sample.

    Args:
        losses: of each candidate, one for each sample; that of magnitude is among them.

    Example:
        >>> losses = {"magnitude": torch.tensor([1.0, 2.0]), "other": torch.tensor([0.5, 1.4])}
        >>> decide(losses).chosen
        'other'
    """
    plain = losses[MAGNITUDE].double()
    means, errors = {}, {}
    for name, values in losses.items():
        finite = torch.nan_to_num(values.double(), nan=torch.inf)
        means[name] = float(finite.mean())
        difference = finite - plain
        spread = float(difference.std()) if len(difference) > 1 else 0.0
        errors[name] = spread / len(difference) ** 0.5
    best = min(means, key=lambda name: means[name])
    if best == MAGNITUDE:
        return Verdict(MAGNITUDE, "no candidate has a smaller loss", means, errors)
    gain = means[MAGNITUDE] - means[best]
    if not gain > errors[best]:
        reason = f"the gain of {best}, {gain:.3g}, is within its standard error {errors[best]:.3g}"
        return Verdict(MAGNITUDE, reason, means, errors)
    return Verdict(best, "smallest loss", means, errors)


def _kl(outputs: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    log_q, log_p = (values.double().log_softmax(1) for values in (outputs, dense))
    return functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1)


def _relative(outputs: torch.Tensor, dense: torch.Tensor) -> torch.Tensor:
    change = (outputs - dense).double().flatten(1).square().sum(1)
    return change / dense.double().flatten(1).square().sum(1).clamp_min(1e-30)
