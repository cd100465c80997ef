"""Work that is finished once it has begun: a signal that comes meanwhile waits for its end."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import TypeVar

from ..backends import Backend
from .device import is_capturing
from .plan import Plan

T = TypeVar("T")


def cannot_be_interrupted(backend: Backend, plan: Plan) -> bool:
    """True where one call of the backend changes all weights or none."""
    # What is captured runs later, as a whole.
    return (backend.is_atomic and plan.is_uniform) or is_capturing()


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
    try:
        for held in handlers:
            signal.signal(held, lambda *arrival: arrived.append(arrival))
        return work()
    finally:
        for held, handler in handlers.items():
            signal.signal(held, handler)
        for came, frame in arrived:
            handlers[came](came, frame)
