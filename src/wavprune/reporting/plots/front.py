"""The metric of every run against its bytes."""

from __future__ import annotations

import math
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator

from .. import series
from ..front import Front, Point
from ..scale import Scale
from ..series import BASELINES
from .accuracy import format_bytes, format_metric, label_of, limits, spaced
from .style import WIDTH, styled

# Points that lose this many times the tolerance are left out, unless they are on the front.
WORST = 10


def front_by_bytes(front: Front, scale: Scale, width: float = WIDTH) -> Figure:
    """The metric of every run against its bytes, with the front of the smallest and best.

    Args:
        front: of a network's runs.
        scale: of their metric.
        width: inches.
    """
    visible = visible_points(front, scale)
    points = sorted(visible, key=lambda point: point.basis in BASELINES, reverse=True)
    low, high = limits([point.value for point in points], front.dense, scale)
    narrow = width < WIDTH
    with styled():
        figure = Figure(figsize=(width, 4.4 if narrow else 4.0), layout="constrained")
        ax = figure.subplots()
        handles: dict[str, Any] = {}
        if not math.isnan(front.dense):
            handles["unpruned"] = ax.axhline(
                front.dense, color="#666666", ls=(0, (5, 3)), lw=1.2, zorder=1
            )
        for point in points:
            color, marker = series.basis_style(point.basis)
            is_baseline = point.basis in BASELINES
            error = None if math.isnan(point.spread) else point.spread
            drawn = ax.errorbar(
                point.bytes,
                point.value,
                yerr=error,
                fmt=marker,
                color=color,
                markersize=6.5 if is_baseline else 5,
                markerfacecolor="none" if is_baseline else color,
                elinewidth=0.7,
                alpha=0.9,
                zorder=2 if is_baseline else 3,
            )
            handles.setdefault(point.basis, drawn.lines[0])
        row_points = [row.point for row in front.rows]
        (handles["front"],) = ax.plot(
            [point.bytes for point in row_points],
            [point.value for point in row_points],
            color="#262626",
            lw=1.0,
            drawstyle="steps-post",
            zorder=2.5,
        )
        if front.chosen is not None:
            (handles["headline"],) = ax.plot(
                front.chosen.bytes,
                front.chosen.value,
                "o",
                markersize=14,
                markerfacecolor="none",
                color="#262626",
                linestyle="none",
            )
        format_metric(ax, low, high, 0.05, scale)
        format_bytes(ax)
        sizes = [point.bytes for point in points]
        ax.set_xlim(min(sizes) / 1.08, max(sizes) * 1.08)
        ticks = _round_sizes(min(sizes) / 1.08, max(sizes) * 1.08)
        ax.xaxis.set_major_locator(FixedLocator(spaced(ax, ticks, 0.16 if narrow else 0.09)))
        ax.set_xlabel("bytes of the file (log scale)")
        ax.set_ylabel(label_of(scale))
        order = sorted(handles, key=lambda name: name in ("unpruned", "front", "headline"))
        figure.legend(
            [handles[name] for name in order],
            order,
            loc="outside upper left" if narrow else "outside right upper",
            ncols=3 if narrow else 1,
            frameon=False,
        )
    return figure


def visible_points(front: Front, scale: Scale) -> list[Point]:
    """The points that are not so bad that the others would be on top of each other."""
    worst = [scale.sign * row.point.value for row in front.rows]
    if not math.isnan(front.dense):
        worst.append(scale.sign * front.dense - WORST * scale.tolerance(front.dense))
    return [point for point in front.points if scale.sign * point.value >= min(worst)]


def _round_sizes(low: float, high: float) -> list[float]:
    """Sizes of one or two digits between two sizes."""
    first = math.floor(math.log10(low))
    decades = [10.0**i for i in range(first, math.ceil(math.log10(high)) + 1)]
    for steps in ((1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(i / 2 for i in range(2, 20))):
        ticks = [step * ten for ten in decades for step in steps if low <= step * ten <= high]
        if len(ticks) > 3:
            break
    return ticks
