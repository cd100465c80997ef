"""Files that come in pieces, counted as they come."""

from __future__ import annotations

import os
import secrets
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .service import Service


class FullError(Exception):
    """A limit is reached; the message says which."""


class Upload:
    """A file that comes in pieces; a context, after which it is gone unless it was moved.

    Args:
        service: which takes it.
        size: how large it says it is.

    Raises:
        FullError: there is no room for it.
        OverflowError: it says that it is too large.
    """

    def __init__(self, service: Service, size: int | None) -> None:
        self._service = service
        self._limits = service.limits
        self._said = size or 0
        self.size = 0
        self._room = self._limits.disk_bytes - service.used_bytes()
        self._check()
        self.path = service.settings.directory / "incoming" / secrets.token_hex(16)

    def __enter__(self) -> Upload:
        self._file = self.path.open("xb")
        self._service.uploads.add(self)
        return self

    def __exit__(self, *error: object) -> None:
        self._service.uploads.discard(self)
        self._file.close()
        self.path.unlink(missing_ok=True)

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
        self._room = self._limits.disk_bytes - self._service.used_bytes()
        self._check()
        self._file.flush()
        os.fsync(self._file.fileno())

    @property
    def claim(self) -> int:
        """Bytes that it has or says that it will have."""
        return max(self.size, self._said)

    def _check(self) -> None:
        if self.claim > self._limits.upload_bytes:
            raise OverflowError(
                f"the file has more than {self._limits.upload_bytes:,} bytes, which is the most"
            )
        others = sum(upload.claim for upload in self._service.uploads if upload is not self)
        if self.claim + others > self._room:
            raise FullError(self._service.no_room())
