"""The optimizers that a pruner follows, and what they remember of a weight."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.hooks import RemovableHandle

# Running means of gradients, which are linear in them; everything else an optimizer remembers of
# a weight (running squares, step sizes, quantised values) has no coefficients.
MOMENTUM = ("momentum_buffer", "exp_avg")


class Followed:
    """One optimizer that a pruner follows.

    Args:
        optimizer: of ``torch.optim``, or what accelerate's ``prepare`` made of one.

    Attributes:
        optimizer: the one whose ``step`` moves the weights.

    Raises:
        TypeError: it is something else.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = _inner(optimizer)
        self._handle: RemovableHandle | None = None

    @property
    def name(self) -> str:
        """What people call it."""
        return type(self.optimizer).__name__

    def trains(self, weight: torch.Tensor) -> bool:
        """True where it has this very parameter."""
        groups = self.optimizer.param_groups
        return any(parameter is weight for group in groups for parameter in group["params"])

    def momentum(self, weight: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
        """The running means that it keeps of the gradients of a weight, by their names."""
        state = self.optimizer.state.get(weight, {})
        for key in MOMENTUM:
            value = state.get(key)
            if (
                isinstance(value, torch.Tensor)
                and value.is_floating_point()
                and value.shape == weight.shape
            ):
                yield key, value

    def register(self, after_step: Callable[[], None]) -> None:
        """Call this after every ``optimizer.step()``."""
        self._handle = self.optimizer.register_step_post_hook(lambda *_: after_step())

    def remove(self) -> None:
        """Undo ``register``."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    def __getstate__(self) -> dict[str, Any]:
        """Copies have no hook; the pruner registers theirs."""
        return {"optimizer": self.optimizer, "_handle": None}


def _inner(optimizer: Any) -> torch.optim.Optimizer:
    """The optimizer that calls hooks.

    accelerate's is a ``torch.optim.Optimizer`` by its type alone: it has no hooks of its own.
    """
    current = optimizer
    while isinstance(current, torch.optim.Optimizer):
        if isinstance(getattr(current, "_optimizer_step_post_hooks", None), dict):
            return current
        current = getattr(current, "optimizer", None)
    needed = ("register_step_post_hook", "param_groups", "state")
    if all(hasattr(optimizer, name) for name in needed):
        duck: torch.optim.Optimizer = optimizer
        return duck
    hint = ""
    inner = getattr(optimizer, "optimizer", None)
    if isinstance(inner, torch.optim.Optimizer):
        hint = f", such as the {type(inner).__name__} in its attribute 'optimizer'"
    raise TypeError(
        f"optimizer must be a torch.optim.Optimizer, not {type(optimizer).__name__}; allowed: "
        f"whatever calls the hooks of register_step_post_hook{hint}"
    )
