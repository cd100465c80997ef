"""One run of a sweep, in the process that does it."""

from __future__ import annotations

import copy
import dataclasses
import json
import os
import signal
import sys
import threading
import time
import traceback
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache
from typing import Any

import torch
from torch import nn

from .._version import versions
from ..calibration.collect import calibrate
from ..calibration.collected import Calibration
from ..common.cache import ByteCache
from ..common.clock import Clock, Part, timed
from ..common.memory import kept_memory
from ..engine.run import prune_model
from ..errors import WavpruneError
from ..evaluation.answers import Answers, answers_of
from ..evaluation.batchnorm import BatchnormStatistics, batchnorm_statistics
from ..evaluation.measure import Measure
from ..evaluation.predictions import Predictions
from ..evaluation.size import stored_bytes
from ..evaluation.trial import DenseReference, Trial, run_trial
from ..report import LayerStats, PruneReport
from . import schema
from .data import Loader, load_data
from .finishing import fine_tune, store
from .grid import Run
from .metrics import load_metric
from .models import identify, load_model
from .pictures import picture_data
from .sources import Data

# Data of up to this size is kept in memory from run to run, and twice as much together.
CACHED_BYTES = 1 << 29


@dataclass(frozen=True, slots=True)
class Task:
    """One run for a worker.

    Attributes:
        guid: the run's id.
        run: its settings.
        model: the identity of its model; see ``models.identify``.
        sweep: an id of this call of ``run_sweep``; workers share nothing between calls.
        threads: how many threads torch may use; None leaves that to the worker.
        parent: the process that a worker on its machine ends with; None on a cluster.
    """

    guid: str
    run: Run
    model: str
    sweep: str
    threads: int | None
    parent: int | None


@dataclass(frozen=True, slots=True)
class Result:
    """What a worker sends back; ``Store.add`` takes the first three.

    Attributes:
        row: the columns of ``runs``.
        layers: the report's rows.
        pictures: the data that pictures are drawn from.
        warned: the warnings of the run, as pairs of category and message.
        spent: seconds of the run, by part; see ``evaluation.clock``.
    """

    row: dict[str, Any]
    layers: tuple[LayerStats, ...] = ()
    pictures: Mapping[str, Any] | None = None
    warned: tuple[tuple[type[Warning], str], ...] = ()
    spent: Mapping[Part, float] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Workload:
    """What a worker keeps from one run to the next: everything measured on one unpruned model.

    Attributes:
        key: which model, data, batch size and device.
        model: the unpruned model.
        loader: the data that it is measured on.
        measure: what it is measured by; None for a classifier.
        predictions: what the model predicts on it.
        statistics: of its batch norms, by the source of the data that they are repaired on.
        collected: what pruning from data reads, by its source, ``targets`` and ``ignore``.
    """

    key: str
    model: nn.Module
    loader: Loader
    measure: Measure | None
    predictions: Predictions | Answers
    statistics: dict[str, BatchnormStatistics]
    collected: dict[object, Calibration]


_one_at_a_time = threading.Lock()
_current: _Workload | None = None
# Batches by source, batch size and sweep.
_data = ByteCache[Loader](2 * CACHED_BYTES, lambda loader: _cached_bytes(loader))


def execute(task: Task) -> Result:
    """Do one run; an error becomes the row of a failed run."""
    started = datetime.now(UTC)
    if task.parent == os.getppid():
        _begin(task.parent)
    # Workers that are threads of one process share torch's threads and the workload.
    with _one_at_a_time, Clock.running() as clock:
        result = _executed(task, started)
    return dataclasses.replace(result, spent=clock.seconds)


def _executed(task: Task, started: datetime) -> Result:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        if task.threads is not None:
            torch.set_num_threads(task.threads)
        try:
            workload = _workload(task)
            trial, file_bytes = _trial(task, workload)
            pictures = picture_data(workload.model, trial)
        except (Exception, SystemExit) as error:
            described = f"{type(error).__name__}: {error}"
            return Result(failed_row(task, started, described, traceback.format_exc()))
    report = trial.report
    row = {
        **_row(task, started, "ok"),
        **schema.values(schema.EVALUATION, trial.evaluation),
        **({} if report is None else schema.values(schema.TOTALS, report)),
        **schema.values(schema.TIMES, trial),
        "file_bytes": file_bytes,
    }
    warned = tuple(
        (_importable(entry.category), str(entry.message))
        for entry in caught
        if issubclass(entry.category, UserWarning)
    )
    return Result(row, () if report is None else report.layers, pictures, warned)


def _importable(category: type[Warning]) -> type[Warning]:
    """The category, or UserWarning for one of a factory's module, which nobody else can import."""
    module = sys.modules.get(category.__module__)
    return category if getattr(module, category.__name__, None) is category else UserWarning


@cache
def _begin(parent: int) -> None:
    """Set up a worker process: it keeps its memory, and ends soon after its parent.

    The parent may be killed, and tell it nothing. Ctrl-C in a terminal reaches both, and the parent
    ends its workers then: one that waits for its next run would end with a traceback instead.
    """
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    kept_memory().__enter__()

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(1)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()


