"""Methods and bases side by side, on copies of one model: the same data, kept counts and repair."""

from __future__ import annotations

import copy
import csv
import dataclasses
import io
import itertools
import json
import os
import statistics
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import nn

from .._version import versions
from ..backends.protocol import check_name
from ..config import METHODS, PruneConfig
from ..engine.layers import select_layers
from ..engine.run import compute_device
from ..report import data_frame, written
from .metrics import Evaluation
from .trial import Reference, Trial, check_repair, fitting, run_trial

if TYPE_CHECKING:
    import pandas as pd
    from rich.table import Table

__all__ = ["Comparison", "Reference", "Trial", "compare", "run_trial"]

WIDE = 200
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
    "kept: values that a file must store. bytes: of the whole file; rows that say same bytes keep "
    "what fits into min-weight's. change: of top-1, in points. KL (nats) and agreement: with the "
    "unpruned model. error: relative change of the weights. Several seeds: the mean, and of top-1 "
    "[smallest, largest]. level 0: no transform ran."
)


@dataclass(frozen=True)
class Comparison:
    """The trials of ``compare``; ``str()`` is a table.

    Attributes:
        unpruned: what the unpruned model is worth.
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
        """One mapping a trial, as ``Trial.row``; the unpruned model first."""
        return [trial.row() for trial in (self._unpruned(), *self.trials)]

    def to_dataframe(self) -> pd.DataFrame:
        """One row a trial, the unpruned model first, as a pandas DataFrame.

        Raises:
            ImportError: pandas is not installed.
        """
        return data_frame(self.rows())

    def to_csv(self, path: str | os.PathLike[str] | None = None) -> str:
        """One row a trial, the unpruned model first; written to ``path`` too, where given."""
        rows = self.rows()
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return written(text.getvalue(), path)

    def to_json(self, path: str | os.PathLike[str] | None = None) -> str:
        """Settings, notes and trials with their layers; written to ``path`` too, where given."""
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
        """A rich table: a section a sparsity, several seeds as one row."""
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
            # Those matched by bytes have a sparsity of their own, and belong to the one before.
            if config is not None and trials[0].matched == "kept" and config.sparsity != section:
                table.add_section()
                section = config.sparsity
            table.add_row(*map(escape, self._cells(trials)))
        return table

    def __str__(self) -> str:
        from rich.console import Console

        text = io.StringIO()
        Console(file=text, width=WIDE, color_system=None).print(self.to_table())
        return "\n".join(line.rstrip() for line in text.getvalue().splitlines())

    def _unpruned(self) -> Trial:
        return Trial(None, None, self.unpruned, "off", "", 0.0, 0.0, 0.0, None)

    def _groups(self) -> list[list[Trial]]:
        """Trials that differ by their seed alone, together."""

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
        found = [trial.evaluation for trial in trials]
        first = trials[0]
        reports = [trial.report for trial in trials if trial.report is not None]
        change = statistics.mean(each.top1 for each in found) - self.unpruned.top1
        return [
            f"{found[0].sparsity:.2%}",
            first.basis,
            f"{reports[0].kept:,}" if reports else "",
            f"{found[0].stored_bytes:,}",
            _spread([100 * each.top1 for each in found]),
            f"{100 * change:+.2f}" if reports else "",
            f"{_mean(each.loss for each in found):.4f}",
            f"{_mean(each.kl for each in found):.4f}",
            f"{100 * _mean(each.agreement for each in found):.2f}",
            f"{_mean(report.relative_error for report in reports):.4f}" if reports else "",
            "; ".join(_remarks(first, len(trials))),
        ]


def compare(
    model: nn.Module,
    loader: Iterable[Any],
    *,
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    wavelets: Sequence[str] = ("uhaar", "haar", "dct", "auto"),
    methods: Sequence[str] = METHODS,
    level: int | None = None,
    mode: str = "periodization",
    scope: str = "global",
    batchnorm: str = "match",
    calibration: Iterable[Any] | None = None,
    seeds: Sequence[int] = (0, 1, 2),
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
    timing: bool = False,
    progress: bool = False,
) -> Comparison:
    """Prune copies of a model by every method and basis, and evaluate each.

    At each sparsity all methods keep the same count of values, but for values that tie at the
    threshold, which are all kept. A basis with more coefficients than weights, or one that a file
    must store, needs more bytes for that: it is tried once more with as many values as fit into
    the bytes of min-weight.

    Args:
        model: the unpruned model; it is not changed.
        loader: what to evaluate on; see ``evaluate``. The same batches in the same order every
            time.
        sparsities: pruned fractions relative to the weights, each in [0, 1).
        wavelets: the bases for ``"dwt"``: what ``fast.prune`` takes as ``wavelet``.
        methods: any of ``"dwt"``, ``"min_weight"``, ``"random"``.
        level: levels of the transforms; None means the deepest that exists.
        mode: PyWavelets' boundary mode.
        scope: ``"global"`` ranks all layers together, ``"layer"`` each by itself.
        batchnorm: the repair of the copies: ``"match"`` (``match_batchnorm``), ``"update"``
            (``update_batchnorm``) or ``"off"``.
        calibration: batches to repair them on; None means those of ``loader``, without labels.
        seeds: which random masks to try; the table shows their mean and range.
        targets: names, globs or ``"re:..."`` patterns of the layers to prune.
        ignore: names, globs or patterns of layers to leave as they are.
        device: where to prune and run; None means where the model lives.
        backend: ``"auto"`` or a name from ``wavprune.backends.names()``.
        timing: measure the time of the forward passes of every trial.
        progress: show a progress bar on standard error.

    Returns:
        All trials; their pruned copies are let go.

    Raises:
        TypeError, ValueError: an argument is not allowed, before anything has run; or as
            ``fast.prune`` and ``evaluate``.
        ImportError: torchmetrics is not installed.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        >>> data = [(torch.randn(64, 1, 4, 4), torch.arange(64) % 16)]
        >>> result = compare(net, data, sparsities=[0.5], wavelets=["uhaar", "dct"], seeds=[0])
        >>> [(trial.basis, trial.report.kept) for trial in result]
        [('uhaar', 18), ('dct', 18), ('min_weight', 18), ('random', 18)]
    """
    check_repair(batchnorm)
    check_name(backend)
    shared: dict[str, Any] = {
        "level": level,
        "mode": mode,
        "scope": scope,
        "targets": targets,
        "ignore": ignore,
        "backend": backend,
    }
    settings = {
        "sparsities": _listed("sparsities", sparsities),
        "wavelets": _listed("wavelets", wavelets),
        "methods": _listed("methods", methods),
        "seeds": _listed("seeds", seeds),
    }
    plan = _plan(**settings, shared=shared)
    for _, configs in plan:
        select_layers(model, configs[0])
    place = compute_device(device)
    base = model if place is None else copy.deepcopy(model).to(place)
    reference = Reference.measure(base, loader, batchnorm, calibration, progress=progress)
    common: dict[str, Any] = {
        "batchnorm": batchnorm,
        "calibration": calibration,
        "reference": reference,
        "timing": timing,
    }
    unpruned = run_trial(base, loader, None, **common).evaluation
    trials: list[Trial] = []
    notes: list[str] = []
    with _bar(progress, sum(len(configs) for _, configs in plan)) as advance:
        for sparsity, configs in plan:
            done = []
            for config in configs:
                trial = run_trial(base, loader, config, **common)
                done.append(dataclasses.replace(trial, model=None))
                advance()
            trials += done
            budgets = [t.evaluation.stored_bytes for t in done if t.method == "min_weight"]
            for trial in done if budgets else ():
                if not _costly(trial):
                    continue
                assert trial.config is not None
                fitted = fitting(base, trial.config, budgets[0])
                if fitted is None:
                    notes.append(
                        f"At {sparsity:.2%}, the masks of {trial.basis} alone are larger than "
                        "min-weight's file."
                    )
                    continue
                trial = run_trial(base, loader, fitted, **common)
                trials.append(dataclasses.replace(trial, model=None, matched="bytes"))
    stated = {
        **{name: list(values) for name, values in settings.items()},
        **shared,
        "batchnorm": batchnorm,
        "device": None if device is None else str(device),
        "versions": dict(versions()),
    }
    return Comparison(unpruned, tuple(trials), stated, tuple(notes))


def _plan(
    sparsities: Sequence[float],
    wavelets: Sequence[str],
    methods: Sequence[str],
    seeds: Sequence[int],
    shared: dict[str, Any],
) -> list[tuple[float, list[PruneConfig]]]:
    """Every setting to try, by sparsity, all of them checked."""
    plan = []
    for sparsity in sorted(set(sparsities)):
        configs = []
        for method in methods:
            variants: list[dict[str, Any]] = [{}]
            if method == "dwt":
                variants = [{"wavelet": wavelet} for wavelet in wavelets]
            elif method == "random":
                variants = [{"seed": seed} for seed in seeds]
            configs += [
                PruneConfig(method=method, sparsity=sparsity, **variant, **shared)
                for variant in variants
            ]
        plan.append((sparsity, configs))
    return plan


def _listed(name: str, values: object) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list, not {values!r}")
    result = tuple(values)
    if not result:
        raise ValueError(f"{name} is empty; it must hold at least one")
    return result


def _costly(trial: Trial) -> bool:
    """Whether its basis needs more bytes than min-weight for the same kept count."""
    return any(
        layer.coefficients > layer.numel or layer.wavelet == "klt" for layer in trial.report or ()
    )


def _remarks(trial: Trial, trials: int) -> Iterator[str]:
    if trials > 1:
        yield f"{trials} seeds"
    if trial.matched == "bytes":
        yield "same bytes"
    layers = [layer for layer in trial.report or () if layer.method == "dwt"]
    flat = [layer for layer in layers if layer.level_used == 0 and layer.wavelet != "identity"]
    if flat:
        yield f"level 0 in {len(flat)} of {len(layers)} layers"


def _mean(values: Iterable[float | None]) -> float:
    return statistics.mean(value for value in values if value is not None)


def _spread(values: Sequence[float]) -> str:
    mean = f"{statistics.mean(values):.2f}"
    return mean if len(values) == 1 else f"{mean} [{min(values):.2f}, {max(values):.2f}]"


@contextmanager
def _bar(shown: bool, trials: int) -> Iterator[Callable[[], object]]:
    if not shown:
        yield lambda: None
        return
    from tqdm import tqdm

    with tqdm(total=trials, unit="trial", desc="compare") as bar:
        yield bar.update
