"""The results of sweeps as one HTML page: what they say, pictures, tables, settings.

The page holds all that it shows: it needs no network, and asks for none.
"""

from __future__ import annotations

import base64
import io
import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import pandas as pd

from .._version import __version__
from ..atomic import replaced
from ..sweep.store import Store
from . import plots, series, summary
from .series import UNPRUNED
from .summary import Network, percent
from .tables import ROWS, Table, layers_table, runs_table, size

try:
    import jinja2
except ImportError as error:
    raise ImportError(
        "the page needs jinja2; pip install 'wavprune[report]'", name=error.name
    ) from error
import matplotlib as mpl

if TYPE_CHECKING:
    from matplotlib.figure import Figure

HISTOGRAMS = 6


class Picture(NamedTuple):
    """One picture.

    Attributes:
        source: a data URI.
        alt: what it shows, for those who do not see it.
        caption: what it shows.
    """

    source: str
    alt: str
    caption: str


@dataclass(frozen=True)
class Section:
    """What the page shows of a network.

    Attributes:
        network: its runs.
        id: the section's anchor.
        facts: a sentence on the unpruned network.
        comparisons: tables and sentences.
        chosen: which run is pictured, and why; empty where none is.
        pictures: in the page's order.
        layers: a table of the layers of the pictured runs; None where there are none.
    """

    network: Network
    id: str
    facts: str
    comparisons: list[summary.Comparison]
    chosen: str
    pictures: list[Picture]
    layers: Table | None


def write_page(results: str | os.PathLike[str], output: str | os.PathLike[str]) -> None:
    """Write the results of sweeps as one self-contained HTML page.

    For each network the page says which methods keep its accuracy up to which sparsity, and shows
    accuracy against sparsity and stored size. Layers, coefficients, kernels and the confusion
    matrix are pictured of one run: the sparsest whose accuracy is within a point of the unpruned
    network's, beside the other methods at its sparsity.

    Args:
        results: a results file that a sweep wrote; it may be one that a sweep still writes to.
        output: the page; what is there is replaced.

    Raises:
        ValueError: ``results`` is no results file, or has no run.
        ImportError: an extra is not installed.
    """
    with Store(results) as store:
        runs, layers = store.runs(), store.layers()
        if runs.empty:
            raise ValueError(f"{os.fspath(results)} has no run; run a sweep into it first")
        finished = runs[(runs["status"] == "ok") & runs["top1"].notna()]
        sections = [
            _section(network, layers, store, f"network-{i}")
            for i, network in enumerate(summary.networks(finished), 1)
        ]
    failed = runs[runs["status"] != "ok"]
    shared, own = _settings(runs)
    content = _template().render(
        title=Path(results).name,
        version=__version__,
        overview=_overview(runs, finished, failed),
        notes=summary.collapsed(finished, layers),
        sections=sections,
        runs=runs_table(finished) if len(finished) else None,
        failed=failed.to_dict("records"),
        shared=shared,
        own=own,
        versions=_versions(runs),
    )
    with replaced(Path(output)) as new:
        new.write_text(content, encoding="utf-8")


def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters |= {"percent": percent, "percentage": summary.percentage}
    text = resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text)


def _overview(runs: pd.DataFrame, finished: pd.DataFrame, failed: pd.DataFrame) -> str:
    pruned = finished[finished["method"] != UNPRUNED]
    count = f"{len(finished)} finished {'run' if len(finished) == 1 else 'runs'}"
    if len(failed):
        count += f", {len(failed)} failed"
    names = list(dict.fromkeys(runs["sweep"]))
    text = f"{count}, of the {'sweep' if len(names) == 1 else 'sweeps'} {summary.listed(names)}, "
    text += (
        f"{runs['started'].min():%Y-%m-%d %H:%M} to {runs['finished'].max():%Y-%m-%d %H:%M} UTC."
    )
    if len(pruned):
        methods = list(dict.fromkeys(series.lines(pruned, "sparsity", "top1")["basis"]))
        text += f" Compared: {summary.listed(methods)}."
    return text


def _section(network: Network, layers: pd.DataFrame, store: Store, anchor: str) -> Section:
    found = summary.chosen_run(network)
    pictures = _accuracy_pictures(network)
    chosen, table = "", None
    if found is not None:
        run, why = found
        beside = summary.companions(network, run)
        chosen = f"{_named(network, run)}: {why}"
        rows = layers[layers["guid"].isin(beside["guid"])]
        rows = pd.concat([rows[rows["guid"] == guid] for guid in beside["guid"]])
        if len(rows):
            pictures += _layer_pictures(rows, beside, float(run["sparsity"]))
            table = layers_table(rows, beside)
        pictures += _run_pictures(store.pictures(run["guid"]), run, _named(network, run))
    return Section(
        network=network,
        id=anchor,
        facts=_facts(network),
        comparisons=summary.comparisons(network) if len(network.pruned) else [],
        chosen=chosen,
        pictures=pictures,
        layers=table,
    )


def _facts(network: Network) -> str:
    first = (network.unpruned if len(network.unpruned) else network.pruned).iloc[0]
    samples = int(first["samples"])
    text = f"{int(first['parameters']):,} parameters. {samples:,} samples: one is "
    text += f"{100 / samples:.2g} points."
    if len(network.unpruned):
        base = network.unpruned["top1"]
        text = f"Unpruned: {percent(base.mean())} top-1, {size(first['stored_bytes'])}; " + text
        if base.max() > base.min():
            text += f" The unpruned trainings are from {percent(base.min())} to "
            text += f"{percent(base.max())}."
    else:
        text += " The unpruned network has no finished run."
    return text


