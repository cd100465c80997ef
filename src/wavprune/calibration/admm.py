"""Which coefficients to keep, of one layer or of all layers together, by ADMM.

Minimize ``sum_i w_i (z_i - c_i)' H (z_i - c_i)`` over all rows ``i`` of all layers with ``k``
non-zeros in all. In variables scaled by ``sqrt(w_i h_j)`` with the diagonal ``h`` of ``H``, whose
matrix ``R`` then has ones on its diagonal, each step is

    Z = (R Z0 + rho D - V) (R + rho I)^-1,    D = top k of (Z + V / rho),    V = V + rho (Z - D)

and ``rho`` grows the slower the fewer coefficients change places, as in Meng et al., "ALPS:
Improved Optimization for Highly Sparse One-Shot Pruning for Large Language Models" (2024), which
prunes the layers one by one, in the identity.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..engine.patterns import Pattern
from .problem import Problem
from .rows import join_columns, split_columns

START = 0.1
ITERATIONS = 40
# After this many steps without a change of places nothing changes any more.
SETTLED = 10
CHECKED = 3


def select(
    problems: Sequence[Problem],
    keep: int,
    row_weights: Mapping[str, torch.Tensor],
    iterations: int = ITERATIONS,
    pattern: Pattern | None = None,
) -> dict[str, torch.Tensor]:
    """The coefficients to keep, ``keep`` in all.

    Args:
        problems: the layers that share the budget.
        keep: how many coefficients.
        row_weights: of each layer, ``(groups, r)``.
        iterations: steps at most.
        pattern: what masks must be in, in place of a budget.

    Returns:
        By the name of the layer ``(G, r, m)``, bool.
    """
    numel = sum(problem.numel for problem in problems)
    if keep >= numel:
        return {p.name: torch.ones_like(p.C, dtype=torch.bool) for p in problems}
    if keep <= 0:
        return {p.name: torch.zeros_like(p.C, dtype=torch.bool) for p in problems}
    states = [_State(problem, row_weights[problem.name]) for problem in problems]
    rho, last = START, None
    for step in range(iterations):
        scores = [state.advance(rho) for state in states]
        if pattern is None:
            masks = top(scores, keep)
        else:
            pairs = zip(scores, problems, strict=True)
            masks = [pattern_mask(pattern, problem, score) for score, problem in pairs]
        for state, mask in zip(states, masks, strict=True):
            state.project(mask, rho)
        if last is None:
            last = masks
        elif step % CHECKED == CHECKED - 1:
            changed = sum(int((new & ~old).sum()) for new, old in zip(masks, last, strict=True))
            last = masks
            if not changed and step > SETTLED:
                break
            rho *= 1.3 if changed > 0.1 * keep else 1.2 if changed > 0.005 * keep else 1.1
    return {problem.name: mask for problem, mask in zip(problems, masks, strict=True)}


def pattern_mask(pattern: Pattern, problem: Problem, scores: torch.Tensor) -> torch.Tensor:
    """The mask of the highest scores ``(G, r, m)`` in each group of a pattern."""
    joined = join_columns(scores, problem.blocks)
    size = problem.rows.kernel_values
    kept = pattern.top(joined.reshape(*joined.shape[:2], -1, size))
    return split_columns(kept.reshape(joined.shape), problem.blocks)


def top(scores: Sequence[torch.Tensor], keep: int) -> list[torch.Tensor]:
    """The ``keep`` highest of all scores; of equal ones the first.

    Args:
        scores: of each layer, of any shape and device.
        keep: from 0 to the number of scores.

    Returns:
        A mask for each layer.

    Example:
        >>> top([torch.tensor([1.0, 3.0]), torch.tensor([2.0, 3.0])], 3)
        [tensor([False,  True]), tensor([True, True])]
    """
    home = scores[0].device
    ranks = torch.cat([part.flatten().to(home) for part in scores])
    if keep <= 0:
        chosen = torch.zeros_like(ranks, dtype=torch.bool)
    else:
        threshold = torch.kthvalue(ranks, ranks.numel() - keep + 1).values
        chosen = ranks > threshold
        ties = torch.nonzero(ranks == threshold)[:, 0]
        chosen[ties[: keep - int(chosen.sum())]] = True
    parts = torch.split(chosen, [part.numel() for part in scores])
    return [
        part.view(score.shape).to(score.device) for part, score in zip(parts, scores, strict=True)
    ]


class _State:
    """The variables of one layer."""

    def __init__(self, problem: Problem, row_weights: torch.Tensor) -> None:
        self._values, self._vectors = problem.spectrum()
        rows = problem.weights(row_weights).clamp_min(1e-30).sqrt()
        Z0 = problem.C * problem.diagonal.sqrt()[:, None, :] * rows[..., None]
        self._target = (Z0 @ self._vectors) * self._values[:, None, :]
        self._D, self._V = Z0.clone(), torch.zeros_like(Z0)
        self._Z = self._candidate = Z0

    def advance(self, rho: float) -> torch.Tensor:
        """Solve for ``Z``; the squares of what the next top k is taken of."""
        B = self._target + (rho * self._D - self._V) @ self._vectors
        self._Z = (B / (self._values[:, None, :] + rho)) @ self._vectors.mT
        self._candidate = self._Z + self._V / rho
        return self._candidate.square()

    def project(self, mask: torch.Tensor, rho: float) -> None:
        """Keep the top k, and move the multipliers."""
        self._D = self._candidate * mask
        self._V = self._V + rho * (self._Z - self._D)
