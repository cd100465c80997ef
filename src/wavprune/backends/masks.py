"""Masks: one bit for each coefficient, 1 where it is kept.

Kernels stand in blocks of 16, as the compiled kernels read them. A block holds a 16-bit word,
little-endian, for each coefficient; its bit l is that of the block's kernel l. The masks of the
identity, where every value is a kernel of one coefficient, and of large kernels, which are few, are
*flat*: their bits are in the order of the coefficients. Bits past the last one mean nothing.
"""

from __future__ import annotations

import torch

BLOCK = 16


def mask_bytes(kernels: int, coefficients: int, *, flat: bool) -> int:
    """How many bytes the mask of a weight has.

    Args:
        kernels: how many kernels the weight holds.
        coefficients: how many of each kernel are masked.
        flat: True where the bits are in the order of the coefficients.

    Example:
        >>> mask_bytes(20, 9, flat=False), mask_bytes(20, 9, flat=True)
        (36, 24)
    """
    rows, columns = (kernels * coefficients, 1) if flat else (kernels, coefficients)
    return -(-rows // BLOCK) * columns * 2


def pack(kept: torch.Tensor, *, flat: bool) -> torch.Tensor:
    """A mask of its bits.

    Args:
        kept: ``(kernels, coefficients)``, bool.
        flat: True where the bits are in the order of the coefficients.

    Returns:
        ``(mask_bytes,)``, uint8, on the same device.

    Example:
        >>> pack(torch.tensor([[True, False, True]]), flat=True).tolist()
        [5, 0]
    """
    bits = kept.reshape(-1, 1) if flat else kept
    padded = torch.nn.functional.pad(bits, (0, 0, 0, -len(bits) % BLOCK))
    bytes_of_bits = padded.view(len(padded) // BLOCK, 2, 8, bits.shape[1]).permute(0, 3, 1, 2)
    powers = 1 << torch.arange(8, dtype=torch.uint8, device=kept.device)
    return (bytes_of_bits * powers).sum(-1, dtype=torch.uint8).flatten()


def unpack(mask: torch.Tensor, kernels: int, coefficients: int, *, flat: bool) -> torch.Tensor:
    """The bits of a mask, ``(kernels, coefficients)``, bool; what ``pack`` was given.

    Raises:
        ValueError: the mask does not have the bytes of such a weight.
    """
    expected = mask_bytes(kernels, coefficients, flat=flat)
    if mask.dtype != torch.uint8 or mask.shape != (expected,):
        raise ValueError(
            f"a mask of {kernels} kernels of {coefficients} coefficients must be {expected} bytes "
            f"(uint8), not {tuple(mask.shape)} of {mask.dtype}"
        )
    rows, columns = (kernels * coefficients, 1) if flat else (kernels, coefficients)
    powers = 1 << torch.arange(8, dtype=torch.uint8, device=mask.device)
    words = mask.view(-(-rows // BLOCK), columns, 2, 1)
    by_kernel = ((words & powers) != 0).permute(0, 2, 3, 1).reshape(-1, columns)
    return by_kernel[:rows].reshape(kernels, coefficients)
