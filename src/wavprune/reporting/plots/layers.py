"""What pruning did to each layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...report import PruneReport
from .. import series
from .style import PERCENT, WIDTH, require, short, styled

_NAMED = 60
_RUNS = 8


def error_by_layer(layers: pd.DataFrame | PruneReport, runs: pd.DataFrame | None = None) -> Figure:
    """The relative error of each layer's weight, one series a run.

    Args:
        layers: a report, or one row a layer with ``LayerStats``' columns; where it holds several
            runs, a column ``guid`` tells them apart.
        runs: ``guid``, ``method`` and ``wavelet`` of these runs. Without it a run is named by the
            bases of its layers.

    Raises:
        ValueError: a column is missing, there is no layer, or there are more than eight runs.
    """
    return _by_layer(layers, runs, "relative_error", "relative error of the weight")


def sparsity_by_layer(
    layers: pd.DataFrame | PruneReport, runs: pd.DataFrame | None = None
) -> Figure:
    """The sparsity of each layer, one series a run; below 0 more is stored than there are weights.

    Args:
        layers: as for ``error_by_layer``.
        runs: as for ``error_by_layer``.

    Raises:
        ValueError: a column is missing, there is no layer, or there are more than eight runs.
    """
    figure = _by_layer(layers, runs, "sparsity", "sparsity (pruned share of the layer's weights)")
    figure.axes[0].xaxis.set_major_formatter(PERCENT)
    return figure


def _by_layer(
    layers: pd.DataFrame | PruneReport, runs: pd.DataFrame | None, column: str, label: str
) -> Figure:
    frame = layers.to_dataframe() if isinstance(layers, PruneReport) else layers
    require(frame, ("name", "shape", "method", "wavelet", column))
    if frame.empty:
        raise ValueError("layers has no layer to picture; give those of one run at least")
    named = _named_runs(frame, runs)
    names = list(dict.fromkeys(frame["name"]))
    shapes = dict(zip(frame["name"], frame["shape"], strict=True))
    place = {name: i for i, name in enumerate(names)}
    step = math.ceil(len(names) / _NAMED)
    with styled():
        height = 1.3 + 0.27 * min(len(names), _NAMED) + 0.05 * len(named)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        ax = figure.subplots()
        for i, (title, basis, rows) in enumerate(named):
            colour, marker = series.basis_style(basis)
            beside = 0.6 * ((i + 0.5) / len(named) - 0.5)
            ax.plot(
                rows[column].astype(np.float64),
                rows["name"].map(place) + beside,
                linestyle="none",
                color=colour,
                marker=marker,
                markersize=5,
                label=title,
            )
        for i in range(0, len(names), 2):
            ax.axhspan(i - 0.5, i + 0.5, color="#f4f4f4", lw=0, zorder=0)
        ax.grid(visible=False, axis="y")
        shown = names[::step]
        texts = [f"{short(name)}  {_size(shapes[name])}" for name in shown]
        ax.set_yticks([place[name] for name in shown], texts, parse_math=False)
        ax.set_ylim(len(names) - 0.5, -0.5)
        low = min(0.0, float(frame[column].min()))
        ax.set_xlim(left=low - 0.02 * (float(frame[column].max()) - low or 1.0))
        ax.set_xlabel(label)
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def _named_runs(
    layers: pd.DataFrame, runs: pd.DataFrame | None
) -> list[tuple[str, str, pd.DataFrame]]:
    """Title, basis and layers of each run."""
    groups = dict(list(layers.groupby("guid", sort=False))) if "guid" in layers else {"": layers}
    if len(groups) > _RUNS:
        raise ValueError(f"layers holds {len(groups)} runs; allowed: {_RUNS} in one picture")
    if runs is None:
        found = {guid: _layers_basis(rows) for guid, rows in groups.items()}
        titles = dict(found)
    else:
        require(runs, ("guid", "method", "wavelet"))
        missing = sorted(map(str, set(groups) - set(runs["guid"])))
        if missing:
            raise ValueError(f"runs has no row of the run {missing[0]!r} that layers has")
        found = dict(zip(runs["guid"], series.bases(runs), strict=True))
        titles = dict(zip(runs["guid"], series.labels(runs), strict=True))
    return [(titles[guid], found[guid], rows) for guid, rows in groups.items()]


def _layers_basis(rows: pd.DataFrame) -> str:
    """The basis that a run's layers have in common; 1x1 kernels have the identity in each."""
    found = list(dict.fromkeys(rows["wavelet"]))
    others = [name for name in found if name != "identity"]
    name = "auto" if len(others) > 1 else (others or found)[0]
    return series.basis_label(rows["method"].iloc[0], name)


def _size(shape: Any) -> str:
    sizes = shape.split("x") if isinstance(shape, str) else list(map(str, shape))
    return "x".join(sizes[-2:])
