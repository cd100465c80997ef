"""Worker processes, as the service holds them: one task at a time, and an end to each."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
from collections.abc import Callable
from typing import Any

# A worker that was asked to end has done so by then.
GRACE_SECONDS = 5.0
LONGEST_MESSAGE = 1 << 20


class WorkerDiedError(Exception):
    """The process ended in the middle of a task."""


class WorkerProcess:
    """A process that runs tasks; started when it is first needed, and again after it has ended.

    Args:
        memory: bytes that it may have.
        threads: that it computes with.
    """

    def __init__(self, memory: int, threads: int) -> None:
        self._memory, self._threads = memory, threads
        self._process: asyncio.subprocess.Process | None = None

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return None if self._process is None else self._process.pid

    async def start(self) -> None:
        """Start the process, where there is none, and wait until it takes tasks.

        Raises:
            WorkerDiedError: it ended at once.
        """
        if self._process is not None and self._process.returncode is None:
            return
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-m", f"{__package__}.worker"),
            *(str(self._memory), str(self._threads)),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.PIPE,
            limit=LONGEST_MESSAGE,
            # Ctrl-C in the terminal is for the service, which then ends its workers.
            start_new_session=True,
        )
        await self._message()

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
            WorkerDiedError: the process ended before the task.
            TimeoutError: it took longer; the process was ended.
        """
        try:
            async with asyncio.timeout(seconds):
                await self.start()
                assert self._process is not None
                assert self._process.stdin is not None
                self._process.stdin.write(f"{json.dumps(task)}\n".encode())
                await self._process.stdin.drain()
                while True:
                    message = await self._message()
                    if "stage" not in message:
                        break
                    report(message["stage"], message["share"])
        except (BrokenPipeError, ConnectionResetError) as error:
            raise WorkerDiedError from error
        except (TimeoutError, asyncio.CancelledError):
            await self.stop()
            raise
        if message.get("end"):
            # What did not fit may have left little room.
            await self.stop()
        return message

    async def stop(self) -> None:
        """End the process, whatever it is doing."""
        process, self._process = self._process, None
        if process is None or process.returncode is not None:
            return
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(process.wait(), GRACE_SECONDS)

    async def _message(self) -> dict[str, Any]:
        assert self._process is not None
        assert self._process.stdout is not None
        line = await self._process.stdout.readline()
        if not line:
            await self._process.wait()
            self._process = None
            raise WorkerDiedError
        message: dict[str, Any] = json.loads(line)
        return message
