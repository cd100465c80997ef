"""What the callbacks for other training loops share: each is a little over ``Pruner``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from ..config import PruneConfig
from ..engine.sharding import as_sharded
from ..errors import WavpruneError
from ..report import PruneReport
from .pruner import Pruner
from .schedules import Schedule


class PruningHooks:
    """A pruner that lives as long as a training loop runs.

    Args:
        config: method, basis and scope, as for ``Pruner``.
        schedule: when and how far; None prunes once, before the first step.
        regrow: as for ``Pruner``.
        project_state: as for ``Pruner``.

    Attributes:
        report: what is pruned; None until training ends.
    """

    def __init__(
        self,
        config: PruneConfig | None = None,
        schedule: Schedule | None = None,
        *,
        regrow: bool = True,
        project_state: bool = False,
    ) -> None:
        self._make_pruner = partial(
            Pruner,
            config=config,
            schedule=schedule,
            regrow=regrow,
            project_state=project_state,
        )
        self._pruner: Pruner | None = None
        self.report: PruneReport | None = None

    def _new_pruner(self, model: nn.Module) -> Pruner:
        check_whole(model)
        return self._make_pruner(model)

    def _start(
        self,
        pruner: Pruner,
        optimizers: Sequence[torch.optim.Optimizer],
        state: Mapping[str, Any] | None,
    ) -> None:
        """Let a new pruner follow the optimizers, and go on from a state if there is one."""
        if state:
            pruner.load_state_dict(dict(state))
        if self._pruner is not None:
            self._pruner.detach()
        try:
            for optimizer in optimizers:
                pruner.attach(optimizer)
        except BaseException:
            pruner.detach()
            raise
        self._pruner, self.report = pruner, None

    def _enforce(self) -> None:
        """See that the weights are pruned: something else may have changed them."""
        if self._pruner is not None:
            self._pruner.enforce()

    def _finish(self) -> None:
        """Take the report of weights that are pruned."""
        if self._pruner is not None:
            self.report = self._pruner.finish(enforce=True)


def check_whole(model: nn.Module) -> None:
    """Raise unless one rank's masks are those of all, as checkpoints of these libraries have them.

    Raises:
        WavpruneError: a parameter is sharded.
    """
    for name, parameter in model.named_parameters():
        if as_sharded(parameter) is not None:
            raise WavpruneError(
                f"parameter {name!r} is sharded, and this callback stores the masks of rank 0 "
                "alone; allowed: whole parameters, or a Pruner with one state_dict() a rank"
            )
