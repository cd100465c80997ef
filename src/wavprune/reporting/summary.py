"""The results of runs in tables and sentences."""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import pandas as pd

from ..evaluation.spread import is_tie
from . import series
from .front import Front, front, smallest_good
from .scale import Scale, percent, scale_of
from .series import BASELINES, UNPRUNED, listed

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
        scale: of the metric that all were measured by.
    """

    models: tuple[str, ...]
    data: str
    unpruned: pd.DataFrame
    pruned: pd.DataFrame
    scale: Scale

    @property
    def title(self) -> str:
        """The trainings, the data, and a metric that is not top-1 accuracy."""
        title = f"{listed(self.models)} on {self.data}"
        return title if self.scale.is_share else f"{title}: {self.scale.name}"

    @property
    def dense(self) -> float:
        """The mean value of the unpruned networks; NaN without one."""
        return float(self.unpruned["value"].mean())

    @cached_property
    def front(self) -> Front:
        """The front of its runs."""
        return front(self.unpruned, self.pruned, self.scale)


def networks(runs: pd.DataFrame, tolerance: float | None = None) -> list[Network]:
    """The networks of a results file, in the order in which they first finished.

    Models with the same number of parameters that differ only in their seed, their weights or the
    arguments of a factory are trainings of one network, whose accuracies are averaged. A training
    that lacks some of the others' runs would bias the mean, so it is a network of its own.

    Args:
        runs: the finished runs, as ``scale.with_metric`` gives them.
        tolerance: see ``Scale``.
    """
    keys = [
        json.dumps([_architecture(model, settings), *others], sort_keys=True)
        for model, settings, *others in zip(
            *(runs["model"], runs["settings"], runs["data"], runs["metric"]),
            *(runs["higher_is_better"].astype(bool).tolist(), runs["parameters"].tolist()),
            strict=True,
        )
    ]
    result = []
    for _, group in runs.groupby(pd.Series(keys, index=runs.index, dtype=object), sort=False):
        for models in _complete_and_others(group):
            rows = group[group["model"].isin(models)]
            unpruned = rows["method"] == UNPRUNED
            data = str(rows["data"].iloc[0])
            scale = scale_of(rows, tolerance)
            result.append(Network(models, data, rows[unpruned], rows[~unpruned], scale))
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
    """The values of a panel: runs that differ in method, amount and repetition.

    Attributes:
        title: the settings of the panel; empty where it is the only one.
        sparsities: of the columns, ascending.
        rows: label -> one row of ``series.lines`` per sparsity, empty where it was not tried.
        sentences: the main results.
        scale: of the values.
    """

    title: str
    sparsities: tuple[float, ...]
    rows: Rows
    sentences: tuple[str, ...]
    scale: Scale

    def leads(self, column: int, label: str) -> bool:
        """Whether no other label is better at a sparsity by more than chance."""
        cells = {name: row[column] for name, row in self.rows.items() if row[column]}
        return label in _leaders(cells, self.scale)


def main_panels(network: Network) -> dict[str, pd.DataFrame]:
    """The panels of a network's runs, those with the most runs first."""
    panels = series.panels(network.pruned).items()
    return dict(sorted(panels, key=lambda panel: -len(panel[1])))


def panel_summaries(network: Network) -> list[PanelSummary]:
    """A summary of each panel of a network's runs."""
    summaries = []
    for title, panel in main_panels(network).items():
        points = series.lines(panel, "sparsity", "value")
        points["at"] = points["x"].round(2)
        sparsities = tuple(sorted(points["at"].unique().tolist()))
        rows: Rows = {
            str(label): tuple(
                next(iter(line[line["at"] == at].to_dict("records")), {}) for at in sparsities
            )
            for label, line in points.groupby("label", sort=False)
        }
        sentences = (
            *_good_up_to(network, rows, sparsities),
            *_best_at_each(rows, sparsities, network.scale),
        )
        summaries.append(PanelSummary(title, sparsities, rows, sentences, network.scale))
    return summaries


