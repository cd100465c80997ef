"""One run of a sweep, in the process that does it."""

from __future__ import annotations

import copy
import dataclasses
import importlib
import json
import os
import threading
import time
import traceback
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import metadata
from typing import Any

import torch
from torch import nn

from .._version import versions
from ..backends.eager import EagerBackend
from ..backends.protocol import Batch
from ..bases.basis import basis_for
from ..config import PruneConfig
from ..engine.run import prune_model
from ..evaluation.compare import Reference, Trial, run_trial
from ..evaluation.size import stored_bytes
from ..report import LayerStats
from .data import Loader, load_data
from .models import load_model
from .settings import Run

# Data that takes less than this a process is held in memory: it is read for each run.
HELD_BYTES = 1 << 29
BINS = 64
KERNELS = 64


@dataclass(frozen=True, slots=True)
class Task:
    """One run for a worker.

    Attributes:
        guid: the run's id.
        run: what to do.
        threads: how many threads torch may use; None leaves that to the worker.
        parent: the process that a worker on its machine ends with; None on a cluster.
    """

    guid: str
    run: Run
    threads: int | None
    parent: int | None


@dataclass(frozen=True, slots=True)
class Result:
    """What a worker sends back; ``Store.add`` takes the first three.

    Attributes:
        row: the columns of ``runs``.
        layers: the report's rows.
        pictures: what pictures are drawn from.
        warned: the warnings of the run: category and message.
    """

    row: dict[str, Any]
    layers: tuple[LayerStats, ...] = ()
    pictures: Mapping[str, Any] | None = None
    warned: tuple[tuple[type[Warning], str], ...] = ()


@dataclass(frozen=True, slots=True)
class _Held:
    """What a worker keeps from one run to the next: all that is measured on one unpruned model.

    Attributes:
        key: which model, data, batches and device.
        model: the unpruned model.
        loader: what accuracy is measured on.
        calibrations: other data, by its source.
        references: by how batch norms are repaired, and on what.
    """

    key: str
    model: nn.Module
    loader: Loader
    calibrations: dict[str, Loader]
    references: dict[tuple[bool, str], Reference]


_one_at_a_time = threading.Lock()
_held: _Held | None = None


def execute(task: Task) -> Result:
    """Do one run; an error becomes the row of a failed run."""
    started = datetime.now(UTC)
    if task.parent == os.getppid():
        _end_with(task.parent)
    # Workers that are threads of one process share torch's threads and what is held.
    with _one_at_a_time, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if task.threads is not None:
            torch.set_num_threads(task.threads)
        try:
            held = _workload(task.run)
            trial = _trial(task.run, held)
            pictures = _pictures(held.model, trial)
        except Exception as error:
            described = f"{type(error).__name__}: {error}"
            return Result(failed_row(task, started, described, traceback.format_exc()))
    # What was asked for stays as it was asked: a matched run's own sparsity says nothing.
    row = {**trial.row(), **_row(task, started, "ok")}
    return Result(
        row,
        tuple(trial.report or ()),
        pictures,
        tuple(
            (entry.category, str(entry.message))
            for entry in caught
            if issubclass(entry.category, UserWarning)
        ),
    )


@cache
def _end_with(parent: int) -> None:
    """End this process soon after its parent, which may have been killed and told it nothing."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def used_versions() -> dict[str, str]:
    """The versions that a result depends on.

    Raises:
        ImportError: torchmetrics is not installed.
    """
    try:
        return {**versions(), "torchmetrics": metadata.version("torchmetrics")}
    except ImportError as error:
        raise ImportError("sweeps need torchmetrics; pip install 'wavprune[sweep]'") from error


def _workload(run: Run) -> _Held:
    """The run's model and data, read once a process."""
    global _held
    sources = [run.model.model_dump_json(), run.data.model_dump_json()]
    key = json.dumps([*sources, run.batch_size, run.device])
    if _held is None or _held.key != key:
        _held = None
        # Importing it takes seconds, which are not the first run's evaluation.
        importlib.import_module("torchmetrics.classification")
        loader = _in_memory(load_data(run.data, run.batch_size))
        _held = _Held(key, load_model(run.model), loader, {}, {})
    return _held


