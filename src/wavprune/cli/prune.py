"""``wavprune prune``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import click

from ..checkpoint.prune import prune_file
from ..config import SCOPES, PruneConfig
from ..report import PruneReport
from .options import (
    DEFAULTS,
    IGNORE,
    JSON,
    METHOD,
    SOURCE,
    TARGETS,
    WAVELET,
    transform_options,
)
from .output import check_replaceable, expect_output, write, write_table

REPORT_WRITERS = {".csv": PruneReport.to_csv, ".json": PruneReport.to_json}


def _report_path(
    context: click.Context, parameter: click.Parameter, path: Path | None
) -> Path | None:
    if path is not None and path.suffix.lower() not in REPORT_WRITERS:
        raise click.BadParameter(f"{path} must end in {' or '.join(REPORT_WRITERS)}")
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise click.BadParameter(f"{path} is not a file in a directory that exists")
    return path


@click.command()
@SOURCE
@click.option(
    "-o", "--output", metavar="OUT", type=click.Path(path_type=Path), help="Where to write."
)
@METHOD
@WAVELET
@transform_options
@click.option("--sparsity", type=float, help="Pruned fraction, in [0, 1).  [default: 0.5]")
@click.option(
    "--percentile",
    type=float,
    help="Instead of --sparsity: prune the coefficients of a layer below this percentile.",
)
@click.option(
    "--scope",
    type=click.Choice(SCOPES),
    default=DEFAULTS.scope,
    help="Rank the coefficients of each layer by themselves, or those of all layers together.",
)
@TARGETS
@IGNORE
@click.option(
    "--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1, ...  [default: cpu]"
)
@click.option(
    "--backend",
    metavar="NAME",
    default=DEFAULTS.backend,
    help="A backend that `wavprune info` lists, or auto.",
)
@click.option(
    "--seed", type=int, default=DEFAULTS.seed, help="Seed of the mask of --method random."
)
@click.option(
    "--report",
    metavar="FILE",
    type=click.Path(path_type=Path),
    callback=_report_path,
    help="Write the report to a .csv or .json file.",
)
@JSON
@click.option(
    "--force", is_flag=True, help="Replace OUT and FILE if they exist; OUT may be IN itself."
)
@click.option("--dry-run", is_flag=True, help="Prune in memory and report; write no file.")
def prune(
    source: Path,
    output: Path | None,
    report: Path | None,
    as_json: bool,
    force: bool,
    dry_run: bool,
    targets: tuple[str, ...],
    ignore: tuple[str, ...],
    **settings: Any,
) -> None:
    """Prune the 4-D weights of a checkpoint.

    IN is a .safetensors file, a .pt, .pth or .bin state dict, or a model directory that holds
    model.safetensors or its shards and their index. OUT is of the same kind and appears when it
    is complete.
    """
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o': name OUT, or give --dry-run.")
    if report is not None:
        check_replaceable(report, force)
    for path in (output, report):
        expect_output(path)
    config = PruneConfig(targets=targets or None, ignore=ignore or None, **settings)
    result = prune_file(
        source, output, config, force=force, dry_run=dry_run, progress=sys.stderr.isatty()
    )
    result.wait()
    if report is not None and not dry_run:
        REPORT_WRITERS[report.suffix.lower()](result, report)
    if as_json:
        write(result.to_json())
        return
    write_table(result.to_table())
    write("dry run: no file was written\n" if dry_run else f"pruned: {output}\n")
