"""The service without HTTP: models and jobs in one directory, begun, ended and expired.

Files lie in it so::

    service.db  models/<id>/{source*,curves.npz,inputs/}  jobs/<id>/result/  incoming/
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import time

from ..errors import WavpruneError
from . import tasks
from .jobs import Jobs
from .launcher import Launcher
from .limits import Settings
from .models import Models
from .state import State, going_on
from .store import OPEN, WAITING, Model

SWEEP_SECONDS = 30.0


class Service(State):
    """Everything that is kept and done.

    Args:
        settings: where, and how much.
        launcher: starts its workers.

    Attributes:
        models: what was uploaded.
        jobs: what is done to it.

    Raises:
        WavpruneError: another service has the directory.
    """

    def __init__(self, settings: Settings, launcher: Launcher) -> None:
        root = settings.directory
        root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = (root / "lock").open("w")
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._lock.close()
            raise WavpruneError(f"{root} is in use by another service") from error
        super().__init__(settings)
        self.models = Models(self, launcher)
        self.jobs = Jobs(self, launcher)
        self._expiry: asyncio.Task[None] | None = None
        self.models.recover()
        self.jobs.recover()

    async def start(self) -> None:
        """Begin to work on what waits."""
        self._expiry = asyncio.create_task(self._expire_all())
        await self.models.start()
        await self.jobs.start()

    async def stop(self) -> None:
        """End all work; what was running is tried again by the next service."""
        if self._expiry is not None:
            self._expiry.cancel()
            await asyncio.gather(self._expiry, return_exceptions=True)
        await asyncio.gather(self.models.stop(), self.jobs.stop())
        self.changed()
        self.store.close()
        self._lock.close()

    async def remove_model(self, model: Model) -> None:
        """Forget a model, its jobs and their files."""
        # Jobs may be added meanwhile, and another removal may be under way.
        while jobs := [job for job in self.store.jobs(model.id) if self.jobs.is_open(job)]:
            for job in jobs:
                with contextlib.suppress(LookupError):
                    await self.jobs.cancel(job)
        for job in self.store.jobs(model.id):
            tasks.remove(self.job_directory(job.id))
        self.models.remove(model)

    async def _expire_all(self) -> None:
        while True:
            await asyncio.sleep(min(SWEEP_SECONDS, self.limits.idle_seconds / 4))
            with going_on():
                await self._expire()

    async def _expire(self) -> None:
        oldest = time.time() - self.limits.idle_seconds
        busy = {job.model for job in self.store.jobs(states=OPEN)}
        for model in self.store.models():
            if model.used < oldest and model.id not in busy and model.state != WAITING:
                await self.remove_model(model)
