"""Keep a network pruned while Lightning trains it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from ..common.optional import require
from ..config import PruneConfig
from ..engine.layers import named_layers
from ..errors import WavpruneError
from .callbacks import PruningHooks
from .schedules import Schedule

require("lightning.pytorch", extra="lightning", purpose="this callback")
from lightning.pytorch.callbacks import Callback, Checkpoint  # noqa: E402  # after the check

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer


class PruningCallback(PruningHooks, Callback):
    """Prunes a ``LightningModule`` in training; resumes from Lightning's checkpoints.

    It follows every optimizer of the module that trains a pruned layer. What other callbacks do to
    the weights, such as averaging, is projected before a checkpoint is saved and when training
    ends, with a warning: this callback runs after them.

    Args:
        config: method, basis and scope, as for ``Pruner``.
        schedule: when and how far; None prunes once, before the first step.
        regrow: as for ``Pruner``.
        project_state: as for ``Pruner``.

    Attributes:
        report: what is pruned; None until training ends. After ``trainer.test(ckpt_path=...)``, of
            the weights that were loaded.
    """

    def __init__(
        self,
        config: PruneConfig | None = None,
        schedule: Schedule | None = None,
        *,
        regrow: bool = True,
        project_state: bool = False,
    ) -> None:
        super().__init__(config, schedule, regrow=regrow, project_state=project_state)
        selection = {} if config is None else {"targets": config.targets, "ignore": config.ignore}
        self._selection = {name: value for name, value in selection.items() if value is not None}
        self._resumed: dict[str, Any] = {}

    @property
    def state_key(self) -> str:
        """Under which name checkpoints hold the state: one for each selection of layers."""
        if not self._selection:
            return type(self).__qualname__
        return self._generate_state_key(**self._selection)

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Come after all callbacks but those that save checkpoints."""
        loop: Any = trainer  # whose type does not have the list
        others = [callback for callback in loop.callbacks if callback is not self]
        savers = [callback for callback in others if isinstance(callback, Checkpoint)]
        before = [callback for callback in others if not isinstance(callback, Checkpoint)]
        loop.callbacks = [*before, self, *savers]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Follow the optimizers; go on where the trainer's own count of steps is not 0.

        Raises:
            WavpruneError: there is no optimizer, a parameter is sharded, or training goes on from a
                checkpoint without this callback's state.
        """
        # Where there is none, Lightning has an empty list, or a stand-in of no parameter of these.
        parameters = {id(parameter) for parameter in pl_module.parameters()}
        followed = [o for o in trainer.optimizers if not parameters.isdisjoint(_trained(o))]
        if not followed:
            raise WavpruneError(
                "configure_optimizers gave no optimizer of this module's parameters, and pruning "
                "in training follows one"
            )
        pruner = self._new_pruner(pl_module)
        modules = named_layers(pl_module)
        pruned = {id(modules[name].weight) for name in pruner.layer_names}
        followed = [o for o in followed if not pruned.isdisjoint(_trained(o))] or followed[:1]
        state = self._resumed
        if trainer.global_step and not state:
            if self._pruner is None:
                raise WavpruneError(
                    f"training goes on at step {trainer.global_step}, and the checkpoint has no "
                    "state of this callback; to start pruning there, load the weights alone"
                )
            state = self._pruner.state_dict()
        self._start(pruner, followed, state)
        self._resumed = {}

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that what may be saved next is pruned."""
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._enforce()

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See that what may be saved next is pruned."""
        self._enforce()

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Put pruned weights into the checkpoint where others, such as averages, are in it."""
        if self._pruner is not None:
            weights = checkpoint["state_dict"]
            checkpoint["state_dict"] = {**weights, **self._pruner.enforced(weights)}

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take the report."""
        self._finish()

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take it once more where something changed the weights since."""
        self._finish()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Leave the optimizers alone."""
        if self._pruner is not None:
            self._pruner.detach()

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See ``on_test_start``."""
        if trainer.state.fn != "fit":
            self._follow_loaded(pl_module)

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Where a checkpoint was loaded, take the report of its weights."""
        self._follow_loaded(pl_module)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """See ``on_test_start``."""
        self._follow_loaded(pl_module)

    def _follow_loaded(self, pl_module: LightningModule) -> None:
        pruner, state = self._pruner, self._resumed
        if state and state.get("layers") and pruner is not None and pruner.model is pl_module:
            self._resumed = {}
            pruner.load_state_dict(state)
            self._finish()

    def state_dict(self) -> dict[str, Any]:
        """What Lightning puts into its checkpoints."""
        return self._resumed if self._pruner is None else self._pruner.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """What Lightning found in a checkpoint; taken up when training starts."""
        self._resumed = state_dict

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Take up what an older version stored, which had one name for every callback."""
        found = checkpoint.get("callbacks", {})
        self._resumed = found.get(self.state_key) or found.get(type(self).__qualname__) or {}


def _trained(optimizer: Optimizer) -> set[int]:
    return {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
