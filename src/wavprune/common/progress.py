"""Progress bars: rich's, on standard error; or whatever listens instead."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime, timedelta

# Seconds between two lines where there is no terminal.
EVERY = 30.0

# Is told what is going on and how much of it is done, from 0 to 1 where that is known.
Listener = Callable[[str, float | None], object]

_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def reported_to(listener: Listener) -> Iterator[None]:
    """Within the block progress goes to a function, and no bar is shown.

    Example:
        >>> seen = []
        >>> with reported_to(lambda what, share: seen.append((what, share))):
        ...     with progress_bar("prune", 4, shown=False) as advance:
        ...         advance(3)
        >>> seen
        [('prune', 0.0), ('prune', 0.75)]
    """
    before = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(before)


@contextmanager
def progress_bar(
    description: str, total: float | None, unit: str = "", shown: bool = True
) -> Iterator[Callable[[float], None]]:
    """A bar with the share done, the time spent and the time left.

    Args:
        description: what is going on.
        total: how much there is to do; None where that is not known.
        unit: of what there is to do, such as ``"runs"``.
        shown: False shows nothing and costs nothing.

    Yields:
        A function that advances the bar by an amount.

    Example:
        >>> with progress_bar("prune", 3, shown=False) as advance:
        ...     advance(3)
    """
    listener = _LISTENER.get()
    if listener is not None:
        yield _reporting(listener, description, total)
        return
    if not shown:
        yield lambda _: None
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        Progress,
        TextColumn,
        TimeElapsedColumn,
        TimeRemainingColumn,
    )

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        TextColumn("{task.percentage:>3.0f}%" if total else ""),
        TextColumn("{task.completed:,.0f}/{task.total:,.0f} " + unit if total else unit),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        task = bar.add_task(description, total=total)
        yield lambda amount: bar.advance(task, amount)


def _reporting(
    listener: Listener, description: str, total: float | None
) -> Callable[[float], None]:
    done = 0.0

    def advance(amount: float) -> None:
        nonlocal done
        done += amount
        listener(description, min(1.0, done / total) if total else None)

    advance(0)
    return advance


@contextmanager
def progress_lines(description: str, total: int, unit: str) -> Iterator[Callable[[float], None]]:
    """A line on standard error every 30 s, for logs: how much is done, and when it will end.

    Args:
        description: what is going on.
        total: how much there is to do.
        unit: of what there is to do, such as ``"runs"``.

    Yields:
        A function that advances by an amount.
    """
    start = time.monotonic()
    done = 0.0
    over = threading.Event()

    def advance(amount: float) -> None:
        nonlocal done
        done += amount

    def say() -> None:
        while not over.wait(EVERY):
            spent = time.monotonic() - start
            text = f"{description}: {done:,.0f} of {total:,} {unit} in {_duration(spent)}"
            if done:
                left = spent * (total - done) / done
                end = datetime.now().astimezone() + timedelta(seconds=left)
                text += f", {_duration(left)} left, until {end:%Y-%m-%d %H:%M:%S}"
            print(text, file=sys.stderr, flush=True)

    thread = threading.Thread(target=say, daemon=True)
    thread.start()
    try:
        yield advance
    finally:
        over.set()
        thread.join()


def _duration(seconds: float) -> str:
    return str(timedelta(seconds=round(seconds)))
