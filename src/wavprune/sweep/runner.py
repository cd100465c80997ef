"""Sweeps: every run of a grid that has no row yet, in parallel, a row committed as each finishes.

The workers prune and evaluate; the process that started the sweep alone writes the results file.
So the workers may be on other machines, which need the models and data under the same paths.
"""

from __future__ import annotations

import logging
import os
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

import torch

from .data import data_identity, load_data
from .models import load_model, model_identity
from .settings import Run, Sweep, expand
from .sources import Data, Model
from .store import Store
from .worker import Result, Task, execute, failed_row, used_versions

CLUSTERS = ("ray", "dask")


@dataclass(frozen=True, slots=True)
class Summary:
    """What a sweep did.

    Attributes:
        runs: how many runs the sweep has.
        known: those that had a row already, or got one from another sweep meanwhile.
        ok: those that finished now.
        failed: those that failed now.
        seconds: wall time.
        prune_seconds: of all runs, in all processes.
        repair_seconds: the same, of the repair of batch norms.
        evaluate_seconds: the same, of evaluation.
    """

    runs: int
    known: int
    ok: int
    failed: int
    seconds: float
    prune_seconds: float
    repair_seconds: float
    evaluate_seconds: float

    @property
    def prune_share(self) -> float:
        """Pruning's part of the time that the runs took."""
        spent = self.prune_seconds + self.repair_seconds + self.evaluate_seconds
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
        output: the results file, made where it does not exist. Several sweeps may use one.
        jobs: processes; None means one a core, or all that the cluster has.
        cluster: ``"ray"`` or ``"dask"``; None means processes of this machine.
        address: of the cluster; None starts one on this machine.
        retry_failed: run again what failed before.
        progress: show a bar on standard error that says when the sweep ends.

    Returns:
        How many runs there were, and where their time went.

    Raises:
        ValueError: an argument, a model or the data is not as it must be; nothing has run then.
        ImportError: an extra is not installed.
    """
    if jobs is not None and jobs < 1:
        raise ValueError(f"jobs must be 1 or more, not {jobs!r}")
    if cluster is not None and cluster not in CLUSTERS:
        raise ValueError(f"unknown cluster {cluster!r}; allowed: {', '.join(CLUSTERS)}")
    if address is not None and cluster is None:
        raise ValueError(f"address={address!r} is a cluster's; name it: {', '.join(CLUSTERS)}")
    start = time.perf_counter()
    runs = _identified(expand(sweep))
    ended = Counter[str]()
    spent = dict.fromkeys(("prune_seconds", "repair_seconds", "evaluate_seconds"), 0.0)
    said: set[tuple[type[Warning], str]] = set()
    with Store(output, create=True) as store:
        known = store.known(retry_failed)
        todo = {guid: run for guid, run in runs.items() if guid not in known}
        with _bar(progress, len(todo)) as advance:

            def wanted(guid: str) -> bool:
                if not store.has(guid, retry_failed):
                    return True
                # Another sweep has done it meanwhile.
                advance(1)
                return False

            for result in _results(todo, wanted, jobs, cluster, address):
                store.add(result.row, result.layers, result.pictures)
                ended[result.row["status"]] += 1
                for name in spent:
                    spent[name] += result.row.get(name) or 0.0
                advance(1)
                for category, message in dict.fromkeys(result.warned):
                    if (category, message) not in said:
                        said.add((category, message))
                        warnings.warn(message, category, stacklevel=2)
    return Summary(
        runs=len(runs),
        known=len(runs) - ended.total(),
        ok=ended["ok"],
        failed=ended["failed"],
        seconds=time.perf_counter() - start,
        **spent,
    )


def _identified(runs: Sequence[Run]) -> dict[str, Run]:
    """The runs by their ids."""
    found: dict[str, str] = {}

    def of_model(source: Model) -> str:
        return model_identity(load_model(source))

    def of_data(source: Data) -> str:
        # What is wrong with it is wrong with every run.
        load_data(source, 1)
        return data_identity(source)

    def identity(source: Any, of: Callable[[Any], str]) -> str:
        key = source.model_dump_json()
        if key not in found:
            found[key] = of(source)
        return found[key]

    used = used_versions()
    return {
        run.guid(
            {
                "model": identity(run.model, of_model),
                "data": identity(run.data, of_data),
                "calibration": identity(run.calibration or run.data, of_data),
            },
            used,
        ): run
        for run in runs
    }


def _results(
    todo: Mapping[str, Run],
    wanted: Callable[[str], bool],
    jobs: int | None,
    cluster: str | None,
    address: str | None,
) -> Iterator[Result]:
    """The results, as they come, of what is still wanted when its turn comes."""
    if not todo:
        return
    joblib = _joblib()
    sent: dict[str, Task] = {}
    finished: set[str] = set()
    workers = jobs or min(joblib.cpu_count(), len(todo))
    threads = None if cluster else max(joblib.cpu_count() // workers, 1)

    def calls(guids: Sequence[str]) -> Iterator[Any]:
        for guid in guids:
            if wanted(guid):
                sent[guid] = Task(guid, todo[guid], threads, None if cluster else os.getpid())
                yield joblib.delayed(execute)(sent[guid])

    def parallel(guids: Sequence[str], **settings: Any) -> Iterator[Result]:
        # One run a message: a result that waits for others could be lost with them.
        pool = joblib.Parallel(return_as="generator_unordered", batch_size=1, **settings)
        for result in pool(calls(guids)):
            finished.add(result.row["guid"])
            yield result

    with _cluster(cluster, address, jobs), _threads_restored():
        settings = {"n_jobs": workers} if cluster is None else {"n_jobs": jobs or -1}
        while True:
            try:
                yield from parallel([guid for guid in todo if guid not in sent], **settings)
            except BrokenProcessPool:
                # A worker died, and one of those that were under way killed it: each by itself.
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


def _joblib() -> Any:
    try:
        import joblib
    except ImportError as error:
        raise ImportError("sweeps need joblib; pip install 'wavprune[sweep]'") from error
    return joblib


@contextmanager
def _cluster(name: str | None, address: str | None, jobs: int | None) -> Iterator[None]:
    """Calls of joblib go to this cluster within the block."""
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
    try:
        import ray
        from ray.util.joblib.ray_backend import RayBackend
    except ImportError as error:
        raise ImportError("cluster='ray' needs ray; pip install 'wavprune[ray]'") from error

    class Backend(RayBackend):
        """Ray hands each result to a callback, which is all that a generator of results needs."""

        supports_return_generator = True

    _joblib().register_parallel_backend("ray", Backend)
    # An existing cluster has its own number of cores and its own dashboard.
    size: dict[str, Any] = {} if address else {"num_cpus": jobs, "include_dashboard": False}
    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR, **size)
    except (ConnectionError, ValueError) as error:
        raise ValueError(f"address={address!r}: no Ray cluster answers there: {error}") from error
    try:
        yield
    finally:
        ray.shutdown()


@contextmanager
def _dask(address: str | None, jobs: int | None) -> Iterator[None]:
    try:
        from dask.distributed import Client
    except ImportError as error:
        raise ImportError("cluster='dask' needs dask; pip install 'wavprune[dask]'") from error
    size = (
        {} if address else {"n_workers": jobs, "threads_per_worker": 1, "dashboard_address": None}
    )
    try:
        client = Client(address) if address else Client(**size)  # type: ignore[no-untyped-call]  # dask's
    except (OSError, ValueError) as error:
        raise ValueError(f"address={address!r}: no Dask cluster answers there: {error}") from error
    with client:
        yield


@contextmanager
def _threads_restored() -> Iterator[None]:
    # One job runs in this process.
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@contextmanager
def _bar(shown: bool, total: int) -> Iterator[Callable[[int], object]]:
    if not shown or not total:
        yield lambda _: None
        return
    from tqdm import tqdm

    with tqdm(total=total, unit="run", desc="sweep", smoothing=0.05) as bar:

        def advance(count: int) -> None:
            bar.update(count)
            rate = bar.format_dict["rate"]
            if rate:
                end = datetime.now() + timedelta(seconds=(total - bar.n) / rate)
                bar.set_postfix_str(f"ends {end:%H:%M}")

        yield advance
