"""``wavprune compare``."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from ..calibration.run import LEVELS
from ..config import SCOPES
from ..evaluation.compare import compare as run
from ..evaluation.comparison import Comparison
from ..evaluation.trial import REPAIRS
from .calibration import Inputs, data_options
from .networks import load_network
from .options import IGNORE, JSON, SOURCE, TARGETS, Method, transform_options
from .output import check_replaceable, expect_output, write, write_table

if TYPE_CHECKING:
    from ..evaluation.measure import Measure

WRITERS = {
    ".csv": Comparison.to_csv,
    ".json": Comparison.to_json,
    ".html": Comparison.to_html,
}


def _output(context: click.Context, parameter: click.Parameter, path: Path | None) -> Path | None:
    if path is None:
        return None
    if path.suffix.lower() not in WRITERS:
        raise click.BadParameter(f"{path} must end in {', '.join(WRITERS)}")
    if path.is_dir() or not path.parent.is_dir():
        raise click.BadParameter(f"{path} is not a file in a directory that exists")
    return path


@click.command()
@SOURCE
@data_options
@click.option(
    "--class-folders",
    is_flag=True,
    help="The subfolders of --data's folder are its classes, in alphabetical order.",
)
@click.option(
    "--model",
    "factory",
    metavar="FACTORY",
    help="package.module:function that returns the network whose weights IN has.",
)
@click.option(
    "--sparsity",
    "sparsities",
    type=float,
    multiple=True,
    help="Pruned fraction, in [0, 1); can be repeated.  [default: 0.5, 0.7, 0.8, 0.9, 0.95]",
)
@click.option(
    "--wavelet",
    "wavelets",
    metavar="NAME",
    multiple=True,
    help="A basis, as of `wavprune prune`; can be repeated.  [default: uhaar, haar, dct, auto]",
)
@click.option(
    "--method",
    "methods",
    type=Method(),
    multiple=True,
    help="What to prune by; can be repeated.  [default: all]",
)
@transform_options
@click.option(
    "--scope",
    type=click.Choice(SCOPES),
    default="global",
    help="Rank the coefficients of each layer by themselves, or those of all layers together.",
)
@click.option(
    "--calibrated",
    type=click.Choice(LEVELS),
    multiple=True,
    help="Further rows, pruned from the inputs at this level; can be repeated.",
)
@click.option(
    "--batchnorm",
    type=click.Choice(REPAIRS),
    default="match",
    help="How the batch norms of pruned copies are repaired.",
)
@click.option(
    "--seeds", type=click.IntRange(min=1), default=3, help="How many masks of --method random."
)
@TARGETS
@IGNORE
@click.option(
    "--metric",
    metavar="FACTORY",
    help="In place of accuracy: package.module:Class of a torchmetrics.Metric, or "
    "package.module:function of outputs and targets.",
)
@click.option(
    "--better",
    type=click.Choice(("higher", "lower")),
    help="Of --metric, where it does not say it itself.",
)
@click.option(
    "--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1, ...  [default: cpu]"
)
@click.option(
    "--backend",
    metavar="NAME",
    default="auto",
    help="A backend that `wavprune info` lists, or auto.",
)
@click.option(
    "-o",
    "--output",
    metavar="FILE",
    type=click.Path(path_type=Path),
    callback=_output,
    help="Write the table to a .csv, .json or .html file, too.",
)
@JSON
@click.option("--force", is_flag=True, help="Replace FILE if it exists.")
def compare(
    source: Path,
    data: Inputs,
    calibration: Inputs | None,
    class_folders: bool,
    factory: str | None,
    sparsities: tuple[float, ...],
    wavelets: tuple[str, ...],
    methods: tuple[str, ...],
    calibrated: tuple[str, ...],
    seeds: int,
    targets: tuple[str, ...],
    ignore: tuple[str, ...],
    metric: str | None,
    better: str | None,
    output: Path | None,
    as_json: bool,
    force: bool,
    **settings: Any,
) -> None:
    """Prune copies of a network by every method and basis, and measure what they answer.

    IN is an .onnx model, a Hugging Face directory, or package.module:function that returns the
    network; with --model, a checkpoint of its weights. Nothing is written but FILE.

    With labels the accuracy of each copy is measured; without, in which share of the inputs it
    gives the same class as IN, and of a network that is no classifier, how far its output changes.
    """
    if output is not None:
        check_replaceable(output, force)
        expect_output(output)
    measure = _measure(metric, better)
    grid: dict[str, Any] = {"sparsities": sparsities, "wavelets": wavelets, "methods": methods}
    network, place, _ = load_network(source, factory, "comparing")
    result = run(
        network,
        data.load(place, labels=True, class_folders=class_folders),
        calibration=None if calibration is None else calibration.load(place),
        calibrated=calibrated,
        seeds=range(seeds),
        targets=targets or None,
        ignore=ignore or None,
        metric=measure,
        progress=sys.stderr.isatty(),
        **{name: values for name, values in grid.items() if values},
        **settings,
    )
    if output is not None:
        WRITERS[output.suffix.lower()](result, output)
    if as_json:
        write(result.to_json())
        return
    write_table(result.to_table())
    if output is not None:
        write(f"comparison: {output}\n")


def _measure(metric: str | None, better: str | None) -> Measure | None:
    if metric is None:
        if better is not None:
            raise click.UsageError("--better goes with --metric.")
        return None
    from ..sweep.metrics import load_metric
    from ..sweep.sources import FACTORY, MetricSource

    if not re.fullmatch(FACTORY, metric):
        raise click.UsageError(f"--metric {metric}: write it as package.module:name.")
    higher = None if better is None else better == "higher"
    return load_metric(MetricSource(factory=metric, higher_is_better=higher))
