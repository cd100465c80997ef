"""The compiled operators, ``torch.ops.wavprune.*``: what they take, and their shapes for tracing.

A *plan* is the basis as an operator takes it: one float64 vector ``[kind, kh, kw, Mh, Mw, ...]``
followed by the matrices, row-major.

| kind | matrices |
|---|---|
| 0, identity | none |
| 1, separable | analysis of the rows ``(Mh, kh)`` and columns ``(Mw, kw)``, then their synthesis |
| 2, general | ``A`` (M, K) and ``S`` (K, M); entries that are 0 cost nothing |
| 3, pairs | as separable, 3x3 to 3x3, both axes ``a + b, c, a - b`` (Haar with a border) |
| 4, merges | as separable, 3x3 to 3x3, both axes ``a + b + c, a + b - 2c, a - b`` |

An axis has the form ``U`` where its analysis is ``diag(s) @ U`` and its synthesis ``U.T @ diag(t)``
for some ``s`` and ``t``: then a coefficient takes one multiplication. In float64 the operators
treat kinds 3 and 4 as separable. A plan that does not have the form it claims is an error.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch

from .bases import Basis
from .bases.basis import GENERAL, IDENTITY, MERGES_3X3, PAIRS_3X3, SEPARABLE

try:
    # Importing it registers the operators.
    importlib.import_module("wavprune._C")
except ImportError as error:
    raise ImportError(
        "the compiled extension wavprune._C was not built or does not fit this torch; with a C++ "
        "compiler, 'pip install --force-reinstall --no-deps .' in the folder of wavprune's source "
        f"builds it ({error})"
    ) from error

__all__ = [
    "GENERAL",
    "IDENTITY",
    "MERGES_3X3",
    "PAIRS_3X3",
    "SEPARABLE",
    "cuda_architectures",
    "dwt2",
    "idwt2",
    "instruction_set",
    "percentile_mask",
]

INSTRUCTION_SETS = ("baseline", "x86-64-v3 (AVX2)", "x86-64-v4 (AVX-512)")


def instruction_set() -> str:
    """The instruction set that the compiled operators use on this processor."""
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
        ``(..., Mh, Mw)``, arranged as by ``pywt.coeffs_to_array``. Gradients of any order,
        ``torch.func.vmap`` and ``torch.compile`` work.

    Raises:
        TypeError: the kernels are no tensor of these dtypes.
        ValueError: the kernels are not of the basis's size.

    Example:
        >>> from wavprune.bases import named_basis
        >>> dwt2(torch.ones(5, 3, 3), named_basis("haar", (3, 3))).shape
        torch.Size([5, 4, 4])
    """
    _check_values("kernels", kernels, basis.kernel)
    rows = kernels.reshape(-1, basis.kernel[0] * basis.kernel[1]).contiguous()
    out = torch.ops.wavprune.dwt2(rows, basis.whole_operator.plan, basis.grid[0] * basis.grid[1])
    result: torch.Tensor = out.view(*kernels.shape[:-2], *basis.grid)
    return result


def idwt2(coefficients: torch.Tensor, basis: Basis) -> torch.Tensor:
    """The kernels of a batch of coefficients, the inverse of ``dwt2``.

    Args:
        coefficients: ``(..., Mh, Mw)``, float32 or float64, on the CPU or on CUDA.
        basis: the basis of ``dwt2``.

    Returns:
        ``(..., kh, kw)``.

    Example:
        >>> from wavprune.bases import named_basis
        >>> basis = named_basis("haar", (4, 4))
        >>> bool(torch.allclose(idwt2(dwt2(torch.ones(4, 4), basis), basis), torch.ones(4, 4)))
        True

    Raises:
        TypeError: the coefficients are no tensor of these dtypes.
        ValueError: the coefficients are not of the basis's grid.
    """
    _check_values("coefficients", coefficients, basis.grid)
    rows = coefficients.reshape(-1, basis.grid[0] * basis.grid[1]).contiguous()
    values = basis.kernel[0] * basis.kernel[1]
    out = torch.ops.wavprune.idwt2(rows, basis.whole_operator.plan, values)
    result: torch.Tensor = out.view(*coefficients.shape[:-2], *basis.kernel)
    return result


def _check_values(name: str, values: torch.Tensor, size: tuple[int, int]) -> None:
    if not isinstance(values, torch.Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, not {type(values).__name__}")
    if values.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"{name} are {values.dtype}; allowed: torch.float32, torch.float64")
    if tuple(values.shape[-2:]) != size:
        raise ValueError(
            f"{name} are {tuple(values.shape)}; the basis is of {size}, so allowed: "
            f"(..., {size[0]}, {size[1]})"
        )


def percentile_mask(x: torch.Tensor, percentile: float, packed: bool = False) -> torch.Tensor:
    """Where ``|x|`` is at or above ``numpy.percentile(|x|, percentile)``.

    Args:
        x: any shape, float64, float32, float16 or bfloat16, on the CPU or on CUDA.
        percentile: in [0, 100].
        packed: one bit a value, the first in a byte's lowest bit.

    Returns:
        bool of the shape of ``x``; packed, uint8 of ``ceil(numel / 8)``.

    Raises:
        RuntimeError: an argument is not allowed, or ``x`` holds NaN or infinite values. On CUDA,
            which is not waited for, the mask is False everywhere instead.

    Example:
        >>> percentile_mask(torch.tensor([1.0, -4.0, 2.0]), 50)
        tensor([False,  True,  True])
    """
    mask: torch.Tensor = torch.ops.wavprune.percentile_mask(x.contiguous(), percentile, packed)
    return mask


