"""One run: its coefficients, its kernels, and its confusion matrix."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import pandas as pd
import seaborn as sns
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.ticker import PercentFormatter

from ...errors import WavpruneError
from .style import WIDTH, panels, short, styled

MAX_LABELS = 20
MAX_KERNELS = 64


def coefficient_histogram(
    histograms: Mapping[str, Mapping[str, Any]], label: str = "coefficient"
) -> Figure:
    """The distribution of each layer's coefficients before pruning, with the threshold marked.

    Args:
        histograms: layer name -> ``edges``, B+1 ascending values; ``counts``, the number of
            coefficients in each of the B intervals; and ``threshold``, below which they were
            pruned by magnitude, or None.
        label: of the axis of the coefficients.

    Raises:
        WavpruneError: there is no layer, or a layer's counts do not fit its edges.

    Example:
        >>> layer = {"edges": [-1.0, 0.0, 1.0], "counts": [5, 7], "threshold": 0.25}
        >>> len(coefficient_histogram({"conv1": layer}).axes)
        1
    """
    if not histograms:
        raise WavpruneError("histograms has no layer to picture; give at least one")
    with styled():
        figure, axes = panels(len(histograms), columns=3, height=2.3)
        for ax, (name, histogram) in zip(axes, histograms.items(), strict=True):
            edges = np.asarray(histogram["edges"], dtype=np.float64)
            counts = np.asarray(histogram["counts"], dtype=np.float64)
            if edges.ndim != 1 or counts.shape != (len(edges) - 1,):
                raise WavpruneError(
                    f"layer {name!r}: {counts.size} counts do not fit {edges.size} edges; allowed: "
                    "one more edge than counts"
                )
            _histogram(ax, edges, counts, histogram.get("threshold"))
            ax.set_title(short(name), parse_math=False)
        figure.supxlabel(label, fontsize="medium")
        figure.supylabel("number (log scale)", fontsize="medium")
        handles, texts = axes[0].get_legend_handles_labels()
        figure.legend(handles, texts, loc="outside upper center", ncols=3, frameon=False)
    return figure


def kernels_before_after(before: npt.ArrayLike, after: npt.ArrayLike) -> Figure:
    """The first 64 kernels of a layer as a grid, before and after pruning, in one color scale.

    Args:
        before: ``(N, kh, kw)`` kernels or a ``(Cout, Cin/groups, kh, kw)`` weight.
        after: the same, pruned.

    Raises:
        WavpruneError: the shapes differ, or are not those of kernels.

    Example:
        >>> figure = kernels_before_after(np.eye(3)[None], np.zeros((1, 3, 3)))
        >>> [ax.get_title() for ax in figure.axes[:2]]
        ['before', 'after']
    """
    pair = [np.asarray(kernels, dtype=np.float64) for kernels in (before, after)]
    if pair[0].shape != pair[1].shape or pair[0].ndim not in (3, 4) or 0 in pair[0].shape:
        raise WavpruneError(
            f"before is {pair[0].shape} and after {pair[1].shape}; allowed: the same shape twice, "
            "(N, kh, kw) or (Cout, Cin/groups, kh, kw), without a 0"
        )
    grids = [_tiled(kernels.reshape(-1, *kernels.shape[-2:])[:MAX_KERNELS]) for kernels in pair]
    largest = max(float(np.nanmax(np.abs(grid))) for grid in grids) or 1.0
    height, width = grids[0].shape
    with styled():
        size = (WIDTH, max(2.2, min(10.0, 3.0 * height / width + 0.7)))
        figure = Figure(figsize=size, layout=ConstrainedLayoutEngine(wspace=0.08))
        axes = figure.subplots(1, 2)
        colors = sns.color_palette("vlag", as_cmap=True).with_extremes(bad="#cccccc")
        for ax, grid, title in zip(axes, grids, ("before", "after"), strict=True):
            image = ax.imshow(grid, cmap=colors, vmin=-largest, vmax=largest)
            ax.set_title(title)
            ax.set_axis_off()
        figure.colorbar(image, ax=list(axes), label="weight", shrink=0.85, aspect=30)
    return figure


def confusion_matrix(confusion: npt.ArrayLike, names: Sequence[str] | None = None) -> Figure:
    """How often each class was predicted for each class.

    Args:
        confusion: ``(C, C)`` counts: rows are the true classes, columns the predicted ones.
        names: the names of the C classes; None numbers them from 0.

    Raises:
        WavpruneError: ``confusion`` is not square, or there are not C names.

    Example:
        >>> confusion_matrix([[9, 1], [0, 10]]).axes[0].get_ylabel()
        'true class'
    """
    counts = np.asarray(confusion)
    if counts.ndim != 2 or counts.shape[0] != counts.shape[1] or not counts.size:
        raise WavpruneError(f"confusion is {counts.shape}; allowed: (C, C), C at least 1")
    classes = len(counts)
    if names is not None and len(names) != classes:
        raise WavpruneError(
            f"names has {len(names)} entries for {classes} classes; allowed: one per class"
        )
    few = classes <= MAX_LABELS
    labels = [short(str(name), 20) for name in (names if names is not None else range(classes))]
    longest = max(map(len, labels))
    shares = counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    side = 2.0 + 0.36 * min(classes, MAX_LABELS) + 0.09 * longest
    with styled():
        figure = Figure(figsize=(side * 1.1, side), layout="constrained")
        ax = figure.subplots()
        sns.heatmap(
            pd.DataFrame(shares),
            ax=ax,
            cmap="Blues",
            # On a linear scale a few mistakes among many right answers would be as pale as none.
            norm=PowerNorm(0.4, 0.0, 1.0),
            annot=np.where(counts > 0, counts.astype(str), "") if few else None,
            fmt="",
            square=True,
            linewidths=0.5 if few else 0.0,
            linecolor="#dddddd",
            rasterized=not few,
            cbar_kws={
                "shrink": 0.8,
                "label": "share of the true class",
                "format": PercentFormatter(1.0),
                "ticks": [0.0, 0.01, 0.05, 0.2, 0.5, 1.0],
            },
        )
        for text in ax.texts:
            if text.get_color() == ".15":
                # Cells are as pale in the dark.
                text.set_color("#272727")
        _label_classes(ax, labels, longest)
        ax.set_xlabel("predicted class")
        ax.set_ylabel("true class")
    return figure


def _label_classes(ax: Axes, labels: Sequence[str], longest: int) -> None:
    """Label every class, or six of them where they are many."""
    count = len(labels)
    few = count <= MAX_LABELS
    shown = range(count) if few else sorted({round(i * (count - 1) / 5) for i in range(6)})
    rotation: Any = 90 if few and longest > 3 else 0
    texts = [labels[i] for i in shown]
    positions = [i + 0.5 for i in shown]
    ax.set_xticks(positions, texts, rotation=rotation, parse_math=False)
    ax.set_yticks(positions, texts, rotation=0, parse_math=False)


def _histogram(
    ax: Axes, edges: npt.NDArray[Any], counts: npt.NDArray[Any], threshold: float | None
) -> None:
    ax.stairs(counts, edges, fill=True, color="#7FA3CC", label="coefficients")
    ax.set_yscale("log")
    ax.set_ylim(0.6, max(float(counts.max()), 1.0) * 2)
    ax.set_xlim(edges[0], edges[-1])
    if threshold is None or not math.isfinite(threshold):
        return
    low = max(-threshold, float(edges[0]))
    ax.axvspan(low, min(threshold, edges[-1]), color="#D55E00", alpha=0.12, lw=0, label="pruned")
    for i, x in enumerate((threshold, -threshold)):
        if edges[0] <= x <= edges[-1]:
            ax.axvline(x, color="#D55E00", lw=1.2, label=None if i else "threshold")


def _tiled(kernels: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Kernels in a grid that is about square, with half a value between them."""
    count, kh, kw = kernels.shape
    columns = math.ceil(math.sqrt(count))
    rows = math.ceil(count / columns)
    grid = np.full((rows * (2 * kh + 1) - 1, columns * (2 * kw + 1) - 1), np.nan)
    for i, kernel in enumerate(kernels):
        top, left = (i // columns) * (2 * kh + 1), (i % columns) * (2 * kw + 1)
        grid[top : top + 2 * kh, left : left + 2 * kw] = np.kron(kernel, np.ones((2, 2)))
    return grid
