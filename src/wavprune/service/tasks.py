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
from typing import Any

from ..calibration.prune import prune_calibrated
from ..checkpoint import save
from ..checkpoint.formats import ONNX
from ..checkpoint.formats.names import SkippedLayerWarning
from ..checkpoint.prune import prune_file
from ..checkpoint.update import changed_since, snapshot, update_directory
from ..common.atomic import replaced
from ..common.progress import Listener
from ..config import PruneConfig
from ..errors import WavpruneError
from ..evaluation.unlabelled import distance
from ..graph import GraphModule
from ..onnx import save as save_graph
from ..onnx.models import rewrite_changed
from ..report import PruneReport
from . import analysis, networks
from .archives import unpack

ZIP = ".zip"
# Of a sentence that says why a model cannot be run.
LONGEST_REASON = 400
CURVES, INPUTS, RESULT, REPORT = "curves.npz", "inputs", "result.json", "report.json"
# What is made of a directory: itself, and a zip of it to download.
DIRECTORY, PACKED = "model", "model.zip"
# Compressed weights; a graph is beside them.
WEIGHTS = "model.safetensors"


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


def made(folder: Path, source: Path) -> Path:
    """Where what is pruned is put: of the same kind as the source."""
    return folder / (DIRECTORY if source.is_dir() else f"{DIRECTORY}{source.suffix}")


def compressed(folder: Path, source: Path) -> Path:
    """Where what is compressed is put: of a graph, the one whose weights are beside it."""
    return folder / (f"{DIRECTORY}{source.suffix}" if source.suffix in ONNX else WEIGHTS)


def analyze(model: Path, kind: str, most: int, report: Listener) -> dict[str, Any]:
    """Unpack what needs it and measure the curves.

    Args:
        model: the directory of the model.
        kind: the suffix of what was uploaded.
        most: bytes that a zip may unpack to.
        report: is told how far it is.

    Returns:
        What is said of the model; ``cannot_run`` is why the service cannot run it, or None.

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
    reason = networks.obstacle(source)
    return {
        "layers": len(curves.layers),
        "left_out": [name[:200] for name in left_out[:64]],
        "cannot_run": None if reason is None else reason[:LONGEST_REASON],
    }


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
    return PruneConfig(
        wavelet=settings["basis"],
        sparsity=settings["sparsity"],
        scope=settings.get("scope", "layer"),
        ignore=_ignored(model),
    )


def _ignored(model: Path) -> tuple[str, ...] | None:
    """The layers that are left out, beside those that always are."""
    if not analysis.is_current(model / CURVES):
        raise WavpruneError("the model is being measured again; ask for the job again later")
    return analysis.load(model / CURVES).ignored or None


def _prune(
    source: Path, model: Path, settings: dict[str, Any], output: Path, report: Listener
) -> dict[str, Any]:
    target = made(output, source)
    report("prune", 0.0)
    pruned = prune_file(source, target, _config(settings, model))
    return _finished(pruned, target, report)


def _compress(
    source: Path, model: Path, settings: dict[str, Any], output: Path, report: Listener
) -> dict[str, Any]:
    target = compressed(output, source)
    save_compressed: Any = save_graph if source.suffix in ONNX else save
    report("compress", None)
    if settings.get("target_bytes") is None:
        saved = save_compressed(source, target, config=_config(settings, model))
    else:
        saved = save_compressed(
            source,
            target,
            wavelet=settings["basis"],
            targets="*" if settings["matrices"] else None,
            ignore=_ignored(model),
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
    report("load the network", None)
    network = networks.load_network(source)
    inputs = networks.load_inputs(source, model / INPUTS, settings)
    before = {} if isinstance(network, GraphModule) else snapshot(network)
    pruned = prune_calibrated(network, _config(settings, model), inputs, settings["level"])
    target = made(output, source)
    if isinstance(network, GraphModule):
        rewrite_changed(source, target, network, pruned, force=False)
    else:
        update_directory(source, target, changed_since(network, before), report=pruned)
    facts = _finished(pruned, target, report)
    return {**facts, **distance(network, networks.load_network(source), inputs)._asdict()}


def _compare(
    source: Path, model: Path, settings: dict[str, Any], output: Path, report: Listener
) -> dict[str, Any]:
    report("load the networks", None)
    result = model.parent.parent / "jobs" / settings["job"] / "result"
    if (result / WEIGHTS).exists():
        network = networks.load_stored(source, compressed(result, source), output)
    else:
        network = networks.load_network(made(result, source))
    inputs = networks.load_inputs(source, model / INPUTS, settings)
    return distance(network, networks.load_network(source), inputs)._asdict()


TASKS: dict[str, Callable[..., dict[str, Any]]] = {
    "prune": _prune,
    "compress": _compress,
    "calibrate": _calibrate,
    "compare": _compare,
}


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