def _numbers(weights: list[torch.Tensor], *shape: int) -> torch.Tensor:
    """Results in float64, where the weights are."""
    device = weights[0].device if weights else None
    return torch.empty(shape, dtype=torch.float64, device=device)


def _topk_threshold_shape(
    weights: list[torch.Tensor],
    plans: list[torch.Tensor],
    seeds: list[int],
    jobs: list[int],
    keep: list[int],
    compute_float64: bool,
) -> torch.Tensor:
    return _numbers(weights, len(keep))


def _topk_measure_shape(
    weights: list[torch.Tensor],
    plans: list[torch.Tensor],
    jobs: list[int],
    keep: list[int],
    compute_float64: bool,
) -> torch.Tensor:
    return _numbers(weights, len(keep) + 3 * len(weights))


def _gram_shape(weights: list[torch.Tensor]) -> torch.Tensor:
    return _numbers(weights, sum(math.prod(weight.shape[2:]) ** 2 for weight in weights))


def _percentile_threshold_shape(
    weights: list[torch.Tensor],
    plans: list[torch.Tensor],
    dropped: list[int],
    percentile: float,
    compute_float64: bool,
) -> torch.Tensor:
    return _numbers(weights, len(weights))


def _prune_shape(
    weights: list[torch.Tensor],
    plans: list[torch.Tensor],
    seeds: list[int],
    thresholds: torch.Tensor,
    compute_float64: bool,
) -> torch.Tensor:
    return _numbers(weights, len(weights), 4)


def _mark_shape(
    weights: list[torch.Tensor],
    plans: list[torch.Tensor],
    seeds: list[int],
    thresholds: torch.Tensor,
    masks: list[torch.Tensor],
    compute_float64: bool,
) -> None:
    return None


def _project_shape(
    weights: list[torch.Tensor],
    plans: list[torch.Tensor],
    masks: list[torch.Tensor],
    compute_float64: bool,
) -> None:
    return None


def _prune_by_mask_shape(
    weights: list[torch.Tensor],
    plans: list[torch.Tensor],
    masks: list[torch.Tensor],
    compute_float64: bool,
) -> torch.Tensor:
    return _numbers(weights, len(weights), 4)


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
    ("topk_measure", _topk_measure_shape),
    ("gram", _gram_shape),
    ("percentile_threshold", _percentile_threshold_shape),
    ("prune_", _prune_shape),
    ("mark_", _mark_shape),
    ("project_", _project_shape),
    ("prune_by_mask_", _prune_by_mask_shape),
    ("dwt2", _dwt2_shape),
    ("idwt2", _idwt2_shape),
    ("percentile_mask", _percentile_mask_shape),
):
    torch.library.register_fake(f"wavprune::{_name}", _shape)


# Gradients: each transform is linear, and the transpose of the other with its matrices swapped.


@torch.library.custom_op("wavprune::transposed_plan", mutates_args=())
def _transposed_plan(plan: torch.Tensor) -> torch.Tensor:
    """A plan with analysis and synthesis transposed and swapped."""
    kind, *sizes = plan[:5].tolist()
    kh, kw, rows, columns = map(int, sizes)
    if kind == IDENTITY:
        shapes = []
    elif kind == GENERAL:
        shapes = [(rows * columns, kh * kw), (kh * kw, rows * columns)]
    else:
        shapes = [(rows, kh), (columns, kw), (kh, rows), (kw, columns)]
    parts = torch.split(plan[5:], [math.prod(shape) for shape in shapes])
    matrices = [part.view(shape) for part, shape in zip(parts, shapes, strict=True)]
    half = len(matrices) // 2
    swapped = [matrix.T.flatten() for matrix in (*matrices[half:], *matrices[:half])]
    return torch.cat([plan[:5], *swapped])


@_transposed_plan.register_fake
def _(plan: torch.Tensor) -> torch.Tensor:
    return torch.empty_like(plan)


def _save(ctx: Any, inputs: tuple[Any, ...], output: torch.Tensor) -> None:
    rows, plan, _ = inputs
    ctx.save_for_backward(plan)
    ctx.num_values = rows.shape[1]


def _dwt2_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    plan = torch.ops.wavprune.transposed_plan(*ctx.saved_tensors)
    rows = gradient.contiguous()
    return torch.ops.wavprune.idwt2(rows, plan, ctx.num_values), None, None


def _idwt2_backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
    plan = torch.ops.wavprune.transposed_plan(*ctx.saved_tensors)
    rows = gradient.contiguous()
    return torch.ops.wavprune.dwt2(rows, plan, ctx.num_values), None, None


def _batched(operator: Any) -> Callable[..., tuple[torch.Tensor, int]]:
    """A batch of batches is a longer batch."""

    def rule(
        info: Any,
        in_dims: tuple[int | None, ...],
        rows: torch.Tensor,
        plan: torch.Tensor,
        size: int,
    ) -> tuple[torch.Tensor, int]:
        if in_dims[0] is None or in_dims[1] is not None:
            raise NotImplementedError("vmap goes over the values, not over the plan of a basis")
        many = rows.movedim(in_dims[0], 0)
        out = operator(many.flatten(0, 1).contiguous(), plan, size)
        return out.view(*many.shape[:2], size), 0

    return rule


for _name, _backward in (("dwt2", _dwt2_backward), ("idwt2", _idwt2_backward)):
    torch.library.register_autograd(f"wavprune::{_name}", _backward, setup_context=_save)
    torch.library.register_vmap(f"wavprune::{_name}", _batched(getattr(torch.ops.wavprune, _name)))
