"""Weights whose output channels are spread over ranks, as ``fully_shard`` leaves them.

Each rank has whole kernels of every layer. What the steps add up, the ranks add up too: histograms,
counts and sums of squares, never a weight. So every rank finds the one threshold that the whole
weight has, exactly.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from ..backends.eager import EagerBackend
from ..backends.protocol import Backend, Batch
from ..config import PruneConfig
from .layers import LayerRef
from .sharding import group_of

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

    def counted(self, count: int, device: torch.device) -> int:
        """The sum over all ranks."""
        return int(self.summed(torch.tensor(count, device=device)))

    def smallest(self, values: torch.Tensor) -> torch.Tensor:
        """The minimum over all ranks."""
        torch.distributed.all_reduce(values, torch.distributed.ReduceOp.MIN, group=self._group)
        return values

    def apply_(self, batches: Sequence[Batch], thresholds: torch.Tensor) -> torch.Tensor:
        """Prune each rank's part in place; the rows are those of the whole weights."""
        return self.summed(super().apply_(batches, thresholds))


def sharded_backend(layers: Sequence[LayerRef], config: PruneConfig) -> Backend | None:
    """What prunes weights that are spread over ranks; None where no weight is."""
    groups = [group_of(ref.weight) for ref in layers]
    first = next((group for group in groups if group is not None), None)
    if first is None:
        return None
    if config.device is not None:
        raise ValueError(
            f"device={str(config.device)!r}: sharded weights are pruned where they live; leave "
            "device out"
        )
    for ref, group in zip(layers, groups, strict=True):
        if group != first:
            raise ValueError(
                f"layer {ref.name!r} is not spread over the same ranks as others; allowed: all "
                "selected layers sharded alike, or none"
            )
        if config.method == "dwt" and config.wavelet == "klt":
            raise ValueError(
                f"layer {ref.name!r} is sharded, and 'klt' looks at all of its kernels at once; "
                "allowed: every other basis"
            )
        if config.method == "dwt" and ref.weight.ndim == 2 and config.wavelet != "identity":
            raise ValueError(
                f"layer {ref.name!r} is a sharded matrix, which is one kernel to "
                f"{config.wavelet!r}; allowed: method='min_weight' or 'random', or Conv2d weights"
            )
    if config.backend not in ("auto", EagerBackend.name):
        raise ValueError(
            f"backend {config.backend!r} cannot do this: layer {layers[0].name!r} is sharded; "
            "allowed: 'auto', 'eager'"
        )
    return ShardedBackend(first)
