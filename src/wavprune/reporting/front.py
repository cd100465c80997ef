"""The fewest bytes for each value: the Pareto front of a network's runs, and what chance leaves."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ..evaluation.spread import ERRORS, is_tie, joint_error
from . import series
from .scale import Scale, percent, size
from .series import BASELINES

# Sizes that differ by less than this part are the same.
SAME_SIZE = 0.02
# How many other methods a headline names.
MOST_RIVALS = 4


@dataclass(frozen=True)
class Point:
    """Runs that differ only in their seed or training: their means.

    Attributes:
        label: what they are: basis, and the settings that vary.
        basis: the label of the basis or method.
        setting: what tells their panel from the others; empty where there is one.
        details: how they were calibrated, trained and stored, where the label does not say it.
        sparsity: what was pruned.
        bytes: of the stored file; computed where no file was written.
        measured: whether files were written.
        value: of the metric.
        spread: its standard error; NaN if it is not known.
        change: from the unpruned network's; NaN without one.
        change_spread: its standard error.
        runs: their ids.
    """

    label: str
    basis: str
    setting: str
    details: str
    sparsity: float
    bytes: float
    measured: bool
    value: float
    spread: float
    change: float
    change_spread: float
    runs: tuple[str, ...]

    @property
    def name(self) -> str:
        """Label, sparsity, and how it was made."""
        parts = (self.label, percent(self.sparsity), self.setting, self.details)
        return ", ".join(part for part in parts if part)

    def error_to(self, other: Point) -> float:
        """A bound of the standard error of the difference of two points.

        As on different samples, or through the unpruned network on the same ones: the error of a
        sum is at most the sum of the errors.
        """
        bounds = (math.hypot(self.spread, other.spread), self.change_spread + other.change_spread)
        return min((bound for bound in bounds if not math.isnan(bound)), default=math.nan)


@dataclass(frozen=True)
class FrontRow:
    """A point that no other beats in both bytes and value.

    Attributes:
        point: the point.
        tie: the smaller point that is as good as far as the samples show; None where none is.
    """

    point: Point
    tie: Point | None


@dataclass(frozen=True)
class Front:
    """The front of a network.

    Attributes:
        points: all of them, by size.
        rows: those on the front, by size.
        dense_bytes: of the unpruned network; NaN if it is not known.
        dense: the value of the unpruned network; NaN if it is not known.
        chosen: the smallest point within the tolerance; None where there is none.
    """

    points: tuple[Point, ...]
    rows: tuple[FrontRow, ...]
    dense_bytes: float
    dense: float
    chosen: Point | None


def front(unpruned: pd.DataFrame, pruned: pd.DataFrame, scale: Scale) -> Front:
    """The front of a network's runs.

    Args:
        unpruned: the runs of the unpruned network.
        pruned: all others.
        scale: of their metric.
    """
    dense_values = unpruned.drop_duplicates("model").set_index("model")["value"]
    dense = float(unpruned["value"].mean()) if len(unpruned) else math.nan
    dense_bytes = float(unpruned["bytes"].iloc[0]) if len(unpruned) else math.nan
    points = _points(pruned, dense_values)
    by_size = sorted(points, key=lambda point: (point.bytes, -scale.sign * point.value))
    rows: list[FrontRow] = []
    best, solid = -math.inf, None
    for point in by_size:
        if scale.sign * point.value <= best:
            continue
        best = scale.sign * point.value
        tied = solid is not None and is_tie(point.value - solid.value, point.error_to(solid))
        rows.append(FrontRow(point, solid if tied else None))
        solid = solid if tied else point
    return Front(
        tuple(by_size), tuple(rows), dense_bytes, dense, smallest_good(by_size, dense, scale)
    )


def smallest_good(points: Iterable[Point], dense: float, scale: Scale) -> Point | None:
    """The first point that is within the tolerance of the unpruned network; None if none is.

    Args:
        points: by size.
        dense: the value of the unpruned network.
        scale: of the metric.
    """
    allowed = scale.tolerance(dense) + 1e-9
    return next((point for point in points if scale.sign * point.change >= -allowed), None)


def headline(found: Front, scale: Scale) -> tuple[str, str]:
    """The smallest network that is as good as the unpruned one, in a line, and what to know of it.

    Example:
        >>> point = Point("uhaar", "uhaar", "", "8 bits", 0.9, 28_900, True, 0.98, 0.003, -0.005,
        ...               0.002, ("a",))
        >>> headline(Front((point,), (), 314_000, 0.985, point), Scale())[0]
        '28.9 kB, 10.9 times smaller: uhaar, 90%, 8 bits, -0.5 points'
    """
    if math.isnan(found.dense):
        return "", "The unpruned network has no finished run to compare with."
    within = f"{scale.difference(scale.tolerance(found.dense))} of the unpruned network's "
    within += f"{scale.text(found.dense)}"
    point = found.chosen
    if point is None:
        return f"No run is within {within}.", ""
    sizes = f"{size(point.bytes)}{_times(found.dense_bytes / point.bytes)}"
    line = f"{sizes}: {point.name}, {scale.change(point.change)}"
    return line, " ".join((_reason(point, within, scale), *_rivals(found, point, scale)))


def _times(smaller: float) -> str:
    """How much smaller or larger than the unpruned network's file; empty if it is not known."""
    if math.isnan(smaller):
        return ""
    times = f"{max(smaller, 1 / smaller):.3g}"
    if times == "1":
        return ", no smaller"
    return f", {times} times {'smaller' if smaller > 1 else 'larger'}"


