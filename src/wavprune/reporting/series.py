"""Which runs are one line of a picture, what it is called, and how it looks everywhere.

Runs are rows of a DataFrame, with the columns that the results file of a sweep has: ``method`` and
``wavelet``, the other settings of ``PruneConfig``, and what was measured. A column of settings that
is missing is taken for one that does not vary.
"""

from __future__ import annotations

from typing import Any

import pandas as pd

from ..config import WAVELETS

# The method of the rows that are the unpruned network.
UNPRUNED = "none"
# What wavelets are compared with.
BASELINES = ("min-weight", "random")

_STYLES = {
    "auto": ("#009E73", "P"),
    "uhaar": ("#0072B2", "o"),
    "dct": ("#D55E00", "^"),
    "klt": ("#E69F00", "v"),
    "haar": ("#56B4E9", "D"),
    "identity": ("#666666", "d"),
    "min-weight": ("#000000", "s"),
    "random": ("#999999", "X"),
}
# Coprime lengths: neighbours in PyWavelets' list look unlike each other.
_COLOURS = ("#CC79A7", "#882255", "#332288", "#999933", "#8C510A")
_MARKERS = ("<", ">", "p", "h", "*", "8", "H")
_ORDER = {label: place for place, label in enumerate((*_STYLES, *WAVELETS))}

# Runs that differ in one of these are not compared in one panel ...
_PANELS = ("data", "scope", "batchnorm", "targets", "ignore")
# ... those that differ in one of these are not one line, and what is left is repetition.
_VARIANTS = ("mode", "level", "force_level", "matched")
_REPAIRS = {"off": "not repaired", "update": "re-estimated", "match": "matched"}


def basis_label(method: str, wavelet: str | None) -> str:
    """What pictures and pages call a method: ``"dwt"`` by its basis.

    Example:
        >>> basis_label("dwt", "uhaar"), basis_label("min_weight", None)
        ('uhaar', 'min-weight')
    """
    return str(wavelet) if method == "dwt" else method.replace("_", "-")


def basis_style(label: str) -> tuple[str, str]:
    """The colour and matplotlib's marker of a basis or method, the same in every picture.

    The colours are ones that the colour-blind tell apart, of Okabe and Ito (2008) and Tol (2021).

    Example:
        >>> basis_style("uhaar")
        ('#0072B2', 'o')
    """
    if label in _STYLES:
        return _STYLES[label]
    place = _ORDER.get(label, len(_ORDER))
    return _COLOURS[place % len(_COLOURS)], _MARKERS[place % len(_MARKERS)]


def bases(runs: pd.DataFrame) -> pd.Series[str]:
    """The ``basis_label`` of each run."""
    named = [basis_label(*pair) for pair in zip(runs["method"], runs["wavelet"], strict=True)]
    return pd.Series(named, index=runs.index, dtype=object)


def labels(runs: pd.DataFrame) -> pd.Series[str]:
    """What tells each run's line from the others: its basis, and of its settings those that vary.

    Example:
        >>> runs = pd.DataFrame({"method": "dwt", "wavelet": ["db2", "db2", "dct"]})
        >>> list(labels(runs.assign(level=[1, 2, None])))
        ['db2, level 1', 'db2, level 2', 'dct']
    """
    basis = bases(runs)
    named = basis.copy()
    for column in _VARIANTS:
        if column in runs:
            values = pd.Series(
                [_variant(column, value) for value in runs[column]], runs.index, dtype=object
            )
            varies = values.groupby(basis).transform("nunique") > 1
            named = named.where(~varies | (values == ""), named + ", " + values)
    return named


def panels(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title -> the runs that are compared with each other; one set has the title ``""``.

    Example:
        >>> runs = pd.DataFrame({"scope": ["layer", "global"], "batchnorm": ["match", "match"]})
        >>> list(panels(runs))
        ['scope global', 'scope layer']
    """
    varying = [
        column for column in _PANELS if column in runs and runs[column].nunique(dropna=False) > 1
    ]
    if not varying:
        return {"": runs}
    return {
        ", ".join(_setting(column, value) for column, value in zip(varying, key, strict=True)): rows
        for key, rows in runs.groupby(varying, dropna=False)
    }


def lines(runs: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The points of a panel's lines.

    Runs that differ in their seed or model alone are one point. Their amounts are the same where
    the same was asked for, and else where the same was reached, to a thousandth.

    Args:
        runs: the pruned runs of one panel.
        x: the column along the horizontal axis.
        y: the column along the vertical axis.

    Returns:
        One row a point, line by line, the methods that all else is compared with last: ``label``,
        ``basis``, ``x``, the means of ``x`` and ``y``; ``low`` and ``high``, the extremes of ``y``;
        ``runs``, how many there are.

    Example:
        >>> runs = pd.DataFrame({"method": "random", "wavelet": None, "sparsity": [0.5, 0.5]})
        >>> lines(runs.assign(top1=[0.75, 0.25]), "sparsity", "top1")[["x", "y", "low", "high"]]
             x    y   low  high
        0  0.5  0.5  0.25  0.75
    """
    named = runs.assign(label=labels(runs), basis=bases(runs), point=_points(runs, x))
    found = named.groupby(["label", "basis", "point"], as_index=False).agg(
        x=(x, "mean"), y=(y, "mean"), low=(y, "min"), high=(y, "max"), runs=(y, "size")
    )
    found["rank"] = [
        (basis in BASELINES, _ORDER.get(basis, len(_ORDER)), label)
        for basis, label in zip(found["basis"], found["label"], strict=True)
    ]
    found = found.sort_values(["rank", "x"], ignore_index=True)
    return found.drop(columns=["rank", "point"]).astype(
        dict.fromkeys(("x", "y", "low", "high"), "float64")
    )


def _points(runs: pd.DataFrame, x: str) -> list[str]:
    """What repetitions share."""
    points = []
    for row in runs.to_dict("records"):
        asked = ("sparsity_requested", "percentile") if not row.get("matched") else ()
        column = next((name for name in asked if pd.notna(row.get(name))), None)
        reached = "sparsity" if "sparsity" in row else x
        amount = column or reached
        points.append(f"{amount}={float(row[amount]):.3f}")
    return points


def _variant(column: str, value: Any) -> str:
    if column == "level":
        return "full depth" if pd.isna(value) else f"level {value:g}"
    if pd.isna(value) or not value:
        return ""
    named = {"force_level": "forced", "matched": f"{value} matched"}
    return named.get(column, str(value))


def _setting(column: str, value: Any) -> str:
    if column == "batchnorm":
        return f"batch norm {_REPAIRS.get(value, value)}"
    if pd.isna(value) or value == "":
        return f"no {column}"
    return f"{column} {value}"
