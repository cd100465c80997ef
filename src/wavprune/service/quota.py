"""How much of the disk is taken, and what was promised of the rest."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Protocol

# What a job writes is its own until it is complete: what it may write is reserved instead.
ATTEMPT = "attempt-"


class FullError(Exception):
    """A limit is reached; the message says which."""


class Claimant(Protocol):
    """Something that will take room."""

    @property
    def claim(self) -> int:
        """Bytes that it has or will have, in no directory that is counted."""


class Reservation:
    """Room for what a job writes.

    Args:
        claim: bytes.
    """

    def __init__(self, claim: int) -> None:
        self.claim = claim


class Quota:
    """The bytes that a service may keep.

    Args:
        directories: that are counted.
        most: bytes that they may have together, with all claims.
    """

    def __init__(self, directories: Iterable[Path], most: int) -> None:
        self._directories = tuple(directories)
        self._most = most
        self._claimants: set[Claimant] = set()

    def used(self) -> int:
        """Bytes of everything that is kept."""
        return sum(map(size_of, self._directories))

    def claimed(self, but: Claimant | None = None) -> int:
        """Bytes of all claims, but for one."""
        return sum(one.claim for one in self._claimants if one is not but)

    def free(self) -> int:
        """Bytes that nothing has, claimed or not; fewer than 0 where it is more than full."""
        return self._most - self.used()

    def room(self) -> int:
        """Bytes that are neither taken nor claimed."""
        return self.free() - self.claimed()

    @contextmanager
    def held(self, claimant: Claimant) -> Iterator[None]:
        """Within the block a claim counts."""
        self._claimants.add(claimant)
        try:
            yield
        finally:
            self._claimants.discard(claimant)

    @contextmanager
    def reserved(self, size: int) -> Iterator[None]:
        """Within the block so many bytes are kept free.

        Raises:
            FullError: there is no room for them.
        """
        if size > self.room():
            raise self.full()
        with self.held(Reservation(size)):
            yield

    def full(self) -> FullError:
        """Why something does not fit."""
        return FullError(
            f"the disk quota of {self._most:,} bytes is used up, or promised to what runs; remove "
            "models that are no longer needed"
        )


def size_of(directory: Path) -> int:
    """Bytes of all files below a directory, but for what jobs are writing."""
    total = 0
    for folder, inner, files in os.walk(directory):
        inner[:] = [name for name in inner if not name.startswith(ATTEMPT)]
        for name in files:
            with contextlib.suppress(OSError):
                total += os.stat(os.path.join(folder, name)).st_size  # noqa: PTH116, PTH118
    return total
