"""The service without HTTP: models, jobs and their states, what waits, what is expired.

Files lie in one directory::

    service.db  models/<id>/{source*,curves.npz,inputs/}  jobs/<id>/result/  incoming/

An upload is written under ``incoming`` and moved to its place; a job writes into a directory of its
own, which is renamed to ``result`` when it is complete. A result that is there is a job that is
done, whatever the process was doing when it was killed.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import logging
import os
import secrets
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ..errors import WavpruneError
from . import analysis, tasks
from .analysis import ModelCurves
from .launcher import Launcher, WorkerDiedError
from .limits import Settings
from .processes import WorkerProcess
from .store import (
    CANCELLED,
    DONE,
    FAILED,
    OPEN,
    QUEUED,
    READY,
    REFUSED,
    RUNNING,
    WAITING,
    Job,
    Model,
    Store,
)
from .uploads import FullError, Upload

# Curves that stay in memory.
CURVES_BYTES = 256 << 20
# How often a job may take its process down, and the service.
TRIES, MOST_ATTEMPTS = 2, 20
ANALYSIS_SECONDS = 600.0
SWEEP_SECONDS = 30.0
LOG = logging.getLogger(__name__)


class NotReadyError(Exception):
    """A model cannot be asked yet, or no more; the message says why."""


class Progress(NamedTuple):
    """How far something is: what it does, and from 0 to 1 where that is known."""

    stage: str
    share: float | None


class Service:
    """Everything that is kept and done.

    Args:
        settings: where, and how much.
        launcher: starts its workers.

    Raises:
        WavpruneError: another service has the directory.
    """

    def __init__(self, settings: Settings, launcher: Launcher) -> None:
        self.settings = settings
        self.limits = settings.limits
        root = settings.directory
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = (root / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise WavpruneError(f"{root} is in use by another service") from error
        self.store = Store(root / "service.db")
        self.progress: dict[str, Progress] = {}
        self._curves: OrderedDict[str, ModelCurves] = OrderedDict()
        self._models: asyncio.Queue[str] = asyncio.Queue()
        self._jobs: asyncio.Queue[str] = asyncio.Queue()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._loops: list[asyncio.Task[None]] = []
        self._changed = asyncio.Event()
        self.uploads: set[Upload] = set()
        cores = os.cpu_count() or 1
        memory = self.limits.worker_bytes
        self._analyst = WorkerProcess(launcher, memory, 1)
        self._workers = [
            WorkerProcess(launcher, memory, max(1, cores // self.limits.workers))
            for _ in range(self.limits.workers)
        ]
        for name in ("models", "jobs", "incoming"):
            (root / name).mkdir(exist_ok=True)
        self._recover()

    # Where things are.

    def model_directory(self, identity: str) -> Path:
        """Of a model that is known."""
        return self.settings.directory / "models" / identity

    def job_directory(self, identity: str) -> Path:
        """Of a job that is known."""
        return self.settings.directory / "jobs" / identity

    def result(self, job: Job, name: str) -> Path:
        """A file that a job left."""
        return self.job_directory(job.id) / "result" / name

    # Beginning and end.

    async def start(self) -> None:
        """Begin to work on what waits."""
        self._loops = [
            asyncio.create_task(self._analyze_all()),
            asyncio.create_task(self._expire_all()),
            *(asyncio.create_task(self._work(worker)) for worker in self._workers),
        ]

    async def stop(self) -> None:
        """End all work; what was running is tried again by the next service."""
        for loop in (*self._loops, *self._running.values()):
            loop.cancel()
        await asyncio.gather(*self._loops, *self._running.values(), return_exceptions=True)
        await asyncio.gather(*(worker.stop() for worker in (self._analyst, *self._workers)))
        self.changed()
        self.store.close()
        self._lock.close()

    def _recover(self) -> None:
        """Bring the states up to what a service that was killed left on the disk."""
        root = self.settings.directory
        for path in (root / "incoming").iterdir():
            path.unlink(missing_ok=True)
        known = {model.id for model in self.store.models()}
        for path in (root / "models").iterdir():
            if path.name not in known:
                tasks.remove(path)
        for model in self.store.models():
            curves = self.model_directory(model.id) / tasks.CURVES
            if model.state == READY and not analysis.is_current(curves):
                self.store.update_model(model.id, state=WAITING)
                self._models.put_nowait(model.id)
            if model.state == WAITING:
                self._models.put_nowait(model.id)
        jobs = {job.id: job for job in self.store.jobs()}
        for path in (root / "jobs").iterdir():
            if path.name not in jobs:
                tasks.remove(path)
        for job in jobs.values():
            if job.state in OPEN:
                self._recover_job(job)

    def _recover_job(self, job: Job) -> None:
        path = self.job_directory(job.id) / "result" / tasks.RESULT
        if path.exists():
            result = json.loads(path.read_text())
            self.store.update_job(job.id, state=DONE, result=result, finished=time.time())
            return
        for attempt in self.job_directory(job.id).glob("attempt-*"):
            tasks.remove(attempt)
        if job.attempts >= MOST_ATTEMPTS:
            self._over(job.id, FAILED, error=f"it was interrupted {job.attempts} times")
            return
        self.store.update_job(job.id, state=QUEUED)
        self._jobs.put_nowait(job.id)

    # Waiting for changes.

    @property
    def change(self) -> asyncio.Event:
        """Is set at the next change from now; taken before the state that it is about."""
        return self._changed

    def changed(self) -> None:
        """Wake everyone who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    # Uploads.

    def used_bytes(self) -> int:
        """Of everything that is kept."""
        root = self.settings.directory
        return _size(root / "models") + _size(root / "jobs")

    def incoming(self, size: int | None) -> Upload:
        """A file that begins to come.

        Args:
            size: how large it says it is.

        Raises:
            FullError: there is no room for it.
        """
        return Upload(self, size)

    def add_model(self, upload: Path, name: str, kind: str) -> Model:
        """Make a model of an upload that is complete.

        Raises:
            FullError: there are too many.
        """
        if len(self.store.models()) >= self.limits.models:
            raise FullError(
                f"{self.limits.models} models are kept, which is the most; remove one of them"
            )
        identity = secrets.token_hex(16)
        directory = self.model_directory(identity)
        directory.mkdir()
        size = upload.stat().st_size
        upload.rename(tasks.uploaded(directory, kind))
        model = self.store.add_model(identity, name, kind, size)
        self._models.put_nowait(identity)
        self.changed()
        return model

    def add_input(self, upload: Path, model: Model, suffix: str) -> Model:
        """Add a file of inputs to a model."""
        folder = self.model_directory(model.id) / tasks.INPUTS
        folder.mkdir(exist_ok=True)
        upload.rename(folder / f"{model.inputs:06d}{suffix}")
        self.store.update_model(model.id, inputs=model.inputs + 1, used=time.time())
        self.changed()
        return self.store.model(model.id)

    def touch(self, model: Model) -> None:
        """Somebody looked at it; says so in the store now and then."""
        now = time.time()
        if now - model.used > min(60.0, self.limits.idle_seconds / 4):
            self.store.update_model(model.id, used=now)

    def curves(self, model: Model) -> ModelCurves:
        """The curves of a model that is ready.

        Raises:
            NotReadyError: it is not.
        """
        found = self._curves.get(model.id)
        if found is None:
            if model.state != READY:
                raise NotReadyError(
                    f"the model was refused: {model.error}"
                    if model.state == REFUSED
                    else "the model is being measured; wait until it is ready"
                )
            found = self._curves[model.id] = analysis.load(
                self.model_directory(model.id) / tasks.CURVES
            )
            while len(self._curves) > 1 and self._curves_bytes() > CURVES_BYTES:
                self._curves.popitem(last=False)
        self._curves.move_to_end(model.id)
        return found

    def _curves_bytes(self) -> int:
        return sum(curves.nbytes for curves in self._curves.values())

    async def remove_model(self, model: Model) -> None:
        """Forget a model, its jobs and their files."""
        for job in self.store.jobs(model.id):
            await self.cancel(job)
            tasks.remove(self.job_directory(job.id))
        self.store.remove_model(model.id)
        self._curves.pop(model.id, None)
        tasks.remove(self.model_directory(model.id))
        self.changed()

    # Jobs.

    def add_job(self, model: Model, kind: str, settings: dict[str, Any]) -> Job:
        """A job that waits for its turn.

        Raises:
            FullError: too many wait.
        """
        if len(self.store.jobs(states=OPEN)) >= self.limits.queue:
            raise FullError(
                f"{self.limits.queue} jobs wait or run, which is the most; try again later"
            )
        job = self.store.add_job(secrets.token_hex(16), model.id, kind, settings)
        self.store.update_model(model.id, used=time.time())
        self._jobs.put_nowait(job.id)
        self.changed()
        return job

    async def cancel(self, job: Job) -> Job:
        """End a job that is not over."""
        if not job.is_over:
            self._over(job.id, CANCELLED)
            running = self._running.get(job.id)
            if running is not None:
                running.cancel()
                await asyncio.gather(running, return_exceptions=True)
        return self.store.job(job.id)

    def _over(self, identity: str, state: str, **values: Any) -> None:
        now = time.time()
        self.store.update_job(identity, state=state, finished=now, **values)
        with contextlib.suppress(LookupError):
            # Its result can be fetched from now on.
            self.store.update_model(self.store.job(identity).model, used=now)
        self.progress.pop(identity, None)
        self.changed()

    async def _work(self, worker: WorkerProcess) -> None:
        while True:
            identity = await self._jobs.get()
            with _going_on():
                await self._work_on(worker, identity)

    async def _work_on(self, worker: WorkerProcess, identity: str) -> None:
        job = self.store.job(identity)
        if job.state != QUEUED:
            return
        self._running[identity] = asyncio.create_task(self._run(worker, job))
        try:
            (failure,) = await asyncio.gather(self._running[identity], return_exceptions=True)
        finally:
            self._running.pop(identity, None)
        if isinstance(failure, Exception):
            self._over(identity, FAILED, error=_defect(failure))

    async def _run(self, worker: WorkerProcess, job: Job) -> None:
        attempts = job.attempts + 1
        self.store.update_job(job.id, state=RUNNING, started=time.time(), attempts=attempts)
        self.changed()
        model = self.store.model(job.model)
        directory = self.job_directory(job.id)
        directory.mkdir(exist_ok=True)
        task: dict[str, Any] = {
            "task": job.kind,
            "model": str(self.model_directory(model.id)),
            "kind": model.kind,
            "settings": job.settings,
            "output": str(directory / f"attempt-{attempts}"),
            "target": str(directory / "result"),
        }
        if self.used_bytes() + self._made_bytes(model, job.kind) > self.limits.disk_bytes:
            self._over(job.id, FAILED, error=self.no_room())
            return
        message = {"error": "its process ended without a word, probably for want of memory"}
        try:
            for _ in range(TRIES):
                with contextlib.suppress(WorkerDiedError):
                    message = await worker.run(task, self._report(job.id), self.limits.job_seconds)
                    break
                tasks.remove(Path(task["output"]))
        except TimeoutError:
            message = {"error": f"it took longer than {self.limits.job_seconds:g} s"}
        finally:
            tasks.remove(Path(task["output"]))
        if "error" in message:
            self._over(job.id, FAILED, error=message["error"])
        else:
            self._over(job.id, DONE, result=message["done"])

    def _made_bytes(self, model: Model, kind: str) -> int:
        """What a job of this kind may write."""
        if kind == "compare":
            return 0
        source = tasks.source_of(self.model_directory(model.id), model.kind)
        if not source.is_dir():
            return model.bytes
        # A directory is kept as it is and packed, but compressed into one file.
        return _size(source) * (1 if kind == "compress" else 2)

    def no_room(self) -> str:
        """Why something does not fit."""
        return (
            f"the disk quota of {self.limits.disk_bytes:,} bytes is used up; remove models that "
            "are no longer needed"
        )

    def _report(self, identity: str) -> Callable[[str, float | None], None]:
        def report(stage: str, share: float | None) -> None:
            self.progress[identity] = Progress(stage, share)
            self.changed()

        return report

    # Models.

    async def _analyze_all(self) -> None:
        while True:
            identity = await self._models.get()
            with _going_on():
                await self._analyze(self.store.model(identity))

    async def _analyze(self, model: Model) -> None:
        taken = self.used_bytes() + sum(upload.claim for upload in self.uploads)
        packed = tasks.uploaded(self.model_directory(model.id), tasks.ZIP).exists()
        task = {
            "task": "analyze",
            "model": str(self.model_directory(model.id)),
            "kind": model.kind,
            "most": max(0, min(self.limits.upload_bytes, self.limits.disk_bytes - taken)),
        }
        try:
            message = await self._analyst.run(task, self._report(model.id), ANALYSIS_SECONDS)
        except WorkerDiedError:
            message = {
                "error": "reading it ended the process that did, probably for want of memory"
            }
        except TimeoutError:
            message = {"error": f"reading it took longer than {ANALYSIS_SECONDS:g} s"}
        except Exception as error:
            message = {"error": _defect(error)}
        if packed and "error" not in message and self.used_bytes() > self.limits.disk_bytes:
            # Something else has come while it was unpacked.
            message = {"error": self.no_room()}
        self.progress.pop(model.id, None)
        # Raises where it was removed meanwhile.
        self.store.model(model.id)
        if "error" in message:
            self.store.update_model(model.id, state=REFUSED, error=message["error"])
            tasks.remove(self.model_directory(model.id))
        else:
            self.store.update_model(model.id, state=READY)
        self.changed()

    async def _expire_all(self) -> None:
        while True:
            await asyncio.sleep(min(SWEEP_SECONDS, self.limits.idle_seconds / 4))
            with _going_on():
                await self._expire()

    async def _expire(self) -> None:
        oldest = time.time() - self.limits.idle_seconds
        busy = {job.model for job in self.store.jobs(states=OPEN)}
        for model in self.store.models():
            if model.used < oldest and model.id not in busy and model.state != WAITING:
                await self.remove_model(model)


@contextlib.contextmanager
def _going_on() -> Iterator[None]:
    """One failure does not end what is done for all."""
    try:
        yield
    except LookupError as error:
        # It was removed meanwhile.
        LOG.debug("%s", error)
    except Exception:
        LOG.exception("the service goes on after a failure")


def _defect(error: Exception) -> str:
    LOG.error("a defect of wavprune", exc_info=error)
    return f"a defect of wavprune: {type(error).__name__}"


def _size(directory: Path) -> int:
    total = 0
    for folder, _, files in os.walk(directory):
        for name in files:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(folder, name)).st_size  # noqa: PTH116, PTH118
    return total
