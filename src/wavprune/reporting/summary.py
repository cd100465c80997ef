"""The results of runs in tables and sentences."""

from __future__ import annotations

import json
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import pandas as pd

from . import series
from .series import BASELINES, UNPRUNED

# How much accuracy a run may lose and still count as accurate as the unpruned network.
TOLERANCE = 0.01
# Settings of a model in which trainings of the same network may differ.
_TRAINING = ("name", "seed", "weights", "arguments", "root")

Rows: TypeAlias = dict[str, tuple[dict[Hashable, Any], ...]]


@dataclass(frozen=True)
class Network:
    """A network, trained once or several times, on one data set.

    Attributes:
        models: the names of the trainings.
        data: the data that accuracy was measured on.
        unpruned: the finished runs of the unpruned networks.
        pruned: all other finished runs.
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

    Models with the same number of parameters that differ only in their seed, their weights or the
    arguments of a factory are trainings of one network, whose accuracies are averaged. A training
    that lacks some of the others' runs would bias the mean, so it is a network of its own.

    Args:
        runs: the finished runs.
    """
    keys = [
        json.dumps([_architecture(model, settings), data, parameters], sort_keys=True)
        for model, settings, data, parameters in zip(
            runs["model"], runs["settings"], runs["data"], runs["parameters"].tolist(), strict=True
        )
    ]
    result = []
    for _, group in runs.groupby(pd.Series(keys, index=runs.index, dtype=object), sort=False):
        for models in _complete_and_others(group):
            rows = group[group["model"].isin(models)]
            unpruned = rows["method"] == UNPRUNED
            data = str(rows["data"].iloc[0])
            result.append(Network(models, data, rows[unpruned], rows[~unpruned]))
    return result


def _complete_and_others(runs: pd.DataFrame) -> list[tuple[str, ...]]:
    """All models that were run with every setting, and each other model by itself."""
    tried: dict[str, set[str]] = {}
    for model, text in zip(runs["model"], runs["settings"], strict=True):
        settings = {key: value for key, value in json.loads(text).items() if key != "model"}
        tried.setdefault(str(model), set()).add(json.dumps(settings, sort_keys=True))
    every = set().union(*tried.values())
    full = tuple(model for model, settings in tried.items() if settings == every)
    return [models for models in (full, *((m,) for m in tried if m not in full)) if models]


@dataclass(frozen=True)
class PanelSummary:
    """The accuracies of a panel: runs that differ in method, amount and repetition.

    Attributes:
        title: the settings of the panel; empty where it is the only one.
        sparsities: of the columns, ascending.
        rows: label -> one row of ``series.lines`` per sparsity, empty where it was not tried.
        sentences: the main results.
    """

    title: str
    sparsities: tuple[float, ...]
    rows: Rows
    sentences: tuple[str, ...]

    def best(self, column: int) -> float:
        """The highest mean accuracy at a sparsity."""
        return max(float(row[column]["y"]) for row in self.rows.values() if row[column])


def panel_summaries(network: Network) -> list[PanelSummary]:
    """A summary of each panel of a network's runs."""
    summaries = []
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
        sentences = (*_accurate_up_to(network, rows, sparsities), *_best_at_each(rows, sparsities))
        summaries.append(PanelSummary(title, sparsities, rows, sentences))
    return summaries


def chosen_run(network: Network) -> tuple[pd.Series[Any], str] | None:
    """The run to picture, and why: the sparsest that is as accurate as the unpruned network.

    Random pruning is left out. Where no run is accurate enough, it is the most accurate one.
    """
    runs = network.pruned[network.pruned["method"] != "random"]
    if runs.empty:
        return None
    lost = _lost_accuracy(network, runs)
    accurate = runs[lost <= TOLERANCE + 1e-9]
    if accurate.empty:
        candidates, order, reason = runs, ["top1", "sparsity"], "the most accurate"
        if lost.notna().any():
            reason += f", for none is within {_points(TOLERANCE)} of the unpruned network"
    else:
        candidates, order = accurate, ["sparsity", "top1"]
        reason = f"the sparsest within {_points(TOLERANCE)} of the unpruned network"
    keys = candidates[order].astype("float64").round(4)
    best = keys.sort_values(order, ascending=False, kind="stable").index[0]
    return candidates.loc[best], reason


