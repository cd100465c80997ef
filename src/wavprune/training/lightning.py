"""Keep a network pruned while Lightning trains it."""

from __future__ import annotations

from functools import partial
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("this callback needs Lightning; pip install 'wavprune[lightning]'") from error

from ..config import PruneConfig
from ..report import PruneReport
from .callbacks import check_whole
from .pruner import Pruner
from .schedules import Schedule


class PruningCallback(Callback):
    """Prunes a ``LightningModule`` in training; resumes from Lightning's checkpoints.

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
        self._new = partial(
            Pruner,
            config=config,
            schedule=schedule,
            regrow=regrow,
            project_state=project_state,
        )
        self._resumed: dict[str, Any] = {}
        self._pruner: Pruner | None = None
        self.report: PruneReport | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the first optimizer; go on where the trainer's own count of steps is not 0.

        Raises:
            ValueError: there is no optimizer, a parameter is sharded, or training goes on from a
                checkpoint without this callback's state.
        """
        # Where there is none, Lightning has an empty list, or a stand-in of no parameter of these.
        groups = trainer.optimizers[0].param_groups if trainer.optimizers else []
        followed = {id(parameter) for group in groups for parameter in group["params"]}
        if followed.isdisjoint(map(id, pl_module.parameters())):
            raise ValueError(
                "configure_optimizers gave no optimizer of this module's parameters, and pruning "
                "in training follows one"
            )
        check_whole(pl_module)
        pruner = self._new(pl_module)
        state, self._resumed = self._resumed, {}
        if trainer.global_step and not state:
            if self._pruner is None:
                raise ValueError(
                    f"training goes on at step {trainer.global_step}, and the checkpoint has no "
                    "state of this callback; to start pruning there, load the weights alone"
                )
            state = self._pruner.state_dict()
        if state:
            pruner.load_state_dict(state)
        self.report = None
        self._pruner = pruner
        pruner.attach(trainer.optimizers[0])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the report."""
        if self._pruner is not None:
            self.report = self._pruner.finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the optimizer alone."""
        if self._pruner is not None:
            self._pruner.detach()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning puts into its checkpoints."""
        return self._resumed if self._pruner is None else self._pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What Lightning found in a checkpoint; taken up when training starts."""
        self._resumed = state_dict
