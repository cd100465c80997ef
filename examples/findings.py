"""Measure where wavelet pruning wins and where it does not, and write ``docs/findings.md``.

``python examples/findings.py`` trains ResNet-18 on MNIST, runs the sweeps into
``out/findings/results.db``, extracts the tables in ``docs/findings/`` from that file, and writes
the page from those tables. Results that exist already are not computed again. With
``--from-tables`` the page is written from the existing tables alone, in seconds.

It needs ``pip install 'wavprune[examples,huggingface]'`` and no download.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import click
import pandas as pd
import resnet18_mnist
from findings_page import LAYERWISE, write_page

from wavprune.common.atomic import replaced
from wavprune.demo import SEEDS
from wavprune.sweep.runner import run_sweep
from wavprune.sweep.settings import parse_sweep
from wavprune.sweep.store import Store

DOCS = Path(__file__).parents[1] / "docs"

SPARSITIES = [0.5, 0.62, 0.7, 0.79, 0.9, 0.95, 0.97]
# The runs that prune each layer separately, so that the errors of a layer can be compared.
LAYERS = {
    "method": ["dwt", "min_weight"],
    "wavelet": ["uhaar", "haar", "dct", "klt"],
    "sparsity": LAYERWISE,
}
DIGITS: dict[str, Any] = {
    "models": [{"builtin": "demo", "seed": seed} for seed in SEEDS],
    "data": {"builtin": "demo", "split": "test"},
    "calibration": {"builtin": "demo", "split": "train"},
    "batch_size": 1200,
}
# The same as in a YAML file for ``wavprune sweep``.
SWEEPS: tuple[dict[str, Any], ...] = (
    {
        **DIGITS,
        "name": "digits",
        "grid": [
            {
                "method": ["dwt", "min_weight", "random"],
                "wavelet": ["uhaar", "haar", "dct", "klt", "auto"],
                "sparsity": SPARSITIES,
                "scope": "global",
            },
            LAYERS,
        ],
    },
    {
        **DIGITS,
        "name": "repair",
        "batchnorm": ["off", "update", "match"],
        "grid": {
            "method": ["dwt", "min_weight"],
            "sparsity": SPARSITIES,
            "scope": "global",
        },
    },
    {
        **DIGITS,
        "name": "mlp",
        "models": [{"builtin": "demo-mlp", "seed": seed} for seed in SEEDS],
        "grid": [
            {
                "method": ["dwt", "min_weight", "random"],
                "wavelet": ["uhaar", "dct", "auto"],
                "targets": ["fc1", "fc2"],
                "sparsity": SPARSITIES,
                "scope": "global",
            },
            {
                "wavelet": "haar",
                "level": [1, 2, 3, 4, 5],
                "targets": ["fc1", "fc2"],
                "sparsity": SPARSITIES,
                "scope": "global",
            },
        ],
    },
)

COLUMNS = [
    "sweep",
    "model",
    "method",
    "wavelet",
    "level",
    "scope",
    "seed",
    "batchnorm",
    "sparsity_requested",
    "sparsity",
    "weight_sparsity",
    "top1",
    "samples",
    "kl",
    "stored_bytes",
    "numel",
    "relative_error",
]
LAYER_COLUMNS = ["name", "shape", "level_requested", "level_used", "sparsity", "relative_error"]


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/findings"),
    show_default=True,
    help="Folder for the networks and the results file.",
)
@click.option(
    "--docs",
    type=click.Path(file_okay=False, path_type=Path),
    default=DOCS,
    help="Folder for the tables and the page. [default: docs/ of the repository]",
)
@click.option("--jobs", type=click.IntRange(min=1), default=None, help="Number of processes.")
@click.option("--from-tables", is_flag=True, help="Write the page from existing tables.")
def main(out: Path, docs: Path, jobs: int | None, from_tables: bool) -> None:
    """Measure, and write docs/findings.md."""
    tables = docs / "findings"
    tables.mkdir(parents=True, exist_ok=True)
    if not from_tables:
        results = measure(out, jobs)
        write_tables(results, tables)
    write_page(tables, docs / "findings.md")
    click.echo(f"{docs / 'findings.md'}")


def measure(out: Path, jobs: int | None) -> Path:
    """Run all sweeps, but for the runs that the results file has already.

    Args:
        out: the folder for the networks and the results file.
        jobs: number of processes.

    Returns:
        The results file.

    Raises:
        RuntimeError: a run failed.
    """
    out.mkdir(parents=True, exist_ok=True)
    results = out / "results.db"
    resnet18_mnist.prepare(out / "mnist")
    for content in (*SWEEPS, resnet18_mnist.SWEEP):
        sweep = parse_sweep(content, out / "mnist")
        summary = run_sweep(sweep, results, jobs=jobs, retry_failed=True, progress=True)
        if summary.failed:
            raise RuntimeError(
                f"{summary.failed} runs of the sweep {sweep.name!r} failed; "
                f"`wavprune report {results} -o report.html` shows the errors"
            )
    return results


def write_tables(results: Path, tables: Path) -> None:
    """Extract from a results file what the page is written from.

    Args:
        results: the results file.
        tables: the folder for ``runs.csv``, ``layers.csv`` and ``versions.json``.
    """
    with Store(results) as store:
        runs, layers = store.runs(), store.layers()
    runs = runs[runs["status"] == "ok"]
    runs = runs.sort_values(["sweep", "scope", "sparsity_requested", "method", "wavelet", "model"])
    settings = runs[["guid", "sweep", "model", "method", "scope", "wavelet", "sparsity_requested"]]
    layers = layers.merge(
        settings.rename(columns={"wavelet": "asked"}), on="guid", suffixes=("_layer", "")
    )
    layers = layers[(layers["scope"] == "layer") | layers["level_requested"].notna()]
    versions = [json.loads(text) for text in runs["versions"].unique()]
    save(runs[COLUMNS], tables / "runs.csv")
    save(
        layers[["sweep", "model", "method", "asked", "sparsity_requested", *LAYER_COLUMNS]],
        tables / "layers.csv",
    )
    with replaced(tables / "versions.json") as temporary:
        temporary.write_text(json.dumps(versions, indent=2) + "\n")


def save(frame: pd.DataFrame, path: Path) -> None:
    """Write a table with six significant digits per number."""
    with replaced(path) as temporary:
        frame.to_csv(temporary, index=False, float_format="%.6g")


if __name__ == "__main__":
    main()
