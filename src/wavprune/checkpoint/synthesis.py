"""From coefficients back to weights, to the same bits on every machine.

Every weight is ``c[m0] * S[k, m0] + c[m1] * S[k, m1] + ...`` over the entries of its row that are
not 0, in rising order, each product and each sum rounded to float64; then it is rounded to float32.
Nothing goes through BLAS, whose order of sums depends on the processor.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from ..engine.ambient import inference_mode

Floats = npt.NDArray[np.float32]

try:
    from .. import ops
except ImportError:
    ops = None  # type: ignore[assignment]  # without a compiler, numpy does it

# The plans of larger matrices would fill the cache.
LARGEST_PLAN = 1 << 16


def synthesise(coefficients: Floats, matrix: Floats, *, compiled: bool = True) -> Floats:
    """Kernels from their coefficients.

    Args:
        coefficients: ``(M, kernels)``, float32: each row one coefficient of all kernels.
        matrix: ``(K, M)``, float32: the synthesis matrix ``S``.
        compiled: use the compiled operator, where it is there; the bits are the same.

    Returns:
        ``(kernels, K)``, float32.

    Example:
        >>> synthesise(np.float32([[1, 2], [3, 4]]), np.float32([[1, 1], [1, -1]])).tolist()
        [[4.0, -2.0], [6.0, -2.0]]
    """
    # The operator takes a row of zeros times a coefficient, which may be infinite.
    planned = matrix.size <= LARGEST_PLAN and bool(matrix.any(axis=1).all())
    if compiled and ops is not None and planned:
        # Inference tensors do not pass through autograd's part of the operator.
        with inference_mode(True):
            rows = torch.from_numpy(np.ascontiguousarray(coefficients.T, dtype=np.float64))
            plan = _plan(matrix.tobytes(), *matrix.shape)
            kernels: torch.Tensor = torch.ops.wavprune.idwt2(rows, plan, len(matrix))
            return kernels.numpy().astype(np.float32)
    values = coefficients.astype(np.float64)
    result = np.zeros((values.shape[1], len(matrix)), dtype=np.float32)
    for k, row in enumerate(matrix.astype(np.float64)):
        nonzero = np.flatnonzero(row)
        if len(nonzero):
            total = values[nonzero[0]] * row[nonzero[0]]
            for m in nonzero[1:]:
                total += values[m] * row[m]
            result[:, k] = total
    return result


@lru_cache(maxsize=64)
def _plan(matrix: bytes, K: int, M: int) -> torch.Tensor:
    """A plan of the general kind, whose sums run in the written order; see ``wavprune.ops``."""
    S = np.frombuffer(matrix, dtype=np.float32).astype(np.float64)
    head = np.array([ops.GENERAL, K, 1, M, 1])
    return torch.from_numpy(np.concatenate([head, np.zeros(M * K), S]))
