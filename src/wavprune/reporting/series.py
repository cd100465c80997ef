"""Which runs form one line of a picture, its label, and its style.

Runs are rows of a DataFrame, with the columns of a results file (see ``sweep.schema``): ``method``
and ``wavelet``, the other settings, and what was measured. A setting whose column is missing does
not vary.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterable
from typing import Any

import pandas as pd

from ..config import WAVELETS
from ..evaluation.spread import joint_error
from ..sweep.schema import SETTINGS

# The method of the rows that are the unpruned network.
UNPRUNED = "none"
# What wavelets are compared with.
BASELINES = ("min-weight", "random")

# Colors that the color-blind can tell apart, of Okabe and Ito (2008) and Tol (2021).
_STYLES = {
    "auto": ("#009E73", "P"),
    "uhaar": ("#0072B2", "o"),
    "dct": ("#D55E00", "^"),
    "klt": ("#E69F00", "v"),
    "haar": ("#56B4E9", "D"),
    "identity": ("#666666", "d"),
    "min-weight": ("#111111", "s"),
    "random": ("#999999", "X"),
}
# The cycles of all others. Their lengths are coprime, so neighbors in PyWavelets' list differ.
_COLORS = ("#CC79A7", "#882255", "#332288", "#999933", "#8C510A")
_MARKERS = ("<", ">", "p", "h", "*", "8", "H")
_ORDER = {label: index for index, label in enumerate((*_STYLES, *WAVELETS))}

# Runs that differ in one of these are not compared in one panel ...
_PANELS = tuple(column.name for column in SETTINGS if column.role == "panel")
# ... those that differ in one of these are not one line, and what is left is repetition.
_VARIANTS = tuple(column.name for column in SETTINGS if column.role == "variant")
# What was done to a network beside pruning it.
_DETAILS = ("calibrated", "epochs", "bits", "target_kl", "target_bits_per_weight")
_UNITS = {"epochs": "{:g} epochs", "bits": "{:g} bits", "target_kl": "KL {:g}"}
_UNITS["target_bits_per_weight"] = "{:g} bits per weight"
_STORED = ("bits", "target_kl", "target_bits_per_weight")
_REPAIRS = {"off": "not repaired", "update": "re-estimated", "match": "matched"}


def basis_label(method: str, wavelet: str | None) -> str:
    """The name of a method in pictures and pages: the basis of ``"dwt"``.

    Example:
        >>> basis_label("dwt", "uhaar"), basis_label("min_weight", None)
        ('uhaar', 'min-weight')
    """
    return str(wavelet) if method == "dwt" else method.replace("_", "-")


def basis_style(label: str) -> tuple[str, str]:
    """The color and matplotlib's marker of a basis or method, the same in every picture.

    Well-known ones have a style of their own, all others take theirs from a cycle, by their name.

    Example:
        >>> basis_style("uhaar")
        ('#0072B2', 'o')
    """
    if label in _STYLES:
        return _STYLES[label]
    index = _ORDER[label] if label in _ORDER else zlib.crc32(label.encode())
    return _COLORS[index % len(_COLORS)], _MARKERS[index % len(_MARKERS)]


def bases(runs: pd.DataFrame) -> pd.Series[str]:
    """The ``basis_label`` of each run."""
    named = [basis_label(*pair) for pair in zip(runs["method"], runs["wavelet"], strict=True)]
    return pd.Series(named, index=runs.index, dtype=object)


def labels(runs: pd.DataFrame) -> pd.Series[str]:
    """The label of each run's line: its basis, and those of its settings that vary.

    Example:
        >>> runs = pd.DataFrame({"method": "dwt", "wavelet": ["db2", "db2", "dct"]})
        >>> list(labels(runs.assign(level=[1, 2, None])))
        ['db2, level 1', 'db2, level 2', 'dct']
    """
    basis = bases(runs)
    named = basis.copy()
    for column in _VARIANTS:
        if column in runs:
            texts = [
                _variant(column, *pair) for pair in zip(runs["method"], runs[column], strict=True)
            ]
            values = pd.Series(texts, runs.index, dtype=object)
            varies = values.groupby(basis).transform("nunique") > 1
            named = named.where(~varies | (values == ""), named + ", " + values)
    return named


def panels(runs: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """Title -> the runs that are compared with each other; a single panel has the title ``""``.

    Example:
        >>> runs = pd.DataFrame({"scope": ["layer", "global"], "batchnorm": ["match", "match"]})
        >>> list(panels(runs))
        ['scope global', 'scope layer']
    """
    runs, whole = _comparable(runs), runs
    varying = [
        column for column in _PANELS if column in runs and runs[column].nunique(dropna=False) > 1
    ]
    if not varying:
        return {"": whole}
    return {
        _title(dict(zip(varying, key, strict=True))): whole.loc[rows.index]
        for key, rows in runs.groupby(varying, dropna=False)
    }


def lines(runs: pd.DataFrame, x: str, y: str) -> pd.DataFrame:
    """The points of a panel's lines.

    Runs that differ only in their seed or model are one point: those for which the same amount was
    requested or, where none was, those that reached the same, to a thousandth.

    Args:
        runs: the pruned runs of one panel.
        x: the column along the horizontal axis.
        y: the column along the vertical axis.

    Returns:
        One row per point, line by line, the baselines last: ``label``, ``basis``; ``x`` and ``y``,
        the means; ``low`` and ``high``, the extremes of ``y``; ``error``, the standard error of the
        mean, NaN if it is not known; ``runs``, the number of runs.

    Example:
        >>> runs = pd.DataFrame({"method": "random", "wavelet": None, "sparsity": [0.5, 0.5]})
        >>> lines(runs.assign(top1=[0.75, 0.25]), "sparsity", "top1")[["x", "y", "low", "high"]]
             x    y   low  high
        0  0.5  0.5  0.25  0.75
    """
    named = runs.assign(label=labels(runs), basis=bases(runs), point=points(runs, x))
    if "spread" not in named:
        named["spread"] = float("nan")
    found = named.groupby(["label", "basis", "point"], as_index=False).agg(
        x=(x, "mean"), y=(y, "mean"), low=(y, "min"), high=(y, "max"), runs=(y, "size")
    )
    errors = {
        key: joint_error(rows[y].tolist(), rows["spread"].tolist())
        for key, rows in named.groupby(["label", "basis", "point"])
    }
    keys = zip(found["label"], found["basis"], found["point"], strict=True)
    found["error"] = [errors[key] for key in keys]
    found["rank"] = [
        (basis in BASELINES, _ORDER.get(basis, len(_ORDER)), label)
        for basis, label in zip(found["basis"], found["label"], strict=True)
    ]
    found = found.sort_values(["rank", "x"], ignore_index=True)
    return found.drop(columns=["rank", "point"]).astype(
        dict.fromkeys(("x", "y", "low", "high", "error"), "float64")
    )


def listed(names: Iterable[str]) -> str:
    """Names as an enumeration in a sentence.

    Example:
        >>> listed(["uhaar", "dct", "klt"])
        'uhaar, dct and klt'
    """
    *most, last = names
    return f"{', '.join(most)} and {last}" if most else last


def details(run: pd.Series[Any]) -> str:
    """How a run was calibrated, trained and stored, in a few words.

    Example:
        >>> details(pd.Series({"epochs": 5, "bits": 8, "calibrated": "full"}))
        'calibrated full, 5 epochs, 8 bits'
    """
    named = [
        _setting(column, run[column])
        for column in _DETAILS
        if column in run and pd.notna(run[column]) and run[column] != ""
    ]
    return ", ".join(named)


def points(runs: pd.DataFrame, x: str) -> list[str]:
    """A key for each run that its repetitions share; see ``lines``."""
    keys = []
    for row in runs.to_dict("records"):
        requested = ("sparsity_requested", "percentile") if not row.get("matched") else ()
        reached = "sparsity" if "sparsity" in row else x
        amount = next((name for name in requested if pd.notna(row.get(name))), reached)
        keys.append(f"{amount}={float(row[amount]):.3f}")
    return keys


def _variant(column: str, method: str, value: Any) -> str:
    if column == "wavelet" and method == "dwt":
        return ""  # the basis is its label already
    if column == "level":
        return "full depth" if pd.isna(value) else f"level {value:g}"
    if pd.isna(value) or not value:
        return ""
    named = {"force_level": "forced", "matched": f"{value} matched"}
    named["calibrated"] = f"calibrated {value}"
    return named.get(column, str(value))


def _comparable(runs: pd.DataFrame) -> pd.DataFrame:
    """Calibrated runs, which repair batch norms themselves, beside the others of one repair."""
    if not {"calibrated", "batchnorm"} <= set(runs):
        return runs
    calibrated = runs["calibrated"].notna() & (runs["calibrated"] != "")
    repairs = runs.loc[~calibrated, "batchnorm"].unique()
    if not calibrated.any() or len(repairs) != 1:
        return runs
    return runs.assign(batchnorm=repairs[0])


def _title(settings: dict[str, Any]) -> str:
    """The settings of a panel; of those that say how it was stored, one has a value at most."""
    stored = [_setting(c, v) for c, v in settings.items() if c in _STORED and pd.notna(v)]
    named = [_setting(column, v) for column, v in settings.items() if column not in _STORED]
    if not stored and any(column in settings for column in _STORED):
        stored = ["not stored"]
    return ", ".join(named + stored)


def _setting(column: str, value: Any) -> str:
    if column == "batchnorm":
        return f"batch norm {_REPAIRS.get(value, value)}"
    if pd.isna(value) or value == "":
        return "not trained" if column == "epochs" else f"no {column}"
    if column in _UNITS:
        return "1 epoch" if (column, value) == ("epochs", 1) else _UNITS[column].format(value)
    return f"{column} {value}"
