"""Results as tables in files that other programs read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.atomic import replaced
from ..common.optional import require
from ..common.text import csv_cell
from ..errors import WavpruneError
from ..sweep.store import Store

if TYPE_CHECKING:
    import pandas as pd

# What WaveletTransforms called the methods.
_PHASES = {"dwt": "selective", "min_weight": "min", "random": "random"}


def export(
    results: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    layers: bool = False,
    wavelettransforms: bool = False,
) -> int:
    """Write the runs of a results file, or their layers, as a table.

    The columns are those of ``docs/results.md``. In a CSV file a text that a spreadsheet would take
    for a formula has an apostrophe in front of it.

    Args:
        results: a results file.
        output: a ``.csv``, ``.parquet`` or ``.json`` (a list of objects) file, which appears when
            it is complete.
        layers: one row per layer instead of one per run; its ``guid`` is that of the run.
        wavelettransforms: one row per layer, with the columns of WaveletTransforms' logs.

    Returns:
        How many rows were written.

    Raises:
        WavpruneError: ``results`` is not a results file, or ``output`` has another ending.
        ImportError: pandas or, for Parquet, pyarrow is not installed.
    """
    output = Path(output)
    write = _WRITERS.get(output.suffix.lower())
    if write is None:
        raise WavpruneError(f"{output} has an unknown ending; allowed: {', '.join(_WRITERS)}")
    with Store(results) as store:
        if wavelettransforms:
            frame = wavelettransforms_table(store)
        else:
            frame = store.layers() if layers else store.runs()
    with replaced(output) as new:
        write(frame, new)
    return len(frame)


def wavelettransforms_table(store: Store) -> pd.DataFrame:
    """One row per layer of each pruned run, with WaveletTransforms' columns.

    ``Threshold`` is its setting of that name: the percentile or, where none was given, the
    sparsity. ``Phase`` is ``"selective"``, ``"min"`` or ``"random"``. ``Non-zero Params`` counts
    the weights that are not 0 afterwards. ``Total Pruned Count`` is ``Original Parameter Count``
    minus the kept values, so unlike WaveletTransforms it does not count structural zeros.
    """
    runs = store.runs().set_index("guid")
    layers = store.layers()
    amounts = runs["percentile"].fillna(runs["sparsity_requested"]).fillna(runs["sparsity"])
    numel = layers["shape"].map(lambda shape: math.prod(map(int, shape.split("x"))))
    numel = numel.astype("Int64")
    frame = layers[["guid"]].rename(columns={"guid": "GUID"})
    frame["Wavelet"] = layers["wavelet"]
    frame["Level"] = layers["level_used"]
    frame["Threshold"] = layers["guid"].map(amounts)
    frame["Phase"] = layers["method"].map(_PHASES)
    frame["Original Parameter Count"] = numel
    frame["Non-zero Params"] = numel - layers["weight_zeros"]
    frame["Total Pruned Count"] = numel - layers["kept"]
    frame["Layer Name"] = layers["name"]
    return frame


def csv_text(frame: pd.DataFrame) -> str:
    """A table as CSV, in which no text is a formula."""
    texts = {name: column.map(csv_cell) for name, column in frame.items() if _is_text(column)}
    named = frame.assign(**texts)  # type: ignore[arg-type]  # names are strings
    return named.to_csv(index=False)


def _write_csv(frame: pd.DataFrame, path: Path) -> None:
    path.write_text(csv_text(frame), encoding="utf-8")


def _is_text(column: pd.Series[Any]) -> bool:
    return column.dtype.kind == "O"


def _write_json(frame: pd.DataFrame, path: Path) -> None:
    frame.to_json(path, orient="records", indent=2, date_format="iso", double_precision=15)


def _write_parquet(frame: pd.DataFrame, path: Path) -> None:
    require("pyarrow", extra="parquet", purpose="Parquet")
    frame.to_parquet(path, index=False, engine="pyarrow")


_WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
    ".json": _write_json,
}
