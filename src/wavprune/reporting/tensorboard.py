"""Results as logs for TensorBoard: each run of a sweep is one there, with its settings."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
from pathlib import Path
from typing import Any

import pandas as pd

from ..common.optional import require
from ..errors import WavpruneError
from ..sweep.schema import EVALUATION, SETTINGS, STORED, TIMES, TOTALS
from ..sweep.store import Store
from . import series
from .scale import with_metric

# What TensorBoard shows as hyperparameters, and what as metrics.
_SETTINGS = tuple(column.name for column in SETTINGS)
_METRICS = tuple(
    column.name
    for column in (*EVALUATION, *TOTALS, *STORED, *TIMES)
    if column.kind in (int, float) and column.name != "higher_is_better"
)


def export_tensorboard(results: str | os.PathLike[str], output: str | os.PathLike[str]) -> int:
    """Write the finished runs of a results file as TensorBoard logs.

    Every run becomes a folder with one value of each measurement, and its settings as
    hyperparameters, so that TensorBoard's tables and parallel coordinates compare them.

    Args:
        results: a results file.
        output: the folder to make, for ``tensorboard --logdir``; it appears when it is complete.

    Returns:
        How many runs were written.

    Raises:
        WavpruneError: ``results`` is not a results file, or ``output`` exists.
        ImportError: the extra ``tensorboard`` is not installed.
    """
    require("tensorboard", extra="tensorboard", purpose="TensorBoard logs")
    output = Path(output)
    if output.exists():
        raise WavpruneError(f"{output} exists already; name a folder that does not")
    with Store(results) as store:
        runs = with_metric(store.runs())
    finished = runs[runs["status"] == "ok"]
    labels = series.labels(finished)
    with tempfile.TemporaryDirectory(dir=output.parent, prefix=f".{output.name}.") as folder:
        logs = Path(folder, "logs")
        logs.mkdir()
        for (_, run), label in zip(finished.iterrows(), labels, strict=True):
            _write(run, logs / _folder(run, label))
        shutil.move(logs, output)
    return len(finished)


def _folder(run: pd.Series[Any], label: str) -> str:
    """A relative path that says what the run is, and is no other run's."""
    name = f"{run['model']} {label} {run['sparsity']:.3g} {run['guid'][:8]}"
    return f"{_file_name(run['sweep']) or 'sweep'}/{_file_name(name)}"


def _file_name(text: str) -> str:
    return re.sub(r"[^\w.,=-]+", "-", text).strip(".-")


def _write(run: pd.Series[Any], folder: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    settings = {name: _plain(run[name]) for name in _SETTINGS if _known(run[name])}
    metrics = {name: float(run[name]) for name in _METRICS if _known(run[name])}
    # Named after the metric too, as TensorBoard cannot tell whose value it is.
    metrics[str(run["metric"])] = float(run["value"])
    finished = run["finished"].timestamp()
    with SummaryWriter(folder) as writer:
        for name, value in metrics.items():
            writer.add_scalar(name, value, 0, walltime=finished)
        writer.add_text("settings", f"    {run['settings']}", 0, walltime=finished)
        writer.add_hparams(settings, metrics, run_name=".")


def _known(value: Any) -> bool:
    return bool(pd.notna(value)) and value != ""


def _plain(value: Any) -> str | int | float:
    number: str | int | float = value.item() if hasattr(value, "item") else value
    return number
