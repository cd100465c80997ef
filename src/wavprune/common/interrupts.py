"""Signals that come at any moment: what is undone after them, and what they wait for."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

T = TypeVar("T")


@contextmanager
def always(undo: Callable[[], object]) -> Iterator[None]:
    """Call ``undo`` at the end, and once more where an interrupt cut it short.

    Args:
        undo: may be called twice.
    """
    try:
        yield
    finally:
        try:
            undo()
        except BaseException:
            undo()
            raise


def finish(work: Callable[[], T]) -> T:
    """Run a function to its end, even if Ctrl-C or another signal comes meanwhile.

    Python runs signal handlers in the main thread, between any two of its instructions. They are
    held back while the function runs, and run after it.

    Args:
        work: what must not stop half-way.

    Returns:
        What ``work`` returned.

    Raises:
        BaseException: what ``work`` raised, or what a handler raised after it.

    Example:
        >>> finish(lambda: 1 + 1)
        2
    """
    if threading.current_thread() is not threading.main_thread():
        return work()
    arrived: list[tuple[int, FrameType | None]] = []
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    for number in signal.valid_signals():
        handler = signal.getsignal(number)
        if callable(handler):
            handlers[number] = handler

    def release() -> None:
        for held, handler in handlers.items():
            signal.signal(held, handler)

    try:
        with always(release):
            for held in handlers:
                signal.signal(held, lambda *arrival: arrived.append(arrival))
            return work()
    finally:
        for came, frame in arrived:
            handlers[came](came, frame)