def _named(network: Network, run: pd.Series[Any]) -> str:
    labels = dict(zip(network.pruned["guid"], series.labels(network.pruned), strict=True))
    text = f"{run['model']}, {labels[run['guid']]} at {percent(run['sparsity'])}"
    panels = series.panels(network.pruned).items()
    panel = next(title for title, rows in panels if run["guid"] in set(rows["guid"]))
    return f"{text}, {panel}" if panel else text


def _accuracy_pictures(network: Network) -> list[Picture]:
    if network.pruned.empty:
        return []
    runs = pd.concat([network.unpruned, network.pruned])
    spread = " Lines are means of repetitions, bands reach from the lowest to the highest."
    if (series.lines(network.pruned, "sparsity", "top1")["runs"] == 1).all():
        spread = ""
    said = " ".join(s for c in summary.comparisons(network) for s in c.sentences)
    return [
        _picture(
            plots.accuracy_by_sparsity(runs),
            f"Line chart of top-1 accuracy against sparsity. {said}",
            f"Accuracy against the pruned share of the weights.{spread}",
        ),
        _picture(
            plots.accuracy_by_bytes(runs),
            "Line chart of top-1 accuracy against the stored size of the network. The table of "
            "runs has the figures.",
            "Accuracy against what a file must store: kept values, a bit a coefficient that says "
            f"which were kept, and all that was not pruned.{spread}",
        ),
    ]


def _layer_pictures(layers: pd.DataFrame, runs: pd.DataFrame, sparsity: float) -> list[Picture]:
    at = percent(sparsity)
    return [
        _picture(
            plots.error_by_layer(layers, runs),
            f"Dot chart of the relative error of each layer at {at}; the table of layers has the "
            "figures.",
            f"Relative change of each layer's weight at {at}, norm of the change over norm of the "
            "weight.",
        ),
        _picture(
            plots.sparsity_by_layer(layers, runs),
            f"Dot chart of the sparsity of each layer at {at}; the table of layers has the "
            "figures.",
            f"What each layer contributes to {at}.",
        ),
    ]


def _run_pictures(stored: Mapping[str, Any], run: pd.Series[Any], named: str) -> list[Picture]:
    found = []
    histograms = {entry["layer"]: entry for entry in stored["histograms"] or ()}
    if histograms:
        shown = _spread(list(histograms), HISTOGRAMS)
        ranked = "magnitude" if pd.notna(run["percentile"]) else "importance"
        some = f"{len(shown)} of {len(histograms)} layers. " if len(shown) < len(histograms) else ""
        found.append(
            _picture(
                plots.coefficient_histogram(
                    {name: histograms[name] for name in shown}, f"{ranked} of a coefficient"
                ),
                f"Histograms of the coefficients of {summary.listed(shown)}, each with its "
                "threshold.",
                f"The coefficients before pruning, by {ranked}, and the threshold. {some}{named}.",
            )
        )
    if stored["kernels"]:
        kernels = stored["kernels"]
        count = len(kernels["before"])
        found.append(
            _picture(
                plots.kernels_before_after(kernels["before"], kernels["after"]),
                f"The {count} first kernels of {kernels['layer']} before and after pruning.",
                f"The first {count} kernels of {kernels['layer']}. {named}.",
            )
        )
    if stored["confusion"]:
        found.append(
            _picture(
                plots.confusion_matrix(stored["confusion"]),
                f"Confusion matrix; {percent(run['top1'])} of the samples are on the diagonal.",
                f"Samples by true and predicted class. {named}.",
            )
        )
    return found


def _spread(names: list[str], most: int) -> list[str]:
    """At most so many of the names, the first and the last among them."""
    if len(names) <= most:
        return names
    return [names[round(i * (len(names) - 1) / (most - 1))] for i in range(most)]


def _picture(figure: Figure, alt: str, caption: str) -> Picture:
    text = io.StringIO()
    # Without a salt and with a date, the same results would give another page each time.
    with mpl.rc_context({"svg.hashsalt": "wavprune", "svg.fonttype": "path"}):
        nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(text, format="svg", metadata=nothing, dpi=150)
    svg = text.getvalue()
    svg = svg[svg.index("<svg") :]
    encoded = base64.b64encode(svg.encode()).decode()
    return Picture(f"data:image/svg+xml;base64,{encoded}", alt, caption)


def _settings(runs: pd.DataFrame) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The settings that all runs share, and each run's own."""
    flat = [_flat(json.loads(text)) for text in runs["settings"]]
    # The unpruned network has no settings of pruning to share.
    pruned = [each for each, method in zip(flat, runs["method"], strict=True) if method != UNPRUNED]
    first, *others = pruned or flat
    shared = {
        name: value
        for name, value in first.items()
        if all(settings.get(name) == value for settings in others)
    }
    own = [
        {
            "guid": str(guid),
            "settings": " ".join(f"{k}={v}" for k, v in settings.items() if shared.get(k) != v),
        }
        for guid, settings in zip(runs["guid"], flat, strict=True)
    ]
    return shared, own[-ROWS:]


def _flat(value: Any, name: str = "") -> dict[str, str]:
    if isinstance(value, dict) and value:
        parts = (_flat(entry, f"{name}.{key}" if name else key) for key, entry in value.items())
        return {key: text for part in parts for key, text in part.items()}
    return {name: json.dumps(value)}


def _versions(runs: pd.DataFrame) -> list[tuple[str, int]]:
    """What ran, and in how many runs."""
    texts = [
        ", ".join(f"{name} {version}" for name, version in json.loads(text).items())
        for text in runs["versions"]
    ]
    return [(text, texts.count(text)) for text in dict.fromkeys(texts)]
