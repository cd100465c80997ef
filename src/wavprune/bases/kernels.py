"""Where the kernels of a weight are: the last axes, whatever kind of layer it belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .basis import Kernel


class KernelShape(NamedTuple):
    """The kernels of a weight as matrices.

    Attributes:
        kernel: ``(kh, kw)``; of a ``Conv1d`` weight ``(k, 1)``, of a ``Conv3d`` weight
            ``(kd, kh * kw)``.
        axes: the axes that have more than one value, where those are not two; else None.
    """

    kernel: Kernel
    axes: tuple[int, ...] | None = None


def kernel_shape(shape: Sequence[int]) -> KernelShape:
    """The kernels of a weight of this shape.

    A kernel with an axis of one value has no use for that axis: 1x3x3 kernels are 3x3 kernels.

    Args:
        shape: ``(Cout, Cin/groups, ...)`` with one to three more axes, or ``(out, in)``; of a
            transposed convolution ``(Cin, Cout/groups, ...)``.

    Example:
        >>> kernel_shape((8, 4, 5)), kernel_shape((8, 4, 3, 3, 2))
        (KernelShape(kernel=(5, 1), axes=(5,)), KernelShape(kernel=(3, 6), axes=(3, 3, 2)))
    """
    sizes = [int(n) for n in (shape if len(shape) == 2 else shape[2:])]
    axes = tuple(n for n in sizes if n != 1)
    if len(sizes) == 1:
        sizes.append(1)
    if len(sizes) == 3 and 1 in sizes:
        sizes.remove(1)
    if len(sizes) == 3:
        return KernelShape((sizes[0], sizes[1] * sizes[2]), axes)
    return KernelShape((sizes[0], sizes[1]), axes if len(axes) == 1 else None)


def as_kernels(weight: torch.Tensor) -> torch.Tensor:
    """A weight of three to five axes as a view ``(Cout, Cin/groups, kh, kw)`` of ``kernel_shape``.

    Raises:
        RuntimeError: the planes of a 3-D kernel do not lie one row after the other.

    Example:
        >>> as_kernels(torch.zeros(8, 4, 3, 3, 2)).shape
        torch.Size([8, 4, 3, 6])
    """
    if weight.ndim == 3:
        return weight.unsqueeze(-1)
    if weight.ndim == 4:
        return weight
    axes = list(weight.shape[2:])
    return weight.select(2 + axes.index(1), 0) if 1 in axes else weight.view(*weight.shape[:3], -1)
