"""What the service knows, in SQLite: models, jobs and their states. One process writes."""

from __future__ import annotations

import json
import sqlite3
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..errors import WavpruneError

VERSION = 2
SCHEMA = """
CREATE TABLE models (
    id TEXT PRIMARY KEY, name TEXT NOT NULL, kind TEXT NOT NULL, bytes INTEGER NOT NULL,
    state TEXT NOT NULL, error TEXT, inputs INTEGER NOT NULL DEFAULT 0,
    created REAL NOT NULL, used REAL NOT NULL,
    cannot_run TEXT
);
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, model TEXT NOT NULL REFERENCES models (id) ON DELETE CASCADE,
    kind TEXT NOT NULL, settings TEXT NOT NULL, state TEXT NOT NULL, error TEXT, result TEXT,
    attempts INTEGER NOT NULL DEFAULT 0, created REAL NOT NULL, started REAL, finished REAL
);
CREATE INDEX jobs_by_model ON jobs (model);
"""
# From version 1: what was measured before is measured again, which says whether it can be run.
UPGRADE = """
ALTER TABLE models ADD COLUMN cannot_run TEXT;
UPDATE models SET state = 'waiting' WHERE state = 'ready';
"""
# States of a model and of a job.
WAITING, READY, REFUSED = "waiting", "ready", "refused"
QUEUED, RUNNING, DONE, FAILED, CANCELLED = "queued", "running", "done", "failed", "cancelled"
OPEN = (QUEUED, RUNNING)


@dataclass(frozen=True)
class Model:
    """An uploaded model; see the table of that name.

    ``cannot_run`` is why the service cannot run it; None before it was measured, or where it can.
    """

    id: str
    name: str
    kind: str
    bytes: int
    state: str
    error: str | None
    inputs: int
    created: float
    used: float
    cannot_run: str | None

    @property
    def runs(self) -> bool:
        """True where the service can run it, as far as measuring it has told."""
        return self.state == READY and self.cannot_run is None


@dataclass(frozen=True)
class Job:
    """What is to be done to a model, or was; see the table of that name."""

    id: str
    model: str
    kind: str
    settings: dict[str, Any]
    state: str
    error: str | None
    result: dict[str, Any] | None
    attempts: int
    created: float
    started: float | None
    finished: float | None

    @property
    def is_over(self) -> bool:
        """True where nothing about it changes any more."""
        return self.state not in OPEN


@dataclass
class Store:
    """The tables in a file.

    Args:
        path: of the file, which is made where there is none.

    Raises:
        WavpruneError: it is of another version.
    """

    path: Path
    _lock: threading.RLock = field(default_factory=threading.RLock, repr=False)

    def __post_init__(self) -> None:
        self._connection = sqlite3.connect(
            self.path, check_same_thread=False, isolation_level=None, timeout=10
        )
        self._connection.row_factory = sqlite3.Row
        self._run("PRAGMA foreign_keys = ON")
        self._run("PRAGMA journal_mode = WAL")
        # A job that was reported as done is done after a power cut, too.
        self._run("PRAGMA synchronous = FULL")
        (version,) = self._run("PRAGMA user_version")[0]
        if version in (0, 1):
            change = UPGRADE if version else SCHEMA
            self._connection.executescript(
                f"BEGIN; {change} PRAGMA user_version = {VERSION}; COMMIT;"
            )
        elif version != VERSION:
            self.close()
            raise WavpruneError(
                f"{self.path} is of version {version}; allowed: up to {VERSION}, or another "
                "directory"
            )

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def add_model(self, identity: str, name: str, kind: str, size: int) -> Model:
        """A model whose file is complete."""
        now = time.time()
        self._run(
            "INSERT INTO models (id, name, kind, bytes, state, created, used) "
            "VALUES (?, ?, ?, ?, ?, ?, ?)",
            (identity, name, kind, size, WAITING, now, now),
        )
        return self.model(identity)

    def model(self, identity: str) -> Model:
        """A model by its id.

        Raises:
            LookupError: there is none.
        """
        rows = self._run("SELECT * FROM models WHERE id = ?", (identity,))
        if not rows:
            raise LookupError(f"there is no model {identity!r}")
        return Model(**dict(rows[0]))

    def models(self) -> list[Model]:
        """All models, the last first."""
        return [
            Model(**dict(row))
            for row in self._run("SELECT * FROM models ORDER BY created DESC, id")
        ]

    def update_model(self, identity: str, **values: Any) -> None:
        """Change columns of a model."""
        self._update("models", identity, values)

    def remove_model(self, identity: str) -> None:
        """Forget a model and its jobs."""
        self._run("DELETE FROM models WHERE id = ?", (identity,))

    def add_job(self, identity: str, model: str, kind: str, settings: dict[str, Any]) -> Job:
        """A job that waits."""
        self._run(
            "INSERT INTO jobs (id, model, kind, settings, state, created) "
            "VALUES (?, ?, ?, ?, ?, ?)",
            (identity, model, kind, json.dumps(settings), QUEUED, time.time()),
        )
        return self.job(identity)

    def job(self, identity: str) -> Job:
        """A job by its id.

        Raises:
            LookupError: there is none.
        """
        rows = self._run("SELECT * FROM jobs WHERE id = ?", (identity,))
        if not rows:
            raise LookupError(f"there is no job {identity!r}")
        return _job(rows[0])

    def jobs(self, model: str | None = None, states: tuple[str, ...] | None = None) -> list[Job]:
        """Jobs in the order in which they were made."""
        rows = self._run("SELECT * FROM jobs ORDER BY created, rowid")
        return [
            job
            for job in map(_job, rows)
            if (model is None or job.model == model) and (states is None or job.state in states)
        ]

    def update_job(self, identity: str, **values: Any) -> None:
        """Change columns of a job."""
        if values.get("result") is not None:
            values["result"] = json.dumps(values["result"])
        self._update("jobs", identity, values)

    def remove_job(self, identity: str) -> None:
        """Forget a job."""
        self._run("DELETE FROM jobs WHERE id = ?", (identity,))

    def _update(self, table: str, identity: str, values: dict[str, Any]) -> None:
        columns = ", ".join(f"{name} = ?" for name in values)
        self._run(f"UPDATE {table} SET {columns} WHERE id = ?", (*values.values(), identity))

    def _run(self, statement: str, values: tuple[Any, ...] = ()) -> list[sqlite3.Row]:
        with self._lock:
            return self._connection.execute(statement, values).fetchall()


def _job(row: sqlite3.Row) -> Job:
    values = dict(row)
    values["settings"] = json.loads(values["settings"])
    values["result"] = json.loads(values["result"]) if values["result"] else None
    return Job(**values)
