"""Orthonormal matrices that PyWavelets does not have: Haar for odd lengths, DCT, KLT."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

Matrix = npt.NDArray[np.float64]

# PyWavelets' tabulated filters sum to zero only up to 1e-13 .. 1e-11, so what is 0 for every
# input in exact arithmetic comes out of them as a row that small.
NEGLIGIBLE = 1e-10


def frozen(matrix: npt.ArrayLike) -> Matrix:
    """A read-only float64 copy, fit to be shared."""
    result = np.array(matrix, dtype=np.float64, order="C")
    result.flags.writeable = False
    return result


def merges(length: int) -> int:
    """Rounds of pairing that bring ``length`` blocks down to one."""
    return (length - 1).bit_length()


def uhaar_matrix(length: int, level: int | None = None) -> Matrix:
    """Orthonormal Haar matrix ``(length, length)`` for any length, odd ones too.

    Neighbouring blocks of sizes a and b with unit scaling functions p and q merge into
    ``(sqrt(a) p + sqrt(b) q) / sqrt(a + b)`` and leave the detail
    ``(sqrt(b) p - sqrt(a) q) / sqrt(a + b)``; an odd last block moves up as it is. Rows go from
    the coarsest scale to the finest: unbalanced Haar, Girardi and Sweldens (1997), "A new class
    of unbalanced Haar wavelets that form an unconditional basis for Lp on general measure spaces".

    Args:
        length: 1 or more.
        level: rounds of merging; None means down to one block.

    Returns:
        The analysis matrix; its transpose is the synthesis matrix.

    Example:
        >>> uhaar_matrix(3).round(3).tolist()
        [[0.577, 0.577, 0.577], [0.408, 0.408, -0.816], [0.707, -0.707, 0.0]]
    """
    blocks = [(1, row) for row in np.eye(length)]
    details: list[Matrix] = []
    rounds = merges(length)
    for _ in range(rounds if level is None else min(level, rounds)):
        merged, left = [], []
        for (a, p), (b, q) in zip(blocks[::2], blocks[1::2], strict=False):
            merged.append((a + b, (np.sqrt(a) * p + np.sqrt(b) * q) / np.sqrt(a + b)))
            left.append((np.sqrt(b) * p - np.sqrt(a) * q) / np.sqrt(a + b))
        blocks = merged + blocks[len(blocks) - len(blocks) % 2 :]
        details = left + details
    return frozen(np.stack([row for _, row in blocks] + details))


def uhaar_spans(length: int, level: int) -> dict[str, slice]:
    """Which rows of ``uhaar_matrix`` belong to which scale: ``a``, then the details."""
    spans: dict[str, slice] = {}
    blocks = length
    for i in range(1, min(level, merges(length)) + 1):
        coarser = (blocks + 1) // 2
        spans[f"d{i}"] = slice(coarser, blocks)
        blocks = coarser
    return {"a": slice(0, blocks), **dict(reversed(spans.items()))}


def dct_matrix(length: int) -> Matrix:
    """Orthonormal DCT-II matrix ``(length, length)``; its transpose is the inverse.

    Example:
        >>> dct_matrix(2).round(3).tolist()
        [[0.707, 0.707], [0.707, -0.707]]
    """
    frequency, place = np.mgrid[:length, :length]
    matrix = np.sqrt(2 / length) * np.cos(np.pi * frequency * (2 * place + 1) / (2 * length))
    matrix[0] = np.sqrt(1 / length)
    return frozen(matrix)


def klt_matrix(kernels: torch.Tensor, rows_at_once: int = 1 << 15) -> Matrix:
    """Right singular vectors ``(K, K)`` of a kernel matrix, strongest first.

    The matrix is not centred. Each vector's largest entry (the first of equals) is positive, so
    that the result is reproducible.

    Args:
        kernels: ``(..., kh, kw)`` or ``(N, K)``: every leading axis counts kernels.
        rows_at_once: kernels converted to float64 at a time, which bounds the extra memory.

    Returns:
        The analysis matrix, orthonormal; its transpose is the synthesis matrix.
    """
    K = kernels.shape[-1] * (kernels.shape[-2] if kernels.ndim > 2 else 1)
    triangle = np.zeros((0, K))
    for block in torch.split(kernels.reshape(-1, K), rows_at_once):
        values = block.detach().to("cpu", torch.float64).numpy()
        # R of a QR keeps the right singular vectors, and QR of stacked Rs is the R of the whole.
        stacked = np.concatenate([triangle, values])
        triangle = np.asarray(np.linalg.qr(stacked, mode="r"), dtype=np.float64)
    _, _, vectors = np.linalg.svd(triangle, full_matrices=True)
    sizes = np.abs(vectors)
    # Entries equal but for rounding count as equal: the first of them decides.
    first = (sizes >= (1 - 1e-6) * sizes.max(axis=1, keepdims=True)).argmax(axis=1)
    peaks = np.take_along_axis(vectors, first[:, None], axis=1)
    return frozen(np.where(peaks < 0, -vectors, vectors))
