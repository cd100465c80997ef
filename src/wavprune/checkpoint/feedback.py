"""Quantisation whose errors are made up for by the entries that are still to come.

With ``H = L D L.T`` (``L`` unit lower triangular), the weighted error ``tr(E H E.T)`` is a sum of
squares, ``D[j]`` times that of ``E[:, j] + sum_{i>j} L[i, j] E[:, i]``: going from the last column
to the first, each takes up what the later ones left (LDLQ of Chee et al. 2023, "QuIP"; GPTQ of
Frantar et al. 2022 is the same). A trellis runs down the rows of one column, which all have the
same ``D[j]``, so that both go together without loss.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .trellis import Floats, Ints, quantise

Doubles = npt.NDArray[np.float64]

# Columns between which errors are passed by matrix products.
BLOCK = 48
DAMPING = (0.0, 1e-6, 1e-4, 1e-2, 1.0)


class Factor(NamedTuple):
    """A layer's ``H``, taken apart.

    Attributes:
        hessian: ``(groups, d, d)``.
        order: ``(d,)``, in which columns are taken, the last first.
        lower: ``(groups, d, d)``, ``L`` in that order; None without feedback.
        diagonal: ``(groups, d)``, ``D`` in that order.
        scale: the geometric mean of ``D``; of several groups, the mean of theirs.
    """

    hessian: Doubles
    order: npt.NDArray[np.intp]
    lower: Floats | None
    diagonal: Doubles
    scale: float


def factor_of(hessian: Doubles, feedback: bool = True) -> Factor:
    """Take ``H`` apart, ``(groups, d, d)``, with the least sensitive columns taken last."""
    groups, d, _ = hessian.shape
    order = np.arange(d)
    if groups == 1:
        order = np.argsort(np.diagonal(hessian[0]), kind="stable")
    diagonals = np.diagonal(hessian, axis1=1, axis2=2)[:, order]
    if not feedback:
        return Factor(hessian, order, None, diagonals, float(diagonals.mean()))
    ordered = hessian[:, order][:, :, order]
    mean = diagonals.mean(axis=1)[:, None, None]
    for damping in DAMPING:
        damped = torch.from_numpy(ordered + damping * mean * np.eye(d))
        root, failed = torch.linalg.cholesky_ex(damped)
        if not failed.any():
            break
    roots = root.numpy()
    diagonal = np.diagonal(roots, axis1=1, axis2=2)
    lower = (roots / diagonal[:, None, :]).astype(np.float32)
    D = diagonal**2
    scale = float(np.exp(np.log(D).mean(axis=1)).mean())
    return Factor(hessian, order, lower, D, scale)


def quantise_matrix(
    matrix: Floats | Doubles,
    factor: Factor,
    step: float,
    zeros: npt.NDArray[np.bool_] | None = None,
) -> Ints:
    """Indices of a matrix.

    Args:
        matrix: ``(R, d)``, group after group.
        factor: of its ``H``.
        step: of its values, half of what neighbors in a quantiser are apart.
        zeros: ``(R, d)``, entries that must be 0; None for none.

    Returns:
        ``(R, d)``, int32.
    """
    R, d = matrix.shape
    groups = len(factor.hessian)
    order = factor.order
    targets = np.ascontiguousarray(matrix.T[order], dtype=np.float32)
    masked = None if zeros is None else np.ascontiguousarray(zeros.T[order])
    indices = np.empty((d, R), dtype=np.int32)
    if factor.lower is None or groups > 1:
        importance = None
        if groups > 1:
            weights = factor.diagonal / factor.diagonal.mean()
            importance = np.repeat(weights, R // groups, axis=0).T.astype(np.float32)
        indices[order] = quantise(
            targets, targets, step, lower=factor.lower, importance=importance, zeros=masked
        )[0]
        return np.ascontiguousarray(indices.T)
    lower = factor.lower[0]
    errors = np.zeros((d, R), dtype=np.float32)
    for stop in range(d, 0, -BLOCK):
        start = max(0, stop - BLOCK)
        block = slice(start, stop)
        wanted = targets[block]
        if stop < d:
            passed = torch.from_numpy(lower[stop:, block].T) @ torch.from_numpy(errors[stop:])
            wanted = wanted + passed.numpy()
        found, errors[block] = quantise(
            wanted,
            targets[block],
            step,
            lower=np.ascontiguousarray(lower[None, block, block]),
            zeros=None if masked is None else masked[block],
        )
        indices[order[block]] = found
    return np.ascontiguousarray(indices.T)


def divergence_of(matrix: Floats | Doubles, values: Floats | Doubles, factor: Factor) -> float:
    """``1/2 tr(E H E.T)`` for the error ``E`` of values of a matrix, both ``(R, d)``."""
    groups, d, _ = factor.hessian.shape
    error = torch.from_numpy(values.astype(np.float64) - matrix).reshape(groups, -1, d)
    weighted = error @ torch.from_numpy(factor.hessian)
    return float((weighted * error).sum()) / 2
