"""Tables of runs and layers that a reader can sort."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import pandas as pd

from . import series
from .series import UNPRUNED
from .summary import percentage

# A browser shows and sorts so many rows at once; an export has all.
ROWS = 2000


class Cell(NamedTuple):
    """One cell of a table.

    Attributes:
        text: what it shows.
        key: what it is sorted by: a number, or text; None comes last.
    """

    text: str
    key: float | str | None


class Column(NamedTuple):
    """One column of a table.

    Attributes:
        title: its heading.
        name: the results' column that it shows.
        show: a value -> its text.
        about: what the heading means.
    """

    title: str
    name: str
    show: Callable[[Any], str]
    about: str


@dataclass(frozen=True)
class Table:
    """A table that its reader can sort.

    Attributes:
        caption: what it shows.
        columns: headings.
        rows: cells, row by row.
        note: what was left out; empty where nothing was.
    """

    caption: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]
    note: str = ""


def runs_table(runs: pd.DataFrame) -> Table:
    """The finished runs; a setting that all share has no column."""
    shown = runs.assign(basis=series.bases(runs).replace(UNPRUNED, "unpruned"))
    pruned = runs[runs["method"] != UNPRUNED]
    columns = [c for c in _RUNS if c.name not in _SHARED or pruned[c.name].nunique() > 1]
    note = ""
    if len(runs) > ROWS:
        note = f"The last {ROWS:,} of {len(runs):,} runs; an export has all."
    return _table("Every finished run", columns, shown.tail(ROWS), note)


def layers_table(layers: pd.DataFrame, runs: pd.DataFrame) -> Table:
    """The layers of some runs, which ``runs`` names by ``guid`` and ``label``."""
    names = dict(zip(runs["guid"], runs["label"], strict=True))
    return _table(
        "Layers of the pictured runs", _LAYERS, layers.assign(label=layers["guid"].map(names))
    )


def _table(caption: str, columns: Iterable[Column], frame: pd.DataFrame, note: str = "") -> Table:
    """The columns that have a value somewhere."""
    used = tuple(
        column
        for column in columns
        if (frame[column.name].notna() & (frame[column.name] != "")).any()
    )
    rows = tuple(
        tuple(_cell(row[column.name], column) for column in used) for _, row in frame.iterrows()
    )
    return Table(caption, used, rows, note)


def _cell(value: Any, column: Column) -> Cell:
    if pd.isna(value) or value == "":
        return Cell("", None)
    return Cell(column.show(value), value if isinstance(value, str) else float(value))


def size(value: float) -> str:
    """Bytes, in the unit that suits.

    Example:
        >>> size(48_178), size(312)
        ('48.2 kB', '312 B')
    """
    for unit in ("B", "kB", "MB"):
        if value < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"


def _plain(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _count(value: float) -> str:
    return f"{int(value):,}"


def _milliseconds(value: float) -> str:
    return f"{value * 1e3:.3g}"


_RUNS = (
    Column("run", "guid", lambda guid: str(guid)[:8], "The first characters of its id"),
    Column("model", "model", str, ""),
    Column("data", "data", str, ""),
    Column("method", "basis", str, "A wavelet method by its basis"),
    Column("mode", "mode", str, "How kernels are extended past their border"),
    Column("level", "level", _plain, "Asked for; empty: the deepest"),
    Column("matched", "matched", str, "What it shares with the run it is compared with"),
    Column("scope", "scope", str, "What is ranked together"),
    Column("batch norm", "batchnorm", str, "How it was repaired"),
    Column("targets", "targets", str, ""),
    Column("ignore", "ignore", str, ""),
    Column("seed", "seed", _plain, "Of random pruning"),
    Column("percentile", "percentile", _plain, "Asked for"),
    Column("sparsity", "sparsity", percentage, "Pruned share of the weights, reached"),
    Column("top-1", "top1", percentage, "Accuracy"),
    Column("top-5", "top5", percentage, "Accuracy of the five best classes"),
    Column("loss", "loss", _plain, "Mean cross entropy, nats"),
    Column("F1", "f1_macro", _plain, "Mean over the classes"),
    Column("precision", "precision_macro", _plain, "Mean over the classes"),
    Column("recall", "recall_macro", _plain, "Mean over the classes"),
    Column("agreement", "agreement", percentage, "Same class as the unpruned network's"),
    Column("KL", "kl", _plain, "Mean divergence from the unpruned network, nats"),
    Column("size", "stored_bytes", size, "What a file must store"),
    Column("weight sp.", "weight_sparsity", percentage, "Exact zeros in the weights"),
    Column("error", "relative_error", _plain, "Relative change of the weights"),
    Column("latency ms", "latency_median", _milliseconds, "Median, a batch"),
    Column("p95 ms", "latency_p95", _milliseconds, "95th percentile, a batch"),
    Column("prune ms", "prune_seconds", _milliseconds, "Time of pruning"),
    Column("evaluate ms", "evaluate_seconds", _milliseconds, "Time of the evaluation"),
)

# Settings that are a column only where they differ.
_SHARED = ("data", "mode", "matched", "scope", "batchnorm", "targets", "ignore")

_LAYERS = (
    Column("method", "label", str, "A wavelet method by its basis"),
    Column("layer", "name", str, ""),
    Column("shape", "shape", str, ""),
    Column("basis", "wavelet", str, "That ran in this layer"),
    Column("level", "level_used", _plain, "That ran; 0: no transform"),
    Column("threshold", "threshold", _plain, "Coefficients below it were pruned"),
    Column("coefficients", "coefficients", _count, "Without those that are always 0"),
    Column("kept", "kept", _count, "Coefficients that a file must store"),
    Column("sparsity", "sparsity", percentage, "1 - kept / weights"),
    Column("weight sp.", "weight_sparsity", percentage, "Exact zeros in the weight"),
    Column("error", "relative_error", _plain, "Relative change of the weight"),
)
