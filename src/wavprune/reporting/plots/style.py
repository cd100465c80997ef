"""What all pictures share: style, panels, formats of numbers."""

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

from ...errors import WavpruneError

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes

# Inches: the width of a column of the page, and of a phone's.
WIDTH = 7.6
NARROW = 4.3
# An axis that is linear in sqrt(1 - value): it spreads values near 100% as a logarithmic axis
# would, but has room for 100% itself.
STRETCHED = (
    lambda values: 1 - np.sqrt(np.maximum(1 - np.asarray(values), 0)),
    lambda positions: 1 - (1 - np.asarray(positions)) ** 2,
)
PERCENT = FuncFormatter(lambda value, _: f"{100 * value:.3g}%")


@contextmanager
def styled() -> Iterator[None]:
    """Within the block pictures look the same, whatever matplotlib's settings are."""
    style: Any = {
        **sns.axes_style("whitegrid", {"grid.color": "#e4e4e4", "axes.edgecolor": "#888888"}),
        **sns.plotting_context("notebook", font_scale=0.8),
        "font.family": ["DejaVu Sans"],
    }
    with mpl.rc_context(style):
        yield


def panels(
    count: int, columns: int, height: float, width: float = WIDTH
) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels, row by row, each ``height`` inches high."""
    columns = min(columns, count)
    rows = math.ceil(count / columns)
    figure = Figure(figsize=(width, height * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    axes: list[Axes] = list(grid.flat)
    for ax in axes[count:]:
        ax.remove()
    return figure, axes[:count]


def short(name: str, longest: int = 38) -> str:
    """A name shortened to fit beside a picture; its end says more than its middle."""
    tail = longest * 2 // 3
    return name if len(name) <= longest else f"{name[: longest - tail - 1]}…{name[-tail:]}"


def check_columns(frame: pd.DataFrame, columns: Sequence[str]) -> None:
    """Raise WavpruneError unless the frame has these columns."""
    missing = [column for column in columns if column not in frame]
    if missing:
        raise WavpruneError(f"there is no column {', '.join(missing)}; there are {list(frame)}")
