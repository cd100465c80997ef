"""Where the time of trials goes: every moment belongs to exactly one part."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Literal, get_args

Part = Literal[
    "forward", "matching", "moments", "metrics", "pruning", "reference", "loading", "other"
]
PARTS: tuple[Part, ...] = get_args(Part)


class Clock:
    """Wall time of what runs between ``start`` and ``stop`` in this thread, by part.

    ``timed`` names the parts. A part within another one interrupts it, so the parts add up to the
    whole. A clock that stops adds its time to the one that ran before it was started.

    Attributes:
        seconds: the time of each part that is over.

    Example:
        >>> with Clock.running() as clock:
        ...     with timed("forward"):
        ...         time.sleep(0.01)
        >>> list(clock.seconds)
        ['other', 'forward']
    """

    def __init__(self) -> None:
        self.seconds: dict[Part, float] = {}
        self._part: Part = "other"
        self._since = time.perf_counter()

    @classmethod
    @contextmanager
    def running(cls) -> Iterator[Clock]:
        """A clock that runs within the block."""
        outer = _current.get()
        if outer is not None:
            outer.switch(outer._part)
        clock = cls()
        token = _current.set(clock)
        try:
            yield clock
        finally:
            clock.switch("other")
            _current.reset(token)
            if outer is not None:
                outer._since = clock._since
                outer.add(clock.seconds)

    @property
    def total(self) -> float:
        """The time of all parts."""
        return sum(self.seconds.values())

    def add(self, seconds: dict[Part, float]) -> None:
        """Add the time of another clock."""
        for part, spent in seconds.items():
            self.seconds[part] = self.seconds.get(part, 0.0) + spent

    def switch(self, part: Part) -> Part:
        """Let time count for another part; returns the one before."""
        now = time.perf_counter()
        before = self._part
        self.seconds[before] = self.seconds.get(before, 0.0) + now - self._since
        self._part, self._since = part, now
        return before


_current: ContextVar[Clock | None] = ContextVar("clock", default=None)


@contextmanager
def timed(part: Part) -> Iterator[None]:
    """Count the time of the block for a part, if a clock runs.

    Args:
        part: ``"forward"``, forward passes of the evaluation; ``"matching"``, those on the data of
            the batch norms; ``"moments"``, the rest of their repair; ``"metrics"``;
            ``"pruning"``; ``"reference"``, what is measured once on the unpruned model;
            ``"loading"``, models and data; ``"other"``.
    """
    clock = _current.get()
    if clock is None:
        yield
        return
    before = clock.switch(part)
    try:
        yield
    finally:
        clock.switch(before)
