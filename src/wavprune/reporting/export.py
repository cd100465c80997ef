"""Results as files that other programs read."""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from ..atomic import replaced
from ..sweep.store import Store

if TYPE_CHECKING:
    import pandas as pd

# What WaveletTransforms called the methods.
PHASES = {"dwt": "selective", "min_weight": "min", "random": "random"}


def export(
    results: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    layers: bool = False,
    wavelettransforms: bool = False,
) -> int:
    """Write the runs of a results file, or their layers, as a table.

    Args:
        results: the file of a sweep.
        output: a ``.csv``, ``.parquet`` or ``.json`` (a list of objects) file, which appears when
            it is complete.
        layers: one row a layer of each run, not one a run; the run's ``guid`` tells which.
        wavelettransforms: one row a layer, with the columns that WaveletTransforms' logs have.

    Returns:
        How many rows were written.

    Raises:
        ValueError: ``results`` is no results file, or ``output`` has another ending.
        ImportError: pandas or, for Parquet, pyarrow is not installed.
    """
    output = Path(output)
    write = _WRITERS.get(output.suffix.lower())
    if write is None:
        raise ValueError(f"{output} has an unknown ending; allowed: {', '.join(_WRITERS)}")
    with Store(results) as store:
        if wavelettransforms:
            frame = wavelettransforms_table(store)
        else:
            frame = store.layers() if layers else store.runs()
    with replaced(output) as new:
        write(frame, new)
    return len(frame)


def wavelettransforms_table(store: Store) -> pd.DataFrame:
    """One row a layer of each pruned run, with WaveletTransforms' columns.

    ``Threshold`` is its knob: the percentile or, where a sparsity was given, that. ``Phase`` is
    ``"selective"``, ``"min"`` or ``"random"``. ``Non-zero Params`` counts weights that are not 0
    afterwards; ``Total Pruned Count`` is ``Original Parameter Count`` less the values kept, so it
    counts no structural zeros, which WaveletTransforms counted.
    """
    runs = store.runs().set_index("guid")
    layers = store.layers()
    asked = runs["percentile"].fillna(runs["sparsity_requested"]).fillna(runs["sparsity"])
    numel = layers["shape"].map(lambda shape: math.prod(map(int, shape.split("x"))))
    numel = numel.astype("Int64")
    frame = layers[["guid"]].rename(columns={"guid": "GUID"})
    frame["Wavelet"] = layers["wavelet"]
    frame["Level"] = layers["level_used"]
    frame["Threshold"] = layers["guid"].map(asked)
    frame["Phase"] = layers["method"].map(PHASES)
    frame["Original Parameter Count"] = numel
    frame["Non-zero Params"] = numel - layers["weight_zeros"]
    frame["Total Pruned Count"] = numel - layers["kept"]
    frame["Layer Name"] = layers["name"]
    return frame


def _write_csv(frame: pd.DataFrame, path: Path) -> None:
    frame.to_csv(path, index=False)


def _write_json(frame: pd.DataFrame, path: Path) -> None:
    frame.to_json(path, orient="records", indent=2, date_format="iso", double_precision=15)


def _write_parquet(frame: pd.DataFrame, path: Path) -> None:
    try:
        import pyarrow  # noqa: F401  # pandas' own message names no extra
    except ImportError as error:
        raise ImportError("Parquet needs pyarrow; pip install 'wavprune[sweep]'") from error
    frame.to_parquet(path, index=False, engine="pyarrow")


_WRITERS: dict[str, Callable[[pd.DataFrame, Path], None]] = {
    ".csv": _write_csv,
    ".parquet": _write_parquet,
    ".json": _write_json,
}
