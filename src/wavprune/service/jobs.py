"""The jobs: what waits for its turn, what runs, and what became of it.

A job writes into a directory of its own, which is renamed to ``result`` when it is complete. A
result that is there is a job that is done, whatever the process was doing when it was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from pathlib import Path
from typing import Any

import torch

from ..checkpoint.formats import ONNX
from . import tasks
from .launcher import Launcher, WorkerDiedError
from .processes import WorkerProcess
from .quota import ATTEMPT, FullError, size_of
from .state import State, defect, going_on
from .store import CANCELLED, DONE, FAILED, OPEN, QUEUED, RUNNING, Job, Model

# How often a job may take its process down, and the service.
TRIES, MOST_ATTEMPTS = 2, 20


class Jobs:
    """The queue of jobs, and the processes that work on it.

    Args:
        state: what is kept.
        launcher: starts the processes.
    """

    def __init__(self, state: State, launcher: Launcher) -> None:
        self._state, self._store, self._limits = state, state.store, state.limits
        self._queue: asyncio.Queue[str] = asyncio.Queue()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._loops: list[asyncio.Task[None]] = []
        count = self._limits.workers
        threads = max(1, torch.get_num_threads() // count)
        memory = self._limits.worker_bytes
        self._workers = [WorkerProcess(launcher, memory, threads) for _ in range(count)]

    async def start(self) -> None:
        """Begin to work on what waits."""
        self._loops = [asyncio.create_task(self._work(worker)) for worker in self._workers]

    async def stop(self) -> None:
        """End all work; what was running is tried again by the next service."""
        ended = (*self._loops, *self._running.values())
        for one in ended:
            one.cancel()
        await asyncio.gather(*ended, return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in self._workers))

    def recover(self) -> None:
        """Bring the states up to what a service that was killed left on the disk."""
        jobs = {job.id: job for job in self._store.jobs()}
        for path in (self._state.settings.directory / "jobs").iterdir():
            if path.name not in jobs:
                tasks.remove(path)
        for job in jobs.values():
            if job.state in OPEN:
                self._recover(job)

    def _recover(self, job: Job) -> None:
        path = self._state.job_directory(job.id) / "result" / tasks.RESULT
        if path.exists():
            result = json.loads(path.read_text())
            self._store.update_job(job.id, state=DONE, result=result, finished=time.time())
            return
        for attempt in self._state.job_directory(job.id).glob(f"{ATTEMPT}*"):
            tasks.remove(attempt)
        if job.attempts >= MOST_ATTEMPTS:
            self._over(job.id, FAILED, error=f"it was interrupted {job.attempts} times")
            return
        self._store.update_job(job.id, state=QUEUED)
        self._queue.put_nowait(job.id)

    def add(self, model: Model, kind: str, settings: dict[str, Any]) -> Job:
        """A job that waits for its turn.

        Raises:
            FullError: too many wait.
        """
        if len(self._store.jobs(states=OPEN)) >= self._limits.queue:
            raise FullError(
                f"{self._limits.queue} jobs wait or run, which is the most; try again later"
            )
        job = self._store.add_job(secrets.token_hex(16), model.id, kind, settings)
        self._store.update_model(model.id, used=time.time())
        self._queue.put_nowait(job.id)
        self._state.changed()
        return job

    async def cancel(self, job: Job) -> Job:
        """End a job that is not over; when this returns, nothing works on it.

        Raises:
            LookupError: it was removed meanwhile.
        """
        running = self._running.get(job.id)
        # As it is now: whoever cancels twice would interrupt how its process ends.
        if not self._store.job(job.id).is_over:
            self._over(job.id, CANCELLED)
            if running is not None:
                running.cancel()
        if running is not None:
            await asyncio.gather(running, return_exceptions=True)
        return self._store.job(job.id)

    def is_open(self, job: Job) -> bool:
        """Whether something waits for a job, or works on it."""
        return not job.is_over or job.id in self._running

    def _over(self, identity: str, state: str, **values: Any) -> None:
        now = time.time()
        self._store.update_job(identity, state=state, finished=now, **values)
        with contextlib.suppress(LookupError):
            # Its result can be fetched from now on.
            self._store.update_model(self._store.job(identity).model, used=now)
        self._state.progress.pop(identity, None)
        self._state.changed()

    async def _work(self, worker: WorkerProcess) -> None:
        while True:
            identity = await self._queue.get()
            with going_on():
                await self._work_on(worker, identity)

    async def _work_on(self, worker: WorkerProcess, identity: str) -> None:
        job = self._store.job(identity)
        if job.state != QUEUED:
            return
        self._running[identity] = asyncio.create_task(self._run(worker, job))
        try:
            (failure,) = await asyncio.gather(self._running[identity], return_exceptions=True)
        finally:
            self._running.pop(identity, None)
        # Its model may have been removed meanwhile.
        if isinstance(failure, Exception) and any(j.id == identity for j in self._store.jobs()):
            self._over(identity, FAILED, error=defect(failure))

    async def _run(self, worker: WorkerProcess, job: Job) -> None:
        attempts = job.attempts + 1
        self._store.update_job(job.id, state=RUNNING, started=time.time(), attempts=attempts)
        self._state.changed()
        model = self._store.model(job.model)
        directory = self._state.job_directory(job.id)
        directory.mkdir(exist_ok=True)
        task: dict[str, Any] = {
            "task": job.kind,
            "model": str(self._state.model_directory(model.id)),
            "kind": model.kind,
            "settings": job.settings,
            "output": str(directory / f"{ATTEMPT}{attempts}"),
            "target": str(directory / "result"),
        }
        try:
            # What runs beside it cannot take the room.
            with self._state.quota.reserved(self._made_bytes(model, job.kind)):
                message = await self._tried(worker, job.id, task)
        except FullError as error:
            message = {"error": str(error)}
        if "error" in message:
            self._over(job.id, FAILED, error=message["error"])
        else:
            self._over(job.id, DONE, result=message["done"])

    async def _tried(
        self, worker: WorkerProcess, identity: str, task: dict[str, Any]
    ) -> dict[str, Any]:
        """What a process says that did the task; another one does it where one has died."""
        report, seconds = self._state.reporter(identity), self._limits.job_seconds
        try:
            for _ in range(TRIES):
                with contextlib.suppress(WorkerDiedError):
                    return await worker.run(task, report, seconds)
                tasks.remove(Path(task["output"]))
        except TimeoutError:
            return {"error": f"it took longer than {seconds:g} s"}
        finally:
            tasks.remove(Path(task["output"]))
        return {"error": "its process ended without a word, probably for want of memory"}

    def _made_bytes(self, model: Model, kind: str) -> int:
        """What a job of this kind may write."""
        if kind == "compare":
            # A compressed graph is put together.
            return 0 if model.kind == tasks.ZIP else model.bytes
        source = tasks.source_of(self._state.model_directory(model.id), model.kind)
        if not source.is_dir():
            # A compressed graph and its weights are kept as they are and packed.
            packed = kind == "compress" and source.suffix in ONNX
            return model.bytes * (2 if packed else 1)
        # A directory is kept as it is and packed, but compressed into one file.
        return size_of(source) * (1 if kind == "compress" else 2)
