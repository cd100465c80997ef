"""What a worker does with a model: curves, pruning, compression, calibration, comparison.

Each task reads one directory and writes another; nothing here knows of HTTP or of a queue.
"""

from __future__ import annotations

import json
import os
import shutil
import time
import warnings
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import save
from ..checkpoint.formats import ONNX
from ..checkpoint.formats.names import COMPUTED_REASONS, SkippedLayerWarning
from ..checkpoint.prune import prune_file
from ..common.atomic import replaced
from ..common.progress import Listener
from ..config import PruneConfig
from ..onnx import save as save_graph
from ..report import PruneReport
from . import analysis
from .archives import unpack

if TYPE_CHECKING:
    from torch import nn

    from ..sweep.data import Loader

ZIP = ".zip"
CURVES, INPUTS, RESULT, REPORT = "curves.npz", "inputs", "result.json", "report.json"
# What is made of a directory: itself, and a zip of it to download.
DIRECTORY, PACKED = "model", "model.zip"
# Inputs that say how far two networks agree, and from which one is calibrated.
MOST_INPUTS = 2048


def source_of(model: Path, kind: str) -> Path:
    """Where the checkpoint of a model lies, in its directory.

    Args:
        model: the directory.
        kind: the suffix of what was uploaded.
    """
    return model / "source" if kind == ZIP else model / f"source{kind}"


def uploaded(model: Path, kind: str) -> Path:
    """Where an upload of this kind is put."""
    return model / f"source{kind}"


def analyze(model: Path, kind: str, most: int, report: Listener) -> dict[str, Any]:
    """Unpack what needs it and measure the curves.

    Args:
        model: the directory of the model.
        kind: the suffix of what was uploaded.
        most: bytes that a zip may unpack to.
        report: is told how far it is.

    Returns:
        What is said of the model.

    Raises:
        WavpruneError: it cannot be used; the message says why.
    """
    source = source_of(model, kind)
    left_out: list[str] = []
    if kind == ZIP and not source.exists():
        report("unpack", None)
        with replaced(source) as new:
            new.mkdir()
            left_out = unpack(uploaded(model, kind), new, most)
        uploaded(model, kind).unlink()
    curves = analysis.analyze(source, lambda share: report("measure", share))
    analysis.save(curves, model / CURVES)
    return {"layers": len(curves.layers), "left_out": [name[:200] for name in left_out[:64]]}


def run(
    task: str, model: Path, kind: str, settings: dict[str, Any], output: Path, report: Listener
) -> dict[str, Any]:
    """Do a job.

    Args:
        task: one of ``TASKS``.
        model: the directory of the model.
        kind: the suffix of what was uploaded.
        settings: those of the job, which were checked.
        output: an empty directory.
        report: is told how far it is.

    Returns:
        What came out, ready for JSON: ``file`` is its name in ``output``, if there is one.

    Raises:
        WavpruneError: it cannot be done; the message says why.
    """
    start = time.perf_counter()
    source = source_of(model, kind)
    with warnings.catch_warnings():
        # They are in the facts of the model.
        warnings.simplefilter("ignore", SkippedLayerWarning)
        result = TASKS[task](source, model, settings, output, report)
    return {**result, "seconds": round(time.perf_counter() - start, 3)}


def _config(settings: dict[str, Any], model: Path) -> PruneConfig:
    skipped = analysis.load(model / CURVES).skipped
    return PruneConfig(
        wavelet=settings["basis"],
        sparsity=settings["sparsity"],
        scope=settings.get("scope", "layer"),
        ignore=tuple(_by_name(skipped)) or None,
    )


def _by_name(names: dict[str, str]) -> list[str]:
    """Patterns that match these names alone; those of computed weights are in no file."""
    return [name for name, reason in names.items() if reason not in COMPUTED_REASONS]


def _prune(
    source: Path, model: Path, settings: dict[str, Any], output: Path, report: Listener
) -> dict[str, Any]:
    target = output / (DIRECTORY if source.is_dir() else f"{DIRECTORY}{source.suffix}")
    report("prune", 0.0)
    pruned = prune_file(source, target, _config(settings, model))
    return _finished(pruned, target, report)


def _compress(
    source: Path, model: Path, settings: dict[str, Any], output: Path, report: Listener
) -> dict[str, Any]:
    target = output / f"{DIRECTORY}.safetensors"
    save_compressed: Any = save
    if source.suffix in ONNX:
        save_compressed = save_graph
        target = target.with_suffix(source.suffix)
    report("compress", None)
    if settings.get("target_bytes") is None:
        saved = save_compressed(source, target, config=_config(settings, model))
    else:
        skipped = _by_name(analysis.load(model / CURVES).skipped)
        saved = save_compressed(
            source,
            target,
            wavelet=settings["basis"],
            targets="*" if settings["matrices"] else None,
            ignore=skipped or None,
            target_bytes=settings["target_bytes"],
            coder="trellis",
        )
    layers = [
        {
            "name": layer.name,
            "wavelet": layer.wavelet,
            "kept": layer.kept,
            "bytes": layer.bytes,
            "relative_error": layer.relative_error,
        }
        for layer in saved.layers
    ]
    facts = {"bytes": saved.bytes, "uncompressed": saved.uncompressed, "layers": layers}
    (output / REPORT).write_text(json.dumps(facts, indent=2))
    kept = sum(layer.kept for layer in saved.layers)
    if target != saved.path:
        # A graph without weights, and its weights: they go together.
        _pack((target, saved.path), output / PACKED)
        target = output / PACKED
    return {
        "file": target.name,
        "bytes": saved.bytes,
        "kept": kept,
        "sparsity": max(0.0, 1 - kept / saved.numel) if saved.numel else 0.0,
        "error": saved.relative_error,
    }


