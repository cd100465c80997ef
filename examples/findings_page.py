"""The page ``docs/findings.md``, from the tables in ``docs/findings/``."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from statistics import NormalDist
from typing import Any

import jinja2
import pandas as pd

from wavprune import plots
from wavprune.common.atomic import replaced
from wavprune.reporting import series

TEMPLATE = Path(__file__).with_name("findings.md.jinja")
# The sparsity at which layers are compared.
LAYERWISE = 0.9


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
        with replaced(tables / f"{name}.png") as temporary:
            figure = plots.accuracy_by_sparsity(study.runs)
            figure.savefig(temporary, format="png", dpi=110, metadata={"Software": None})
    text = environment.from_string(TEMPLATE.read_text()).render(
        **studies,
        repairs=repairs(runs),
        noise=noise_error(LAYERWISE),
        layerwise=LAYERWISE,
        gradual=gradual(pd.read_csv(tables / "gradual.csv")),
        versions=json.loads((tables / "versions.json").read_text()),
    )
    with replaced(page) as temporary:
        temporary.write_text(text)


class Study:
    """The results of one sweep over several trainings of one network.

    Args:
        runs: the runs of all sweeps.
        layers: the layers of all sweeps.
        name: the sweep.

    Attributes:
        runs: its runs that rank all layers together, and the unpruned networks.
        layers: the layers of those that rank each layer separately.
        trainings: the number of networks.
        images: the number of test images.
        unpruned: the accuracy of each unpruned network, from 0 to 1.
    """

    def __init__(self, runs: pd.DataFrame, layers: pd.DataFrame, name: str) -> None:
        own = runs[runs["sweep"] == name]
        self.runs = own[own["scope"] != "layer"]
        self.layers = layers[layers["sweep"] == name]
        unpruned = own[own["method"] == series.UNPRUNED]
        self.unpruned = unpruned.set_index("model")["top1"]
        self.trainings = len(unpruned)
        self.images = int(unpruned["samples"].iloc[0])

    @property
    def accuracies(self) -> str:
        """A table: the accuracy of each basis at each sparsity, and the range of the trainings."""
        points = series.lines(self._pruned(), "sparsity_requested", "top1")
        texts = [
            f"{_percent(mean)} ({_percent(low)} to {_percent(high)})"
            for mean, low, high in zip(points["y"], points["low"], points["high"], strict=True)
        ]
        # The mean of equal sparsities may differ from them in the last digit.
        cells = points.assign(cell=texts, x=points["x"].round(6))
        order = list(dict.fromkeys(points["label"]))
        table = cells.pivot(index="label", columns="x", values="cell").loc[order].fillna("")
        return markdown("basis", {f"{x:.0%}": table[x] for x in table.columns})

    def leads(self, *bases: str) -> str:
        """A table: the lead of each basis over min-weight, in points of accuracy."""
        columns = {
            f"`{basis}`": self._lead(basis).apply(_mean_and_range, axis=1) for basis in bases
        }
        loss = self._loss().map("{:.1f}".format)
        return markdown("sparsity", {"min-weight has lost": loss, **columns}, "{:.0%}".format)

    def furthest(self, basis: str) -> str:
        """The lead of a basis over min-weight at the highest sparsity, in words."""
        lead = self._lead(basis)["mean"]
        return f"{_points(lead.iloc[-1])} points at {lead.index[-1]:.0%}"

    def verdict(self, basis: str) -> str:
        """Whether a basis reached the aims of this project, in words."""
        lead = self._lead(basis)["mean"]
        lead = lead[lead.index >= 0.5]
        lost = self._loss()
        lost = lost[lost >= 20]
        accuracy = self._behind(basis, lead)
        if lost.empty:
            return f"{accuracy} Min-weight loses less than 20 points at all of them."
        ahead = lead[lost.index]
        parts = [
            f"{_points(points)} points at {sparsity:.0%}, where it has lost {loss:.1f}"
            for sparsity, points, loss in zip(lost.index, ahead, lost, strict=True)
        ]
        reached = "reaches" if (ahead >= 10).all() else "does not reach"
        return (
            f"{accuracy} Where min-weight has lost 20 points or more, the lead of `{basis}` is "
            f"{'; '.join(parts)}. That {reached} the 10 points that were set out for."
        )

    def _behind(self, basis: str, lead: pd.Series[float]) -> str:
        """At which sparsities a basis is less accurate than min-weight, in words.

        Args:
            basis: its label.
            lead: its mean lead by sparsity, in points.
        """
        behind = lead[lead < 0]
        if behind.empty:
            return f"`{basis}` is at least as accurate as min-weight at every sparsity from 50% up."
        images = self.images * self.trainings
        listed = ", ".join(
            f"at {sparsity:.0%} by {-points:.2f} points ({-points * images / 100:.0f} of the "
            f"{images:,} answers of {self.trainings} networks)"
            for sparsity, points in behind.items()
        )
        return (
            f"`{basis}` is at least as accurate as min-weight at {len(lead) - len(behind)} of "
            f"the {len(lead)} sparsities from 50% up, and behind {listed}."
        )

    @property
    def errors(self) -> str:
        """A table: the relative error of each layer, pruned separately, mean of the trainings."""
        table = self._errors()
        columns = sorted(table.columns, key=lambda label: table[label].mean(), reverse=True)
        cells = {label: table[label].map("{:.3f}".format) for label in columns}
        return markdown("layer", cells, lambda key: f"`{_short(key[0])}` {key[1]}")

    def losses(self, basis: str) -> str:
        """The number of layers with spatial kernels where min-weight has a smaller error."""
        table = self._errors()
        table = table[~table.index.get_level_values("shape").str.endswith("x1x1")]
        return f"{int((table[basis] > table['min-weight']).sum())} of {len(table)}"

    @property
    def weights(self) -> str:
        """A table: sparsity, exact zeros, bytes and error, mean of the trainings."""
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
        """The levels that ran with ``wavelet``, and its largest distance from min-weight."""
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
        """The relative error of each layer in each basis, each layer pruned separately."""
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
        """Mean, lowest and highest lead over min-weight on the same network, in points."""
        points = 100 * (self._by_training(basis) - self._by_training("min-weight"))
        return points.agg(["mean", "min", "max"]).T

    def _loss(self) -> pd.Series[float]:
        kept = self._by_training("min-weight")
        return 100 * (self.unpruned.mean() - kept.mean())


def repairs(runs: pd.DataFrame) -> str:
    """A table: the accuracy after each repair of the batch norms, mean of the trainings."""
    # A run that both sweeps contain is a row of the first.
    rows = runs[runs["sweep"].isin(["digits", "repair"]) & (runs["scope"] == "global")]
    rows = rows[(rows["method"] == "min_weight") | (rows["wavelet"] == "uhaar")]
    rows = rows.assign(label=series.bases(rows) + ", " + rows["batchnorm"])
    table = rows.pivot_table(
        index="label", columns="sparsity_requested", values="top1", sort=False
    ).sort_index()
    return markdown("basis, repair", {f"{x:.0%}": table[x].map(_percent) for x in table.columns})


def gradual(runs: pd.DataFrame) -> str:
    """A table: the accuracy after each way of fine-tuning, mean and range of the trainings."""
    tuned = runs[runs["basis"].notna()]
    accuracies = tuned.groupby(["way", "basis", "sparsity"], sort=False)["top1"].agg(
        ["mean", "min", "max"]
    )
    cells = accuracies.map(_percent).apply("{0[mean]} ({0[min]} to {0[max]})".format, axis=1)
    table = cells.unstack("sparsity")
    return markdown(
        "way, basis",
        {f"{sparsity:.0%}": table[sparsity] for sparsity in table.columns},
        lambda key: f"{key[0]}: {key[1]}",
    )


def noise_error(sparsity: float) -> float:
    """The relative error of pruning white noise: the same in every orthonormal basis.

    Of standard normal values, those with ``|x| >= t`` hold the fraction ``2 (t phi(t) + Q(t))`` of
    the energy (integration by parts with ``phi' = -t phi``), where ``Q`` is the tail probability
    and ``2 Q(t)`` the kept fraction.
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
        name: the text of an index entry in the first column.
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
    # Adding 0.0 turns a negative zero into a zero.
    return f"{round(value, 1) + 0.0:+.1f}"


def _mean_and_range(row: pd.Series[float]) -> str:
    return f"{_points(row['mean'])} ({_points(row['min'])} to {_points(row['max'])})"


def _short(name: str) -> str:
    return name.removeprefix("resnet.").removeprefix("encoder.").removesuffix(".convolution")
