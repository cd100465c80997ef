"""Keep a network pruned while a Hugging Face ``Trainer`` trains it."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..common.atomic import replaced
from ..common.optional import require
from ..config import PruneConfig
from ..errors import WavpruneError
from .callbacks import PruningHooks
from .pruner import Pruner
from .schedules import Schedule

require("transformers", "safetensors", extra="huggingface", purpose="this callback")
from safetensors import SafetensorError, safe_open  # noqa: E402  # after the check
from safetensors.torch import save  # noqa: E402
from transformers import TrainerCallback  # noqa: E402

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

# Masks of the first callback, and of further ones.
FILE, FURTHER_FILE = "wavprune.safetensors", "wavprune-{}.safetensors"
# Layers are named like modules, and no such name begins with a dot.
TENSOR = ".tensor"


class PruningCallback(PruningHooks, TrainerCallback):
    """Prunes the model of a ``Trainer``; resumes from the ``Trainer``'s checkpoints.

    With ``load_best_model_at_end`` the model that was loaded is projected onto the last masks, with
    a warning where it was pruned less.

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
        super().__init__(config, schedule, regrow=regrow, project_state=project_state)
        self._resume_from = resume_from

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        """Follow the optimizer, inside what accelerate wraps around it.

        Raises:
            WavpruneError: a parameter is sharded, or training resumes where there are no masks of
                these weights.
        """
        pruner = self._new_pruner(kwargs["model"])
        resumed = self._resumed(pruner, args, state) if state.global_step else None
        self._start(pruner, [kwargs["optimizer"]], resumed)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See that what is evaluated or saved next is pruned."""
        if control.should_evaluate or control.should_save:
            self._enforce()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """See ``on_step_end``."""
        if control.should_evaluate or control.should_save:
            self._enforce()

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the masks to the checkpoint that was written."""
        if self._pruner is None or not args.should_save:
            return
        folder = _saved_folder(args, state)
        if folder is None:
            warnings.warn(
                f"there is no folder checkpoint-{state.global_step} in {args.output_dir!r}, so the "
                "masks were not saved, and training cannot be resumed there",
                stacklevel=2,
            )
            return
        _write(self._pruner.state_dict(), _own_file(folder, self._pruner))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the report, of the best model where that was loaded."""
        self._finish()

    def _resumed(
        self, pruner: Pruner, args: TrainingArguments, state: TrainerState
    ) -> dict[str, Any]:
        """The stored state of this callback, of these weights."""
        if self._resume_from is not None:
            folders = [Path(self._resume_from)]
        else:
            folders = [_usual_folder(args, state), *_nested_folders(args, state)]
        files = [file for folder in folders for file in _mask_files(folder)]
        if not files:
            raise WavpruneError(
                f"training resumes at step {state.global_step}, and there are no masks at "
                f"{str(folders[0] / FILE)!r}; give the checkpoint's folder as resume_from=, or "
                "load its weights alone to start pruning there"
            )
        problems = []
        for file in files:
            try:
                stored = _read(file)
                if pruner.describes(stored):
                    return stored
                problems.append(f"{str(file)!r}: masks of other weights than the model has now")
            except WavpruneError as error:
                problems.append(f"{str(file)!r}: {error}")
        raise WavpruneError(
            f"training resumes at step {state.global_step}, and no masks of this model were found: "
            f"{'; '.join(problems)}; give the folder of the checkpoint that is resumed as "
            "resume_from="
        )


def _usual_folder(args: TrainingArguments, state: TrainerState) -> Path:
    return Path(args.output_dir or ".") / f"checkpoint-{state.global_step}"


def _nested_folders(args: TrainingArguments, state: TrainerState) -> list[Path]:
    """Where a hyperparameter search saves; the latest first."""
    root = Path(args.output_dir or ".")
    folders = [
        folder
        for depth in ("*", "*/*")
        for folder in root.glob(f"{depth}/checkpoint-{state.global_step}")
    ]
    return sorted(folders, key=_saved_at, reverse=True)


def _saved_at(folder: Path) -> int:
    written = folder / "trainer_state.json"
    return (written if written.exists() else folder).stat().st_mtime_ns


def _saved_folder(args: TrainingArguments, state: TrainerState) -> Path | None:
    """The checkpoint that was written just now."""
    usual = _usual_folder(args, state)
    if usual.is_dir() and not state.is_hyper_param_search:
        return usual
    nested = _nested_folders(args, state)
    return nested[0] if nested else usual if usual.is_dir() else None


def _mask_files(folder: Path) -> list[Path]:
    return [*folder.glob(FILE), *sorted(folder.glob(FURTHER_FILE.format("*")))]


def _own_file(folder: Path, pruner: Pruner) -> Path:
    """Where the masks of this pruner go: not where those of another one's layers are."""
    for path in _names(folder):
        if not path.exists():
            return path
        try:
            stored = _read(path)
        except WavpruneError:
            continue
        if list(stored.get("layers") or ()) == pruner.layer_names:
            return path
    raise AssertionError


def _names(folder: Path) -> Iterator[Path]:
    yield folder / FILE
    yield from (folder / FURTHER_FILE.format(number) for number in itertools.count(2))


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
        # safetensors' own save_file makes a file that only its owner can read.
        new.write_bytes(save(tensors, metadata={"wavprune.pruner": content}))


def _read(path: Path) -> dict[str, Any]:
    """What ``_write`` wrote.

    Raises:
        WavpruneError: the file holds something else.
    """
    try:
        with safe_open(path, framework="pt") as file:

            def whole(value: Any) -> Any:
                if not isinstance(value, dict):
                    return value
                if TENSOR in value:
                    return file.get_tensor(value[TENSOR])
                return {key: whole(entry) for key, entry in value.items()}

            state: dict[str, Any] = whole(json.loads(file.metadata()["wavprune.pruner"]))
    except (SafetensorError, TypeError, KeyError, ValueError, RecursionError) as error:
        raise WavpruneError(f"this holds no masks: {error}") from error
    return state
