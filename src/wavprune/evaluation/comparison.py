"""The trials of a comparison: a table, rows and files."""

from __future__ import annotations

import csv
import io
import itertools
import json
import os
import statistics
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..common.tables import as_html, as_text
from ..common.text import csv_cell
from ..report import data_frame, written
from .metrics import Evaluation
from .trial import Trial

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

# Width of the table that str() returns, in characters.
TABLE_WIDTH = 200
COLUMNS = (
    "sparsity",
    "basis",
    "kept",
    "bytes",
    "top-1 %",
    "change",
    "loss",
    "KL",
    "agreement %",
    "error",
    "note",
)
CAPTION = (
    "kept: values that a file must store. bytes: of the whole file; rows with the note 'same "
    "bytes' keep what fits into min-weight's. change: of top-1, in points. KL (nats) and "
    "agreement: with the unpruned model. error: relative change of the weights. Several seeds: the "
    "mean, and for top-1 [smallest, largest]. level 0: no transform ran."
)


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

    def to_table(self) -> Table:
        """A rich table: one section per sparsity, several seeds in one row."""
        from rich.markup import escape
        from rich.table import Table

        table = Table(title=self._title(), title_justify="left", caption_justify="left")
        table.caption = escape(" ".join((CAPTION, *self.notes)))
        for column in COLUMNS:
            justify: Literal["left", "right"] = "left" if column in ("basis", "note") else "right"
            table.add_column(column, justify=justify, no_wrap=column != "note")
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

    def _cells(self, trials: Sequence[Trial]) -> list[str]:
        """One row of the table."""
        first = trials[0]
        evaluations = [trial.evaluation for trial in trials]
        reports = [trial.report for trial in trials if trial.report is not None]
        top1 = [evaluation.top1 for evaluation in evaluations]
        change = statistics.mean(top1) - self.unpruned.top1
        return [
            f"{first.evaluation.sparsity:.2%}",
            first.basis,
            f"{reports[0].kept:,}" if reports else "",
            f"{first.evaluation.stored_bytes:,}",
            _mean_and_range([100 * value for value in top1]),
            f"{100 * change:+.2f}" if reports else "",
            f"{_mean(evaluation.loss for evaluation in evaluations):.4f}",
            f"{_mean(evaluation.kl for evaluation in evaluations):.4f}",
            f"{100 * _mean(evaluation.agreement for evaluation in evaluations):.2f}",
            f"{_mean(report.relative_error for report in reports):.4f}" if reports else "",
            "; ".join(_notes(first, len(trials))),
        ]


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
    return statistics.mean(value for value in values if value is not None)


def _mean_and_range(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.2f}, {max(values):.2f}]"
