"""Unbalanced Haar: orthonormal Haar for every kernel size, odd ones too, without padding."""

from __future__ import annotations

import numpy as np
import torch

from .axes import (
    LONGEST_DENSE_AXIS,
    Axis,
    AxisMap,
    Constants,
    along,
    every_second,
    fast_orthonormal_axis,
    orthonormal_axis,
)
from .basis import Basis, Kernel, Request
from .factors import single_level
from .matrices import Matrix, frozen
from .registry import Family, register
from .separable import separable_basis
from .transform import Array, AxisTransform, Transform


class UnbalancedHaar(Family):
    """Haar that merges blocks of unequal sizes; Girardi and Sweldens (1997)."""

    def max_level(self, name: str, kernel: Kernel) -> int:
        """Rounds of merging down to one block on the longer axis."""
        del name
        return max(merges(n) for n in kernel)

    def build(self, request: Request) -> Basis:
        """The basis; see ``Family``."""
        deepest = self.max_level(request.name, request.kernel)
        used = deepest if request.level is None else min(request.level, deepest)
        rows, columns = (_axis(n, used) for n in request.kernel)
        factors = single_level(rows, columns)
        spans = [uhaar_spans(n, used) for n in request.kernel]
        return separable_basis(request, used, deepest, factors, spans)

    def transform(self, basis: Basis, kernels: Array) -> Transform:
        """The merging itself, without a matrix."""
        del kernels
        return _UnbalancedHaar(basis.level_used)


def _form(length: int, level: int) -> str | None:
    if length != 3 or level == 0:
        return None
    return "pairs" if level == 1 else "merges"


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


def _axis(length: int, level: int) -> Axis:
    if length <= LONGEST_DENSE_AXIS:
        return orthonormal_axis(uhaar_matrix(length, level), _form(length, level))
    analysis = Merging(length, level)
    return fast_orthonormal_axis(analysis, Merging(length, level, inverse=True), analysis.reach())


class Merging(AxisMap):
    """The merging of ``uhaar_matrix`` itself, without the matrix.

    Args:
        length: of the axis.
        level: rounds of merging.
        inverse: True for the synthesis.
    """

    def __init__(self, length: int, level: int, inverse: bool = False) -> None:
        self.shape = (length, length)
        self._inverse = inverse
        self._sizes = block_sizes(length, min(level, merges(length)))
        self.is_identity = len(self._sizes) == 1
        self.constants = tuple(
            frozen(np.sqrt(side / (a + b)))
            for a, b in map(_pairs, self._sizes[:-1])
            for side in (a, b)
        )

    def reach(self) -> Matrix:
        """``(length,)``: the largest magnitude with which each coefficient reads a value."""
        details = [
            np.maximum(np.sqrt(b / (a * (a + b))), np.sqrt(a / (b * (a + b))))
            for a, b in map(_pairs, self._sizes[:-1])
        ]
        return np.concatenate([1 / np.sqrt(self._sizes[-1]), *reversed(details)])

    def apply(self, x: torch.Tensor, dim: int, constants: Constants) -> torch.Tensor:
        """O(n)."""
        result = x.clone(memory_format=torch.contiguous_format)
        rounds = range(len(self._sizes) - 1)
        for i in reversed(rounds) if self._inverse else rounds:
            blocks, coarser = len(self._sizes[i]), len(self._sizes[i + 1])
            pairs = blocks // 2
            p_share, q_share = (along(share, dim) for share in constants[2 * i : 2 * i + 2])
            finer = result.narrow(dim, 0, blocks)
            if self._inverse:
                mean, detail = finer.narrow(dim, 0, pairs), finer.narrow(dim, coarser, pairs)
                left = p_share * mean + q_share * detail
                right = q_share * mean - p_share * detail
                if blocks % 2:
                    finer.narrow(dim, blocks - 1, 1).copy_(finer.narrow(dim, pairs, 1).clone())
                every_second(finer.narrow(dim, 0, 2 * pairs), dim, 0).copy_(left)
                every_second(finer.narrow(dim, 0, 2 * pairs), dim, 1).copy_(right)
                continue
            p = every_second(finer.narrow(dim, 0, 2 * pairs), dim, 0)
            q = every_second(finer.narrow(dim, 0, 2 * pairs), dim, 1)
            mean, detail = p_share * p + q_share * q, q_share * p - p_share * q
            if blocks % 2:
                finer.narrow(dim, pairs, 1).copy_(finer.narrow(dim, blocks - 1, 1).clone())
            finer.narrow(dim, 0, pairs).copy_(mean)
            finer.narrow(dim, coarser, pairs).copy_(detail)
        return result


def block_sizes(length: int, rounds: int) -> list[Matrix]:
    """The sizes of the blocks before the first round of merging and after each."""
    sizes = [np.ones(length)]
    for _ in range(rounds):
        finer = sizes[-1]
        # The size of an odd last block stays.
        sizes.append(np.add.reduceat(finer, np.arange(0, len(finer), 2)))
    return sizes


def _pairs(sizes: Array) -> tuple[Array, Array]:
    """The sizes of the left and the right block of every pair."""
    paired = sizes[: len(sizes) - len(sizes) % 2]
    return paired[::2], paired[1::2]


class _UnbalancedHaar(AxisTransform):
    def __init__(self, level: int) -> None:
        self.level = level

    def _roots(self, x: Array) -> list[tuple[Array, Array, Array]]:
        """Of every round: the square roots of the sizes of the pairs and of their sums."""
        sizes = block_sizes(x.shape[-1], min(self.level, merges(x.shape[-1])))
        pairs = [_pairs(finer.astype(x.dtype)) for finer in sizes[:-1]]
        return [(np.sqrt(a), np.sqrt(b), np.sqrt(a + b)) for a, b in pairs]

    def along(self, x: Array) -> Array:
        means = x
        details: list[Array] = []
        for a, b, whole in self._roots(x):
            odd = means[..., 2 * len(a) :]
            p, q = means[..., : 2 * len(a) : 2], means[..., 1::2]
            means = np.concatenate([(a * p + b * q) / whole, odd], axis=-1)
            details.insert(0, (b * p - a * q) / whole)
        return np.concatenate([means, *details], axis=-1)

    def back(self, x: Array) -> Array:
        roots = self._roots(x)
        used = x.shape[-1] - sum(len(whole) for _, _, whole in roots)
        means = x[..., :used]
        for a, b, whole in reversed(roots):
            pairs = len(whole)
            mean, detail = means[..., :pairs], x[..., used : used + pairs]
            finer = np.empty((*x.shape[:-1], means.shape[-1] + pairs), dtype=x.dtype)
            finer[..., : 2 * pairs : 2] = (a * mean + b * detail) / whole
            finer[..., 1 : 2 * pairs : 2] = (b * mean - a * detail) / whole
            finer[..., 2 * pairs :] = means[..., pairs:]
            means, used = finer, used + pairs
        return means


register("uhaar", UnbalancedHaar())
