"""Measure where wavelet pruning wins and where not, and write ``docs/findings.md``.

``python examples/findings.py`` does all of it: it trains ResNet-18 on MNIST where it is not there
yet, runs the sweeps into ``out/findings/results.db``, takes the tables in ``docs/findings/`` from
that file, and writes the page from those tables. What is there already is not done again. With
``--from-tables`` the page is written from the tables alone, in seconds.

It needs ``pip install 'wavprune[examples,huggingface]'`` and no download.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import click
import jinja2
import pandas as pd
import resnet18_mnist

from wavprune import plots
from wavprune.atomic import replaced
from wavprune.demo import SEEDS
from wavprune.reporting import series
from wavprune.sweep.runner import run_sweep
from wavprune.sweep.settings import parse_sweep
from wavprune.sweep.store import Store

TEMPLATE = Path(__file__).with_name("findings.md.jinja")
DOCS = Path(__file__).parents[1] / "docs"

SPARSITIES = [0.5, 0.62, 0.7, 0.79, 0.9, 0.95, 0.97]
# One sparsity at which the layers are looked at, each for itself.
LAYERWISE = 0.9
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
# What ``wavprune sweep`` reads from a YAML file.
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
    help="Where the networks and the results file go.",
)
@click.option(
    "--docs",
    type=click.Path(file_okay=False, path_type=Path),
    default=DOCS,
    help="Where the tables and the page go. [default: docs/ of the repository]",
)
@click.option("--jobs", type=click.IntRange(min=1), default=None, help="Processes of a sweep.")
@click.option("--from-tables", is_flag=True, help="Write the page from the tables that are there.")
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
    """Run all sweeps; what is in the results file already stays.

    Args:
        out: where the networks and the results file go.
        jobs: processes of a sweep.

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
    """Take from a results file what the page is written from.

    Args:
        results: the results file.
        tables: the folder for ``runs.csv``, ``layers.csv``, ``versions.json`` and the pictures.
    """
    with Store(results) as store:
        runs, layers = store.runs(), store.layers()
    runs = runs[runs["status"] == "ok"]
    runs = runs.sort_values(["sweep", "scope", "sparsity_requested", "method", "wavelet", "model"])
    asked = runs[["guid", "sweep", "model", "method", "scope", "wavelet", "sparsity_requested"]]
    looked_at = layers.merge(
        asked.rename(columns={"wavelet": "asked"}), on="guid", suffixes=("_layer", "")
    )
    looked_at = looked_at[(looked_at["scope"] == "layer") | looked_at["level_requested"].notna()]
    versions = [json.loads(text) for text in runs["versions"].unique()]
    save(runs[COLUMNS], tables / "runs.csv")
    save(
        looked_at[["sweep", "model", "method", "asked", "sparsity_requested", *LAYER_COLUMNS]],
        tables / "layers.csv",
    )
    with replaced(tables / "versions.json") as unfinished:
        unfinished.write_text(json.dumps(versions, indent=2) + "\n")


def save(frame: pd.DataFrame, path: Path) -> None:
    """Write a table with six digits a number."""
    with replaced(path) as unfinished:
        frame.to_csv(unfinished, index=False, float_format="%.6g")


def write_page(tables: Path, page: Path) -> None:
    """Write the page and its pictures from the tables.

    Args:
        tables: the folder that ``write_tables`` filled.
        page: the Markdown file.
    """
    runs = pd.read_csv(tables / "runs.csv")
    layers = pd.read_csv(tables / "layers.csv")
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    studies = {name: Study(runs, layers, name) for name in ("digits", "mnist", "mlp")}
    for name, study in studies.items():
        with replaced(tables / f"{name}.png") as unfinished:
            figure = plots.accuracy_by_sparsity(study.runs)
            figure.savefig(unfinished, format="png", dpi=110, metadata={"Software": None})
    text = environment.from_string(TEMPLATE.read_text()).render(
        **studies,
        repairs=repairs(runs),
        noise=noise_error(LAYERWISE),
        layerwise=LAYERWISE,
        gradual=gradual(pd.read_csv(tables / "gradual.csv")),
        versions=json.loads((tables / "versions.json").read_text()),
    )
    with replaced(page) as unfinished:
        unfinished.write_text(text)


