"""Tables of runs and layers that a reader can sort."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from ..sweep.schema import LAYERS, RUNS, SNAPSHOTS, Column, Format
from . import series
from .export import csv_text
from .scale import percentage, size
from .series import UNPRUNED

# The columns that a narrow window shows first, and the last one.
_FIRST = ("method", "bits", "sparsity", "top1", "value", "spread", "file_bytes", "stored_bytes")
_LAST = "guid"
# The page shows this many runs at most; an export has all.
MAX_ROWS = 2000


class Cell(NamedTuple):
    """One cell of a table.

    Attributes:
        text: what it shows.
        key: what it is sorted by: a number, or text; None comes last.
    """

    text: str
    key: float | str | None


@dataclass(frozen=True)
class Table:
    """A table that its reader can sort.

    Attributes:
        caption: what it shows.
        columns: headings and descriptions.
        rows: cells, row by row.
        note: what was left out; empty where nothing was.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def runs_table(runs: pd.DataFrame) -> Table:
    """The finished runs; a setting that all of them share has no column."""
    pruned = runs[runs["method"] != UNPRUNED]
    # Of a classifier top-1 is the value, and its spread follows from it.
    hidden = {"value", "spread"} if runs["top1"].notna().all() else set()
    columns = [
        column
        for column in sorted(RUNS, key=_place)
        if column.name not in hidden and (not column.role or _varies(pruned, column.name))
    ]
    note = ""
    if len(runs) > MAX_ROWS:
        note = f"The last {MAX_ROWS:,} of {len(runs):,} runs; an export has all."
    named = runs.assign(method=series.bases(runs).replace(UNPRUNED, "unpruned"))
    return _table("Every finished run", columns, named.tail(MAX_ROWS), note)


def _place(column: Column) -> int:
    """Where a column is in the table of runs; those of one place keep their order."""
    if column.name in _FIRST:
        return _FIRST.index(column.name)
    return len(_FIRST) + (column.name == _LAST)


def layers_table(layers: pd.DataFrame, runs: pd.DataFrame) -> Table:
    """The layers of some runs, which ``runs`` names by ``guid`` and ``label``."""
    labels = dict(zip(runs["guid"], runs["label"], strict=True))
    named = layers.assign(guid=layers["guid"].map(labels))
    return _table("Layers of the pictured runs", LAYERS, named)


def _varies(runs: pd.DataFrame, setting: str) -> bool:
    values = runs[setting]
    # Within a method an empty setting is a value of its own, such as the deepest level.
    within = values.groupby(runs["method"]).nunique(dropna=False)
    return bool(values.nunique() > 1 or (within > 1).any())


def _table(caption: str, columns: Iterable[Column], frame: pd.DataFrame, note: str = "") -> Table:
    """The columns that have a heading, and a value somewhere."""
    used = tuple(
        column
        for column in columns
        if column.heading and (frame[column.name].notna() & (frame[column.name] != "")).any()
    )
    rows = tuple(
        tuple(_cell(row[column.name], column) for column in used) for _, row in frame.iterrows()
    )
    return Table(caption, used, rows, note)


def runs_csv(runs: pd.DataFrame) -> str:
    """All finished runs as CSV, without their settings as JSON."""
    left_out = {column.name for column in SNAPSHOTS} | {"traceback", "error"}
    names = [column.name for column in RUNS if column.name not in left_out]
    return csv_text(runs[names].dropna(axis="columns", how="all"))


def _cell(value: Any, column: Column) -> Cell:
    if pd.isna(value) or value == "":
        return Cell("", None)
    text = _FORMATS[column.format](value)
    return Cell(text, value if isinstance(value, str) else float(value))


def _number(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


_FORMATS: Mapping[Format, Callable[[Any], str]] = {
    "text": str,
    "id": lambda value: str(value)[:8],
    "number": _number,
    "count": lambda value: f"{int(value):,}",
    "percent": percentage,
    "bytes": size,
    "milliseconds": lambda value: f"{value * 1e3:.3g}",
}
