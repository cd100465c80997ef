"""What the service allows, and what it was told about the network that it is in."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from ..common.checks import integer, positive
from ..errors import WavpruneError

GB = 10**9
# What a page may send as JSON.
JSON_BYTES = 1 << 16


@dataclass(frozen=True)
class Limits:
    """What one service takes and keeps.

    Attributes:
        upload_bytes: of one file, and of all that a zip holds.
        disk_bytes: of everything that is kept.
        models: how many are kept at a time.
        queue: jobs that wait or run.
        workers: jobs that run at a time.
        worker_bytes: memory of a process that runs jobs.
        job_seconds: how long a job may run.
        idle_seconds: how long a model stays that nobody looks at, with its jobs.
    """

    upload_bytes: int = 2 * GB
    disk_bytes: int = 16 * GB
    models: int = 64
    queue: int = 32
    workers: int = 1
    worker_bytes: int = 8 * GB
    job_seconds: float = 3600.0
    idle_seconds: float = 86400.0

    def __post_init__(self) -> None:
        for name in ("upload_bytes", "disk_bytes", "models", "queue", "workers", "worker_bytes"):
            integer(name, getattr(self, name), 1, 1 << 50)
        for name in ("job_seconds", "idle_seconds"):
            positive(name, getattr(self, name))


@dataclass(frozen=True)
class Settings:
    """A service.

    Attributes:
        directory: where it keeps what was uploaded and made.
        token: what a request must bring; None lets every request in.
        names: host names, beside numbers and ``localhost``, under which it may be asked.
        limits: what it takes and keeps.
    """

    directory: Path
    token: str | None = field(default=None, repr=False)
    names: tuple[str, ...] = ()
    limits: Limits = Limits()

    def __post_init__(self) -> None:
        # Messages name files below it, and what opens them makes paths absolute.
        object.__setattr__(self, "directory", self.directory.resolve())
        if self.token is not None and not self.token.isascii():
            raise WavpruneError(
                "the token has characters that a header does not take; allowed: ASCII"
            )
        if self.token is not None and len(self.token) < MIN_TOKEN:
            raise WavpruneError(
                f"the token has {len(self.token)} characters; allowed: {MIN_TOKEN} or more"
            )


MIN_TOKEN = 16