def _calibrate(
    source: Path, model: Path, settings: dict[str, Any], output: Path, report: Listener
) -> dict[str, Any]:
    from ..calibration.prune import prune_calibrated
    from ..checkpoint.update import changed_since, snapshot, update_directory

    report("load the network", None)
    network = load_network(source)
    inputs = load_inputs(source, model, settings)
    before = snapshot(network)
    dense = load_network(source)
    pruned = prune_calibrated(network, _config(settings, model), inputs, settings["level"])
    target = output / DIRECTORY
    update_directory(source, target, changed_since(network, before), report=pruned)
    facts = _finished(pruned, target, report)
    report("compare", None)
    return {**facts, **agreement(network, dense, inputs)}


def _compare(
    source: Path, model: Path, settings: dict[str, Any], output: Path, report: Listener
) -> dict[str, Any]:
    report("load the networks", None)
    other = model.parent.parent / "jobs" / settings["job"] / "result" / DIRECTORY
    inputs = load_inputs(source, model, settings)
    return agreement(load_network(other), load_network(source), inputs)


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "prune": _prune,
    "compress": _compress,
    "calibrate": _calibrate,
    "compare": _compare,
}


def load_network(directory: Path) -> nn.Module:
    """The network of a Hugging Face directory, whose code is that of transformers alone.

    Raises:
        WavpruneError: it cannot be loaded, or not completely.
    """
    from ..sweep.models import load_model
    from ..sweep.sources import DirectoryModel

    return load_model(DirectoryModel.model_validate({"directory": directory}))


def load_inputs(source: Path, model: Path, settings: dict[str, Any]) -> Loader:
    """The inputs that were uploaded for a model.

    Raises:
        WavpruneError: there are none, or they cannot be read.
    """
    from ..sweep.inputs import load_inputs as load

    folder = model / INPUTS
    arrays = sorted(folder.glob("*.npz"))
    size = settings.get("image_size")
    return load(
        str(arrays[-1] if arrays else folder),
        model=source,
        size=None if size is None else (size,),
        limit=MOST_INPUTS,
    )


def agreement(network: nn.Module, dense: nn.Module, inputs: Loader) -> dict[str, Any]:
    """How far two classifiers agree: the share of equal first classes, and the mean divergence.

    Raises:
        WavpruneError: they are no classifiers.
    """
    import torch

    from ..evaluation.measures import against_reference
    from ..evaluation.predictions import predict

    labelled = [(batch, torch.zeros(len(batch), dtype=torch.long)) for batch in _batches(inputs)]
    ours, theirs = predict(network, labelled), predict(dense, labelled)
    measures = against_reference(ours, theirs)
    return {name: measures[name] for name in ("agreement", "kl") if name in measures} | {
        "inputs": len(ours.labels)
    }


def _batches(inputs: Loader) -> list[Any]:
    return [batch[0] if isinstance(batch, tuple | list) else batch for batch in inputs]


def _finished(pruned: PruneReport, target: Path, report: Listener) -> dict[str, Any]:
    pruned.wait()
    pruned.to_json(target.parent / REPORT)
    file = target
    if target.is_dir():
        report("pack", None)
        file = target.parent / PACKED
        _pack((path for path in sorted(target.rglob("*")) if path.is_file()), file)
    return {
        "file": file.name,
        "bytes": file.stat().st_size,
        "kept": pruned.kept,
        "sparsity": pruned.sparsity,
        "error": pruned.relative_error,
    }


def _pack(files: Iterable[Path], target: Path) -> None:
    with zipfile.ZipFile(target, "w", zipfile.ZIP_STORED) as archive:
        for path in files:
            archive.write(path, path.relative_to(target.parent))


def finish(output: Path, result: dict[str, Any], target: Path) -> None:
    """Put what came out where it is found, complete or not at all.

    Args:
        output: what the task wrote.
        result: what it returned.
        target: the directory that ``output`` becomes, if there is none yet.
    """
    (output / RESULT).write_text(json.dumps(result))
    for path in output.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
    output.rename(target)
    descriptor = os.open(target.parent, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove(path: Path) -> None:
    """Remove a directory, there or not."""
    shutil.rmtree(path, ignore_errors=True)
