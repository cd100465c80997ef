"""Weights that make up for what the layers before have lost.

A layer of a quantised network reads ``read`` where it should read ``meant``. Its weights
``W`` become the least-squares solution for the first onto the outputs of the second,
``W + W L (A + ridge)^-1`` with ``A = read read.T`` and ``L = (meant - read) read.T``. What a few
inputs say of rare directions is noise: the ridge is the one with which what either half of the
inputs says is best for the other half.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

# Of the mean energy of the inputs.
RIDGES = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)


def made_up(weight: torch.Tensor, read: torch.Tensor, meant: torch.Tensor) -> torch.Tensor:
    """What weights change by.

    Args:
        weight: ``(groups, r, d)``, float64.
        read: ``(groups, d, n)``, patches of some inputs, one input after the other.
        meant: ``(groups, d, n)``.

    Returns:
        ``(groups, r, d)``: 0 where neither half of the inputs has use for what the other says.
    """
    halves = [
        _Moments((r @ r.mT).double(), ((m - r) @ r.mT).double())
        for r, m in zip(_halves(read), _halves(meant), strict=True)
    ]
    first, last = halves
    wanted = [weight @ half.lost for half in halves]
    errors = []
    for ridge in RIDGES:
        of_first, of_last = (
            half.solved(want, ridge) for half, want in zip(halves, wanted, strict=True)
        )
        errors.append(last.error(of_first, wanted[1]) + first.error(of_last, wanted[0]))
    best = min(range(len(RIDGES)), key=errors.__getitem__)
    if not errors[best] < 0:
        return torch.zeros_like(weight)
    both = _Moments(first.read + last.read, first.lost + last.lost)
    return both.solved(weight @ both.lost, RIDGES[best])


class _Moments(NamedTuple):
    """Of some inputs.

    Attributes:
        read: ``(groups, d, d)``, of what a layer reads.
        lost: ``(groups, d, d)``, of what was lost with what it reads.
    """

    read: torch.Tensor
    lost: torch.Tensor

    def solved(self, wanted: torch.Tensor, ridge: float) -> torch.Tensor:
        """The change of weights that gives what is wanted, ``(groups, r, d)``."""
        energy = self.read.diagonal(dim1=1, dim2=2).mean(1)
        damped = self.read + torch.diag_embed(
            (ridge * energy + 1e-30)[:, None].expand(-1, self.read.shape[-1])
        )
        solution: torch.Tensor = torch.linalg.solve(damped, wanted.mT).mT
        return solution

    def error(self, change: torch.Tensor, wanted: torch.Tensor) -> float:
        """The squared error of a change, less that of none."""
        return float((change * (change @ self.read - 2 * wanted)).sum())


def _halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    half = values.shape[-1] // 2
    return values[..., :half], values[..., half:]
