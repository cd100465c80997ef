"""Worker processes, as the service holds them: one task at a time, and an end to each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
from collections.abc import Callable
from typing import Any, NamedTuple

from .launcher import Launcher, WorkerDiedError

# A worker that was asked to end has done so by then.
GRACE_SECONDS = 5.0
LONGEST_MESSAGE = 1 << 20


class WorkerProcess:
    """A process that runs tasks; started when it is first needed, and again after it has ended.

    Args:
        launcher: starts it.
        memory: bytes that it may have.
        threads: that it computes with.
    """

    def __init__(self, launcher: Launcher, memory: int, threads: int) -> None:
        self._launcher = launcher
        self._memory, self._threads = memory, threads
        self._open: _Connection | None = None

    async def start(self) -> _Connection:
        """Start the process, where there is none.

        Raises:
            WorkerDiedError: it cannot be started.
        """
        if self._open is None:
            launching = asyncio.get_running_loop().run_in_executor(
                None, self._launcher.launch, self._memory, self._threads
            )
            try:
                connection, pid = await asyncio.shield(launching)
            except asyncio.CancelledError:
                # The process comes all the same, and ends with its connection.
                launching.add_done_callback(_close)
                raise
            try:
                reader, writer = await asyncio.open_unix_connection(
                    sock=connection, limit=LONGEST_MESSAGE
                )
            except BaseException:
                connection.close()
                raise
            self._open = _Connection(reader, writer, pid)
        return self._open

    async def run(
        self, task: dict[str, Any], report: Callable[[str, float | None], None], seconds: float
    ) -> dict[str, Any]:
        """Run a task.

        Args:
            task: what to do.
            report: is told how far it is.
            seconds: how long it may take.

        Returns:
            What it returned under ``"done"``, or why it failed under ``"error"``.

        Raises:
            WorkerDiedError: the process ended before the task, or wrote what cannot be read.
            TimeoutError: it took longer; the process was ended.
        """
        try:
            async with asyncio.timeout(seconds):
                process = await self.start()
                process.writer.write(f"{json.dumps(task)}\n".encode())
                await process.writer.drain()
                while True:
                    message = await process.message()
                    if "stage" not in message:
                        break
                    report(message["stage"], message["share"])
        except (BrokenPipeError, ConnectionResetError, ValueError) as error:
            # A ValueError: a message is longer than any that is taken, or no JSON.
            await self.stop()
            raise WorkerDiedError from error
        except (TimeoutError, asyncio.CancelledError, WorkerDiedError):
            await self.stop()
            raise
        if message.get("end"):
            # What did not fit may have left little room.
            await self.stop()
        return message

    async def stop(self) -> None:
        """End the process, whatever it is doing."""
        process, self._open = self._open, None
        if process is None:
            return
        # The connection is open until the process has ended, so the id is still its own.
        if not process.reader.at_eof():
            with contextlib.suppress(ProcessLookupError):
                os.kill(process.pid, signal.SIGKILL)
            with contextlib.suppress(TimeoutError, ConnectionResetError):
                async with asyncio.timeout(GRACE_SECONDS):
                    while await process.reader.read(LONGEST_MESSAGE):
                        pass
        process.writer.close()
        with contextlib.suppress(OSError):
            await process.writer.wait_closed()


def _close(launching: asyncio.Future[tuple[socket.socket, int]]) -> None:
    if not launching.cancelled() and launching.exception() is None:
        launching.result()[0].close()


class _Connection(NamedTuple):
    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    pid: int

    async def message(self) -> dict[str, Any]:
        line = await self.reader.readline()
        if not line:
            raise WorkerDiedError
        found: dict[str, Any] = json.loads(line)
        return found
