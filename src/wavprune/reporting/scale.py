"""How the values of a metric are written, compared and drawn."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd

from ..evaluation.metrics import TOP1
from ..evaluation.spread import share_error

# How much top-1 accuracy a run may lose and still count as accurate as the unpruned network, and
# which part of its value any other metric.
TOLERANCE = 0.01


@dataclass(frozen=True)
class Scale:
    """A metric on the page.

    Attributes:
        metric: its name.
        higher: whether larger values are better.
        asked: how much worse a run may be and still count as good as the unpruned network; None
            takes a point of accuracy, or a hundredth of any other metric.
    """

    metric: str = TOP1
    higher: bool = True
    asked: float | None = None

    @property
    def is_share(self) -> bool:
        """Whether values are shares, written as percentages."""
        return self.metric == TOP1

    @property
    def name(self) -> str:
        """The metric in a sentence."""
        return "top-1 accuracy" if self.is_share else self.metric

    @property
    def sign(self) -> int:
        """1 where higher is better, else -1."""
        return 1 if self.higher else -1

    def tolerance(self, dense: float) -> float:
        """How much worse than the unpruned network's a value may be."""
        if self.asked is not None:
            return self.asked
        return TOLERANCE if self.is_share else TOLERANCE * abs(dense)

    def text(self, value: float) -> str:
        """A value in a sentence."""
        return percent(value) if self.is_share else f"{value:.4g}"

    def cell(self, value: float) -> str:
        """A value in a column, always with as many digits."""
        return percentage(value) if self.is_share else f"{value:.4g}"

    def difference(self, value: float) -> str:
        """A difference without a sign, with its unit.

        Example:
            >>> Scale().difference(0.01), Scale("PSNR").difference(0.314)
            ('1 point', '0.314')
        """
        return points(value) if self.is_share else f"{value:.3g}"

    def bare(self, value: float) -> str:
        """A difference without sign and unit."""
        return f"{100 * value:.1f}" if self.is_share else f"{value:.2g}"

    def change(self, value: float) -> str:
        """A difference with its sign.

        Example:
            >>> Scale().change(-0.005)
            '-0.5 points'
        """
        written = self.difference(abs(value))
        sign = "-" if value < 0 else "+"
        return f"{sign}{written}" if any(c in "123456789" for c in written) else written


def with_metric(runs: pd.DataFrame) -> pd.DataFrame:
    """Runs with ``metric``, ``value``, ``higher_is_better`` and ``spread``.

    Rows that lack them, such as those of an older results file, are classifiers', whose value is
    ``top1``.
    """
    runs = runs.copy()
    for name in ("metric", "value", "higher_is_better", "spread", "change_spread"):
        if name not in runs:
            runs[name] = None if name == "metric" else np.nan
    if "top1" in runs:
        older = runs["value"].isna() & runs["top1"].notna()
        runs.loc[older, "value"] = runs.loc[older, "top1"].astype("float64")
        runs.loc[older, "metric"] = TOP1
        runs["value"] = runs["value"].astype("float64")
        runs["higher_is_better"] = runs["higher_is_better"].fillna(1)
        if "samples" in runs:
            counted = older & runs["samples"].notna()
            runs.loc[counted, "spread"] = [
                share_error(float(value), int(samples))
                for value, samples in runs.loc[counted, ["value", "samples"]].itertuples(
                    index=False
                )
            ]
    return runs


def scale_of(runs: pd.DataFrame, asked: float | None = None) -> Scale:
    """The scale of runs that were measured by one metric."""
    first = runs.iloc[0]
    return Scale(str(first["metric"]), bool(first["higher_is_better"]), asked)


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


def points(value: float) -> str:
    """The difference of two fractions, in percentage points.

    Example:
        >>> points(0.01), points(0.179)
        ('1 point', '17.9 points')
    """
    rounded = round(100 * value, 1)
    return f"{rounded:g} {'point' if rounded == 1 else 'points'}"


def size(value: float) -> str:
    """A number of bytes with a suitable unit.

    Example:
        >>> size(48_178), size(312), size(999_600)
        ('48.2 kB', '312 B', '1 MB')
    """
    for unit in ("B", "kB", "MB"):
        # As written: what is rounded up to 1000 is one of the next unit.
        if float(f"{value:.3g}") < 1000:
            return f"{value:.3g} {unit}"
        value /= 1000
    return f"{value:.3g} GB"
