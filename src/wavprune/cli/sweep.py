"""``wavprune sweep``, ``export`` and ``report``."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from .output import check_replaceable, expect_output

if TYPE_CHECKING:
    from ..sweep.runner import Summary

Command = TypeVar("Command", bound=Callable[..., Any])

# Failed runs that the last line names.
MOST_FAILURES = 5


class FailedRunsError(click.ClickException):
    """A sweep was done, and some of its runs failed."""


FORCE = click.option("--force", is_flag=True, help="Replace FILE if it exists.")
RESULTS = click.argument("results", metavar="RESULTS", type=click.Path(path_type=Path))


# The parts of the time of a sweep, as its last line calls them.
PART_NAMES = {
    "forward": "forward passes of the evaluation",
    "matching": "of the matching",
    "moments": "moments",
    "pruning": "pruning",
    "metrics": "metrics",
    "reference": "unpruned networks",
    "loading": "loading",
    "other": "other",
    "waiting": "starting and waiting",
}


def _html(context: click.Context, parameter: click.Parameter, path: Path) -> Path:
    if path.suffix.lower() not in (".html", ".htm"):
        raise click.BadParameter(f"{path} must end in .html")
    return _output(context, parameter, path)


def _output(context: click.Context, parameter: click.Parameter, path: Path) -> Path:
    if path.is_dir() or not path.parent.is_dir():
        raise click.BadParameter(f"{path} is not a file in a directory that exists")
    return path


def _output_option(**settings: Any) -> Callable[[Command], Command]:
    settings = {"callback": _output, **settings}
    return click.option("-o", "--output", type=click.Path(path_type=Path), **settings)


@click.command()
@click.argument("file", metavar="SWEEP", type=click.Path(path_type=Path))
@_output_option(default="results.db", metavar="RESULTS", help="The results file.")
@click.option(
    "--jobs",
    type=click.IntRange(min=1),
    help="Runs at a time.  [default: one per core, or all that the cluster has]",
)
@click.option(
    "--cluster",
    type=click.Choice(("ray", "dask")),
    help="Run on a cluster instead of processes of this machine.",
)
@click.option(
    "--address", help="Address of the cluster; without it, one is started on this machine."
)
@click.option("--retry-failed", is_flag=True, help="Run failed runs again.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def sweep(
    file: Path,
    output: Path,
    jobs: int | None,
    cluster: str | None,
    address: str | None,
    retry_failed: bool,
    as_json: bool,
) -> None:
    """Run the grid of a sweep file, in parallel, into a results file.

    Every finished run becomes a row there at once. A sweep that is started again continues where
    it stopped, and several sweeps can share a file.
    """
    from ..sweep.runner import run_sweep
    from ..sweep.settings import read_sweep

    summary = run_sweep(
        read_sweep(file),
        output,
        jobs=jobs,
        cluster=cluster,
        address=address,
        retry_failed=retry_failed,
        progress=True,
    )
    if as_json:
        click.echo(json.dumps(dataclasses.asdict(summary), indent=2))
    else:
        click.echo(_summary_text(summary, output))
    if summary.failed:
        shown = [f"{label}: {error}" for label, error in summary.failures[:MOST_FAILURES]]
        more = summary.failed - len(shown)
        raise FailedRunsError(
            f"{summary.failed} of {summary.runs} runs failed; {'; '.join(shown)}"
            f"{f'; and {more} more' if more else ''}; all errors are in {output}"
        )


def _summary_text(summary: Summary, output: Path) -> str:
    if summary.known == summary.runs:
        return f"{output}: {summary.runs} of {summary.runs} runs done, nothing to do"
    lines = [
        f"{output}: {summary.ok} of {summary.runs} runs finished in {summary.seconds:.1f} s, "
        f"{summary.failed} failed, {summary.known} were there before"
    ]
    if summary.ok:
        spent = summary.finish_seconds
        finishing = f"training and storing {spent:.2f} s, " if spent >= 0.005 else ""
        lines.append(
            f"time of all runs: pruning {summary.prune_seconds:.2f} s "
            f"({summary.prune_share:.1%}), batch norms {summary.repair_seconds:.2f} s, "
            f"{finishing}evaluation {summary.evaluate_seconds:.2f} s"
        )
        lines.append(parts_text(summary))
    return "\n".join(lines)


def parts_text(summary: Summary) -> str:
    """Runs an hour, and the share of every part of the time."""
    total = sum(summary.parts.values())
    shares = [
        f"{name} {summary.parts.get(part, 0.0) / total:.1%}" for part, name in PART_NAMES.items()
    ]
    on = {None: "", 1: " on 1 process"}.get(summary.processes, f" on {summary.processes} processes")
    whose = "its" if summary.processes == 1 else "their"
    return f"{summary.runs_per_hour:,.0f} runs an hour{on}; {whose} time: {', '.join(shares)}"


@click.command()
@RESULTS
@_output_option(
    required=True,
    metavar="FILE",
    help="A .csv, .parquet or .json file; for TensorBoard, a folder to make.",
)
@FORCE
@click.option(
    "--to",
    type=click.Choice(("table", "tensorboard")),
    default="table",
    help="A table, or logs that TensorBoard compares by settings and measurements.",
)
@click.option("--layers", is_flag=True, help="One row per layer instead of one per run.")
@click.option(
    "--wavelettransforms",
    is_flag=True,
    help="One row per layer, with the columns of WaveletTransforms' logs.",
)
def export(
    results: Path, output: Path, force: bool, to: str, layers: bool, wavelettransforms: bool
) -> None:
    """Write the runs of a results file as a table, or as logs for TensorBoard."""
    if to == "tensorboard":
        if layers or wavelettransforms:
            raise click.UsageError("--layers and --wavelettransforms are tables; leave --to out")
        check_replaceable(output, False)
        from ..reporting.tensorboard import export_tensorboard

        runs = export_tensorboard(results, output)
        click.echo(f"{runs} runs: tensorboard --logdir {output}")
        return
    check_replaceable(output, force)
    expect_output(output)
    from ..reporting.export import export

    rows = export(results, output, layers=layers, wavelettransforms=wavelettransforms)
    click.echo(f"{rows} rows: {output}")


@click.command()
@RESULTS
@_output_option(required=True, metavar="FILE", help="An .html file.", callback=_html)
@FORCE
@click.option(
    "--tolerance",
    type=click.FloatRange(min=0),
    help="How much worse than unpruned is as good.  [default: 0.01 of accuracy, or a hundredth of "
    "another metric]",
)
def report(results: Path, output: Path, force: bool, tolerance: float | None) -> None:
    """Write a results file as one page: bytes against the metric, pictures, tables, errors."""
    check_replaceable(output, force)
    expect_output(output)
    from ..reporting.page import write_page

    write_page(results, output, tolerance)
    click.echo(f"report: {output}")
