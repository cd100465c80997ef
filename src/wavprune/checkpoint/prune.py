"""Prune checkpoints on disk, tensor by tensor and with no model code.

What is written has a temporary name until it is complete.
"""

from __future__ import annotations

import os
from collections.abc import Collection, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from pathlib import Path

from ..common.atomic import recover, replaced
from ..config import PruneConfig, RunSettings
from ..engine.ambient import neutral
from ..engine.layers import LayerRef, unique_layers
from ..engine.run import prune_layers
from ..errors import WavpruneError
from ..report import Outcome, PruneReport
from .formats import (
    INDEX,
    KINDS,
    ONNX,
    SINGLE,
    Checkpoint,
    WeightFile,
    open_checkpoint,
)
from .formats.directory import COMPRESSED_WEIGHTS, copy_others
from .formats.names import warn_skipped
from .pruned import File, make_room, note


@neutral()
def prune_file(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str] | None,
    config: PruneConfig,
    *,
    force: bool = False,
    dry_run: bool = False,
    progress: bool = False,
) -> PruneReport:
    """Prune the ``*.weight`` tensors of a checkpoint, or the weights of a graph, into a new one.

    All of three to five axes without ``targets``; 2-D ones only where ``targets`` names them.

    Args:
        source: what ``open_checkpoint`` takes.
        target: a path of the same kind, which appears there when it is complete and not before.
            It may be ``source`` itself, with ``force``.
        config: what to do.
        force: replace what is at ``target``.
        dry_run: check everything and prune a private copy in memory; ``target`` may be None.
        progress: show a progress bar on standard error.

    Returns:
        The report, one entry a layer, in the order of the files and of the tensors in them.

    Raises:
        WavpruneError: ``source`` cannot be pruned or ``target`` cannot be written.
        OSError: reading or writing failed. Nothing is left behind in either case.
    """
    target = None if target is None else Path(target)
    if target is None and not dry_run:
        raise WavpruneError("target is None; allowed only with dry_run=True")
    if target is not None and not dry_run and target.parent.is_dir():
        recover(target)
    checkpoint = open_checkpoint(source, _scratch(target, dry_run))
    chosen = frozenset(checkpoint.select(config))
    if target is not None:
        check_target(checkpoint.path, target, force)
    warn_skipped(checkpoint.path, checkpoint.skipped)
    if target is None or dry_run:
        nowhere = [None] * len(checkpoint.files)
        report = _prune(checkpoint.files, nowhere, chosen, config, progress)
        report.coverage = checkpoint.coverage(report)
        return report
    with replaced(target, overwrite=force) as new, beside(checkpoint, target, force):
        if not checkpoint.path.is_dir():
            report = _prune(checkpoint.files, [new], chosen, config, progress)
            report.coverage = checkpoint.coverage(report)
            return report
        new.mkdir()
        names = [file.path.name for file in checkpoint.files]
        copies = [new / name for name in names]
        report = _prune(checkpoint.files, copies, chosen, config, progress)
        in_place = target.exists() and target.samefile(source)
        copy_others(checkpoint.path, new, names, checkpoint.index, in_place=in_place)
    report.coverage = checkpoint.coverage(report)
    return report


def beside(checkpoint: Checkpoint, target: Path, force: bool) -> AbstractContextManager[object]:
    """For the time of a block, what has to appear beside the target: external data of ONNX."""
    if checkpoint.path.suffix.lower() not in ONNX or checkpoint.path.is_dir():
        return nullcontext()
    from .formats.onnxfile import OnnxFile

    (file,) = checkpoint.files
    assert isinstance(file, OnnxFile)
    return file.beside(target, force=force)


def _scratch(target: Path | None, dry_run: bool) -> Path | None:
    """Where a private copy of the source may lie for a while."""
    return None if target is None or dry_run or not target.parent.is_dir() else target.parent


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
        noted: list[tuple[File, Path]] = []
        for file, copy in zip(files, copies, strict=True):
            weights = [weight for weight in file.weights if weight.layer in chosen]
            if copy is not None and weights and isinstance(file, File):
                make_room(file, weights, config)
                noted.append((file, copy))
            refs += stack.enter_context(file.open([weight.layer for weight in weights], copy))
        if not refs:
            return PruneReport(Outcome((), 0.0, 0.0), RunSettings.of(config))
        # Read before the file appears: an error must leave nothing.
        report = prune_layers(unique_layers(refs), config, progress=progress).wait()
        for file, copy in noted:
            note(file, copy, report)
        return report


def _merged(reports: Sequence[PruneReport]) -> PruneReport:
    outcome = Outcome(
        layers=tuple(layer for report in reports for layer in report),
        squared_norm=sum(report.squared_norm for report in reports),
        squared_error=sum(report.squared_error for report in reports),
    )
    bases = {name: basis for report in reports for name, basis in report.bases.items()}
    return PruneReport(outcome, reports[0].settings, bases)


def check_target(source: Path, target: Path, force: bool) -> None:
    """Raise WavpruneError where a target cannot take what comes from this source."""
    if target.name in ("", ".."):
        raise WavpruneError(f"invalid output path {str(target)!r}; give the directory's own name")
    if not target.parent.is_dir():
        raise WavpruneError(f"{target}: there is no directory {target.parent}")
    suffix = target.suffix.lower()
    if source.is_dir():
        if any(suffix in kind for kind in KINDS) or target.is_file():
            raise WavpruneError(f"{target} names a file, but {source} is a directory; name one too")
        _check_directory(source, target)
    else:
        kind = next(kind for kind in KINDS if source.suffix.lower() in kind)
        if suffix not in kind:
            raise WavpruneError(f"{target} must end in {' or '.join(kind)}, as {source} does")
        if target.is_dir():
            raise WavpruneError(f"{target} is a directory, but {source} is a file; name a file")
        if target.exists() and not target.is_file():
            raise WavpruneError(f"{target} is not a regular file, and is not replaced")
    if not force and os.path.lexists(target):
        raise WavpruneError(f"{target} exists already; only --force replaces it")


def _check_directory(source: Path, target: Path) -> None:
    """Raise where writing or replacing the target would destroy more than a model."""
    inner, outer = source.resolve(), target.resolve()
    if inner != outer and (inner in outer.parents or outer in inner.parents):
        raise WavpruneError(
            f"one of {source} and {target} contains the other; allowed: separate directories"
        )
    if target.exists():
        known = any((target / name).exists() for name in (SINGLE, INDEX, COMPRESSED_WEIGHTS))
        if not known and any(target.iterdir()):
            raise WavpruneError(
                f"{target} is not replaced, for it is no model: it holds neither {SINGLE} nor "
                f"{INDEX}; remove it first"
            )
