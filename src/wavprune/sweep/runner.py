"""Sweeps: every run of a grid that has no row yet, in parallel, a row committed as each finishes.

The workers prune and evaluate; only the process that started the sweep writes the results file.
So the workers may be on other machines, which need the models and data under the same paths.
"""

from __future__ import annotations

import os
import sys
import time
import uuid
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from .._version import versions
from ..common.checks import integer
from ..common.progress import progress_bar, progress_lines
from ..errors import WavpruneError
from . import schema
from .data import data_identity, load_data
from .executors import CLUSTERS, Job, num_processes, results
from .factories import factory_digest
from .finishing import loss_function
from .grid import Run, expand
from .metrics import load_metric, metric_identity
from .models import identify, load_model
from .settings import Sweep
from .sources import Data, Factory, MetricSource, Model, Training
from .store import Store
from .worker import Result


@dataclass(frozen=True, slots=True)
class Summary:
    """What a sweep did.

    Attributes:
        runs: how many runs the sweep has.
        known: runs that already had a row, or got one from another sweep in the meantime.
        ok: runs that finished now.
        failed: runs that failed now.
        seconds: wall time.
        prune_seconds: time spent pruning, summed over all processes.
        repair_seconds: time spent repairing batch norms.
        finish_seconds: time spent training and storing.
        evaluate_seconds: time spent evaluating.
        processes: how many processes did the runs; None on a cluster, or where none was left.
        parts: where all the time of these processes went, by the parts of ``evaluation.clock``;
            ``"waiting"`` is the time in which they did not run, from start to end.
        failures: of each run that failed now, what it was and its error.
    """

    runs: int
    known: int
    ok: int
    failed: int
    seconds: float
    prune_seconds: float
    repair_seconds: float
    finish_seconds: float
    evaluate_seconds: float
    processes: int | None
    parts: dict[str, float]
    failures: tuple[tuple[str, str], ...] = ()

    @property
    def runs_per_hour(self) -> float:
        """Runs that finished or failed now, for an hour of wall time."""
        return 3600 * (self.ok + self.failed) / self.seconds

    @property
    def prune_share(self) -> float:
        """The part of the runs' time that was spent pruning."""
        spent = self.prune_seconds + self.repair_seconds + self.finish_seconds
        spent += self.evaluate_seconds
        return self.prune_seconds / spent if spent else 0.0


def run_sweep(
    sweep: Sweep,
    output: str | os.PathLike[str],
    *,
    jobs: int | None = None,
    cluster: str | None = None,
    address: str | None = None,
    retry_failed: bool = False,
    progress: bool = False,
) -> Summary:
    """Run what has no row in the results file yet.

    Args:
        sweep: what to run.
        output: the results file, created where it does not exist. Several sweeps may share one.
        jobs: processes; None means one per core, or all that the cluster has.
        cluster: ``"ray"`` or ``"dask"``; None means processes of this machine.
        address: the address of the cluster; None starts one on this machine.
        retry_failed: run again what failed before.
        progress: show a progress bar with the time left on standard error or, where that is no
            terminal, a line every 30 s.

    Returns:
        How many runs there were, and where their time went.

    Raises:
        WavpruneError: an argument, a model or the data is not allowed; nothing has run then.
        ImportError: an extra is not installed.
    """
    if jobs is not None:
        integer("jobs", jobs, 1)
    if cluster is not None and cluster not in CLUSTERS:
        raise WavpruneError(f"unknown cluster {cluster!r}; allowed: {', '.join(CLUSTERS)}")
    if address is not None and cluster is None:
        raise WavpruneError(f"address={address!r} is a cluster's; name it: {', '.join(CLUSTERS)}")
    start = time.perf_counter()
    all_jobs = _jobs(expand(sweep))
    outcomes = Counter[str]()
    failures = []
    parts: dict[str, float] = {}
    spent = {column.name: 0.0 for column in schema.TIMES}
    with Store(output, create=True) as store:
        known = store.known(retry_failed)
        pending = {guid: job for guid, job in all_jobs.items() if guid not in known}
        shown = progress and bool(pending)
        with (
            progress_lines("sweep", len(pending), "runs")
            if shown and not sys.stderr.isatty()
            else progress_bar("sweep", len(pending), "runs", shown)
        ) as advance:

            def is_wanted(guid: str) -> bool:
                if not store.has(guid, retry_failed):
                    return True
                # Another sweep has done it in the meantime.
                advance(1)
                return False

            said: set[tuple[type[Warning], str]] = set()
            for result in results(pending, is_wanted, uuid.uuid4().hex, jobs, cluster, address):
                store.add(result.row, result.layers, result.pictures)
                outcomes[result.row["status"]] += 1
                if result.row["status"] == "failed":
                    failures.append((all_jobs[result.row["guid"]].run.label, result.row["error"]))
                for part, spent_on_it in result.spent.items():
                    parts[part] = parts.get(part, 0.0) + spent_on_it
                for name in spent:
                    spent[name] += result.row.get(name) or 0.0
                advance(1)
                _warn_once(result, said)
    seconds = time.perf_counter() - start
    processes = num_processes(len(pending), jobs) if pending and not cluster else None
    if processes is not None:
        parts["waiting"] = max(processes * seconds - sum(parts.values()), 0.0)
    return Summary(
        runs=len(all_jobs),
        known=len(all_jobs) - outcomes.total(),
        ok=outcomes["ok"],
        failed=outcomes["failed"],
        seconds=seconds,
        processes=processes,
        parts=parts,
        failures=tuple(failures),
        **spent,
    )


def _warn_once(result: Result, said: set[tuple[type[Warning], str]]) -> None:
    """Warn of what no earlier run warned of."""
    for category, message in result.warned:
        if (category, message) not in said:
            said.add((category, message))
            warnings.warn(message, category, stacklevel=3)


def _jobs(runs: Sequence[Run]) -> dict[str, Job]:
    """The runs by their ids. Loads every model and data set once, so that all errors come first."""
    identities: dict[str, str] = {}

    def of_model(source: Model) -> str:
        return identify(source, load_model(source))

    def of_data(source: Data) -> str:
        load_data(source, 1)
        return data_identity(source)

    def of_metric(source: MetricSource) -> str:
        load_metric(source)
        return metric_identity(source)

    def of_training(source: Training) -> str:
        loss_function(source)
        loss = Factory(factory=source.loss, root=source.root) if source.loss else None
        return f"{of_data(source.data)} {factory_digest(loss) if loss else ''}"

    def identity(source: Any, compute: Callable[[Any], str]) -> str:
        key = source.model_dump_json()
        if key not in identities:
            identities[key] = compute(source)
        return identities[key]

    used = versions()
    jobs = {}
    for run in runs:
        model = identity(run.model, of_model)
        contents = {
            "model": model,
            "data": identity(run.data, of_data),
            "calibration": identity(run.calibration or run.data, of_data),
            # As in the settings of a run: only where there is one.
            **({"training": identity(run.training, of_training)} if run.training else {}),
            **({"metric": identity(run.metric, of_metric)} if run.metric else {}),
        }
        jobs[run.guid(contents, used)] = Job(run, model)
    return jobs
