"""Which tensors are one and the same memory."""

from __future__ import annotations

from collections.abc import Hashable

import torch


def memory_key(tensor: torch.Tensor) -> Hashable:
    """A key that two tensors share exactly if they are the same values in the same memory.

    Tied weights are found by it: parameters, their detached views and the entries of state dicts
    that are one memory, seen with one dtype, shape and stride. What has no memory of its own to
    compare (empty, sparse, on the meta device, a wrapper subclass) is equal to itself alone; keep
    such a tensor alive while its key is in use.

    Args:
        tensor: any tensor.

    Example:
        >>> weight = torch.nn.Parameter(torch.zeros(2, 3))
        >>> memory_key(weight) == memory_key(weight.detach())
        True
        >>> memory_key(weight) == memory_key(weight.T)
        False
    """
    if tensor.layout != torch.strided or not tensor.numel() or tensor.device.type == "meta":
        return id(tensor)
    try:
        address = tensor.data_ptr()
    except RuntimeError:
        return id(tensor)
    if not address:
        return id(tensor)
    strides = None
    if not tensor.is_contiguous():
        # The stride of an axis of length 1 means nothing.
        pairs = zip(tensor.stride(), tensor.shape, strict=True)
        strides = tuple(step if size > 1 else 0 for step, size in pairs)
    return tensor.device, address, tensor.dtype, tensor.shape, strides
