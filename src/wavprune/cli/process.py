"""What a command line needs from its process: standard streams and signals."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from types import FrameType
from typing import IO, Any

STREAMS = ("stdin", "stdout", "stderr")


class Terminated(KeyboardInterrupt):
    """A signal asked this process to end; handled like Ctrl-C by everything in between.

    Args:
        signum: the number of the signal.
    """

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


@contextmanager
def standard_streams() -> Iterator[None]:
    """Streams that can be written to, whatever the process was started with.

    Missing and closed ones lead to the null device for the time of the block, and characters that
    an output cannot encode are written as escape sequences.
    """
    _fill_closed_descriptors()
    with ExitStack() as stack:
        for name in STREAMS:
            stream = getattr(sys, name)
            if stream is None or getattr(stream, "closed", False):
                null = stack.enter_context(open(os.devnull, "r+", encoding="utf-8"))  # noqa: PTH123
                stack.callback(setattr, sys, name, stream)
                setattr(sys, name, null)
            elif name != "stdin" and hasattr(stream, "reconfigure"):
                stack.callback(_set_errors, stream, stream.errors)
                _set_errors(stream, "backslashreplace")
        yield


def _set_errors(stream: Any, errors: str) -> None:
    with suppress(OSError, ValueError):  # it flushes, which may fail
        stream.reconfigure(errors=errors)


def _fill_closed_descriptors() -> None:
    """Open the null device as each of 0, 1 and 2 that is closed.

    A file opened later would get that number, and what a library writes to its standard error
    would end up in a checkpoint.
    """
    for descriptor in range(len(STREAMS)):
        try:
            os.fstat(descriptor)
        except OSError:
            # The lowest number that is free is this one.
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)


def abandon(stream: IO[str]) -> None:
    """Lead a stream that failed to the null device.

    What it still holds would fail again when the interpreter ends, and change the exit status.
    """
    with suppress(OSError, ValueError):
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, stream.fileno())
        os.close(null)


# Signals of Ctrl-C that came so far.
_interrupts: list[int] = []


def raise_if_interrupted() -> None:
    """Raise KeyboardInterrupt where there was one that got lost.

    Importing compiled libraries swallows it where it falls into code that clears errors.
    """
    if _interrupts:
        raise KeyboardInterrupt


@contextmanager
def termination() -> Iterator[None]:
    """Raise ``Terminated`` at SIGTERM and SIGHUP, so that temporary files are removed.

    Ctrl-C is noted, for ``raise_if_interrupted``. Handlers that are there already, ``nohup`` among
    them, stay.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    process = os.getpid()

    def end(signum: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # in a forked worker
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
            return
        # A second signal must not interrupt the removal of temporary files.
        for each in handled:
            signal.signal(each, signal.SIG_IGN)
        raise Terminated(signum)

    def interrupt(signum: int, frame: FrameType | None) -> None:
        _interrupts.append(signum)
        signal.default_int_handler(signum, frame)

    notes = signal.getsignal(signal.SIGINT) == signal.default_int_handler
    if notes:
        _interrupts.clear()
        signal.signal(signal.SIGINT, interrupt)
    names = ("SIGTERM", "SIGHUP")
    available = [getattr(signal, name) for name in names if hasattr(signal, name)]
    handled = [signum for signum in available if signal.getsignal(signum) == signal.SIG_DFL]
    for signum in handled:
        signal.signal(signum, end)
    try:
        yield
    finally:
        for signum in handled:
            signal.signal(signum, signal.SIG_DFL)
        if notes:
            signal.signal(signal.SIGINT, signal.default_int_handler)
