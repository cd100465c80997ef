"""Keep a network pruned while a Hugging Face ``Trainer`` trains it."""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file

try:
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
except ImportError as error:
    raise ImportError(
        "this callback needs transformers; pip install 'wavprune[huggingface]'"
    ) from error

from ..atomic import replaced
from ..config import PruneConfig
from ..report import PruneReport
from .callbacks import check_whole
from .pruner import Pruner
from .schedules import Schedule

FILE = "wavprune.safetensors"
# Layers are named like modules, and no such name begins with a dot.
TENSOR = ".tensor"


class PruningCallback(TrainerCallback):
    """Prunes the model of a ``Trainer``; resumes from the ``Trainer``'s checkpoints.

    Args:
        config: method, basis and scope, as for ``Pruner``.
        schedule: when and how far; None prunes once, before the first step.
        regrow: as for ``Pruner``.
        project_state: as for ``Pruner``.
        resume_from: the checkpoint's folder where ``resume_from_checkpoint`` is one that is not in
            ``output_dir``.

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
        resume_from: str | Path | None = None,
    ) -> None:
        self._new = partial(
            Pruner,
            config=config,
            schedule=schedule,
            regrow=regrow,
            project_state=project_state,
        )
        self._resume_from = resume_from
        self._pruner: Pruner | None = None
        self.report: PruneReport | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Follow the optimizer, inside what accelerate wraps around it.

        Raises:
            ValueError: a parameter is sharded, or training resumes where there are no masks.
        """
        if self._pruner is not None:
            self._pruner.detach()
        optimizer, model = kwargs["optimizer"], kwargs["model"]
        check_whole(model)
        pruner = self._new(model)
        if state.global_step:
            saved = Path(self._resume_from or _checkpoint(args, state)) / FILE
            if not saved.exists():
                raise ValueError(
                    f"training resumes at step {state.global_step}, and there are no masks at "
                    f"{str(saved)!r}; give the checkpoint's folder as resume_from=, or load its "
                    "weights alone to start pruning there"
                )
            pruner.load_state_dict(_read(saved))
        self.report = None
        self._pruner = pruner
        pruner.attach(getattr(optimizer, "optimizer", optimizer))

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the masks to the checkpoint that was written."""
        if self._pruner is not None and state.is_world_process_zero:
            _write(self._pruner.state_dict(), _checkpoint(args, state) / FILE)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the report."""
        if self._pruner is not None:
            self.report = self._pruner.finish()


def _checkpoint(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _write(state: dict[str, Any], path: Path) -> None:
    tensors: dict[str, torch.Tensor] = {}

    def plain(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            name = str(len(tensors))
            tensors[name] = value.contiguous().cpu()
            return {TENSOR: name}
        if isinstance(value, dict):
            return {key: plain(entry) for key, entry in value.items()}
        return value

    content = json.dumps(plain(state))
    with replaced(path) as new:
        save_file(tensors, new, metadata={"wavprune.pruner": content})


def _read(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:

        def whole(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            if TENSOR in value:
                return file.get_tensor(value[TENSOR])
            return {key: whole(entry) for key, entry in value.items()}

        state: dict[str, Any] = whole(json.loads(file.metadata()["wavprune.pruner"]))
    return state