class Study:
    """What one sweep found about several trainings of one network.

    Args:
        runs: the rows of all sweeps.
        layers: the layers of all sweeps.
        name: which sweep.

    Attributes:
        runs: its runs that rank all layers together, the unpruned networks too.
        layers: the layers of those that rank each layer by itself.
        trainings: how many networks there are.
        images: how many test images there are.
        unpruned: the accuracy of each unpruned network, from 0 to 1.
    """

    def __init__(self, runs: pd.DataFrame, layers: pd.DataFrame, name: str) -> None:
        everything = runs[runs["sweep"] == name]
        self.runs = everything[everything["scope"] != "layer"]
        self.layers = layers[layers["sweep"] == name]
        unpruned = everything[everything["method"] == series.UNPRUNED]
        self.unpruned = unpruned.set_index("model")["top1"]
        self.trainings = len(unpruned)
        self.images = int(unpruned["samples"].iloc[0])

    @property
    def accuracies(self) -> str:
        """A table: the accuracy of each basis at each sparsity, and the trainings' spread."""
        points = series.lines(self._pruned(), "sparsity_requested", "top1")
        shown = [
            f"{_percent(mean)} ({_percent(low)} to {_percent(high)})"
            for mean, low, high in zip(points["y"], points["low"], points["high"], strict=True)
        ]
        # A mean of equal sparsities may differ from them in the last digit.
        cells = points.assign(cell=shown, x=points["x"].round(6))
        order = list(dict.fromkeys(points["label"]))
        table = cells.pivot(index="label", columns="x", values="cell").loc[order].fillna("")
        return markdown("basis", {f"{x:.0%}": table[x] for x in table.columns})

    def leads(self, *bases: str) -> str:
        """A table: how many points of accuracy each basis is ahead of min-weight."""
        columns = {f"`{basis}`": self._lead(basis).apply(_spread, axis=1) for basis in bases}
        loss = self._loss().map("{:.1f}".format)
        return markdown("sparsity", {"min-weight has lost": loss, **columns}, "{:.0%}".format)

    def furthest(self, basis: str) -> str:
        """How far ahead of min-weight a basis is at the highest sparsity, in words."""
        lead = self._lead(basis)["mean"]
        return f"{_points(lead.iloc[-1])} points at {lead.index[-1]:.0%}"

    def verdict(self, basis: str) -> str:
        """Whether a basis reached what this project set out for, in words."""
        lead = self._lead(basis)["mean"]
        lead = lead[lead.index >= 0.5]
        behind = lead[lead < 0]
        images = self.images * self.trainings
        if behind.empty:
            first = (
                f"`{basis}` is at least as accurate as min-weight at every sparsity from 50% up."
            )
        else:
            listed = ", ".join(
                f"at {sparsity:.0%} by {-points:.2f} points ({-points * images / 100:.0f} of the "
                f"{images:,} answers of {self.trainings} networks)"
                for sparsity, points in behind.items()
            )
            first = (
                f"`{basis}` is at least as accurate as min-weight at {len(lead) - len(behind)} of "
                f"the {len(lead)} sparsities from 50% up, and behind {listed}."
            )
        lost = self._loss()
        lost = lost[lost >= 20]
        if lost.empty:
            return f"{first} Min-weight loses less than 20 points at all of them."
        ahead = lead[lost.index]
        parts = [
            f"{_points(points)} points at {sparsity:.0%}, where it has lost {gone:.1f}"
            for sparsity, points, gone in zip(lost.index, ahead, lost, strict=True)
        ]
        reached = "reaches" if (ahead >= 10).all() else "does not reach"
        return (
            f"{first} Where min-weight has lost 20 points or more, the lead of `{basis}` is "
            f"{'; '.join(parts)}. That {reached} the 10 points that were set out for."
        )

    @property
    def errors(self) -> str:
        """A table: the relative error of each layer, each pruned for itself, mean of trainings."""
        table = self._errors()
        columns = sorted(table.columns, key=lambda label: table[label].mean(), reverse=True)
        cells = {label: table[label].map("{:.3f}".format) for label in columns}
        return markdown("layer", cells, lambda key: f"`{_short(key[0])}` {key[1]}")

    def losses(self, basis: str) -> str:
        """In how many layers with spatial kernels a basis has a larger error than min-weight."""
        table = self._errors()
        table = table[~table.index.get_level_values("shape").str.endswith("x1x1")]
        return f"{int((table[basis] > table['min-weight']).sum())} of {len(table)}"

    @property
    def weights(self) -> str:
        """A table: sparsity, exact zeros and bytes at one sparsity, mean of trainings."""
        rows = self._pruned()
        rows = rows[rows["sparsity_requested"] == LAYERWISE]
        means = rows.groupby(series.labels(rows), sort=False)[
            ["sparsity", "weight_sparsity", "stored_bytes", "relative_error"]
        ].mean()
        return markdown(
            "basis",
            {
                "sparsity": means["sparsity"].map("{:.2%}".format),
                "weight sparsity": means["weight_sparsity"].map("{:.2%}".format),
                "file, bytes": means["stored_bytes"].map("{:,.0f}".format),
                "error of the weights": means["relative_error"].map("{:.3f}".format),
            },
        )

    def levels(self, wavelet: str) -> Mapping[str, Any]:
        """The levels that ran when ``wavelet`` was asked for, and how far it is from min-weight."""
        rows = self.layers[self.layers["asked"] == wavelet]
        spatial = rows[~rows["shape"].str.endswith("x1x1")]
        gap = self._by_training(wavelet) - self._by_training("min-weight")
        return {
            "asked": sorted(int(level) for level in spatial["level_requested"].unique()),
            "used": sorted(int(level) for level in spatial["level_used"].unique()),
            "runs": int(gap.count().sum()),
            "gap": float(gap.abs().max().max()) * 100,
        }

    def _pruned(self) -> pd.DataFrame:
        return self.runs[self.runs["method"] != series.UNPRUNED]

    def _errors(self) -> pd.DataFrame:
        """The relative error of each layer in each basis, each pruned for itself."""
        rows = self.layers[self.layers["sparsity_requested"] == LAYERWISE]
        rows = rows[rows["level_requested"].isna()]
        rows = rows.assign(basis=series.bases(rows.rename(columns={"asked": "wavelet"})))
        return rows.pivot_table(
            index=["name", "shape"], columns="basis", values="relative_error", sort=False
        )

    def _by_training(self, basis: str) -> pd.DataFrame:
        pruned = self._pruned()
        rows = pruned[series.bases(pruned) == basis]
        return rows.pivot_table(index="model", columns="sparsity_requested", values="top1")

    def _lead(self, basis: str) -> pd.DataFrame:
        """Mean, lowest and highest lead over min-weight in points, of the same networks."""
        points = 100 * (self._by_training(basis) - self._by_training("min-weight"))
        return points.agg(["mean", "min", "max"]).T

    def _loss(self) -> pd.Series[float]:
        kept = self._by_training("min-weight")
        return 100 * (self.unpruned.mean() - kept.mean())