def _reason(point: Point, within: str, scale: Scale) -> str:
    text = f"The smallest within {within}"
    text += "" if point.measured else ", by computed sizes: sweep over bits to measure files"
    if math.isnan(point.change_spread):
        return f"{text}."
    error = scale.difference(ERRORS * point.change_spread)
    if is_tie(point.change, point.change_spread):
        return f"{text}; up to {error} may be chance, so it is as good."
    return f"{text}, give or take {error}."


def _rivals(found: Front, chosen: Point, scale: Scale) -> list[str]:
    """What other methods need to be as good, as far as the samples show."""
    needs: dict[str, Point] = {}
    for point in found.points:
        worse = scale.sign * (chosen.value - point.value)
        as_good = worse <= 0 or is_tie(worse, point.error_to(chosen))
        if as_good and point.basis != chosen.basis:
            needs.setdefault(point.basis, point)
    tied = [p for p in needs.values() if p.bytes <= chosen.bytes * (1 + SAME_SIZE)]
    larger = [p for p in needs.values() if p.bytes > chosen.bytes * (1 + SAME_SIZE)]
    texts = []
    if tied:
        named = series.listed([p.basis for p in tied[:MOST_RIVALS]])
        texts.append(f"A tie with {named}: as small, and no worse than chance.")
    if larger:
        # What is compared first of all.
        larger.sort(key=lambda p: (p.basis not in BASELINES, p.bytes))
        named = series.listed([f"{p.basis} {size(p.bytes)}" for p in larger[:MOST_RIVALS]])
        texts.append(f"To be as good, {named} {'is' if len(larger) == 1 else 'are'} needed.")
    return texts


def _points(pruned: pd.DataFrame, dense: pd.Series[float]) -> list[Point]:
    labels, bases = series.labels(pruned), series.bases(pruned)
    settings = pd.Series("", pruned.index, dtype=object)
    for title, rows in series.panels(pruned).items():
        settings.loc[rows.index] = title
    keys = [labels, settings, pd.Series(series.points(pruned, "sparsity"), pruned.index)]
    points = []
    for _, rows in pruned.groupby(keys, sort=False):
        first = rows.index[0]
        changes = (rows["value"] - rows["model"].map(dense)).astype("float64")
        values = rows["value"].tolist()
        details = series.details(rows.iloc[0])
        points.append(
            Point(
                label=str(labels[first]),
                basis=str(bases[first]),
                setting=_without(str(settings[first]), details),
                details=_without(details, str(labels[first])),
                sparsity=float(rows["sparsity"].mean()),
                bytes=float(rows["bytes"].mean()),
                measured=bool(_measured(rows)),
                value=float(rows["value"].mean()),
                spread=joint_error(values, rows["spread"].tolist()),
                change=float(changes.mean()),
                change_spread=joint_error(changes.tolist(), rows["change_spread"].tolist()),
                runs=tuple(rows["guid"]),
            )
        )
    return points


def _measured(rows: pd.DataFrame) -> Any:
    return "file_bytes" in rows and rows["file_bytes"].notna().all()


def _without(text: str, other: str) -> str:
    """A text without the parts that another says, or says by saying nothing."""
    said = {*other.split(", "), "not trained", "not stored"}
    return ", ".join(part for part in text.split(", ") if part not in said)
