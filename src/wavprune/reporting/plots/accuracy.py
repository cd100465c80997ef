"""What pruning costs: accuracy against sparsity and against stored size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from .. import series
from ..series import BASELINES, UNPRUNED
from .style import PERCENT, STRETCHED, panels, require, short, styled

_ACCURACY = "top-1 accuracy (stretched towards 100%)"
_TICKS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)


def accuracy_by_sparsity(runs: pd.DataFrame) -> Figure:
    """Top-1 accuracy against the pruned share of the weights, one line a basis or method.

    Runs that differ in their seed or model alone are one point: their mean, in a band from the
    lowest to the highest. Runs of another scope, batch-norm repair or data have a panel of their
    own. The unpruned network is a dashed line.

    Args:
        runs: one row a run, with the columns ``method``, ``wavelet``, ``sparsity`` and ``top1``
            (both from 0 to 1) and those settings of ``PruneConfig`` that vary, as a sweep's results
            file has them. Rows of the method ``"none"`` are the unpruned network.

    Raises:
        ValueError: a column is missing, or no run has an accuracy.

    Example:
        >>> runs = pd.DataFrame(
        ...     {
        ...         "method": ["none", "dwt", "dwt", "min_weight"],
        ...         "wavelet": [None, "uhaar", "uhaar", None],
        ...         "sparsity": [0.0, 0.5, 0.9, 0.9],
        ...         "top1": [0.99, 0.98, 0.97, 0.91],
        ...     }
        ... )
        >>> accuracy_by_sparsity(runs).axes[0].get_xlabel()
        'sparsity (pruned share of the weights)'
    """

    def dress(ax: Axes) -> None:
        ax.set_xscale("function", functions=STRETCHED)
        ax.xaxis.set_major_formatter(PERCENT)

    return _accuracy(runs, "sparsity", "sparsity (pruned share of the weights)", dress)


def accuracy_by_bytes(runs: pd.DataFrame) -> Figure:
    """Top-1 accuracy against what a file of the network must store, one line a basis or method.

    Args:
        runs: as for ``accuracy_by_sparsity``, with a column ``stored_bytes``.

    Raises:
        ValueError: a column is missing, or no run has an accuracy.

    Example:
        >>> runs = pd.DataFrame(
        ...     {
        ...         "method": ["dwt", "min_weight"],
        ...         "wavelet": ["uhaar", None],
        ...         "stored_bytes": [52_000, 52_000],
        ...         "top1": [0.97, 0.91],
        ...     }
        ... )
        >>> accuracy_by_bytes(runs).axes[0].get_xlabel()
        'stored size of the network (log scale)'
    """

    def dress(ax: Axes) -> None:
        ax.set_xscale("log")
        ax.xaxis.set_major_formatter(EngFormatter(unit="B", places=0))
        ax.xaxis.set_minor_locator(NullLocator())

    return _accuracy(runs, "stored_bytes", "stored size of the network (log scale)", dress)


def _accuracy(runs: pd.DataFrame, x: str, label: str, dress: Callable[[Axes], None]) -> Figure:
    require(runs, ("method", "wavelet", x, "top1"))
    runs = runs[runs["top1"].notna() & runs[x].notna()]
    unpruned = runs[runs["method"] == UNPRUNED]
    pruned = runs[runs["method"] != UNPRUNED]
    if pruned.empty:
        raise ValueError("runs has no pruned run with an accuracy; picture a sweep that has one")
    split = series.panels(pruned)
    alone = len(split) == 1
    low = float(runs["top1"].min())
    low = max(low - 0.08 * (1 - low) - 0.001, 0.0)
    with styled():
        figure, axes = panels(len(split), columns=2, height=3.8 if alone else 2.6)
        handles: dict[str, Any] = {}
        spread = False
        for ax, (title, panel) in zip(axes, split.items(), strict=True):
            points = series.lines(panel, x, "top1")
            spread |= bool((points["high"] > points["low"]).any())
            base = unpruned
            if "data" in runs:
                base = base[base["data"].isin(panel["data"].unique())]
            _unpruned_line(ax, base["top1"], handles)
            _lines(ax, points, handles)
            ax.set_title(short(title, 56), parse_math=False)
            ax.set_yscale("function", functions=STRETCHED)
            ax.set_ylim(low, 1.0)
            ax.yaxis.set_major_locator(FixedLocator(_ticks(low, 0.04 if alone else 0.07)))
            ax.yaxis.set_major_formatter(PERCENT)
            dress(ax)
            ticks = _apart(ax, points["x"], 0.09 if alone else 0.16)
            ax.xaxis.set_major_locator(FixedLocator(ticks))
        if alone:
            axes[0].set_xlabel(label)
            axes[0].set_ylabel(_ACCURACY)
        else:
            figure.supxlabel(label, fontsize="medium")
            figure.supylabel(_ACCURACY, fontsize="medium")
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside right upper",
            frameon=False,
            title="line: mean\nband: range" if spread else None,
            alignment="left",
        )
    return figure


def _ticks(low: float, distance: float) -> list[float]:
    """Those of the accuracies that are that part of the axis from each other."""
    chosen: list[float] = []
    for tick in reversed(_TICKS):
        gap = math.sqrt(1 - tick) - math.sqrt(1 - chosen[-1]) if chosen else math.inf
        if tick >= low and gap >= distance * math.sqrt(1 - low):
            chosen.append(tick)
    return chosen


def _lines(ax: Axes, points: pd.DataFrame, handles: dict[str, Any]) -> None:
    dashes: dict[str, int] = {}
    for label, line in points.groupby("label", sort=False):
        name, basis = str(label), str(line["basis"].iloc[0])
        dashes[basis] = dashes.get(basis, -1) + 1
        colour, marker = series.basis_style(basis)
        # What wavelets are compared with lies beneath them, wide and hollow: lines that are the
        # same are both seen.
        below = basis in BASELINES
        (handles[name],) = ax.plot(
            line["x"],
            line["y"],
            ("-", "--", ":", "-.")[dashes[basis] % 4],
            color=colour,
            marker=marker,
            markersize=8 if below else 5,
            markerfacecolor="none" if below else colour,
            linewidth=2.4 if below else 1.4,
            zorder=1.9 if below else 2.0,
            label=name,
        )
        ax.fill_between(line["x"], line["low"], line["high"], color=colour, alpha=0.15, lw=0)


def _unpruned_line(ax: Axes, accuracies: pd.Series[float], handles: dict[str, Any]) -> None:
    if accuracies.empty:
        return
    mean, low, high = accuracies.mean(), accuracies.min(), accuracies.max()
    handles["unpruned"] = ax.axhline(
        float(mean), color="#666666", ls=(0, (5, 3)), lw=1.2, zorder=1, label="unpruned"
    )
    if high > low:
        ax.axhspan(float(low), float(high), color="#666666", alpha=0.12, lw=0)


def _apart(ax: Axes, places: Iterable[float], distance: float) -> list[float]:
    """The places along x but those nearer to the one before than this part of the axis."""
    ascending = sorted(set(places))
    points = [ax.transData.transform((x, 1.0)) for x in ascending]
    across = [float(ax.transAxes.inverted().transform(point)[0]) for point in points]
    chosen: list[float] = []
    last = -math.inf
    for x, at in zip(ascending, across, strict=True):
        if at >= last + distance:
            chosen.append(x)
            last = at
    return chosen
