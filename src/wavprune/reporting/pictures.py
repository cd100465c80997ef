"""The pictures of the report page, each as an SVG with its description."""

from __future__ import annotations

import base64
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from ..common.optional import require
from . import plots, series, summary
from .summary import Network, percent

try:
    import matplotlib as mpl
except ImportError:
    require("matplotlib", extra="report", purpose="a picture")
    raise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_HISTOGRAMS = 6


class Picture(NamedTuple):
    """One picture.

    Attributes:
        source: a data URI.
        alt: a description for those who do not see it.
        caption: the text below it.
    """

    source: str
    alt: str
    caption: str


def accuracy_pictures(network: Network) -> list[Picture]:
    """Accuracy against sparsity and against stored size."""
    if network.pruned.empty:
        return []
    runs = pd.concat([network.unpruned, network.pruned])
    spread = " Lines are means of repetitions, bands reach from the lowest to the highest."
    if (series.lines(network.pruned, "sparsity", "top1")["runs"] == 1).all():
        spread = ""
    results = " ".join(s for p in summary.panel_summaries(network) for s in p.sentences)
    return [
        _rendered(
            plots.accuracy_by_sparsity(runs),
            f"Line chart of top-1 accuracy against sparsity. {results}",
            f"Accuracy against the pruned share of the weights.{spread}",
        ),
        _rendered(
            plots.accuracy_by_bytes(runs),
            "Line chart of top-1 accuracy against the stored size of the network. The table of "
            "runs has the figures.",
            "Accuracy against what a file must store: the kept values, a mask with one bit per "
            f"coefficient, and everything that was not pruned.{spread}",
        ),
    ]


def layer_pictures(layers: pd.DataFrame, runs: pd.DataFrame, sparsity: float) -> list[Picture]:
    """Relative error and sparsity of each layer, one series per run.

    Args:
        layers: of these runs.
        runs: runs of about the same sparsity.
        sparsity: of the run that they are compared with.
    """
    at = percent(sparsity)
    return [
        _rendered(
            plots.error_by_layer(layers, runs),
            f"Dot chart of the relative error of each layer at {at}; the table of layers has the "
            "figures.",
            f"Relative change of each layer's weight at {at}, norm of the change over norm of the "
            "weight.",
        ),
        _rendered(
            plots.sparsity_by_layer(layers, runs),
            f"Dot chart of the sparsity of each layer at {at}; the table of layers has the "
            "figures.",
            f"Sparsity of each layer; all layers together have {at}.",
        ),
    ]


def run_pictures(data: Mapping[str, Any], run: pd.Series[Any], title: str) -> list[Picture]:
    """The coefficients, the kernels and the confusion matrix of one run.

    Args:
        data: what the results file holds for its pictures; see ``Store.pictures``.
        run: its row.
        title: its name.
    """
    pictures = []
    if data["histograms"]:
        pictures.append(_histograms(data["histograms"], run, title))
    if data["kernels"]:
        kernels = data["kernels"]
        count = len(kernels["before"])
        pictures.append(
            _rendered(
                plots.kernels_before_after(kernels["before"], kernels["after"]),
                f"The first {count} kernels of {kernels['layer']} before and after pruning.",
                f"The first {count} kernels of {kernels['layer']}. {title}.",
            )
        )
    if data["confusion"]:
        pictures.append(
            _rendered(
                plots.confusion_matrix(data["confusion"]),
                f"Confusion matrix; {percent(run['top1'])} of the samples are on the diagonal.",
                f"Samples by true and predicted class. {title}.",
            )
        )
    return pictures


def _histograms(entries: Sequence[Mapping[str, Any]], run: pd.Series[Any], title: str) -> Picture:
    by_layer = {entry["layer"]: entry for entry in entries}
    shown = _spread(list(by_layer), MAX_HISTOGRAMS)
    rank = "magnitude" if pd.notna(run["percentile"]) else "importance"
    some = f"{len(shown)} of {len(by_layer)} layers. " if len(shown) < len(by_layer) else ""
    return _rendered(
        plots.coefficient_histogram(
            {layer: by_layer[layer] for layer in shown}, f"{rank} of a coefficient"
        ),
        f"Histograms of the coefficients of {summary.listed(shown)}, each with its threshold.",
        f"The coefficients before pruning, by {rank}, and the threshold. {some}{title}.",
    )


def _spread(names: list[str], most: int) -> list[str]:
    """At most ``most`` of the names, evenly spread, with the first and the last."""
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _rendered(figure: Figure, alt: str, caption: str) -> Picture:
    text = io.StringIO()
    # A fixed salt and no date: the same results give the same page.
    with mpl.rc_context({"svg.hashsalt": "wavprune", "svg.fonttype": "path"}):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=no_metadata, dpi=150)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    encoded = base64.b64encode(svg.encode()).decode()
    return Picture(f"data:image/svg+xml;base64,{encoded}", alt, caption)
