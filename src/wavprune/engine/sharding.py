"""Weights that are spread over ranks: ``DTensor``, as ``fully_shard`` makes them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch

from ..bases import family_of
from ..config import AUTO, PruneConfig
from ..errors import WavpruneError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from torch.distributed import ProcessGroup
    from torch.distributed.tensor import DTensor

    from .layers import LayerRef


# Asked of every weight at every call.
_PLAIN = (torch.nn.Parameter, torch.Tensor)


def as_sharded(weight: torch.Tensor) -> DTensor | None:
    """The weight where it is sharded, else None."""
    if type(weight) in _PLAIN:
        return None
    tensors = sys.modules.get("torch.distributed.tensor")
    return weight if tensors is not None and isinstance(weight, tensors.DTensor) else None


def first_channel(weight: torch.Tensor) -> int:
    """The output channel that this rank's part begins with; 0 where it is not sharded."""
    sharded = as_sharded(weight)
    dim = None if sharded is None else _sharded_dim(sharded)
    if sharded is None or dim is None:
        return 0
    mesh, outs = sharded.device_mesh, int(sharded.shape[0])
    each = -(-outs // mesh.size(dim))
    return min(mesh.get_local_rank(dim) * each, outs)


def group_of(weight: torch.Tensor) -> ProcessGroup | None:
    """The ranks that hold the other parts of a weight; None where each has all of it."""
    sharded = as_sharded(weight)
    dim = None if sharded is None else _sharded_dim(sharded)
    return None if sharded is None or dim is None else sharded.device_mesh.get_group(dim)


def problem(weight: DTensor) -> str | None:
    """Why a sharded weight cannot be pruned, or None."""
    from torch.distributed.tensor import Replicate, Shard

    placements = weight.placements
    sharded = [p for p in placements if p != Replicate()]
    if all(type(p) is Shard and p.dim == 0 for p in sharded) and len(sharded) <= 1:
        return None
    return f"is sharded as {placements}; allowed: its output channels, Shard(0), over one mesh axis"


def _sharded_dim(weight: DTensor) -> int | None:
    for dim, placement in enumerate(weight.placements):
        if placement.is_shard(0):
            return dim
    return None


def local_part(weight: torch.Tensor) -> torch.Tensor:
    """What this rank has of a weight, without gradient; all of it where it is not sharded."""
    if type(weight) in _PLAIN:
        return weight.detach()
    sharded = as_sharded(weight)
    return (weight if sharded is None else sharded.to_local()).detach()


def in_all(value: torch.Tensor) -> torch.Tensor:
    """A number computed from a weight, over all ranks."""
    sharded = as_sharded(value)
    return value if sharded is None else sharded.full_tensor()


def check_sharded(refs: Sequence[LayerRef], config: PruneConfig) -> None:
    """Raise WavpruneError where some weights are sharded and these settings do not allow it."""
    groups = [group_of(ref.weight) for ref in refs]
    shared = next((group for group in groups if group is not None), None)
    if shared is None:
        return
    if config.device is not None:
        raise WavpruneError(
            f"device={str(config.device)!r}: sharded weights are pruned where they live; leave "
            "device out"
        )
    name = config.basis_name
    for ref, group in zip(refs, groups, strict=True):
        if group != shared:
            raise WavpruneError(
                f"layer {ref.name!r} is not spread over the same ranks as others; allowed: all "
                "selected layers sharded alike, or none"
            )
        if name != AUTO and family_of(name).data_driven:
            raise WavpruneError(
                f"layer {ref.name!r} is sharded, and {name!r} looks at all of its kernels at once; "
                "allowed: every other basis"
            )
        if ref.weight.ndim == 2 and name != "identity":
            raise WavpruneError(
                f"layer {ref.name!r} is a sharded matrix, which is one kernel to {name!r}; "
                "allowed: method='min_weight' or 'random', or convolutions"
            )
