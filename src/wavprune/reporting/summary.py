"""What the runs of a results file say, in tables and words."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd

from . import series
from .series import BASELINES, UNPRUNED

# Accuracy that holds is within this of the unpruned network's.
TOLERANCE = 0.01
# What does not tell one network from another: its trainings are repetitions.
_TRAINING = ("name", "seed", "weights", "arguments", "root")


Rows: TypeAlias = dict[str, tuple[dict[Hashable, Any], ...]]


@dataclass(frozen=True)
class Network:
    """A network and its trainings, on one data set.

    Attributes:
        models: the trainings' names.
        data: what accuracy was measured on.
        unpruned: the finished runs of the unpruned trainings.
        pruned: their other finished runs.
    """

    models: tuple[str, ...]
    data: str
    unpruned: pd.DataFrame
    pruned: pd.DataFrame

    @property
    def title(self) -> str:
        """The trainings and the data."""
        return f"{listed(self.models)} on {self.data}"


def networks(runs: pd.DataFrame) -> list[Network]:
    """The networks of a results file, in the order in which they first finished.

    Models that differ in their seed, weights or a factory's arguments alone, and have as many
    parameters, are trainings of one network: their accuracies become one mean. A training that
    lacks some of the others' runs would tilt it, so it is shown as a network of its own.

    Args:
        runs: the finished runs.
    """
    keys = [
        json.dumps([_architecture(model, settings), data, parameters], sort_keys=True)
        for model, settings, data, parameters in zip(
            runs["model"], runs["settings"], runs["data"], runs["parameters"].tolist(), strict=True
        )
    ]
    found = []
    for _, rows in runs.groupby(pd.Series(keys, index=runs.index, dtype=object), sort=False):
        for models in _alike(rows):
            own = rows[rows["model"].isin(models)]
            unpruned = own["method"] == UNPRUNED
            data = str(own["data"].iloc[0])
            found.append(Network(models, data, own[unpruned], own[~unpruned]))
    return found


def _alike(runs: pd.DataFrame) -> list[tuple[str, ...]]:
    """The models that have every setting that any of them has, together; each other by itself."""
    tried: dict[str, set[str]] = {}
    for model, text in zip(runs["model"], runs["settings"], strict=True):
        settings = {key: value for key, value in json.loads(text).items() if key != "model"}
        tried.setdefault(str(model), set()).add(json.dumps(settings, sort_keys=True))
    every = set().union(*tried.values())
    full = tuple(model for model, settings in tried.items() if settings == every)
    return [models for models in (full, *((m,) for m in tried if m not in full)) if models]


@dataclass(frozen=True)
class Comparison:
    """The accuracies of a panel: runs that differ in method, amount and repetition.

    Attributes:
        title: the panel's settings; empty where there is one panel.
        sparsities: ascending, what the columns are.
        rows: label -> one row of ``series.lines`` a sparsity, empty where it was not tried.
        sentences: what they say.
    """

    title: str
    sparsities: tuple[float, ...]
    rows: Rows
    sentences: tuple[str, ...]

    def best(self, column: int) -> float:
        """The highest mean accuracy at a sparsity."""
        return max(float(row[column]["y"]) for row in self.rows.values() if row[column])


def comparisons(network: Network) -> list[Comparison]:
    """What each panel of a network's runs says."""
    found = []
    for title, panel in series.panels(network.pruned).items():
        points = series.lines(panel, "sparsity", "top1")
        points["at"] = points["x"].round(2)
        sparsities = tuple(sorted(points["at"].unique().tolist()))
        rows: Rows = {
            str(label): tuple(
                next(iter(line[line["at"] == at].to_dict("records")), {}) for at in sparsities
            )
            for label, line in points.groupby("label", sort=False)
        }
        sentences = (*_holding(network, rows, sparsities), *_leading(rows, sparsities))
        found.append(Comparison(title, sparsities, rows, sentences))
    return found


def chosen_run(network: Network) -> tuple[pd.Series[Any], str] | None:
    """The run to picture, and why: the sparsest whose accuracy still holds.

    Random pruning is left out. Where no accuracy holds, it is the most accurate run.
    """
    runs = network.pruned[network.pruned["method"] != "random"]
    if runs.empty:
        return None
    lost = _lost(network, runs)
    holds = runs[lost <= TOLERANCE + 1e-9]
    if holds.empty:
        order, why = ["top1", "sparsity"], "the most accurate"
        if lost.notna().any():
            why += f", for none is within {_points(TOLERANCE)} of the unpruned network"
        holds = runs
    else:
        order = ["sparsity", "top1"]
        why = f"the sparsest within {_points(TOLERANCE)} of the unpruned network"
    keys = holds[order].astype("float64").round(4)
    return holds.loc[keys.sort_values(order, ascending=False, kind="stable").index[0]], why