def chosen_run(network: Network) -> tuple[pd.Series[Any], str] | None:
    """The run to picture, and why: the smallest that is as good as the unpruned network.

    Random pruning is left out. Where no run is good enough, it is the best one.
    """
    runs = network.pruned[network.pruned["method"] != "random"]
    if runs.empty:
        return None
    scale = network.scale
    others = (point for point in network.front.points if point.basis != "random")
    chosen = smallest_good(others, network.dense, scale)
    if chosen is not None:
        within = scale.difference(scale.tolerance(network.dense))
        reason = f"the smallest within {within} of the unpruned network"
        return runs[runs["guid"] == chosen.runs[0]].iloc[0], reason
    best = runs.assign(rank=scale.sign * runs["value"].round(4))
    order = ["rank", "sparsity"]
    first = (
        best[order].astype("float64").sort_values(order, ascending=False, kind="stable").index[0]
    )
    reason = "the best"
    if len(network.unpruned):
        within = scale.difference(scale.tolerance(network.dense))
        reason += f", for none is within {within} of the unpruned network"
    return runs.loc[first], reason


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
    order = ["is_other", "is_baseline", "value"]
    like = like.sort_values(order, ascending=[True, False, not network.scale.higher])
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


def _architecture(name: str, settings: str) -> Any:
    model = json.loads(settings).get("model")
    if not isinstance(model, dict):
        return name
    return {key: value for key, value in model.items() if key not in _TRAINING}


def _good_up_to(network: Network, rows: Rows, sparsities: Sequence[float]) -> list[str]:
    """Up to which sparsity each label is as good as the unpruned network."""
    if network.unpruned.empty:
        return []
    dense, scale = network.dense, network.scale
    allowed = scale.tolerance(dense) + 1e-9
    reach: dict[float | None, list[str]] = {}
    for label, cells in rows.items():
        furthest = None
        for at, cell in zip(sparsities, cells, strict=True):
            if cell and scale.sign * (cell["y"] - dense) < -allowed:
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
        f"Within {scale.difference(scale.tolerance(dense))} of the unpruned network's "
        f"{scale.text(dense)}: {'; '.join(parts)}."
    ]


def _leaders(cells: Mapping[str, Mapping[Hashable, Any]], scale: Scale) -> list[str]:
    """The labels that are best, as far as the samples show, the best one first."""
    ranked = sorted(cells, key=lambda label: -scale.sign * cells[label]["y"])
    best = cells[ranked[0]]
    return [
        label
        for label in ranked
        if is_tie(best["y"] - cells[label]["y"], _error(best, cells[label]))
    ]


def _error(one: Mapping[Hashable, Any], other: Mapping[Hashable, Any]) -> float:
    """The standard error of a difference, as if on different samples."""
    return math.hypot(one.get("error", math.nan), other.get("error", math.nan))


def _best_at_each(rows: Rows, sparsities: Sequence[float], scale: Scale) -> list[str]:
    """The best at each sparsity, and how far minimum-weight pruning is behind."""
    sentences = []
    for i, at in enumerate(sparsities):
        cells = {label: row[i] for label, row in rows.items() if row[i]}
        if len(cells) < 2:
            continue
        leaders = _leaders(cells, scale)
        best = cells[leaders[0]]["y"]
        others = [label for label in cells if label not in leaders]
        named = listed(sorted(leaders, key=list(cells).index))
        if len(leaders) > 2 and len(others) < 2:
            named = f"all but {others[0]}" if others else "all"
        text = f"At {percent(at)}: {named}, {scale.text(best)}"
        low = min(scale.sign * cells[label]["y"] for label in leaders) * scale.sign
        if len(leaders) > 1 and scale.text(low) != scale.text(best):
            text = f"At {percent(at)} a tie of {named}, {scale.text(low)} to {scale.text(best)}"
        if "min-weight" in others:
            base = cells["min-weight"]["y"]
            behind = scale.difference(abs(best - base))
            text += (
                f", {behind} {'above' if scale.higher else 'below'} min-weight's {scale.text(base)}"
            )
        sentences.append(f"{text}.")
    return sentences


def _pointwise(shape: str) -> bool:
    sizes = shape.split("x")
    return len(sizes) == 4 and sizes[2:] == ["1", "1"]
