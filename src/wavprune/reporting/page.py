"""The results of sweeps as one HTML page: the smallest networks, pictures, tables, settings.

The page contains everything that it shows and loads nothing from anywhere.
"""

from __future__ import annotations

import base64
import json
import math
import os
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from .._version import __version__
from ..common.atomic import replaced
from ..common.optional import require
from ..errors import WavpruneError
from ..sweep.store import Store
from . import series, summary
from .front import headline
from .pictures import Picture, accuracy_pictures, front_picture, layer_pictures, run_pictures
from .scale import percent, percentage, size, with_metric
from .series import UNPRUNED
from .summary import Network, PanelSummary
from .tables import MAX_ROWS, Table, layers_table, runs_csv, runs_table

# Panels of tables that are open at first.
OPEN_PANELS = 2

try:
    import jinja2
except ImportError:
    require("jinja2", extra="report", purpose="the page")
    raise


@dataclass(frozen=True)
class Section:
    """The section of the page on one network.

    Attributes:
        network: its runs.
        id: the anchor of the section.
        headline: the smallest network that is as good as the unpruned one.
        about: what to know of it.
        front: the picture of all runs' bytes; None where nothing was pruned.
        facts: sentences on the unpruned network.
        panels: the main results, panel by panel.
        chosen: which run is pictured, and why; empty where none is.
        pictures: in the order of the page.
        layers: the layers of the pictured runs; None where there are none.
    """

    network: Network
    id: str
    headline: str
    about: str
    front: Picture | None
    facts: str
    panels: list[PanelSummary]
    chosen: str
    pictures: list[Picture]
    layers: Table | None


