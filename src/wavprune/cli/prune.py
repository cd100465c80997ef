"""``wavprune prune``."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Any

import click

from ..checkpoint.formats import STATE_DICTS
from ..checkpoint.prepared import LARGEST_KERNEL
from ..checkpoint.prune import prune_file
from ..config import RULES, SCOPES, PruneConfig
from ..engine.patterns import pattern_method
from ..report import PruneReport
from .calibration import Inputs, calibration_options, prune_calibrated
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
    "--pattern",
    metavar="N:M",
    help="Instead of --sparsity: keep N of every M weights along the input channels, with --method "
    "min-weight or --wavelet identity.",
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
@calibration_options(levels=True)
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
    pattern: str | None,
    inputs: Inputs | None,
    **settings: Any,
) -> None:
    """Prune the convolutions of a checkpoint: its weights of three to five axes.

    IN is a .safetensors file, an .onnx model, a .pt, .pth or .bin state dict, or a model directory
    that holds model.safetensors or its shards and their index. OUT is of the same kind and appears
    when it is complete; external data of an .onnx model is beside it, as OUT.data.

    With --calibration, IN is an .onnx model, a Hugging Face directory, or package.module:function
    that returns the network; then OUT is a .safetensors file with its weights.
    """
    if output is None and not dry_run:
        raise click.UsageError("Missing option '-o': name OUT, or give --dry-run.")
    if report is not None:
        check_replaceable(report, force)
    for path in (output, report):
        expect_output(path)
    if pattern is not None:
        if settings["sparsity"] is not None or settings["percentile"] is not None:
            raise click.UsageError("--pattern says itself how much is pruned.")
        settings["method"] = pattern_method(pattern, settings["method"], settings["wavelet"])
        settings["sparsity"] = RULES[settings["method"]].sparsity
    config = PruneConfig(targets=targets or None, ignore=ignore or None, **settings)
    progress = sys.stderr.isatty()
    if inputs is None:
        result = prune_file(source, output, config, force=force, dry_run=dry_run, progress=progress)
    else:
        target = None if dry_run else output
        result = prune_calibrated(source, target, config, inputs, force=force, progress=progress)
    result.wait()
    if report is not None and not dry_run:
        REPORT_WRITERS[report.suffix.lower()](result, report)
    if as_json:
        write(result.to_json())
        return
    write_table(result.to_table())
    if result.decision is not None:
        write(f"{result.decision}\n")
    if dry_run:
        write("dry run: no file was written\n")
        return
    assert output is not None
    write(f"pruned: {output}, {_size_of(output):,} bytes\n{_how_to_compress(output, result)}\n")


def _size_of(path: Path) -> int:
    """Bytes of a file, or of all files of a directory."""
    paths = path.rglob("*") if path.is_dir() else [path]
    return sum(entry.stat().st_size for entry in paths if entry.is_file())


def _how_to_compress(output: Path, report: PruneReport) -> str:
    """That the file is not small yet, and the command that makes it so."""
    text = "the pruned file is as large as its input"
    bases = report.bases.values()
    is_told = all(not basis.expansive and basis.num_values <= LARGEST_KERNEL for basis in bases)
    if output.suffix.lower() in STATE_DICTS or not is_told:
        what = "its weights do" if not is_told else "such a file does"
        return (
            f"{text}, and {what} not tell what was kept; `wavprune compress` of the input with the "
            "same settings makes it small"
        )
    small = output.with_name(f"{output.stem}-small{output.suffix}")
    if output.is_dir():
        small = output.with_name(f"{output.name}-small")
    command = shlex.join(["wavprune", "compress", str(output), "-o", str(small)])
    size = report.estimated_bytes()
    assert size is not None
    return f"{text}; this makes it small, about {size:,} bytes:\n    {command}"
