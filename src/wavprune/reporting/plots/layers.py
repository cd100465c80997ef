"""What pruning did to each layer."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from ...config import AUTO
from ...errors import WavpruneError
from ...report import PruneReport
from .. import series
from .style import PERCENT, WIDTH, check_columns, short, styled

MAX_LABELS = 60
MAX_RUNS = 8


def error_by_layer(layers: pd.DataFrame | PruneReport, runs: pd.DataFrame | None = None) -> Figure:
    """The relative error of each layer's weight, one series per run.

    Args:
        layers: a report, or one row per layer with the columns of ``LayerStats``; if it holds
            several runs, a column ``guid`` tells them apart.
        runs: ``guid``, ``method`` and ``wavelet`` of these runs. Without it a run is named after
            the basis of its layers.

    Raises:
        WavpruneError: a column is missing, there is no layer, or there are more than eight runs.
    """
    return _by_layer(layers, runs, "relative_error", "relative error of the weight")


def sparsity_by_layer(
    layers: pd.DataFrame | PruneReport, runs: pd.DataFrame | None = None
) -> Figure:
    """The sparsity of each layer, one series per run; negative where more is kept than there was.

    Args:
        layers: as for ``error_by_layer``.
        runs: as for ``error_by_layer``.

    Raises:
        WavpruneError: a column is missing, there is no layer, or there are more than eight runs.
    """
    figure = _by_layer(layers, runs, "sparsity", "sparsity (pruned share of the layer's weights)")
    figure.axes[0].xaxis.set_major_formatter(PERCENT)
    return figure


def _by_layer(
    layers: pd.DataFrame | PruneReport, runs: pd.DataFrame | None, column: str, label: str
) -> Figure:
    frame = layers.to_dataframe() if isinstance(layers, PruneReport) else layers
    check_columns(frame, ("name", "shape", "method", "wavelet", column))
    if frame.empty:
        raise WavpruneError("layers has no layer to picture; give those of one run at least")
    shown_runs = _runs(frame, runs)
    names = list(dict.fromkeys(frame["name"]))
    positions = {name: i for i, name in enumerate(names)}
    with styled():
        height = 1.3 + 0.27 * min(len(names), MAX_LABELS) + 0.05 * len(shown_runs)
        figure = Figure(figsize=(WIDTH, height), layout="constrained")
        ax = figure.subplots()
        for i, (title, basis, rows) in enumerate(shown_runs):
            color, marker = series.basis_style(basis)
            offset = 0.6 * ((i + 0.5) / len(shown_runs) - 0.5)
            ax.plot(
                rows[column].astype(np.float64),
                rows["name"].map(positions) + offset,
                linestyle="none",
                color=color,
                marker=marker,
                markersize=5,
                label=title,
            )
        for i in range(0, len(names), 2):
            ax.axhspan(i - 0.5, i + 0.5, color="#f4f4f4", lw=0, zorder=0)
        ax.grid(visible=False, axis="y")
        labeled = names[:: math.ceil(len(names) / MAX_LABELS)]
        shapes = dict(zip(frame["name"], frame["shape"], strict=True))
        texts = [f"{short(name)}  {_kernel_size(shapes[name])}" for name in labeled]
        ax.set_yticks([positions[name] for name in labeled], texts, parse_math=False)
        ax.set_ylim(len(names) - 0.5, -0.5)
        low = min(0.0, float(frame[column].min()))
        ax.set_xlim(left=low - 0.02 * (float(frame[column].max()) - low or 1.0))
        ax.set_xlabel(label)
        figure.legend(loc="outside upper center", ncols=4, frameon=False)
    return figure


def _runs(layers: pd.DataFrame, runs: pd.DataFrame | None) -> list[tuple[str, str, pd.DataFrame]]:
    """Title, basis and layers of each run."""
    groups = dict(list(layers.groupby("guid", sort=False))) if "guid" in layers else {"": layers}
    if len(groups) > MAX_RUNS:
        raise WavpruneError(f"layers holds {len(groups)} runs; allowed: {MAX_RUNS} in one picture")
    if runs is None:
        bases = {guid: _common_basis(rows) for guid, rows in groups.items()}
        titles = bases
    else:
        check_columns(runs, ("guid", "method", "wavelet"))
        missing = sorted(map(str, set(groups) - set(runs["guid"])))
        if missing:
            raise WavpruneError(f"runs has no row of the run {missing[0]!r} that layers has")
        bases = dict(zip(runs["guid"], series.bases(runs), strict=True))
        titles = dict(zip(runs["guid"], series.labels(runs), strict=True))
    return [(titles[guid], bases[guid], rows) for guid, rows in groups.items()]


def _common_basis(layers: pd.DataFrame) -> str:
    """What to call a run by its layers alone: their basis, or ``auto`` where they differ."""
    # A 1x1 kernel has the identity, whatever was asked for.
    spatial = layers[[_kernel_size(shape) != "1x1" for shape in layers["shape"]]]
    used = list(dict.fromkeys((spatial if len(spatial) else layers)["wavelet"]))
    return series.basis_label(layers["method"].iloc[0], used[0] if len(used) == 1 else AUTO)


def _kernel_size(shape: Any) -> str:
    sizes = shape.split("x") if isinstance(shape, str) else list(map(str, shape))
    return "x".join(sizes[-2:])