def write_page(
    results: str | os.PathLike[str],
    output: str | os.PathLike[str],
    tolerance: float | None = None,
) -> None:
    """Write the results of sweeps as one self-contained HTML page.

    For each network the page says which is the smallest that is as good as the unpruned one, shows
    the front of bytes against the metric, and says which methods keep it up to which sparsity.
    Differences that chance alone may make, of two standard errors, are ties. Layers, coefficients,
    kernels and the confusion matrix are those of the smallest network, beside the other methods at
    its sparsity.

    Args:
        results: a results file; a sweep may still be writing to it.
        output: the page; an existing file is replaced.
        tolerance: how much worse than the unpruned network a run may be and still count as good;
            None takes 0.01 of accuracy, and a hundredth of the value of any other metric.

    Raises:
        WavpruneError: ``results`` is not a results file, or has no run.
        ImportError: an extra is not installed.
    """
    with Store(results) as store:
        runs, layers = store.runs(), store.layers()
        if runs.empty:
            raise WavpruneError(f"{os.fspath(results)} has no run; run a sweep into it first")
        runs = with_metric(runs)
        runs["bytes"] = runs["file_bytes"].fillna(runs["stored_bytes"]).astype("float64")
        finished = runs[(runs["status"] == "ok") & runs["value"].notna()]
        sections = [
            _section(network, layers, store, f"network-{i}")
            for i, network in enumerate(summary.networks(finished, tolerance), 1)
        ]
    failed = runs[runs["status"] != "ok"]
    shared, own = _settings(runs)
    content = _template().render(
        title=_title_of(runs),
        csv_name=f"{Path(results).stem}.csv",
        csv=_data_uri(runs_csv(finished)),
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
    environment.filters |= {"percent": percent, "percentage": percentage, "size": size}
    environment.globals |= {"isnan": math.isnan, "open_panels": OPEN_PANELS}
    text = resources.files(__package__).joinpath("page.html.jinja").read_text(encoding="utf-8")
    return environment.from_string(text)


def _title_of(runs: pd.DataFrame) -> str:
    """The names of the sweeps."""
    names = list(dict.fromkeys(runs["sweep"]))
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{', '.join(names[:3])}{more}" if more else series.listed(names)


def _data_uri(text: str) -> str:
    return f"data:text/csv;charset=utf-8;base64,{base64.b64encode(text.encode()).decode()}"


def _overview(runs: pd.DataFrame, finished: pd.DataFrame, failed: pd.DataFrame) -> str:
    pruned = finished[finished["method"] != UNPRUNED]
    count = f"{len(finished)} finished {'run' if len(finished) == 1 else 'runs'}"
    if len(failed):
        count += f", {len(failed)} failed"
    names = list(dict.fromkeys(runs["sweep"]))
    of = f" of {len(names)} sweeps" if len(names) > 1 else ""
    text = f"{count}{of}, "
    text += (
        f"{runs['started'].min():%Y-%m-%d %H:%M} to {runs['finished'].max():%Y-%m-%d %H:%M} UTC."
    )
    if len(pruned):
        methods = list(dict.fromkeys(series.lines(pruned, "sparsity", "value")["basis"]))
        text += f" Compared: {series.listed(methods)}."
    return text


def _section(network: Network, layers: pd.DataFrame, store: Store, anchor: str) -> Section:
    pictures = accuracy_pictures(network)
    chosen, table = "", None
    choice = summary.chosen_run(network)
    if choice is not None:
        run, reason = choice
        title = _title(network, run)
        chosen = f"{title}: {reason}"
        compared = summary.companions(network, run)
        rows = pd.concat([layers[layers["guid"] == guid] for guid in compared["guid"]])
        if len(rows):
            pictures += layer_pictures(rows, compared, float(run["sparsity"]))
            table = layers_table(rows, compared)
        pictures += run_pictures(store.pictures(run["guid"]), run, title)
    line, about = headline(network.front, network.scale) if len(network.pruned) else ("", "")
    return Section(
        network=network,
        id=anchor,
        headline=line,
        about=about,
        front=front_picture(network),
        facts=_facts(network),
        panels=summary.panel_summaries(network) if len(network.pruned) else [],
        chosen=chosen,
        pictures=pictures,
        layers=table,
    )


def _facts(network: Network) -> str:
    example = (network.unpruned if len(network.unpruned) else network.pruned).iloc[0]
    scale, samples = network.scale, int(example["samples"])
    text = f"{int(example['parameters']):,} parameters; {samples:,} samples"
    text += f", of which one is {100 / samples:.2g} points." if scale.is_share else "."
    if network.unpruned.empty:
        return f"{text} The unpruned network has no finished run."
    values = network.unpruned["value"]
    text = f"Unpruned: {scale.text(values.mean())} {scale.name}, {size(example['bytes'])}; {text}"
    if values.max() > values.min():
        text += f" The unpruned trainings are from {scale.text(values.min())} to "
        text += f"{scale.text(values.max())}."
    return text


def _title(network: Network, run: pd.Series[Any]) -> str:
    """The name of a run: its model, method and panel."""
    labels = dict(zip(network.pruned["guid"], series.labels(network.pruned), strict=True))
    text = f"{run['model']}, {labels[run['guid']]} at {percent(run['sparsity'])}"
    panels = series.panels(network.pruned).items()
    panel = next(title for title, rows in panels if run["guid"] in set(rows["guid"]))
    return f"{text}, {panel}" if panel else text


def _settings(runs: pd.DataFrame) -> tuple[dict[str, str], list[dict[str, str]]]:
    """The settings that all pruned runs share, and the other settings of each run."""
    flattened = [_flattened(json.loads(text)) for text in runs["settings"]]
    # The unpruned network has no pruning settings to share.
    pruned = [
        settings
        for settings, method in zip(flattened, runs["method"], strict=True)
        if method != UNPRUNED
    ]
    first, *others = pruned or flattened
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
        for guid, settings in zip(runs["guid"], flattened, strict=True)
    ]
    return shared, own[-MAX_ROWS:]


def _flattened(value: Any, name: str = "") -> dict[str, str]:
    """Nested mappings as one, with dotted names."""
    if isinstance(value, dict) and value:
        parts = (
            _flattened(entry, f"{name}.{key}" if name else key) for key, entry in value.items()
        )
        return {key: text for part in parts for key, text in part.items()}
    return {name: json.dumps(value)}


def _versions(runs: pd.DataFrame) -> list[tuple[str, int]]:
    """Each set of versions, and the number of runs with it."""
    texts = [
        ", ".join(f"{name} {version}" for name, version in json.loads(text).items())
        for text in runs["versions"]
    ]
    return [(text, texts.count(text)) for text in dict.fromkeys(texts)]
