"""How far chance alone may move a metric: standard errors from its parts."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import NamedTuple

import torch

# A difference of more standard errors is not chance, in 19 of 20 cases.
ERRORS = 2.0


class Parts(NamedTuple):
    """A metric on disjoint parts of the data: single inputs, batches, or groups of inputs.

    Attributes:
        values: ``(P,)``, float64.
        weights: ``(P,)``, float64: the share of the inputs in each part.
    """

    values: torch.Tensor
    weights: torch.Tensor


def standard_error(parts: Parts | None) -> float | None:
    """The standard error of the whole, by the random-group method; None for fewer than two parts.

    Wolter, "Introduction to Variance Estimation", 2nd edition 2007, chapter 2: how much the values
    of disjoint groups differ says how much the value of all of them would in other data. Groups
    may differ in size: by the divisor the variance is unbiased where a group's own is inverse to
    its weight.

    Example:
        >>> values = torch.tensor([1.0, 3.0], dtype=torch.float64)
        >>> standard_error(Parts(values, torch.tensor([0.5, 0.5], dtype=torch.float64)))
        1.0
    """
    if parts is None or int((parts.weights > 0).sum()) < 2:
        return None
    values, weights = parts
    squares = weights.square()
    mean = (weights * values).sum()
    variance = (squares * (values - mean).square()).sum() / (1 - squares.sum())
    return math.sqrt(float(variance))


def paired_error(parts: Parts | None, reference: Parts | None) -> float | None:
    """The standard error of the difference of two networks on the same parts; None if unknown."""
    if parts is None or reference is None or len(parts.values) != len(reference.values):
        return None
    return standard_error(Parts(parts.values - reference.values, parts.weights))


def share_error(share: float, samples: int) -> float:
    """The standard error of a share of samples.

    Two successes and two failures are added (Agresti and Coull 1998, "Approximate is better than
    exact"), so that it is not 0 where all samples are alike.

    Example:
        >>> round(share_error(0.98, 1800), 4), round(share_error(1.0, 1800), 4)
        (0.0034, 0.0008)
    """
    samples += 4
    share = (share * (samples - 4) + 2) / samples
    return math.sqrt(share * (1 - share) / samples)


def joint_error(values: Sequence[float], spreads: Sequence[float | None]) -> float:
    """The standard error of a mean over repetitions on the same samples; NaN if it is not known.

    The samples' part is that of one run, for they are the same in all; the repetitions' is the
    standard error of their mean.

    Args:
        values: one of each repetition.
        spreads: their standard errors; None or NaN where it is not known.

    Example:
        >>> joint_error([0.5], [0.1]), joint_error([0.4, 0.6], [0.0, 0.0])
        (0.1, 0.1)
    """
    known = [spread for spread in spreads if spread is not None and not math.isnan(spread)]
    if not known and len(values) < 2:
        return math.nan
    samples = sum(spread**2 for spread in known) / len(known) if known else 0.0
    several = len(values) > 1
    repetitions = statistics.variance(map(float, values)) / len(values) if several else 0.0
    return round(math.sqrt(samples + repetitions), 12)


def is_tie(difference: float, error: float) -> bool:
    """Whether chance alone may make a difference of this standard error; unknown ones may not.

    Example:
        >>> is_tie(-0.03, 0.02), is_tie(-0.03, 0.01)
        (True, False)
    """
    return difference == 0 or (not math.isnan(error) and abs(difference) <= ERRORS * error)
