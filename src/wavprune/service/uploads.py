"""Files that come in pieces, counted as they come."""

from __future__ import annotations

import os
import secrets
from contextlib import ExitStack
from pathlib import Path

from .quota import Quota


class Upload:
    """A file that comes in pieces; a context, after which it is gone unless it was moved.

    Args:
        directory: where it is written.
        quota: what it takes room of.
        most: bytes that it may have.
        size: how large it says it is.

    Raises:
        FullError: there is no room for it.
        OverflowError: it says that it is too large.
    """

    def __init__(self, directory: Path, quota: Quota, most: int, size: int | None) -> None:
        self._quota, self._most = quota, most
        self._said = size or 0
        self.size = 0
        self._left = quota.free()
        self._check()
        self.path = directory / secrets.token_hex(16)

    def __enter__(self) -> Upload:
        with ExitStack() as stack:
            self._file = stack.enter_context(self.path.open("xb"))
            stack.callback(self.path.unlink, missing_ok=True)
            stack.enter_context(self._quota.held(self))
            self._stack = stack.pop_all()
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    def write(self, part: bytes) -> None:
        """Add a piece.

        Raises:
            FullError: there is no room for it.
            OverflowError: the file is too large.
        """
        self.size += len(part)
        self._check()
        self._file.write(part)

    def complete(self) -> None:
        """Nothing more comes.

        Raises:
            FullError: what came meanwhile took the room.
        """
        self._left = self._quota.free()
        self._check()
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def claim(self) -> int:
        """Bytes that it has or says that it will have."""
        return max(self.size, self._said)

    def _check(self) -> None:
        if self.claim > self._most:
            raise OverflowError(f"the file has more than {self._most:,} bytes, which is the most")
        if self.claim + self._quota.claimed(but=self) > self._left:
            raise self._quota.full()
