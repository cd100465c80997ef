"""The columns of a results file, declared once.

The database, data frames, exports, the report page and ``docs/results.md`` all follow from the
declarations here; ``python -m wavprune.sweep.schema > docs/results.md`` writes the last one.

To add a column, declare it with the next version in ``since``. Files that were written before
have no value in it.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

from ..config import PruneConfig
from ..evaluation.metrics import Evaluation
from ..evaluation.trial import Trial
from ..report import LayerStats, PruneReport
from .traits import reads_wavelet, uses_seed

Kind = type[str] | type[int] | type[float] | type[bool]
Format = Literal["text", "id", "number", "count", "percent", "bytes", "milliseconds"]
Role = Literal["", "panel", "variant"]

_KINDS: dict[str, Kind] = {"int": int, "float": float, "bool": bool}


@dataclass(frozen=True, slots=True)
class Column:
    """One column.

    Attributes:
        name: its name everywhere.
        kind: the type of its values.
        description: what it holds.
        required: True where every row has a value.
        value: computes it from the object that the columns of its group come from; None takes the
            attribute of the same name.
        heading: its heading on the report page; empty where the page does not show it.
        format: how the page shows a value.
        role: what a setting does to the pictures: runs that differ in a ``"panel"`` setting are
            not compared with each other, those that differ in a ``"variant"`` are separate lines.
        since: the version of the file format that introduced it.
    """

    name: str
    kind: Kind
    description: str
    required: bool = False
    value: Callable[[Any], Any] | None = None
    heading: str = ""
    format: Format = "text"
    role: Role = ""
    since: int = 1

    @property
    def is_number(self) -> bool:
        """Whether the page aligns its values as numbers."""
        return self.kind in (int, float)


def values(columns: Iterable[Column], source: object) -> dict[str, Any]:
    """The values of columns by name.

    Args:
        columns: those of one group.
        source: the object that this group describes.

    Example:
        >>> values((Column("real", float, "The real part"),), 1 + 2j)
        {'real': 1.0}
    """
    return {
        column.name: column.value(source) if column.value else getattr(source, column.name)
        for column in columns
    }


def _attribute(
    owner: type, name: str, heading: str = "", format: Format = "number", since: int = 1
) -> Column:
    """A column for a documented field or property, which states its type and meaning itself."""
    member = inspect.getattr_static(owner, name, None)
    if isinstance(member, property):
        annotation = str(inspect.get_annotations(member.fget)["return"])  # type: ignore[arg-type]  # it has a getter
        description = (inspect.getdoc(member) or "").partition("\n\n")[0]
    else:
        annotation = str(inspect.get_annotations(owner)[name])
        description = _documented_attributes(owner).get(name, "")
    kind = _KINDS.get(annotation.removesuffix(" | None"), str)
    description = " ".join(description.split()).rstrip(".")
    description = description[:1].upper() + description[1:]
    return Column(name, kind, description, heading=heading, format=format, since=since)


@cache
def _documented_attributes(owner: type) -> dict[str, str]:
    """The ``Attributes:`` section of a class docstring."""
    section = (inspect.getdoc(owner) or "").partition("Attributes:\n")[2].partition("\n\n")[0]
    return dict(re.findall(r"^ {4}(\w+): (.*(?:\n {8}.*)*)", section, re.MULTILINE))


def _of_config(
    name: str, if_read: Callable[[PruneConfig], bool] | None = None
) -> Callable[[Any], Any]:
    """The value of a pruning setting; None where the method does not read it."""

    def value(run: Any) -> Any:
        if run.config is None or (if_read is not None and not if_read(run.config)):
            return None
        return getattr(run.config, name)

    return value


def _patterns(name: str) -> Callable[[Any], Any]:
    def value(run: Any) -> Any:
        return None if run.config is None else " ".join(getattr(run.config, name) or ())

    return value


def _of_storage(name: str) -> Callable[[Any], Any]:
    def value(run: Any) -> Any:
        return None if run.storage is None else getattr(run.storage, name)

    return value


def _sparsity_requested(run: Any) -> Any:
    # A run that is matched to another's kept count has no sparsity of its own.
    return None if run.config is None or run.matched == "kept" else run.config.sparsity


# What identifies a run and how it ended; the worker states these.
IDENTITY = (
    Column(
        "guid",
        str,
        "Hash of everything the result depends on",
        True,
        heading="run",
        format="id",
    ),
    Column("sweep", str, "Name of the sweep", True),
    Column("started", str, "Start time, UTC", True),
    Column("finished", str, "End time, UTC", True),
    Column("status", str, "`ok` or `failed`", True),
    Column("error", str, "Why it failed"),
    Column("traceback", str, "Where it failed"),
)

# What was asked for, from a ``Run``; empty where the method does not read a setting.
SETTINGS = (
    Column("model", str, "Model", True, lambda run: run.model.label, "model"),
    Column(
        "data",
        str,
        "Data that accuracy was measured on",
        True,
        lambda run: run.data.label,
        "data",
        role="panel",
    ),
    Column(
        "method",
        str,
        "Pruning method; `none` is the unpruned model",
        True,
        lambda run: run.config.method if run.config else "none",
        "method",
    ),
    Column(
        "wavelet",
        str,
        "Basis that was asked for",
        value=_of_config("wavelet", reads_wavelet),
        role="variant",
    ),
    Column(
        "mode",
        str,
        "Boundary mode",
        value=_of_config("mode", reads_wavelet),
        heading="mode",
        role="variant",
    ),
    Column(
        "level",
        int,
        "Levels that were asked for; empty means the deepest",
        value=_of_config("level", reads_wavelet),
        heading="level",
        format="number",
        role="variant",
    ),
    Column(
        "force_level",
        bool,
        "Whether a level too deep for the kernel was forced",
        value=_of_config("force_level", reads_wavelet),
        role="variant",
    ),
    Column("sparsity_requested", float, "Sparsity that was asked for", value=_sparsity_requested),
    Column(
        "percentile",
        float,
        "Percentile that was asked for",
        value=_of_config("percentile"),
        heading="percentile",
        format="number",
    ),
    Column(
        "scope",
        str,
        "Whether layers are ranked separately or together",
        value=_of_config("scope"),
        heading="scope",
        role="panel",
    ),
    Column(
        "seed",
        int,
        "Seed of a method that draws random numbers",
        value=_of_config("seed", uses_seed),
        heading="seed",
        format="number",
    ),
    Column(
        "targets",
        str,
        "Layers that were selected",
        value=_patterns("targets"),
        heading="targets",
        role="panel",
    ),
    Column(
        "ignore",
        str,
        "Layers that were left out",
        value=_patterns("ignore"),
        heading="ignore",
        role="panel",
    ),
    Column("batchnorm", str, "Batch-norm repair", True, heading="batch norm", role="panel"),
    Column(
        "matched",
        str,
        "What the run has in common with the run it was matched to: `kept` count or `bytes`",
        True,
        heading="matched",
        role="variant",
    ),
    Column(
        "calibrated",
        str,
        "Level of calibrated pruning",
        value=lambda run: run.calibrated or None,
        heading="calibrated",
        role="variant",
        since=2,
    ),
    Column(
        "epochs",
        int,
        "Passes over the training data after pruning",
        value=lambda run: run.epochs or None,
        heading="epochs",
        format="number",
        role="panel",
        since=3,
    ),
    *(
        Column(
            name,
            kind,
            description,
            value=_of_storage(name),
            heading=heading,
            format="number",
            role="panel",
            since=3,
        )
        for name, kind, description, heading in (
            ("bits", int, "Bits of each stored value", "bits"),
            ("target_kl", float, "Divergence that storing was to cost, in nats", "target KL"),
            ("target_bits_per_weight", float, "Bits for each weight that were asked for", "rate"),
        )
    ),
)

# What was measured, from an ``Evaluation``.
EVALUATION = tuple(
    _attribute(Evaluation, *shown)
    for shown in (
        ("samples",),
        ("metric", "", "text", 3),
        ("value", "value", "number", 3),
        ("higher_is_better", "", "number", 3),
        ("spread", "± (1 s.e.)", "number", 3),
        ("change_spread", "", "number", 3),
        ("classes",),
        ("sparsity", "sparsity", "percent"),
        ("top1", "top-1", "percent"),
        ("top5", "top-5", "percent"),
        ("loss", "loss"),
        ("f1_macro", "F1"),
        ("precision_macro", "precision"),
        ("recall_macro", "recall"),
        ("f1_weighted",),
        ("precision_weighted",),
        ("recall_weighted",),
        ("agreement", "agreement", "percent"),
        ("kl", "KL"),
        ("parameters",),
        ("stored_bytes", "size", "bytes"),
        ("weight_sparsity", "weight sp.", "percent"),
        ("latency_median", "latency ms", "milliseconds"),
        ("latency_p95", "p95 ms", "milliseconds"),
        ("throughput",),
    )
)

# Totals over the pruned layers, from a ``PruneReport``.
TOTALS = tuple(
    _attribute(PruneReport, *shown)
    for shown in (("numel",), ("kept",), ("weight_zeros",), ("relative_error", "error"))
)

# Where the time of a run went, from a ``Trial``.
TIMES = tuple(
    _attribute(Trial, *shown)
    for shown in (
        ("prune_seconds", "prune ms", "milliseconds"),
        ("repair_seconds",),
        ("finish_seconds", "", "number", 3),
        ("evaluate_seconds", "evaluate ms", "milliseconds"),
    )
)

# The file that a run stored; the worker states it.
STORED = (
    Column(
        "file_bytes",
        int,
        "Bytes of the compressed file that was written and evaluated; empty where none was",
        heading="file",
        format="bytes",
        since=3,
    ),
)

# What it takes to repeat a run; the worker states these.
SNAPSHOTS = (
    Column("settings", str, "All settings, as JSON", True),
    Column("versions", str, "Versions that the result depends on, as JSON", True),
)

RUNS = (*IDENTITY, *SETTINGS, *EVALUATION, *TOTALS, *STORED, *TIMES, *SNAPSHOTS)

# One row per layer of a pruned run, from its ``LayerStats``.
LAYERS = (
    Column("guid", str, "Run that the layer belongs to", True, heading="run"),
    *(
        _attribute(LayerStats, *shown)
        for shown in (
            ("name", "layer", "text"),
            ("shape", "shape", "text"),
            ("method",),
            ("wavelet", "basis", "text"),
            ("mode",),
            ("level_requested",),
            ("level_used", "level"),
            ("backend",),
            ("device",),
            ("threshold", "threshold"),
            ("coefficients", "coefficients", "count"),
            ("kept", "kept", "count"),
            ("sparsity", "sparsity", "percent"),
            ("weight_zeros",),
            ("weight_sparsity", "weight sp.", "percent"),
            ("relative_error", "error"),
            ("seconds",),
            ("runner_up",),
            ("runner_up_error",),
        )
    ),
)

VERSION = max(column.since for column in (*RUNS, *LAYERS))


def markdown() -> str:
    """The reference of all columns, as a Markdown page."""
    groups = (
        ("Runs: identity and outcome", IDENTITY),
        ("Runs: settings, empty where the method does not read them", SETTINGS),
        ("Runs: measurements", EVALUATION),
        ("Runs: totals over the pruned layers", TOTALS),
        ("Runs: the stored file", STORED),
        ("Runs: times", TIMES),
        ("Runs: everything needed to repeat them", SNAPSHOTS),
        ("Layers: one row per layer of a pruned run", LAYERS),
    )
    lines = [
        "# Columns of a results file",
        "",
        "A sweep writes one SQLite file with the tables `runs` and `layers`; `wavprune export`",
        "writes either as CSV, JSON or Parquet with the same columns. The run whose method is",
        f"`none` is the unpruned model. This is version {VERSION} of the format; every older file",
        "can be read.",
        "",
        "Written by `python -m wavprune.sweep.schema > docs/results.md`.",
    ]
    for title, columns in groups:
        lines += ["", f"## {title}", "", "| column | type | meaning |", "|---|---|---|"]
        lines += [
            f"| `{column.name}` | {column.kind.__name__} | {_cell(column.description)} |"
            for column in columns
        ]
    return "\n".join(lines) + "\n"


def _cell(text: str) -> str:
    return text.replace("``", "`").replace("|", "\\|")


if __name__ == "__main__":
    print(markdown(), end="")
