"""Accuracy, or any other metric, against sparsity and against stored size."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, FixedLocator, NullLocator

from ...errors import WavpruneError
from .. import series
from ..scale import Scale, scale_of, with_metric
from ..series import BASELINES, UNPRUNED
from .style import PERCENT, STRETCHED, WIDTH, check_columns, panels, short, styled

_TICKS = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.98, 0.99, 1.0)


def accuracy_by_sparsity(runs: pd.DataFrame, width: float = WIDTH) -> Figure:
    """Top-1 accuracy against the pruned share of the weights, one line per basis or method.

    Runs that differ only in their seed or model are one point: their mean, in a band from the
    lowest to the highest. Each scope, batch-norm repair and data set has a panel of its own. The
    unpruned network is a dashed line.

    Args:
        runs: one row per run, with the columns ``method``, ``wavelet``, ``sparsity`` and ``top1``
            (both from 0 to 1) and the settings that vary, as in a sweep's results file. Rows with
            the method ``"none"`` are the unpruned network. In place of ``top1`` another metric:
            ``metric``, its name, ``value`` and ``higher_is_better``.
        width: inches.

    Raises:
        WavpruneError: a column is missing, or no run has an accuracy.

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

    def format_x(ax: Axes) -> None:
        ax.set_xscale("function", functions=STRETCHED)
        ax.xaxis.set_major_formatter(PERCENT)

    label = "sparsity (pruned share of the weights)"
    return _accuracy(runs, "sparsity", label, format_x, width)


def accuracy_by_bytes(runs: pd.DataFrame, width: float = WIDTH) -> Figure:
    """Top-1 accuracy against what a file of the network must store, one line per basis or method.

    Args:
        runs: as for ``accuracy_by_sparsity``, with a column ``stored_bytes``.
        width: inches.

    Raises:
        WavpruneError: a column is missing, or no run has an accuracy.

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
    label = "stored size of the network (log scale)"
    return _accuracy(runs, "stored_bytes", label, format_bytes, width)


def format_bytes(ax: Axes) -> None:
    """An axis of sizes."""
    ax.set_xscale("log")
    ax.xaxis.set_major_formatter(EngFormatter(unit="B", places=None))
    ax.xaxis.set_minor_locator(NullLocator())


def _accuracy(
    runs: pd.DataFrame, x: str, label: str, format_x: Callable[[Axes], None], width: float
) -> Figure:
    check_columns(runs, ("method", "wavelet", x))
    if "value" not in runs:
        check_columns(runs, ("top1",))
    runs = with_metric(runs)
    runs = runs[runs["value"].notna() & runs[x].notna()]
    unpruned = runs[runs["method"] == UNPRUNED]
    pruned = runs[runs["method"] != UNPRUNED]
    if pruned.empty:
        raise WavpruneError("runs has no pruned run with an accuracy; picture a sweep that has one")
    if runs["metric"].nunique() > 1:
        raise WavpruneError(
            f"runs were measured by {', '.join(map(str, runs['metric'].unique()))}; picture those "
            "of one metric"
        )
    scale = scale_of(runs)
    split = series.panels(pruned)
    narrow = width < WIDTH
    alone = len(split) == 1
    low, high = limits(runs["value"].tolist(), math.nan, scale)
    with styled():
        columns = 1 if narrow else 2
        figure, axes = panels(len(split), columns, 3.8 if alone else 2.6, width)
        handles: dict[str, Any] = {}
        for ax, (title, panel) in zip(axes, split.items(), strict=True):
            points = series.lines(panel, x, "value")
            baseline = unpruned
            if "data" in runs:
                baseline = unpruned[unpruned["data"].isin(panel["data"].unique())]
            _unpruned_line(ax, baseline["value"], handles)
            _lines(ax, points, handles)
            ax.set_title(short(title, 40 if narrow else 56), parse_math=False)
            format_metric(ax, low, high, 0.04 if alone else 0.07, scale)
            format_x(ax)
            ticks = spaced(ax, points["x"], 0.09 if alone and not narrow else 0.16)
            ax.xaxis.set_major_locator(FixedLocator(ticks))
        if alone:
            axes[0].set_xlabel(label)
            axes[0].set_ylabel(label_of(scale))
        else:
            figure.supxlabel(label, fontsize="medium")
            figure.supylabel(label_of(scale), fontsize="medium")
        has_bands = any(ax.collections for ax in axes)
        figure.legend(
            list(handles.values()),
            list(handles),
            loc="outside upper left" if narrow else "outside right upper",
            ncols=3 if narrow else 1,
            frameon=False,
            title="line: mean\nband: range" if has_bands else None,
            alignment="left",
        )
    return figure


def label_of(scale: Scale) -> str:
    """The label of the axis of a metric."""
    if scale.is_share:
        return "top-1 accuracy (stretched towards 100%)"
    return f"{short(scale.name)} ({'higher' if scale.higher else 'lower'} is better)"


def limits(values: list[float], dense: float, scale: Scale) -> tuple[float, float]:
    """The ends of the axis of a metric."""
    shown = [value for value in (*values, dense) if not math.isnan(value)]
    low, high = min(shown), max(shown)
    if scale.is_share:
        return max(low - 0.08 * (1 - low) - 0.001, 0.0), 1.0
    margin = 0.06 * (high - low) or 0.05 * abs(high) or 1.0
    return low - margin, high + margin


def format_metric(ax: Axes, low: float, high: float, distance: float, scale: Scale) -> None:
    """The axis of a metric, with labels at least this fraction of it apart."""
    if not scale.is_share:
        ax.set_ylim(low, high)
        return
    ax.set_yscale("function", functions=STRETCHED)
    ax.set_ylim(low, 1.0)
    ax.yaxis.set_major_locator(FixedLocator(_ticks(low, distance)))
    ax.yaxis.set_major_formatter(PERCENT)


def _ticks(low: float, distance: float) -> list[float]:
    """Accuracies to label, at least this fraction of the axis apart."""
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
        color, marker = series.basis_style(basis)
        # Baselines are drawn first, wide and hollow, so that lines on top of each other both show.
        is_baseline = basis in BASELINES
        (handles[name],) = ax.plot(
            line["x"],
            line["y"],
            ("-", "--", ":", "-.")[dashes[basis] % 4],
            color=color,
            marker=marker,
            markersize=8 if is_baseline else 5,
            markerfacecolor="none" if is_baseline else color,
            linewidth=2.4 if is_baseline else 1.4,
            zorder=1.9 if is_baseline else 2.0,
            label=name,
        )
        if (line["high"] > line["low"]).any():
            ax.fill_between(line["x"], line["low"], line["high"], color=color, alpha=0.15, lw=0)


def _unpruned_line(ax: Axes, accuracies: pd.Series[float], handles: dict[str, Any]) -> None:
    if accuracies.empty:
        return
    mean, low, high = accuracies.mean(), accuracies.min(), accuracies.max()
    handles["unpruned"] = ax.axhline(
        float(mean), color="#666666", ls=(0, (5, 3)), lw=1.2, zorder=1, label="unpruned"
    )
    if high > low:
        ax.axhspan(float(low), float(high), color="#666666", alpha=0.12, lw=0)


def spaced(ax: Axes, values: Iterable[float], distance: float) -> list[float]:
    """The values along x without those closer to the one before than this fraction of the axis."""
    chosen: list[float] = []
    last = -math.inf
    for x in sorted(set(values)):
        point = ax.transAxes.inverted().transform(ax.transData.transform((x, 1.0)))
        if point[0] >= last + distance:
            chosen.append(x)
            last = float(point[0])
    return chosen