def companions(network: Network, chosen: pd.Series[Any], most: int = 8) -> pd.DataFrame:
    """The runs that a run is compared with, and the run itself: one per method, not random.

    They share its model, its panel and, to a hundredth, its sparsity.

    Args:
        network: the network of the run.
        chosen: the run.
        most: the maximum number of runs.
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
        is_other=like["guid"] != chosen["guid"],
        is_baseline=series.bases(like).isin(BASELINES),
    )
    order = ["is_other", "is_baseline", "top1"]
    like = like.sort_values(order, ascending=[True, False, False])
    like = like.drop_duplicates("label").head(most)
    # Baselines last, as in the other pictures.
    return pd.DataFrame(like).sort_values("is_baseline", kind="stable")


def collapsed(runs: pd.DataFrame, layers: pd.DataFrame) -> list[str]:
    """A sentence on each set of models whose kernels are all too small for some wavelets.

    Args:
        runs: finished runs.
        layers: their layers.
    """
    spatial = layers[(layers["method"] == "dwt") & ~layers["shape"].map(_pointwise).astype(bool)]
    # Only a transform with a boundary can be too long for a kernel.
    too_long = spatial["mode"].notna() & (spatial["level_used"] == 0)
    never_ran = too_long.groupby(spatial["guid"]).all()
    dwt = runs[runs["guid"].isin(never_ran.index)]
    never = dwt["guid"].map(never_ran).groupby([dwt["model"], dwt["wavelet"]]).all()
    models: dict[str, list[str]] = {}
    for model, wavelet in never[never].index:
        models.setdefault(str(wavelet), []).append(str(model))
    wavelets: dict[str, list[str]] = {}
    for wavelet, names in models.items():
        wavelets.setdefault(listed(names), []).append(wavelet)
    return [
        f"Too long for every kernel of {names}: {listed(unfit)}. No transform ran, so these rows "
        "are minimum-weight pruning."
        for names, unfit in wavelets.items()
    ]


def listed(names: Iterable[str]) -> str:
    """Names as an enumeration in a sentence.

    Example:
        >>> listed(["uhaar", "dct", "klt"])
        'uhaar, dct and klt'
    """
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def percentage(value: float) -> str:
    """A fraction as a percentage for a column, always with one decimal.

    Example:
        >>> percentage(0.99)
        '99.0%'
    """
    return f"{value:.1%}"


def percent(value: float) -> str:
    """A fraction as a percentage for a sentence, with one decimal unless it is 0.

    Example:
        >>> percent(0.5), percent(0.9817)
        ('50%', '98.2%')
    """
    return f"{round(100 * value, 1):g}%"


def _points(value: float) -> str:
    """The difference of two fractions, in percentage points.

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


def _lost_accuracy(network: Network, runs: pd.DataFrame) -> pd.Series[float]:
    """The accuracy that each run lost; NaN where its unpruned model has no finished run."""
    known = network.unpruned.drop_duplicates("model").set_index("model")["top1"]
    return runs["model"].map(known) - runs["top1"]


def _accurate_up_to(
    network: Network,
    rows: Rows,
    sparsities: Sequence[float],
) -> list[str]:
    """Up to which sparsity each label is as accurate as the unpruned network."""
    if network.unpruned.empty:
        return []
    dense = float(network.unpruned["top1"].mean())
    reach: dict[float | None, list[str]] = {}
    for label, cells in rows.items():
        furthest = None
        for at, cell in zip(sparsities, cells, strict=True):
            if cell and cell["y"] < dense - TOLERANCE - 1e-9:
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
        f"Within {_points(TOLERANCE)} of the unpruned network's {percent(dense)}: "
        f"{'; '.join(parts)}."
    ]


def _best_at_each(rows: Rows, sparsities: Sequence[float]) -> list[str]:
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
