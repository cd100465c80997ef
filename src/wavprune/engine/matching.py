"""Running statistics that give pruned inputs the mean and variance of unpruned ones.

With mean ``m`` and variance ``v`` of a channel's inputs in the unpruned network, and ``m'`` and
``v'`` in the pruned one, the batch norm with running mean ``R`` and variance ``V`` gets

    R' = m' + (R - m) * sqrt(v' / v)        V' + eps = (V + eps) * v' / v

so that its output for ``(x' - m') / sqrt(v')`` is what it was for ``(x - m) / sqrt(v)``.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm

from .moments import Moments

# A channel is constant but for rounding where its variance is less than this times the running one.
CONSTANT = 1e-12


class RunningStatistics(NamedTuple):
    """What a batch norm subtracts and divides by, float64 on the CPU.

    Attributes:
        mean: ``(C,)``, its running mean.
        var: ``(C,)``, its running variance.
        eps: what it adds to the variance.
    """

    mean: torch.Tensor
    var: torch.Tensor
    eps: float

    def normalize(self, values: torch.Tensor) -> torch.Tensor:
        """Values ``(C,)`` after the batch norm, before its weight and bias."""
        return (values - self.mean) / (self.var + self.eps).sqrt()

    def matched(self, target: Moments, actual: Moments) -> RunningStatistics:
        """The formula at the top of this module, for every channel.

        Args:
            target: the moments of the unpruned network's inputs.
            actual: those of the pruned one's.
        """
        V = self.var + self.eps
        floor = CONSTANT * V
        ratio = torch.maximum(actual.var, floor) / torch.maximum(target.var, floor)
        # A running variance below 0 does not exist, so the gain of a batch norm has a limit.
        ratio = torch.maximum(ratio, self.eps / V)
        mean = actual.mean + (self.mean - target.mean) * ratio.sqrt()
        unchanged = (actual.mean == target.mean) & (actual.var == target.var)
        return RunningStatistics(
            torch.where(unchanged, self.mean, mean),
            torch.where(unchanged, self.var, (V * ratio - self.eps).clamp_min(0)),
            self.eps,
        )


ModelStatistics = dict[str, RunningStatistics]


def running_buffers(norm: BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    """The running mean and variance of a batch norm that has them."""
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def running_statistics(norms: dict[str, BatchNorm]) -> ModelStatistics:
    """Copies of the running statistics of every batch norm."""
    statistics = {}
    for name, norm in norms.items():
        mean, var = (
            buffer.detach().to("cpu", torch.float64, copy=True) for buffer in running_buffers(norm)
        )
        statistics[name] = RunningStatistics(mean, var, norm.eps)
    return statistics


def all_matched(
    original: ModelStatistics, targets: dict[str, Moments], actual: dict[str, Moments]
) -> ModelStatistics:
    """The matched statistics of every batch norm that ran."""
    return {name: original[name].matched(targets[name], actual[name]) for name in actual}


def largest_shift(
    before: ModelStatistics, after: ModelStatistics, actual: dict[str, Moments]
) -> float:
    """How far new statistics move a normalized input, in standard deviations.

    Compared at the mean of the inputs and one standard deviation from it: the statistics themselves
    say nothing about a channel that is constant.
    """
    return max(
        float((before[name].normalize(point) - after[name].normalize(point)).abs().max())
        for name, moments in actual.items()
        for point in (moments.mean, moments.mean + moments.var.sqrt())
    )
