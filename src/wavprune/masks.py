"""Masks: one bit for each coefficient, 1 where it is kept.

Kernels stand in blocks of 16, as the compiled kernels read them. A block holds a 16-bit word,
little-endian, for each coefficient; its bit l is that of the block's kernel l. Of the identity
every value is a kernel of one coefficient, so that the bits are in the order of the weight's values
whatever the kernel size. Bits past the last kernel are 0 or without meaning.
"""

from __future__ import annotations

import torch

from .bases import Operator

BLOCK = 16


def mask_bytes(kernels: int, operator: Operator) -> int:
    """How many bytes the mask of a weight has.

    Args:
        kernels: how many kernels the weight holds.
        operator: the coefficients that it masks.

    Example:
        >>> from wavprune.bases import named_basis
        >>> mask_bytes(20, named_basis("haar", (3, 3)).importance_operator)  # 2 blocks of 9 words
        36
    """
    rows, columns = _shape(kernels, operator)
    return -(-rows // BLOCK) * columns * 2


def pack(kept: torch.Tensor, operator: Operator) -> torch.Tensor:
    """A mask of its bits.

    Args:
        kept: ``(kernels, M')``, bool.
        operator: the coefficients that it masks.

    Returns:
        ``(mask_bytes,)``, uint8, on the same device.
    """
    rows, columns = _shape(len(kept), operator)
    bits = kept.reshape(rows, columns)
    padded = torch.nn.functional.pad(bits, (0, 0, 0, -rows % BLOCK))
    bytes_of_bits = padded.view(-1, 2, 8, columns).permute(0, 3, 1, 2)
    powers = 1 << torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (bytes_of_bits * powers).sum(-1, dtype=torch.uint8).flatten()


def unpack(mask: torch.Tensor, kernels: int, operator: Operator) -> torch.Tensor:
    """The bits of a mask, ``(kernels, M')``, bool; what ``pack`` was given.

    Raises:
        ValueError: the mask does not have the bytes of such a weight.
    """
    expected = mask_bytes(kernels, operator)
    if mask.dtype != torch.uint8 or mask.shape != (expected,):
        raise ValueError(
            f"a mask of {kernels} kernels must be {expected} bytes (uint8), not "
            f"{tuple(mask.shape)} of {mask.dtype}"
        )
    rows, columns = _shape(kernels, operator)
    powers = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    bits = (mask.view(-1, columns, 2, 1) & powers) != 0
    by_kernel = bits.permute(0, 2, 3, 1).reshape(-1, columns)
    return by_kernel[:rows].reshape(kernels, len(operator.analysis))


def _shape(kernels: int, operator: Operator) -> tuple[int, int]:
    """Kernels and coefficients of each, as the blocks see them."""
    coefficients = len(operator.analysis)
    return (kernels * coefficients, 1) if operator.identity else (kernels, coefficients)
