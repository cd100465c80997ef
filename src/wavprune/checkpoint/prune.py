"""Prune checkpoints on disk, tensor by tensor and with no model code.

What is written has a temporary name until it is complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Collection, Sequence
from contextlib import ExitStack
from pathlib import Path

from ..atomic import replaced
from ..config import PruneConfig
from ..engine.layers import LayerRef, select_names, unique_layers
from ..engine.run import prune_layers
from ..report import Outcome, PruneReport
from .formats import (
    INDEX,
    SAFETENSORS,
    SINGLE,
    STATE_DICTS,
    Checkpoint,
    WeightFile,
    open_checkpoint,
)

# A copy of a model directory holds the pruned weights and no others.
WEIGHTS = (
    *SAFETENSORS,
    *STATE_DICTS,
    *(".ckpt", ".gguf", ".h5", ".keras", ".msgpack", ".npy", ".npz", ".onnx", ".onnx_data"),
    *(".ot", ".pb", ".pickle", ".pkl", ".tflite"),
)
CACHES = (".git", ".cache")


def prune_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None,
    config: PruneConfig,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> PruneReport:
    """Prune the 4-D ``*.weight`` tensors of a checkpoint into a new one.

    Args:
        source: what ``open_checkpoint`` takes.
        target: a path of the same kind, which appears there when it is complete and not before.
            It may be ``source`` itself, with ``force``.
        config: what to do.
        force: replace what is at ``target``.
        dry_run: check everything and prune a private copy in memory; ``target`` may be None.
        progress: show a tqdm bar on standard error.

    Returns:
        The report, one entry a layer, in the order of the files and of the tensors in them.

    Raises:
        ValueError: ``source`` cannot be pruned or ``target`` cannot be written.
        OSError: reading or writing failed. Nothing is left behind in either case.
    """
    if target is None and not dry_run:
        raise ValueError("target is None; allowed only with dry_run=True")
    checkpoint = open_checkpoint(source)
    chosen = frozenset(select_names(checkpoint.layers, config))
    if target is not None:
        target = Path(target)
        _check_target(checkpoint.path, target, force)
    if target is None or dry_run:
        return _prune(checkpoint.files, [None] * len(checkpoint.files), chosen, config, progress)
    with replaced(target) as new:
        if not checkpoint.path.is_dir():
            return _prune(checkpoint.files, [new], chosen, config, progress)
        new.mkdir()
        copies = [new / file.path.name for file in checkpoint.files]
        report = _prune(checkpoint.files, copies, chosen, config, progress)
        _copy_others(checkpoint, new, in_place=target.exists() and target.samefile(source))
    return report


def _prune(
    files: Sequence[WeightFile],
    copies: Sequence[Path | None],
    chosen: Collection[str],
    config: PruneConfig,
    progress: bool,
) -> PruneReport:
    if config.scope == "layer" and len(files) > 1:
        # One file after the other, so that no more than one is ever mapped.
        reports = [
            _prune([file], [copy], chosen, config, progress)
            for file, copy in zip(files, copies, strict=True)
        ]
        return _merged([report for report in reports if report.layers])
    with ExitStack() as stack:
        refs: list[LayerRef] = []
        for file, copy in zip(files, copies, strict=True):
            layers = [layer for layer in file.layers if layer in chosen]
            refs += stack.enter_context(file.open(layers, copy))
        if not refs:
            return PruneReport(Outcome((), 0.0, 0.0), {})
        return prune_layers(unique_layers(refs), config, progress=progress)


def _merged(reports: Sequence[PruneReport]) -> PruneReport:
    outcome = Outcome(
        layers=tuple(layer for report in reports for layer in report),
        squared_norm=sum(report.squared_norm for report in reports),
        squared_error=sum(report.squared_error for report in reports),
    )
    return PruneReport(outcome, reports[0].settings)


def _check_target(source: Path, target: Path, force: bool) -> None:
    if target.name in ("", ".."):
        raise ValueError(f"{target} is no name to write to; give the directory's own")
    if not target.parent.is_dir():
        raise ValueError(f"{target}: there is no directory {target.parent}")
    suffix = target.suffix.lower()
    if source.is_dir():
        if suffix in (*SAFETENSORS, *STATE_DICTS) or target.is_file():
            raise ValueError(f"{target} names a file, but {source} is a directory; name one too")
        _check_directory(source, target)
    else:
        kind = SAFETENSORS if source.suffix.lower() in SAFETENSORS else STATE_DICTS
        if suffix not in kind:
            raise ValueError(f"{target} must end in {' or '.join(kind)}, as {source} does")
        if target.is_dir():
            raise ValueError(f"{target} is a directory, but {source} is a file; name a file")
    if not force and (target.exists() or target.is_symlink()):
        raise ValueError(f"{target} exists already; only --force replaces it")


def _check_directory(source: Path, target: Path) -> None:
    """Raise where writing or replacing the target would destroy more than a model."""
    inner, outer = source.resolve(), target.resolve()
    if inner != outer and (inner in outer.parents or outer in inner.parents):
        raise ValueError(f"{source} and {target} lie in one another; allowed: separate directories")
    if target.exists():
        known = any((target / name).exists() for name in (SINGLE, INDEX))
        if not known and any(target.iterdir()):
            raise ValueError(
                f"{target} is not replaced, for it is no model: it holds neither {SINGLE} nor "
                f"{INDEX}; remove it first"
            )


def _copy_others(checkpoint: Checkpoint, new: Path, *, in_place: bool) -> None:
    """Copy what makes a model directory complete: all of it in place, else all but weights."""
    pruned = {file.path.name for file in checkpoint.files}

    def left_out(directory: str, names: list[str]) -> set[str]:
        done = pruned if Path(directory) == checkpoint.path else set()
        if in_place:
            return done
        return done | {name for name in names if name in CACHES or _holds_weights(name)} - {
            checkpoint.index
        }

    shutil.copytree(checkpoint.path, new, ignore=left_out, dirs_exist_ok=True)


def _holds_weights(name: str) -> bool:
    """True for weight files of every format, and for the indices of their shards."""
    return Path(name.removesuffix(".index.json")).suffix.lower() in WEIGHTS
