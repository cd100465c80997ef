"""Worker processes as the service holds them, without processes."""

from __future__ import annotations

import asyncio
import socket
import threading
from typing import Any

import pytest

from wavprune.service.launcher import WorkerDiedError
from wavprune.service.processes import WorkerProcess


class Slow:
    """A launcher that takes its time; it keeps the other end of each connection."""

    def __init__(self) -> None:
        self.asked, self.goes_on = threading.Event(), threading.Event()
        self.theirs: list[socket.socket] = []

    def launch(self, memory: int, threads: int) -> tuple[socket.socket, int]:
        ours, theirs = socket.socketpair()
        self.theirs.append(theirs)
        self.asked.set()
        assert self.goes_on.wait(20)
        # There is no such process.
        return ours, 1 << 30


def ignore(stage: str, share: float | None) -> None:
    pass


@pytest.mark.parametrize("ends_first", [True, False])
def test_a_process_that_nobody_waits_for_any_more_is_let_go(ends_first: bool) -> None:
    """A job that is cancelled while its process starts leaves none behind."""
    launcher: Any = Slow()
    worker = WorkerProcess(launcher, 1, 1)

    async def test() -> None:
        running = asyncio.create_task(worker.run({}, ignore, 20))
        while not launcher.asked.is_set():
            await asyncio.sleep(0.01)
        running.cancel()
        with pytest.raises(asyncio.CancelledError):
            await running
        launcher.goes_on.set()
        if ends_first:
            # With the loop still there; else it is closed meanwhile.
            await asyncio.to_thread(check)

    def check() -> None:
        (theirs,) = launcher.theirs
        theirs.settimeout(20)
        assert theirs.recv(1) == b""
        theirs.close()

    asyncio.run(test())
    if not ends_first:
        check()


def test_a_process_that_ends_without_an_answer_is_named() -> None:
    launcher: Any = Slow()
    launcher.goes_on.set()
    worker = WorkerProcess(launcher, 1, 1)

    async def test() -> None:
        running = asyncio.create_task(worker.run({}, ignore, 20))
        while not launcher.theirs:
            await asyncio.sleep(0.01)
        (theirs,) = launcher.theirs
        assert await asyncio.to_thread(theirs.recv, 10) == b"{}\n"
        theirs.close()
        with pytest.raises(WorkerDiedError):
            await running

    asyncio.run(test())
