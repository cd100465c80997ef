"""Progress bars: rich's, on standard error."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


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
