"""The pictures of the report page, each as an SVG with its description.

An SVG has two sets of colors and takes the one of the page that it is in, light or dark. Those that
a phone shows at another size are drawn for it too.
"""

from __future__ import annotations

import base64
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from ..common.optional import require
from . import plots, series, summary
from .plots.front import front_by_bytes, visible_points
from .plots.style import NARROW, WIDTH
from .scale import percent
from .summary import Network

try:
    import matplotlib as mpl
except ImportError:
    require("matplotlib", extra="report", purpose="a picture")
    raise

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MAX_HISTOGRAMS = 6
MAX_PANELS = 4
# The colors of a page in the dark, for those of the pictures: text, grid, edges and bands, then
# lines that would be too dark.
DARK = {
    "#262626": "#e6e8eb",
    "#e4e4e4": "#363c44",
    "#888888": "#7d8590",
    "#f4f4f4": "#22272d",
    "#dddddd": "#444b54",
    "#666666": "#a2a9b3",
    "#111111": "#f2f2f2",
    "#0072b2": "#4aa3e0",
    "#009e73": "#2fc497",
    "#d55e00": "#ff8a3d",
    "#882255": "#e27fae",
    "#332288": "#a89bf5",
    "#8c510a": "#c98b3f",
}


class Picture(NamedTuple):
    """One picture.

    Attributes:
        source: a data URI.
        narrow: the same picture for a phone; empty where there is none.
        alt: a description for those who do not see it.
        caption: the text below it.
    """

    source: str
    narrow: str
    alt: str
    caption: str


def front_picture(network: Network) -> Picture | None:
    """The metric against bytes, with the front; None where nothing was pruned."""
    if network.pruned.empty:
        return None
    front, name = network.front, network.scale.name
    measured = [point.measured for point in front.points]
    sizes = "Sizes are those of the files that were written."
    if not all(measured):
        which = "Sizes without stored bits" if any(measured) else "Sizes"
        sizes = (
            f"{which} are computed: the kept values, a mask with one bit per coefficient, and "
            "everything that was not pruned."
        )
    below = len(front.points) - len(visible_points(front, network.scale))
    if below:
        sizes += f" {below} runs that are worse than the axis shows are left out."
    return _rendered(
        lambda width: front_by_bytes(front, network.scale, width),
        f"Scatter chart of {name} against bytes, with the front of the smallest and best; the "
        "table beside it has the figures.",
        f"{name[:1].upper()}{name[1:]} against bytes. Bars are standard errors; the line is the "
        f"front. {sizes}",
        narrow=True,
    )


def accuracy_pictures(network: Network) -> list[Picture]:
    """The metric against sparsity."""
    if network.pruned.empty:
        return []
    panels = summary.main_panels(network)
    shown = pd.concat(list(panels.values())[:MAX_PANELS])
    runs = pd.concat([network.unpruned, network.pruned.loc[sorted(shown.index)]])
    name = network.scale.name
    spread = " Lines are means of repetitions, bands reach from the lowest to the highest."
    if (series.lines(network.pruned, "sparsity", "value")["runs"] == 1).all():
        spread = ""
    if len(panels) > MAX_PANELS:
        spread += f" {MAX_PANELS} of {len(panels)} groups of runs; the tables have all."
    results = " ".join(s for p in summary.panel_summaries(network) for s in p.sentences)
    return [
        _rendered(
            lambda width: plots.accuracy_by_sparsity(runs, width),
            f"Line chart of {name} against sparsity. {results}",
            f"{name[:1].upper()}{name[1:]} against the pruned share of the weights.{spread}",
            narrow=True,
        )
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
            lambda _: plots.error_by_layer(layers, runs),
            f"Dot chart of the relative error of each layer at {at}; the table of layers has the "
            "figures.",
            f"Relative change of each layer's weight at {at}, norm of the change over norm of the "
            "weight.",
        ),
        _rendered(
            lambda _: plots.sparsity_by_layer(layers, runs),
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
                lambda _: plots.kernels_before_after(kernels["before"], kernels["after"]),
                f"The first {count} kernels of {kernels['layer']} before and after pruning.",
                f"The first {count} kernels of {kernels['layer']}. {title}.",
            )
        )
    if data["confusion"]:
        pictures.append(
            _rendered(
                lambda _: plots.confusion_matrix(data["confusion"]),
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
        lambda _: plots.coefficient_histogram(
            {layer: by_layer[layer] for layer in shown}, f"{rank} of a coefficient"
        ),
        f"Histograms of the coefficients of {series.listed(shown)}, each with its threshold.",
        f"The coefficients before pruning, by {rank}, and the threshold. {some}{title}.",
    )


def _spread(names: list[str], most: int) -> list[str]:
    """At most ``most`` of the names, evenly spread, with the first and the last."""
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _rendered(
    draw: Callable[[float], Figure], alt: str, caption: str, narrow: bool = False
) -> Picture:
    """A picture.

    Args:
        draw: draws it at a width in inches.
        alt: a description.
        caption: the text below it.
        narrow: whether it is drawn for a phone too.
    """
    small = _svg(draw(NARROW)) if narrow else ""
    return Picture(_svg(draw(WIDTH)), small, alt, caption)


def _svg(figure: Figure) -> str:
    """A figure as a data URI, in the colors of the page around it."""
    text = io.StringIO()
    figure.patch.set_facecolor("none")
    for ax in figure.axes:
        ax.patch.set_facecolor("none")
    # A fixed salt and no date: the same results give the same page.
    with mpl.rc_context({"svg.hashsalt": "wavprune", "svg.fonttype": "path"}):
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=no_metadata, dpi=150)
    svg = text.getvalue()
    encoded = base64.b64encode(_themed(svg[svg.index("<svg") :]).encode()).decode()
    return f"data:image/svg+xml;base64,{encoded}"


def _themed(svg: str) -> str:
    """An SVG whose colors follow the color scheme of the page that shows it."""
    named = re.sub("|".join(DARK), lambda found: f"var(--{found[0][1:]})", svg, flags=re.IGNORECASE)
    named = re.sub(r"var\(--(\w+)\)", lambda found: found[0].lower(), named)
    light = "".join(f"--{color[1:]}:{color};" for color in DARK)
    dark = "".join(f"--{color[1:]}:{other};" for color, other in DARK.items())
    style = f"<style>svg{{{light}}}@media (prefers-color-scheme: dark){{svg{{{dark}}}}}</style>"
    end = named.index(">") + 1
    return named[:end] + style + named[end:]