def companions(network: Network, chosen: pd.Series[Any], most: int = 8) -> pd.DataFrame:
    """The runs that a run is compared with, itself first among them: one a method, not random.

    They share its model, panel and, to a hundredth, its sparsity.
    """
    panels = series.panels(network.pruned).values()
    panel = next(rows for rows in panels if chosen.name in rows.index)
    like = panel[
        (panel["model"] == chosen["model"])
        & (panel["method"] != "random")
        & ((panel["sparsity"] - chosen["sparsity"]).abs() < 0.01)
    ]
    like = like.assign(
        label=series.labels(like),
        first=[guid != chosen["guid"] for guid in like["guid"]],
        baseline=~series.bases(like).isin(BASELINES),
    )
    like = like.sort_values(["first", "baseline", "top1"], ascending=[True, True, False])
    like = like.drop_duplicates("label").head(most)
    # As the lines of the other pictures: those that all is compared with last.
    return pd.DataFrame(like).sort_values("baseline", ascending=False, kind="stable")


def collapsed(runs: pd.DataFrame, layers: pd.DataFrame) -> list[str]:
    """A sentence for each network on the bases that never transformed one of its kernels."""
    spatial = layers[(layers["method"] == "dwt") & ~layers["shape"].map(_pointwise).astype(bool)]
    deepest = spatial.groupby("guid")["level_used"].max()
    own = runs["wavelet"].isin(("identity", "auto"))
    dwt = runs[runs["guid"].isin(deepest.index) & ~own]
    never = dwt["guid"].map(deepest).eq(0).groupby([dwt["model"], dwt["wavelet"]]).all()
    models: dict[str, list[str]] = {}
    for model, wavelet in never[never].index:
        models.setdefault(str(wavelet), []).append(str(model))
    wavelets: dict[str, list[str]] = {}
    for wavelet, names in models.items():
        wavelets.setdefault(listed(names), []).append(wavelet)
    return [
        f"Too long for every kernel of {names}: {listed(found)}. No transform ran, and these rows "
        "are minimum-weight pruning."
        for names, found in wavelets.items()
    ]


def listed(names: Iterable[str]) -> str:
    """Names as a sentence has them.

    Example:
        >>> listed(["uhaar", "dct", "klt"])
        'uhaar, dct and klt'
    """
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def percentage(value: float) -> str:
    """A share for a column of them, always with a digit after the point.

    Example:
        >>> percentage(0.99)
        '99.0%'
    """
    return f"{value:.1%}"


def percent(value: float) -> str:
    """A share, with a digit after the point where it has one.

    Example:
        >>> percent(0.5), percent(0.9817)
        ('50%', '98.2%')
    """
    return f"{round(100 * value, 1):g}%"


def _points(value: float) -> str:
    """A difference of two shares.

    Example:
        >>> _points(0.01), _points(0.179)
        ('1 point', '17.9 points')
    """
    rounded = round(100 * value, 1)
    return f"{rounded:g} {'point' if rounded == 1 else 'points'}"


def _architecture(name: str, settings: str) -> Any:
    model = json.loads(settings).get("model")
    if not isinstance(model, dict):
        return name
    return {key: value for key, value in model.items() if key not in _TRAINING}


def _lost(network: Network, runs: pd.DataFrame) -> pd.Series[float]:
    """Accuracy that each run lost; NaN where its unpruned model did not finish."""
    known = network.unpruned.drop_duplicates("model").set_index("model")["top1"]
    return runs["model"].map(known) - runs["top1"]


def _holding(
    network: Network,
    rows: Rows,
    sparsities: Sequence[float],
) -> list[str]:
    """Up to which sparsity each label is as accurate as the unpruned network."""
    if network.unpruned.empty:
        return []
    base = float(network.unpruned["top1"].mean())
    reach: dict[float | None, list[str]] = {}
    for label, cells in rows.items():
        furthest = None
        for at, cell in zip(sparsities, cells, strict=True):
            if cell and cell["y"] < base - TOLERANCE - 1e-9:
                break
            furthest = at if cell else furthest
        reach.setdefault(furthest, []).append(label)
    parts = [
        f"{listed(reach[at])} up to {percent(at)}"
        for at in sorted((at for at in reach if at is not None), reverse=True)
    ]
    if None in reach:
        parts.append(f"{listed(reach[None])} at no sparsity tried")
    return [
        f"Within {_points(TOLERANCE)} of the unpruned network's {percent(base)}: "
        f"{'; '.join(parts)}."
    ]


def _leading(rows: Rows, sparsities: Sequence[float]) -> list[str]:
    """The best at each sparsity, and how far minimum-weight pruning is behind."""
    sentences = []
    baseline = rows.get("min-weight")
    for i, at in enumerate(sparsities):
        tried = {label: cells[i]["y"] for label, cells in rows.items() if cells[i]}
        if len(tried) < 2:
            continue
        highest = max(tried.values())
        best = [label for label, y in tried.items() if y >= highest - 1e-9]
        others = [label for label in tried if label not in best]
        named = listed(best)
        if len(best) > 2 and len(others) < 2:
            named = f"all but {others[0]}" if others else "all the same"
        text = f"At {percent(at)}: {named}, {percent(highest)}"
        if baseline and baseline[i] and "min-weight" not in best:
            low = baseline[i]["y"]
            text += f", {_points(highest - low)} above min-weight's {percent(low)}"
        sentences.append(f"{text}.")
    return sentences


def _pointwise(shape: str) -> bool:
    sizes = shape.split("x")
    return len(sizes) == 4 and sizes[2:] == ["1", "1"]
