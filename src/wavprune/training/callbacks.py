"""Training loops of other libraries that keep a network pruned: each a little over ``Pruner``."""

from __future__ import annotations

from torch import nn

from ..engine.sharding import as_sharded


def check_whole(model: nn.Module) -> None:
    """Raise unless one rank's masks are those of all, as checkpoints of these libraries have them.

    Raises:
        ValueError: a parameter is sharded.
    """
    for name, parameter in model.named_parameters():
        if as_sharded(parameter) is not None:
            raise ValueError(
                f"parameter {name!r} is sharded, and this callback stores the masks of rank 0 "
                "alone; allowed: whole parameters, or a Pruner with one state_dict() a rank"
            )
