"""Runs tasks in processes of this machine or on a Ray or Dask cluster, through joblib."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

import torch

from ..common.memory import kept_memory
from ..common.optional import require
from ..errors import WavpruneError
from .grid import Run
from .worker import Result, Task, execute, failed_row

CLUSTERS = ("ray", "dask")


@dataclass(frozen=True, slots=True)
class Job:
    """A run that is to be done.

    Attributes:
        run: its settings.
        model: the identity of its model.
    """

    run: Run
    model: str


def results(
    pending: Mapping[str, Job],
    is_wanted: Callable[[str], bool],
    sweep: str,
    jobs: int | None,
    cluster: str | None,
    address: str | None,
) -> Iterator[Result]:
    """The results of jobs, in the order in which they finish.

    Args:
        pending: the jobs by their ids.
        is_wanted: asked just before a job is sent to a worker.
        sweep: see ``Task``.
        jobs: processes; None means one per core, or all that the cluster has.
        cluster: one of ``CLUSTERS``; None means processes of this machine.
        address: the address of the cluster; None starts one on this machine.
    """
    if not pending:
        return
    joblib = _joblib()
    sent: dict[str, Task] = {}
    finished: set[str] = set()
    workers = num_processes(len(pending), jobs)
    threads = None if cluster else max(joblib.cpu_count() // min(workers, len(pending)), 1)

    def calls(guids: Sequence[str]) -> Iterator[Any]:
        for guid in guids:
            if is_wanted(guid):
                job, parent = pending[guid], None if cluster else os.getpid()
                sent[guid] = Task(guid, job.run, job.model, sweep, threads, parent)
                yield joblib.delayed(execute)(sent[guid])

    def parallel(guids: Sequence[str], **settings: Any) -> Iterator[Result]:
        # One run per message: a result that waits for others could be lost with them.
        pool = joblib.Parallel(return_as="generator_unordered", batch_size=1, **settings)
        for result in pool(calls(guids)):
            finished.add(result.row["guid"])
            yield result

    with _cluster(cluster, address, jobs), _threads_restored(), kept_memory():
        settings = {"n_jobs": workers} if cluster is None else {"n_jobs": jobs or -1}
        while True:
            try:
                yield from parallel([guid for guid in pending if guid not in sent], **settings)
            except BrokenProcessPool:
                # A worker died, and one of the unfinished runs killed it: try each by itself.
                for guid in [guid for guid in sent if guid not in finished]:
                    try:
                        yield from parallel([guid], n_jobs=2)
                    except BrokenProcessPool:
                        finished.add(guid)
                        now = datetime.now(UTC)
                        died = "the process died (killed, or out of memory)"
                        yield Result(failed_row(sent[guid], now, died, None))
            else:
                return


def num_processes(pending: int, jobs: int | None) -> int:
    """How many processes of this machine do the pending runs.

    Args:
        pending: how many runs there are.
        jobs: processes that were asked for; None means one per core.
    """
    return jobs or min(_joblib().cpu_count(), max(pending, 1))


def _joblib() -> Any:
    return require("joblib", extra="sweep", purpose="a sweep")


@contextmanager
def _cluster(name: str | None, address: str | None, jobs: int | None) -> Iterator[None]:
    """Within the block joblib runs its calls on this cluster."""
    joblib = _joblib()
    if name is None:
        with joblib.parallel_config(backend="loky"):
            yield
    elif name == "ray":
        with _ray(address, jobs), joblib.parallel_config(backend="ray"):
            yield
    else:
        with _dask(address, jobs), joblib.parallel_config(backend="dask"):
            yield


@contextmanager
def _ray(address: str | None, jobs: int | None) -> Iterator[None]:
    ray = require("ray", extra="ray", purpose="cluster='ray'")
    backend = require(
        "ray.util.joblib.ray_backend", extra="ray", purpose="cluster='ray'"
    ).RayBackend
    # Ray passes each result to a callback, which is all that a generator of results needs.
    traits = {"supports_return_generator": True}
    _joblib().register_parallel_backend("ray", type("Backend", (backend,), traits))
    # An existing cluster has its own number of cores and its own dashboard.
    size: dict[str, Any] = {} if address else {"num_cpus": jobs, "include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **size)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise WavpruneError(
            f"address={address!r}: no Ray cluster answers there: {error}"
        ) from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _dask(address: str | None, jobs: int | None) -> Iterator[None]:
    distributed = require("dask.distributed", extra="dask", purpose="cluster='dask'")
    size = {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
    try:
        client = distributed.Client(address) if address else distributed.Client(**size)
    except (OSError, ValueError) as error:
        raise WavpruneError(
            f"address={address!r}: no Dask cluster answers there: {error}"
        ) from error
    with client:
        yield


@contextmanager
def _threads_restored() -> Iterator[None]:
    # With one job the worker is this process.
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