def _calibration(run: Run, held: _Held) -> tuple[str, Loader]:
    """A name for the data that batch norms are repaired on, and the data."""
    if run.calibration is None:
        return "", held.loader
    name = run.calibration.model_dump_json()
    if name not in held.calibrations:
        held.calibrations[name] = _in_memory(load_data(run.calibration, run.batch_size))
    return name, held.calibrations[name]


def _in_memory(loader: Loader) -> Loader:
    """All batches in a list, where they are small enough."""
    held, size = [], 0
    for batch in loader:
        held.append(batch)
        values = batch.values() if isinstance(batch, Mapping) else batch
        size += sum(each.nbytes for each in values if isinstance(each, torch.Tensor))
        if size > HELD_BYTES:
            return loader
    return held


def _trial(run: Run, held: _Held) -> Trial:
    name, calibration = _calibration(run, held)
    key = (run.batchnorm == "match", name)
    if key not in held.references:
        held.references[key] = Reference.measure(
            held.model, held.loader, run.batchnorm, calibration, run.device
        )
    match = None
    if run.match is not None:
        other = copy.deepcopy(held.model)
        report = prune_model(other, run.match)
        match = report if run.matched == "kept" else stored_bytes(other, report)
    return run_trial(
        held.model,
        held.loader,
        run.config,
        batchnorm=run.batchnorm,
        calibration=calibration,
        reference=held.references[key],
        match=match,
        timing=run.timing,
        device=run.device,
    )


def _row(task: Task, started: datetime, status: str) -> dict[str, Any]:
    run = task.run
    return {
        "guid": task.guid,
        "sweep": run.sweep,
        "started": started.isoformat(),
        "finished": datetime.now(UTC).isoformat(),
        "status": status,
        **run.columns(),
        "settings": json.dumps(run.settings()),
        "versions": json.dumps(used_versions()),
    }


def failed_row(task: Task, started: datetime, error: str, trace: str | None) -> dict[str, Any]:
    """The row of a run that did not finish."""
    return {**_row(task, started, "failed"), "error": error, "traceback": trace}


def _pictures(model: nn.Module, trial: Trial) -> dict[str, Any]:
    pictures: dict[str, Any] = {"confusion": trial.evaluation.confusion}
    if trial.report is not None and trial.model is not None and trial.config is not None:
        layers = tuple(trial.report)
        # Random pruning ranks no magnitudes.
        if trial.config.method != "random":
            pictures["histograms"] = [_histogram(model, layer, trial.config) for layer in layers]
        pictures["kernels"] = _kernels(model, trial.model, layers)
    return pictures


def _weight(model: nn.Module, layer: str) -> torch.Tensor:
    weight = model.get_submodule(layer).weight
    assert isinstance(weight, torch.Tensor)
    return weight.detach().to("cpu", torch.float32)


def _histogram(model: nn.Module, layer: LayerStats, config: PruneConfig) -> dict[str, Any]:
    """How many coefficients before pruning had which rank, importance or magnitude."""
    weight = _weight(model, layer.name)
    basis = basis_for(dataclasses.replace(config, wavelet=layer.wavelet), weight)
    batch = Batch(weight, basis, config.percentile is None, torch.float32)
    ranks = EagerBackend().analyse(batch, weight.reshape(-1, *basis.kernel)).abs().flatten()
    counts, edges = torch.histogram(ranks, BINS, range=(0.0, float(ranks.max()) or 1.0))
    return {
        "layer": layer.name,
        "edges": _rounded(edges),
        "counts": counts.long().tolist(),
        "threshold": layer.threshold,
    }


def _kernels(
    before: nn.Module, after: nn.Module, layers: Sequence[LayerStats]
) -> dict[str, Any] | None:
    """The first kernels of the first layer that has spatial ones."""
    for layer in layers:
        if len(layer.shape) == 4 and layer.shape[2:] != (1, 1):
            pair = (_weight(model, layer.name) for model in (before, after))
            first, second = (weight.flatten(0, 1)[:KERNELS] for weight in pair)
            return {
                "layer": layer.name,
                "before": [_rounded(kernel) for kernel in first],
                "after": [_rounded(kernel) for kernel in second],
            }
    return None


def _rounded(values: torch.Tensor) -> Any:
    """Nested lists of what a picture can show of the values: five digits."""
    if values.ndim > 1:
        return [_rounded(row) for row in values]
    return [float(f"{value:.5g}") for value in values.tolist()]
