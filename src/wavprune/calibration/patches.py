"""Patches: for each output of a layer, the inputs that its weights are multiplied with.

With the patches ``U`` of a group, ``(d, n)``, and its weights as the rows of a matrix ``(r, d)``,
the layer's outputs at ``n`` positions are ``W @ U``. A transposed convolution is a convolution of
its input with zeros in between and its kernels turned round.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch.nn import functional

from .calls import Call


def num_positions(call: Call) -> int:
    """How many positions the outputs of one sample have."""
    return int(call.batched.shape[1]) if not call.spatial else math.prod(_output_size(call))


def patches(call: Call, positions: torch.Tensor | None = None) -> torch.Tensor:
    """The patches of a call, ``(groups, d, n)``, in float32 or float64.

    Args:
        call: of a layer.
        positions: ``(P,)``, int64, which output positions of every sample, in row-major order;
            None means all.

    Returns:
        ``d`` runs over the input channels of a group, then over the values of a kernel, and ``n``
        over samples, then positions.

    Example:
        >>> call = Call(functional.conv2d, torch.ones(2, 6, 5, 5), torch.ones(4, 3, 3, 3), None,
        ...             {"groups": 2}, 2)
        >>> patches(call).shape
        torch.Size([2, 27, 18])
    """
    values = call.batched.detach()
    if not call.spatial:
        rows = values if positions is None else values[:, positions]
        return _wide(rows.reshape(1, -1, rows.shape[-1]).mT)
    windows = _windows(call)
    samples, channels = windows.shape[:2]
    size = windows.shape[2 : 2 + call.spatial]
    if positions is None:
        # (C, kernel, N, positions)
        axes = range(2, 2 + call.spatial)
        order = (1, *range(2 + call.spatial, windows.ndim), 0, *axes)
        columns = windows.permute(order).reshape(channels, -1, samples * math.prod(size))
    else:
        index = _grid_index(positions, size)
        # (N, C, positions, kernel)
        chosen: tuple[Any, ...] = (slice(None), slice(None), *index)
        picked = windows[chosen].flatten(3)
        columns = picked.permute(1, 3, 0, 2).reshape(channels, -1, samples * len(positions))
    # The kernels of a transposed convolution are turned round.
    columns = columns.flip(1) if call.transposed else columns
    return _wide(columns.reshape(call.groups, -1, columns.shape[-1]))


def _grid_index(positions: torch.Tensor, size: Sequence[int]) -> list[torch.Tensor]:
    """``torch.unravel_index``, whose first call imports for a second."""
    index: list[torch.Tensor] = []
    for length in reversed(size):
        index.insert(0, positions % length)
        positions = positions // length
    return index


def _wide(values: torch.Tensor) -> torch.Tensor:
    return values if values.dtype == torch.float64 else values.float()


def _windows(call: Call) -> torch.Tensor:
    """A view ``(N, C, *positions, *kernel)`` of the padded input."""
    padded, stride, dilation = _as_plain(call)
    kernel = call.weight.shape[2:]
    size = [
        (length - d * (k - 1) - 1) // s + 1
        for length, k, s, d in zip(padded.shape[2:], kernel, stride, dilation, strict=True)
    ]
    steps = padded.stride()
    shape = (*padded.shape[:2], *size, *kernel)
    strides = (
        *steps[:2],
        *(s * step for s, step in zip(stride, steps[2:], strict=True)),
        *(d * step for d, step in zip(dilation, steps[2:], strict=True)),
    )
    return padded.as_strided(shape, strides, padded.storage_offset())


def _as_plain(call: Call) -> tuple[torch.Tensor, tuple[int, ...], tuple[int, ...]]:
    """The input with zeros around and in between, the stride and the dilation that are left."""
    dilation = call.axes("dilation", 1)
    values = call.batched.detach()
    if not call.transposed:
        return functional.pad(values, _reversed(_padding(call))), call.axes("stride", 1), dilation
    stride = call.axes("stride", 1)
    if max(stride) > 1:
        size = [(length - 1) * s + 1 for length, s in zip(values.shape[2:], stride, strict=True)]
        spread = values.new_zeros(*values.shape[:2], *size)
        spread[(slice(None), slice(None), *(slice(None, None, s) for s in stride))] = values
        values = spread
    extra = call.axes("output_padding", 0)
    around = [
        (d * (k - 1) - p, d * (k - 1) - p + e)
        for d, k, p, e in zip(
            dilation, call.weight.shape[2:], call.axes("padding", 0), extra, strict=True
        )
    ]
    return functional.pad(values, _reversed(around)), (1,) * call.spatial, dilation


def _padding(call: Call) -> list[tuple[int, int]]:
    """Zeros before and after each axis."""
    padding = call.options.get("padding", 0)
    if padding == "valid":
        return [(0, 0)] * call.spatial
    if padding == "same":
        totals = [
            d * (k - 1)
            for d, k in zip(call.axes("dilation", 1), call.weight.shape[2:], strict=True)
        ]
        return [(total // 2, total - total // 2) for total in totals]
    return [(p, p) for p in call.axes("padding", 0)]


def _reversed(padding: list[tuple[int, int]]) -> list[int]:
    """As ``functional.pad`` takes it: the last axis first."""
    return [amount for pair in reversed(padding) for amount in pair]


def _output_size(call: Call) -> list[int]:
    stride, dilation = call.axes("stride", 1), call.axes("dilation", 1)
    lengths, kernel = call.batched.shape[2:], call.weight.shape[2:]
    if call.transposed:
        rows = zip(
            lengths,
            kernel,
            stride,
            dilation,
            call.axes("padding", 0),
            call.axes("output_padding", 0),
            strict=True,
        )
        return [(n - 1) * s - 2 * p + d * (k - 1) + e + 1 for n, k, s, d, p, e in rows]
    pairs = _padding(call)
    rows_ = zip(lengths, kernel, stride, dilation, pairs, strict=True)
    return [(n + sum(p) - d * (k - 1) - 1) // s + 1 for n, k, s, d, p in rows_]
