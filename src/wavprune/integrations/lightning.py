"""Keep a network pruned while Lightning trains it."""

from __future__ import annotations

from functools import partial
from typing import Any

try:
    from lightning.pytorch import Callback, LightningModule, Trainer
except ImportError as error:
    raise ImportError("this callback needs Lightning; pip install 'wavprune[lightning]'") from error

from ..config import PruneConfig
from ..finetune import Pruner
from ..report import PruneReport
from ..schedule import Schedule


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
        """Follow the first optimizer."""
        self._pruner = self._new(pl_module)
        if self._resumed:
            self._pruner.load_state_dict(self._resumed)
        self._pruner.attach(trainer.optimizers[0])

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the report."""
        if self._pruner is not None:
            self.report = self._pruner.finish()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning puts into its checkpoints."""
        return self._resumed if self._pruner is None else self._pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What Lightning found in a checkpoint; taken up when training starts."""
        self._resumed = state_dict
