"""What the pictures have in common: their style, their panels, their numbers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import matplotlib as mpl
import numpy as np
import seaborn as sns
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Inches: as wide as a page's column.
WIDTH = 7.6
# The square root of what is missing to 1: 99% and 99.9% are as far apart as 60% and 75%, and 100%
# has a place, which it has not on a logarithmic scale.
STRETCHED = (
    lambda values: 1 - np.sqrt(np.maximum(1 - np.asarray(values), 0)),
    lambda places: 1 - (1 - np.asarray(places)) ** 2,
)
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")


@contextmanager
def styled() -> Iterator[None]:
    """What is drawn in the block looks the same whatever matplotlib is set to."""
    style: Any = {
        **sns.axes_style("whitegrid", {"grid.color": "#e4e4e4", "axes.edgecolor": "#888888"}),
        **sns.plotting_context("notebook", font_scale=0.8),
        "font.family": ["DejaVu Sans"],
    }
    with mpl.rc_context(style):
        yield


def panels(count: int, columns: int, height: float) -> tuple[Figure, list[Axes]]:
    """A figure of so many panels, row by row, each ``height`` inches high."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(WIDTH, height * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    axes: list[Axes] = list(grid.flat)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def short(name: str, longest: int = 38) -> str:
    """A name that fits beside a picture: its end tells more than its middle."""
    tail = longest * 2 // 3
    return name if len(name) <= longest else f"{name[: longest - tail - 1]}…{name[-tail:]}"


def require(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Raise ValueError unless the frame has these columns."""
    missing = [column for column in columns if column not in frame]
    if missing:
        raise ValueError(f"there is no column {', '.join(missing)}; there are {list(frame)}")
