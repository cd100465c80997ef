"""Weights whose output channels are spread over ranks, as ``fully_shard`` leaves them.

Each rank has whole kernels of every layer. What the steps add up, the ranks add up too: histograms,
counts and sums of squares, never a weight. So every rank finds the one threshold that the whole
weight has, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from . import Batch
from .eager import EagerBackend

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


class ShardedBackend(EagerBackend):
    """The five steps in plain torch, with sums over the ranks of a group."""

    name = "eager"
    # All layers of a call: the parts differ in size, and every rank must take the same steps.
    unit = 1 << 62

    def __init__(self, group: ProcessGroup) -> None:
        self._group = group

    def summed(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks."""
        torch.distributed.all_reduce(values, group=self._group)
        return values

    def smallest(self, values: torch.Tensor) -> torch.Tensor:
        """The minimum over all ranks."""
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN, group=self._group)
        return values

    def apply_(self, batches: Sequence[Batch], thresholds: torch.Tensor) -> torch.Tensor:
        """Prune each rank's part in place; the rows are those of the whole weights."""
        return self.summed(super().apply_(batches, thresholds))
