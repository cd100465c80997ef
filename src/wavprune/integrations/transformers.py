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
from ..finetune import Pruner
from ..report import PruneReport
from ..schedule import Schedule

FILE = "wavprune.safetensors"


class PruningCallback(TrainerCallback):
    """Prunes the model of a ``Trainer``; resumes from the ``Trainer``'s checkpoints.

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
        self._pruner: Pruner | None = None
        self.report: PruneReport | None = None

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Follow the optimizer, inside what accelerate wraps around it."""
        optimizer = kwargs["optimizer"]
        self._pruner = self._new(kwargs["model"])
        saved = _checkpoint(args, state) / FILE
        if state.global_step and saved.exists():
            self._pruner.load_state_dict(_read(saved))
        self._pruner.attach(getattr(optimizer, "optimizer", optimizer))

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

    def plain(value: Any, place: str) -> Any:
        if isinstance(value, torch.Tensor):
            tensors[place] = value.contiguous().cpu()
            return {"tensor": place}
        if isinstance(value, dict):
            return {key: plain(entry, f"{place}/{key}") for key, entry in value.items()}
        return value

    content = json.dumps(plain(state, "state"))
    with replaced(path) as new:
        save_file(tensors, new, metadata={"wavprune.pruner": content})


def _read(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:

        def whole(value: Any) -> Any:
            if not isinstance(value, dict):
                return value
            if value.keys() == {"tensor"}:
                return file.get_tensor(value["tensor"])
            return {key: whole(entry) for key, entry in value.items()}

        state: dict[str, Any] = whole(json.loads(file.metadata()["wavprune.pruner"]))
    return state
