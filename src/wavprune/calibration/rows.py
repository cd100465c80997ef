"""A weight as matrices: one for each group, a row for each output channel."""

from __future__ import annotations

from typing import NamedTuple

import torch


class Rows(NamedTuple):
    """How a weight becomes matrices ``(groups, r, d)`` whose columns are those of ``patches``.

    Attributes:
        shape: of the weight.
        groups: of the convolution.
        transposed: True for a transposed convolution, with weights ``(Cin, Cout/groups, ...)``.
    """

    shape: tuple[int, ...]
    groups: int = 1
    transposed: bool = False

    @property
    def kernel_values(self) -> int:
        """Values of one kernel; 1 for a linear map."""
        return int(torch.Size(self.shape[2:]).numel())

    @property
    def num_rows(self) -> int:
        """Output channels of a group."""
        return self.shape[1] if self.transposed else self.shape[0] // self.groups

    @property
    def num_columns(self) -> int:
        """``d``: inputs that one output is made of."""
        channels = self.shape[0] // self.groups if self.transposed else self.shape[1]
        return channels * self.kernel_values

    def split(self, values: torch.Tensor) -> torch.Tensor:
        """Values of every kernel, ``(A, B, M)``, as matrices ``(groups, r, channels * M)``.

        Args:
            values: ``A`` and ``B`` are the first two axes of the weight; ``M`` is any number.
        """
        size = values.shape[2]
        if self.transposed:
            channels = self.shape[0] // self.groups
            grouped = values.reshape(self.groups, channels, self.num_rows, size).transpose(1, 2)
        else:
            grouped = values.reshape(self.groups, self.num_rows, self.shape[1], size)
        return grouped.reshape(self.groups, self.num_rows, -1)

    def join(self, matrices: torch.Tensor) -> torch.Tensor:
        """The inverse of ``split``: ``(A, B, M)``."""
        if self.transposed:
            channels = self.shape[0] // self.groups
            grouped = matrices.reshape(self.groups, self.num_rows, channels, -1).transpose(1, 2)
        else:
            grouped = matrices.reshape(self.groups, self.num_rows, self.shape[1], -1)
        return grouped.reshape(self.shape[0], self.shape[1], -1)

    def of_weight(self, weight: torch.Tensor) -> torch.Tensor:
        """The weight as matrices, in float64."""
        return self.split(weight.detach().double().reshape(self.shape[0], self.shape[1], -1))


def split_columns(matrices: torch.Tensor, blocks: int) -> torch.Tensor:
    """Matrices ``(groups, r, m)`` as ``(groups * blocks, r, m / blocks)``."""
    groups, r, m = matrices.shape
    apart = matrices.reshape(groups, r, blocks, m // blocks).transpose(1, 2)
    return apart.reshape(groups * blocks, r, m // blocks)


def join_columns(parts: torch.Tensor, blocks: int) -> torch.Tensor:
    """The inverse of ``split_columns``."""
    number, r, m = parts.shape
    apart = parts.reshape(number // blocks, blocks, r, m).transpose(1, 2)
    return apart.reshape(number // blocks, r, blocks * m)
