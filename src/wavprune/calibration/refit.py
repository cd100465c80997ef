"""The values of kept coefficients that change a layer's outputs least: least squares, given a mask.

Small matrices are solved exactly by Cholesky's factorization; of larger ones all rows are refined
at once by conjugate gradients, preconditioned with the diagonal, from the values as they are.
Either way the objective is never above that of the values as they are.
"""

from __future__ import annotations

import torch

from .problem import Problem

LARGEST_EXACT = 64
# Bytes of the matrices that are factorized at once.
CHUNK = 1 << 26
ITERATIONS = 12


def refit(problem: Problem, M: torch.Tensor, iterations: int = ITERATIONS) -> torch.Tensor:
    """Minimize ``(x - c)' H (x - c)`` of each row over the coefficients that are kept.

    Args:
        problem: the layer.
        M: ``(G, r, m)``, bool: what is kept.
        iterations: of conjugate gradients, where they are used.

    Returns:
        ``(G, r, m)``, 0 where nothing is kept.
    """
    if problem.C.shape[-1] <= LARGEST_EXACT:
        return solve_exactly(problem.C, problem.moment, M)
    return conjugate_gradients(problem.C, problem.moment, problem.diagonal, M, iterations)


def solve_exactly(C: torch.Tensor, H: torch.Tensor, M: torch.Tensor) -> torch.Tensor:
    """The minimum, row by row, in float64.

    Args:
        C: ``(G, r, m)``.
        H: ``(G, m, m)``, positive definite.
        M: ``(G, r, m)``, bool.
    """
    groups, r, m = C.shape
    C64, H64, kept = C.double(), H.double(), M.double()
    X = torch.empty_like(C64)
    step = max(1, CHUNK // (8 * m * m * r))
    for low in range(0, groups, step):
        part = slice(low, low + step)
        K = kept[part]
        # Rows and columns that are not kept are those of the identity.
        A = H64[part, None] * K[..., None] * K[..., None, :] + torch.diag_embed(1 - K)
        right = (C64[part] @ H64[part]) * K
        factor, failed = torch.linalg.cholesky_ex(A)
        solved = torch.cholesky_solve(right[..., None], factor)[..., 0]
        if bool(failed.any()):
            exact = torch.linalg.lstsq(A, right[..., None]).solution[..., 0]
            solved = torch.where(failed[..., None] > 0, exact, solved)
        X[part] = solved * K
    return _not_worse(X, C64, H64, kept).to(C.dtype)


def conjugate_gradients(
    C: torch.Tensor, H: torch.Tensor, diagonal: torch.Tensor, M: torch.Tensor, iterations: int
) -> torch.Tensor:
    """An approximation of the minimum, all rows at once.

    Args:
        C: ``(G, r, m)``.
        H: ``(G, m, m)``, positive definite.
        diagonal: ``(G, m)``, that of ``H``.
        M: ``(G, r, m)``, bool.
        iterations: each is a product with ``H``.
    """
    kept = M.to(C.dtype)
    scale = kept / diagonal[:, None, :]
    X = C * kept
    residual = ((C - X) @ H) * kept
    Z = residual * scale
    P = Z.clone()
    rz = (residual * Z).sum(-1, keepdim=True)
    for _ in range(iterations):
        Q = (P @ H) * kept
        step = rz / (P * Q).sum(-1, keepdim=True).clamp_min(1e-30)
        X += step * P
        residual -= step * Q
        Z = residual * scale
        previous, rz = rz, (residual * Z).sum(-1, keepdim=True)
        P = Z + rz / previous.clamp_min(1e-30) * P
    return _not_worse(X, C, H, kept)


def _not_worse(
    X: torch.Tensor, C: torch.Tensor, H: torch.Tensor, kept: torch.Tensor
) -> torch.Tensor:
    """Rows that rounding made worse than the values as they are, as they are."""
    start = C * kept
    before, after = start - C, X - C
    worse = ((after @ H) * after).sum(-1) > ((before @ H) * before).sum(-1)
    worse |= ~torch.isfinite(X).all(-1)
    return torch.where(worse[..., None], start, X)
