"""What was changed in place is given back if an error follows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from .ambient import neutral
from .sharding import local_part


@contextmanager
def undone_on_error(tensors: Sequence[torch.Tensor]) -> Iterator[None]:
    """Restore the values of some tensors if the block raises anything, an interrupt included.

    Args:
        tensors: what the block changes in place. Copies of all of them are held meanwhile.

    Example:
        >>> weight = torch.ones(2)
        >>> try:
        ...     with undone_on_error([weight]):
        ...         _ = weight.zero_()
        ...         raise KeyboardInterrupt
        ... except KeyboardInterrupt:
        ...     weight.tolist()
        [1.0, 1.0]
    """
    parts = [local_part(tensor) for tensor in tensors]
    copies = [part.clone() for part in parts]
    try:
        yield
    except BaseException:
        with neutral(tensors):
            for part, copy in zip(parts, copies, strict=True):
                part.copy_(copy)
        raise
