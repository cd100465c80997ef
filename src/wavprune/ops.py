"""The compiled operators, ``torch.ops.wavprune.*``: what they take, and their shapes for tracing.

A *plan* tells an operator how a basis runs: one float64 vector ``[kind, kh, kw, Mh, Mw, ...]``
followed by the matrices. Kind 0 is the identity; 1 is separable, with the analysis matrix of the
rows ``(Mh, kh)`` and of the columns ``(Mw, kw)``, then the synthesis matrices ``(kh, Mh)`` and
``(kw, Mw)``; 2 is any other basis, with ``A`` (M, K) and ``S`` (K, M).
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import numpy.typing as npt
import torch

from .bases.basis import Basis, Operator
from .bases.matrices import Matrix

try:
    # Importing it registers the operators.
    importlib.import_module("wavprune._C")
except ImportError as error:
    raise ImportError(
        "the compiled extension wavprune._C is not there: it was not built (no C++ compiler, or no "
        "torch at build time) or does not fit this torch; with a C++ compiler, reinstall by "
        f"pip install --no-build-isolation --force-reinstall --no-deps wavprune ({error})"
    ) from error

INSTRUCTION_SETS = ("baseline", "x86-64-v3 (AVX2)", "x86-64-v4 (AVX-512)")
IDENTITY, SEPARABLE, GENERAL = 0.0, 1.0, 2.0


@lru_cache(maxsize=256)
def plan_for(operator: Operator, kernel: tuple[int, int]) -> torch.Tensor:
    """The plan of an operator: the cheapest form that its matrices have."""
    kh, kw = kernel
    if operator.identity:
        return _plan(IDENTITY, kernel, (kh, kw), [])
    axes = _axes(operator.analysis, kernel)
    back = _axes(operator.synthesis.T, kernel)
    if axes is not None and back is not None:
        grid = (len(axes[0]), len(axes[1]))
        return _plan(SEPARABLE, kernel, grid, [*axes, back[0].T, back[1].T])
    grid = (len(operator.analysis), 1)
    return _plan(GENERAL, kernel, grid, [operator.analysis, operator.synthesis])


def _plan(
    kind: float, kernel: tuple[int, int], grid: tuple[int, int], matrices: Sequence[Matrix]
) -> torch.Tensor:
    head = np.array([kind, *kernel, *grid], dtype=np.float64)
    return torch.from_numpy(np.concatenate([head, *(matrix.ravel() for matrix in matrices)]))


def _axes(A: Matrix, kernel: tuple[int, int]) -> tuple[Matrix, Matrix] | None:
    """The two factors where ``A = kron(rows, columns)``, else None."""
    kh, kw = kernel
    M = len(A)
    for mh in range(1, M + 1):
        if M % mh:
            continue
        mw = M // mh
        # A Kronecker product, reordered, is an outer product.
        paired = A.reshape(mh, mw, kh, kw).transpose(0, 2, 1, 3).reshape(mh * kh, mw * kw)
        row, column = np.unravel_index(np.abs(paired).argmax(), paired.shape)
        pivot = paired[row, column]
        # Entries that equal the pivot up to its sign come out equal in both factors.
        rows = paired[:, column] / np.sqrt(abs(pivot))
        columns = paired[row] * (np.sqrt(abs(pivot)) / pivot)
        if np.abs(np.outer(rows, columns) - paired).max() <= 1e-14 * abs(pivot):
            return rows.reshape(mh, kh), columns.reshape(mw, kw)
    return None


def instruction_set() -> str:
    """The instruction set that the kernels use on this processor."""
    return INSTRUCTION_SETS[int(torch.ops.wavprune.use_instruction_set(-1))]


def cuda_architectures() -> str | None:
    """What the CUDA kernels were compiled for, as in ``"sm_80, sm_90 and PTX"``, or None."""
    capabilities = torch.ops.wavprune.cuda_capabilities()
    return ", ".join(f"sm_{c}" for c in capabilities) + " and PTX" if capabilities else None


def dwt2(kernels: torch.Tensor, basis: Basis) -> torch.Tensor:
    """The coefficients of a batch of kernels.

    Args:
        kernels: ``(..., kh, kw)``, float32 or float64, on the CPU or on CUDA.
        basis: from ``wavprune.basis_for`` or ``wavprune.bases.named_basis``.

    Returns:
        ``(..., Mh, Mw)``, arranged as by ``pywt.coeffs_to_array``.

    Raises:
        ValueError: the kernels are not of the basis's size.

    Example:
        >>> from wavprune.bases import named_basis
        >>> dwt2(torch.ones(5, 3, 3), named_basis("haar", (3, 3))).shape
        torch.Size([5, 4, 4])
    """
    if tuple(kernels.shape[-2:]) != basis.kernel:
        raise ValueError(f"kernels of {tuple(kernels.shape[-2:])} do not fit a basis of {basis}")
    rows = kernels.reshape(-1, basis.kernel[0] * basis.kernel[1]).contiguous()
    out = torch.ops.wavprune.dwt2(rows, _whole_plan(basis), basis.grid[0] * basis.grid[1])
    result: torch.Tensor = out.view(*kernels.shape[:-2], *basis.grid)
    return result


def idwt2(coefficients: torch.Tensor, basis: Basis) -> torch.Tensor:
    """The kernels of a batch of coefficients: the way back from ``dwt2``.

    Args:
        coefficients: ``(..., Mh, Mw)``, float32 or float64, on the CPU or on CUDA.
        basis: the basis of ``dwt2``.

    Returns:
        ``(..., kh, kw)``.

    Raises:
        ValueError: the coefficients are not of the basis's grid.
    """
    if tuple(coefficients.shape[-2:]) != basis.grid:
        raise ValueError(
            f"coefficients of {tuple(coefficients.shape[-2:])} do not fit a basis of {basis}"
        )
    rows = coefficients.reshape(-1, basis.grid[0] * basis.grid[1]).contiguous()
    values = basis.kernel[0] * basis.kernel[1]
    out = torch.ops.wavprune.idwt2(rows, _whole_plan(basis), values)
    result: torch.Tensor = out.view(*coefficients.shape[:-2], *basis.kernel)
    return result


def percentile_mask(x: torch.Tensor, percentile: float, packed: bool = False) -> torch.Tensor:
    """Where ``|x|`` is at or above ``numpy.percentile(|x|, percentile)``.

    Args:
        x: any shape, float64, float32, float16 or bfloat16, on the CPU or on CUDA.
        percentile: in [0, 100].
        packed: eight places in a byte, the first in its lowest bit.

    Returns:
        bool of the shape of ``x``; packed, uint8 of ``ceil(numel / 8)``.

    Raises:
        RuntimeError: an argument is not allowed, or ``x`` holds NaN or infinite values. On CUDA,
            where no one waits to learn of these, the mask is False everywhere then.

    Example:
        >>> percentile_mask(torch.tensor([1.0, -4.0, 2.0]), 50)
        tensor([False,  True,  True])
    """
    mask: torch.Tensor = torch.ops.wavprune.percentile_mask(x.contiguous(), percentile, packed)
    return mask


@lru_cache(maxsize=256)
def _whole_plan(basis: Basis) -> torch.Tensor:
    """A plan with a row for every coefficient, structural zeros too."""
    everything: npt.NDArray[np.intp] = np.arange(len(basis.analysis))
    whole = Operator(
        analysis=basis.analysis,
        synthesis=basis.synthesis,
        rows=everything,
        scale=np.ones(len(everything)),
        dropped=0,
        identity=basis.coefficient_operator.identity,
    )
    return plan_for(whole, basis.kernel)


def _numbers(weights: list[torch.Tensor], *shape: int) -> torch.Tensor:
    """Results in float64, where the weights are."""
    device = weights[0].device if weights else None
    return torch.empty(shape, dtype=torch.float64, device=device)


def _topk_threshold_shape(
    weights: list[torch.Tensor],
    plans: list[torch.Tensor],
    draws: list[int],
    jobs: list[int],
    keep: list[int],
    wide: bool,
) -> torch.Tensor:
    return _numbers(weights, len(keep))


def _percentile_threshold_shape(
    weights: list[torch.Tensor],
    plans: list[torch.Tensor],
    dropped: list[int],
    percentile: float,
    wide: bool,
) -> torch.Tensor:
    return _numbers(weights, len(weights))


def _prune_shape(
    weights: list[torch.Tensor],
    plans: list[torch.Tensor],
    draws: list[int],
    thresholds: torch.Tensor,
    wide: bool,
) -> torch.Tensor:
    return _numbers(weights, len(weights), 4)


def _mark_shape(
    weights: list[torch.Tensor],
    plans: list[torch.Tensor],
    draws: list[int],
    thresholds: torch.Tensor,
    masks: list[torch.Tensor],
    wide: bool,
) -> None:
    return None


def _project_shape(
    weights: list[torch.Tensor], plans: list[torch.Tensor], masks: list[torch.Tensor], wide: bool
) -> None:
    return None


def _dwt2_shape(kernels: torch.Tensor, plan: torch.Tensor, outputs: int) -> torch.Tensor:
    return kernels.new_empty(kernels.shape[0], outputs)


def _idwt2_shape(coefficients: torch.Tensor, plan: torch.Tensor, values: int) -> torch.Tensor:
    return coefficients.new_empty(coefficients.shape[0], values)


def _percentile_mask_shape(input: torch.Tensor, percentile: float, packed: bool) -> torch.Tensor:
    if packed:
        return input.new_empty((input.numel() + 7) // 8, dtype=torch.uint8)
    return torch.empty_like(input, dtype=torch.bool)


for _name, _shape in (
    ("topk_threshold", _topk_threshold_shape),
    ("percentile_threshold", _percentile_threshold_shape),
    ("prune_", _prune_shape),
    ("mark_", _mark_shape),
    ("project_", _project_shape),
    ("dwt2", _dwt2_shape),
    ("idwt2", _idwt2_shape),
    ("percentile_mask", _percentile_mask_shape),
):
    torch.library.register_fake(f"wavprune::{_name}", _shape)