def repairs(runs: pd.DataFrame) -> str:
    """A table: the accuracy after each repair of the batch norms, mean of trainings."""
    # A run that both sweeps have was done by the first.
    rows = runs[runs["sweep"].isin(["digits", "repair"]) & (runs["scope"] == "global")]
    rows = rows[(rows["method"] == "min_weight") | (rows["wavelet"] == "uhaar")]
    rows = rows.assign(label=series.bases(rows) + ", " + rows["batchnorm"])
    table = rows.pivot_table(
        index="label", columns="sparsity_requested", values="top1", sort=False
    ).sort_index()
    return markdown("basis, repair", {f"{x:.0%}": table[x].map(_percent) for x in table.columns})


def gradual(runs: pd.DataFrame) -> str:
    """A table: the accuracy after each way of fine-tuning, mean of trainings, and the spread."""
    tuned = runs[runs["basis"].notna()]
    spread = tuned.groupby(["way", "basis", "sparsity"], sort=False)["top1"].agg(
        ["mean", "min", "max"]
    )
    cells = spread.map(_percent).apply("{0[mean]} ({0[min]} to {0[max]})".format, axis=1)
    table = cells.unstack("sparsity")
    return markdown(
        "way, basis",
        {f"{sparsity:.0%}": table[sparsity] for sparsity in table.columns},
        lambda key: f"{key[0]}: {key[1]}",
    )


def noise_error(sparsity: float) -> float:
    """The relative error of pruning white noise: the same in every orthonormal basis.

    Of standard normal values, those with ``|x| >= t`` have the share ``2 (t phi(t) + Q(t))`` of the
    energy, by parts from ``phi' = -t phi``; ``Q`` is the normal's tail and ``2 Q(t)`` what is kept.
    """
    normal = NormalDist()
    threshold = normal.inv_cdf(1 - (1 - sparsity) / 2)
    kept = 2 * (threshold * normal.pdf(threshold) + (1 - normal.cdf(threshold)))
    return math.sqrt(1 - kept)


def markdown(
    index: str, columns: Mapping[str, pd.Series[str]], name: Callable[[Any], str] = str
) -> str:
    """A Markdown table.

    Args:
        index: the heading of the first column.
        columns: heading -> cells, all with the same index.
        name: what the first column says of an entry of the index.
    """
    rows = next(iter(columns.values())).index
    lines = [f"| {' | '.join((index, *columns))} |", f"|---{'|---:' * len(columns)}|"]
    lines += [
        f"| {' | '.join((name(row), *(str(cells[row]) for cells in columns.values())))} |"
        for row in rows
    ]
    return "\n".join(lines)


def _percent(share: float) -> str:
    return f"{100 * share:.1f}"


def _points(value: float) -> str:
    # The sum makes a zero of a negative zero.
    return f"{round(value, 1) + 0.0:+.1f}"


def _spread(row: pd.Series[float]) -> str:
    return f"{_points(row['mean'])} ({_points(row['min'])} to {_points(row['max'])})"


def _short(name: str) -> str:
    return name.removeprefix("resnet.").removeprefix("encoder.").removesuffix(".convolution")


if __name__ == "__main__":
    main()
