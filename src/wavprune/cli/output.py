"""What commands print, and what they say about the files that they write."""

from __future__ import annotations

import errno
import json
import math
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TextIO

import click
from rich.console import Console
from rich.markup import escape
from rich.table import Table

# Width of tables when the output is not a terminal.
TABLE_WIDTH = 200


class Outputs:
    """The files that a command was asked to write, and which of them it has written."""

    def __init__(self) -> None:
        self._before: dict[Path, object] = {}

    def expect(self, path: Path) -> None:
        """Remember what is at a path before the command writes to it."""
        self._before[path] = _identity(path)

    def written(self) -> list[Path]:
        """The paths where something is that was not there before."""
        return [
            path
            for path, before in self._before.items()
            if (now := _identity(path)) is not None and now != before
        ]


def expect_output(path: Path | None) -> None:
    """Have ``main`` say so if this file was written and the command failed afterwards."""
    if path is not None:
        outputs: Outputs = click.get_current_context().find_root().obj
        outputs.expect(path)


def check_replaceable(path: Path, force: bool) -> None:
    """Raise where something is at a path and ``--force`` was not given."""
    if not force and (path.exists() or path.is_symlink()):
        raise click.ClickException(f"{path} exists already; only --force replaces it")


@contextmanager
def standard_output() -> Iterator[TextIO]:
    """Standard output, flushed at the end of the block.

    Raises:
        OSError: it could not be written; its file name is "standard output".
    """
    try:
        yield sys.stdout
        sys.stdout.flush()
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from error


def write(text: str) -> None:
    """Write text to standard output."""
    with standard_output() as stream:
        stream.write(text)


def write_json(content: object) -> None:
    """Write JSON to standard output; null stands for numbers that are not finite."""
    write(json.dumps(_finite(content), indent=2, allow_nan=False) + "\n")


def write_table(table: Table) -> None:
    """Write a table to standard output."""
    with standard_output() as stream:
        _Console(file=stream, width=None if stream.isatty() else TABLE_WIDTH).print(table)


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Raise the error: rich would end the process without a word."""
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))


def data_table(title: str, label: str, *numbers: str) -> Table:
    """A table with one column of labels and columns of numbers.

    Args:
        title: above the table.
        label: heading of the first column.
        numbers: headings of the other columns.
    """
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column(label, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def literal(text: str) -> str:
    """Text as a cell shows it: no markup, and control characters as escape sequences."""
    return escape(printable(text))


def printable(text: str) -> str:
    """Text with escape sequences for characters that a terminal would act on."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )


def size(shape: Iterable[int]) -> str:
    """A shape as in messages and tables.

    Example:
        >>> size((8, 3, 3, 3))
        '8x3x3x3'
    """
    return "x".join(map(str, shape))


def yes_or_no(value: object) -> str:
    """A cell: ``yes`` and ``no`` for a bool, else the value."""
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _identity(path: Path) -> object:
    """What changes when a file or directory is written or replaced; None where nothing is."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
