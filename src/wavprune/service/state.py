"""What all of the service shares: where things lie, what is known, who waits for a change."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

from .limits import Settings
from .quota import Quota
from .store import Job, Store

LOG = logging.getLogger(__name__)


class Progress(NamedTuple):
    """How far something is: what it does, and from 0 to 1 where that is known."""

    stage: str
    share: float | None


class State:
    """What is kept, and how far it is.

    Args:
        settings: where, and how much.

    Attributes:
        settings: the same.
        store: models, jobs and their states.
        quota: the room that is left for them.
        progress: of what is being done, by the id of its model or job.
    """

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.limits = settings.limits
        root = settings.directory
        self.store = Store(root / "service.db")
        self.quota = Quota((root / "models", root / "jobs"), self.limits.disk_bytes)
        self.progress: dict[str, Progress] = {}
        self._changed = asyncio.Event()
        for name in ("models", "jobs", "incoming"):
            (root / name).mkdir(exist_ok=True)

    def model_directory(self, identity: str) -> Path:
        """Of a model that is known."""
        return self.settings.directory / "models" / identity

    def job_directory(self, identity: str) -> Path:
        """Of a job that is known."""
        return self.settings.directory / "jobs" / identity

    def result(self, job: Job, name: str) -> Path:
        """A file that a job left."""
        return self.job_directory(job.id) / "result" / name

    @property
    def change(self) -> asyncio.Event:
        """Is set at the next change from now; taken before the state that it is about."""
        return self._changed

    def changed(self) -> None:
        """Wake everyone who waits for a change."""
        self._changed.set()
        self._changed = asyncio.Event()

    def reporter(self, identity: str) -> Callable[[str, float | None], None]:
        """Says how far a model or job is."""

        def report(stage: str, share: float | None) -> None:
            self.progress[identity] = Progress(stage, share)
            self.changed()

        return report


@contextlib.contextmanager
def going_on() -> Iterator[None]:
    """One failure does not end what is done for all."""
    try:
        yield
    except LookupError as error:
        # It was removed meanwhile.
        LOG.debug("%s", error)
    except Exception:
        LOG.exception("the service goes on after a failure")


def defect(error: Exception) -> str:
    """What people are told of an error that nobody has thought of."""
    LOG.error("a defect of wavprune", exc_info=error)
    return f"a defect of wavprune: {type(error).__name__}"