def _workload(task: Task) -> _Workload:
    """The model and data of a run, loaded once per process."""
    global _current
    run = task.run
    sources = [run.model.model_dump_json(), run.data.model_dump_json()]
    metric = run.metric.model_dump_json() if run.metric else ""
    key = json.dumps([*sources, metric, run.batch_size, run.device, task.model, task.sweep])
    if _current is None or _current.key != key:
        _current = None
        with timed("loading"):
            model = load_model(run.model)
            if identify(run.model, model) != task.model:
                raise WavpruneError(
                    f"model {run.model.label!r} is not the one that the sweep started with: its "
                    "files have changed since, or its factory returns another network each time"
                )
            loader = _batches(task, run.data)
            measure = load_metric(run.metric)
        predictions = answers_of(model, loader, measure, run.device)
        _current = _Workload(key, model, loader, measure, predictions, {}, {})
    return _current


def _batches(task: Task, source: Data, batch_size: int | None = None) -> Loader:
    """The batches of a source, loaded once per process."""
    size = batch_size or task.run.batch_size
    key = (source.model_dump_json(), size, task.sweep)
    with timed("loading"):
        return _data.get(key, lambda: _in_memory(load_data(source, size)))


def _in_memory(loader: Loader) -> Loader:
    """All batches in a list, if they are small enough; otherwise the loader."""
    batches, size = [], 0
    for batch in loader:
        batches.append(batch)
        size += _num_bytes(batch)
        if size > CACHED_BYTES:
            return loader
    return batches


def _cached_bytes(loader: Loader) -> int:
    return sum(map(_num_bytes, loader)) if isinstance(loader, list) else 0


def _num_bytes(batch: Any) -> int:
    values = batch.values() if isinstance(batch, Mapping) else batch
    return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))


def _reference(task: Task, workload: _Workload, calibration: Loader) -> DenseReference:
    run = task.run
    statistics = None
    if run.batchnorm == "match":
        name = _source_name(run)
        statistics = workload.statistics.get(name)
        if statistics is None:
            statistics = batchnorm_statistics(workload.model, calibration, run.device)
            workload.statistics[name] = statistics
    return DenseReference(workload.predictions, statistics)


def _source_name(run: Run) -> str:
    return "" if run.calibration is None else run.calibration.model_dump_json()


def _collected(run: Run, workload: _Workload, calibration: Loader) -> Calibration | None:
    """What a calibrated run is pruned from; the last ones are kept."""
    if not run.calibrated or run.config is None:
        return None
    config = run.config
    key = (_source_name(run), config.targets, config.ignore, config.seed)
    if key not in workload.collected:
        workload.collected.clear()
        with timed("reference"):
            workload.collected[key] = calibrate(
                workload.model,
                calibration,
                targets=config.targets,
                ignore=config.ignore,
                device=run.device,
                seed=config.seed,
            )
    return workload.collected[key]


def _trial(task: Task, workload: _Workload) -> tuple[Trial, int | None]:
    """The trial of a run, and the bytes of the file that it stored."""
    run = task.run
    file_bytes: int | None = None
    calibration = workload.loader if run.calibration is None else _batches(task, run.calibration)
    reference = _reference(task, workload, calibration)
    match: PruneReport | int | None = None
    if run.match is not None:
        with timed("pruning"):
            other = copy.deepcopy(workload.model)
            report = prune_model(other, run.match).wait()
            match = report if run.matched == "kept" else stored_bytes(other, report)

    def finish(model: nn.Module, report: PruneReport) -> None:
        nonlocal file_bytes
        if run.training is not None and run.config is not None:
            training = run.training
            data = _batches(task, training.data, training.batch_size)
            fine_tune(model, run.config, report, training, data, run.epochs)
        if run.storage is not None:
            file_bytes = store(model, report, run.storage, calibration)

    trial = run_trial(
        workload.model,
        workload.loader,
        run.config,
        batchnorm=run.batchnorm,
        calibration=calibration,
        reference=reference,
        match=match,
        calibrated=run.calibrated,
        collected=_collected(run, workload, calibration),
        timing=run.timing,
        device=run.device,
        metric=workload.measure,
        finish=finish if run.training or run.storage else None,
    )
    if trial.report is not None:
        trial.report.wait()
    return trial, file_bytes


def _row(task: Task, started: datetime, status: str) -> dict[str, Any]:
    run = task.run
    return {
        "guid": task.guid,
        "sweep": run.sweep,
        "started": started.isoformat(),
        "finished": datetime.now(UTC).isoformat(),
        "status": status,
        **schema.values(schema.SETTINGS, run),
        "settings": json.dumps(run.settings()),
        "versions": json.dumps(versions()),
    }


def failed_row(task: Task, started: datetime, error: str, trace: str | None) -> dict[str, Any]:
    """The row of a run that did not finish."""
    return {**_row(task, started, "failed"), "error": error, "traceback": trace}
