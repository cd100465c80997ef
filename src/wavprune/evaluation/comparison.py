"""The trials of a comparison: a table, rows and files."""

from __future__ import annotations

import csv
import io
import itertools
import json
import math
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..common.tables import as_html, as_text
from ..common.text import csv_cell
from ..report import data_frame, written
from .metrics import Evaluation
from .spread import is_tie, joint_error
from .trial import Trial
from .unlabelled import AGREEMENT

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

# Width of the table that str() returns, in characters.
TABLE_WIDTH = 200
LOGITS = "KL (nats) and agreement: with the unpruned model. "
CAPTION = (
    "kept: values that a file must store. bytes: of the whole file; rows with the note 'same "
    "bytes' keep what fits into min-weight's. change: {change}; ~ where it is within two standard "
    "errors, which chance alone may make. {logits}error: relative change of the weights. Several "
    "seeds: the mean, and [smallest, largest] of {metric}. level 0: no transform ran."
)
# Loads nothing from anywhere.
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"><title>wavprune compare</title>
<meta name="viewport" content="width=device-width, initial-scale=1">
<style>
:root {{ color-scheme: light dark; font: 14px/1.5 system-ui, sans-serif }}
body {{ margin: 1.5rem; overflow-x: auto }}
table {{ border-collapse: collapse }}
caption {{ padding: .5rem 0; font-weight: bold }}
th, td {{ padding: .2rem .6rem; white-space: nowrap }}
thead, tbody {{ border-bottom: 1px solid #8888 }}
p {{ max-width: 60rem }}
</style></head>
<body>{table}</body></html>
"""


@dataclass(frozen=True, repr=False)
class Comparison:
    """The trials of ``compare``; printed, and in a notebook, they are a table.

    Attributes:
        unpruned: the measures of the unpruned model.
        trials: in the order in which they ran, by sparsity; those matched by bytes follow the
            others of their sparsity.
        settings: what was asked for, and versions, ready for JSON.
        notes: what could not be tried, and why.
    """

    unpruned: Evaluation
    trials: tuple[Trial, ...]
    settings: dict[str, Any]
    notes: tuple[str, ...] = ()

    def __iter__(self) -> Iterator[Trial]:
        return iter(self.trials)

    def __len__(self) -> int:
        return len(self.trials)

    def rows(self) -> list[dict[str, Any]]:
        """One mapping per trial, as ``Trial.row``; the unpruned model first."""
        return [trial.row() for trial in (self._unpruned(), *self.trials)]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per trial, the unpruned model first, as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        return data_frame(self.rows())

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One row per trial, the unpruned model first; written to ``path`` too, if given."""
        rows = self.rows()
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: csv_cell(cell) for name, cell in row.items()} for row in rows)
        return written(text.getvalue(), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Settings, notes and trials with their layers; written to ``path`` too, if given."""
        trials = [
            {
                **trial.row(),
                "confusion": trial.evaluation.to_dict()["confusion"],
                "layers": json.loads(trial.report.to_json())["layers"] if trial.report else [],
            }
            for trial in (self._unpruned(), *self.trials)
        ]
        content = {"settings": self.settings, "notes": self.notes, "trials": trials}
        return written(json.dumps(content, indent=2, allow_nan=False) + "\n", path)

    def to_html(self, path: str | os.PathLike[str] | None = None) -> str:
        """A page of its own with the table; written to ``path`` too, if given."""
        return written(PAGE.format(table=as_html(self.to_table())), path)

    def to_table(self) -> Table:
        """A rich table: one section per sparsity, several seeds in one row."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=self._title(), title_justify="left", caption_justify="left")
        table.caption = escape(" ".join((self._caption(), *self.notes)))
        for column, heading in self._columns().items():
            justify: Literal["left", "right"] = "left" if column in ("basis", "note") else "right"
            table.add_column(escape(heading), justify=justify, no_wrap=column != "note")
        table.add_row(*self._cells([self._unpruned()]))
        section: float | None = None
        for trials in self._groups():
            config = trials[0].config
            # Trials matched by bytes have a sparsity of their own; they stay in the section before.
            if config is not None and trials[0].matched == "kept" and config.sparsity != section:
                table.add_section()
                section = config.sparsity
            table.add_row(*map(escape, self._cells(trials)))
        return table

    def __repr__(self) -> str:
        return as_text(self.to_table(), TABLE_WIDTH)

    def _repr_html_(self) -> str:
        return as_html(self.to_table())

    def _unpruned(self) -> Trial:
        return Trial(None, None, self.unpruned, "off", "", 0.0, 0.0, 0.0, None)

    def _groups(self) -> list[list[Trial]]:
        """The trials, grouped where they differ in nothing but their seed."""

        def key(trial: Trial) -> tuple[str, str, float | None]:
            return trial.basis, trial.matched, trial.config.sparsity if trial.config else None

        return [list(group) for _, group in itertools.groupby(self.trials, key)]

    def _title(self) -> str:
        settings = self.settings
        level = "deepest level" if settings["level"] is None else f"level {settings['level']}"
        return (
            f"{self.unpruned.samples:,} samples; scope {settings['scope']}; {level}; mode "
            f"{settings['mode']}; batch norm: {settings['batchnorm']}"
        )

    def _columns(self) -> dict[str, str]:
        """The columns of the table with their headings: a metric may be named as any of them."""
        unpruned = self.unpruned
        columns = ["sparsity", "basis", "kept", "bytes", "metric", "change"]
        columns += ["loss"] if unpruned.loss is not None else []
        columns += ["KL"] if unpruned.kl is not None else []
        columns += ["agreement %"] if unpruned.kl is not None and not self._by_agreement else []
        headings = {column: column for column in (*columns, "error", "note")}
        headings["metric"] = "top-1 %" if unpruned.top1 is not None else unpruned.metric
        headings["metric"] += " %" if self._by_agreement else ""
        return headings

    @property
    def _by_agreement(self) -> bool:
        """Whether the data had no labels, and the agreement is the metric."""
        return not self.settings["labels"] and self.unpruned.metric == AGREEMENT

    def _caption(self) -> str:
        if self.unpruned.top1 is not None:
            metric, change = "top-1", "of top-1, in points"
        elif self._by_agreement:
            metric, change = AGREEMENT, "of agreement, in points"
        else:
            metric = self.unpruned.metric
            better = "higher" if self.unpruned.higher_is_better else "lower"
            change = f"of {metric}, of which {better} is better"
        logits = "" if self.unpruned.kl is None else LOGITS
        return CAPTION.format(metric=metric, change=change, logits=logits)

    def _cells(self, trials: Sequence[Trial]) -> list[str]:
        """One row of the table."""
        first = trials[0]
        evaluations = [trial.evaluation for trial in trials]
        reports = [trial.report for trial in trials if trial.report is not None]
        values = [evaluation.value for evaluation in evaluations]
        change = statistics.mean(values) - self.unpruned.value
        error = joint_error(values, [evaluation.change_spread for evaluation in evaluations])
        tie = " ~" if is_tie(change, error) else ""
        is_share = self.unpruned.top1 is not None or self._by_agreement
        scale, digits = (100, 2) if is_share else (1, 4)
        texts = {
            "sparsity": f"{first.evaluation.sparsity:.2%}",
            "basis": first.basis,
            "kept": f"{reports[0].kept:,}" if reports else "",
            "bytes": f"{first.evaluation.stored_bytes:,}",
            "metric": _mean_and_range([scale * value for value in values], digits),
            "change": f"{scale * change:+.{digits}f}{tie}" if reports else "",
            "loss": f"{_mean(evaluation.loss for evaluation in evaluations):.4f}",
            "KL": f"{_mean(evaluation.kl for evaluation in evaluations):.4f}",
            "agreement %": f"{100 * _mean(evaluation.agreement for evaluation in evaluations):.2f}",
            "error": f"{_mean(report.relative_error for report in reports):.4f}" if reports else "",
            "note": "; ".join(_notes(first, len(trials))),
        }
        return [texts[column] for column in self._columns()]


def _notes(trial: Trial, seeds: int) -> Iterator[str]:
    if seeds > 1:
        yield f"{seeds} seeds"
    if trial.matched == "bytes":
        yield "same bytes"
    layers = [layer for layer in trial.report or () if layer.method == "dwt"]
    untransformed = [
        layer for layer in layers if layer.level_used == 0 and layer.wavelet != "identity"
    ]
    if untransformed:
        yield f"level 0 in {len(untransformed)} of {len(layers)} layers"


def _mean(values: Iterable[float | None]) -> float:
    known = [value for value in values if value is not None]
    return statistics.mean(known) if known else math.nan


def _mean_and_range(values: Sequence[float], digits: int) -> str:
    mean = f"{statistics.mean(values):.{digits}f}"
    if len(values) == 1:
        return mean
    return f"{mean} [{min(values):.{digits}f}, {max(values):.{digits}f}]"
