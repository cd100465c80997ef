"""The command line: ``wavprune prune``, ``inspect``, ``bases`` and ``info``."""

from __future__ import annotations

import json
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TextIO, TypeVar

import click
import torch
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from .._version import __version__, versions
from ..backends import protocol as backends
from ..bases.basis import DENSE_VALUES, Kernel, dense_basis, max_level
from ..checkpoint.formats import open_checkpoint
from ..checkpoint.prune import prune_file
from ..config import METHODS, MODES, OWN_BASES, SCOPES, WAVELETS, PruneConfig
from ..engine.layers import DTYPES
from ..report import PruneReport
from . import sweep as commands
from .checkpoint import COMMANDS as CHECKPOINT_COMMANDS

DEFAULT = PruneConfig()
BASES = (*OWN_BASES, *WAVELETS)
REPORTS = {".csv": PruneReport.to_csv, ".json": PruneReport.to_json}
# What has no width of its own, a pipe or a file, gets its tables unfolded.
WIDE = 200

Command = TypeVar("Command", bound=Callable[..., Any])
JSON = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of tables.")


def main(args: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        args: what follows ``wavprune``; None takes it from ``sys.argv``.

    Returns:
        The exit status: 0; 2 after a user's mistake, which one line on standard error names; 130
        after Ctrl-C.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("default", UserWarning)
        warnings.showwarning = _show_warning
        try:
            wavprune.main(args, prog_name="wavprune", standalone_mode=False)
        except click.Abort:
            return _fail("interrupted", 130)
        except click.ClickException as error:
            return _fail(error.format_message(), 2)
        except (OSError, ValueError) as error:
            return _fail(str(error), 2)
    return 0


@click.group(
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "show_default": True},
)
@click.version_option(__version__, prog_name="wavprune")
@click.pass_context
def wavprune(context: click.Context) -> None:
    """Prune convolutional networks in a wavelet basis."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


def _transform(command: Command) -> Command:
    """Add the options of a transform, which ``prune`` and ``bases`` share."""
    for option in (
        click.option(
            "--force-level",
            is_flag=True,
            help="Use --level even where PyWavelets calls it too deep for the kernel.",
        ),
        click.option(
            "--mode",
            metavar="NAME",
            type=click.Choice(MODES),
            default=DEFAULT.mode,
            help=f"How PyWavelets extends a kernel past its border: {', '.join(MODES)}.",
        ),
        click.option(
            "--level",
            type=click.IntRange(min=1),
            help="Levels of the transform.  [default: the deepest that exists]",
        ),
    ):
        command = option(command)
    return command


def _report_path(
    context: click.Context, parameter: click.Parameter, path: Path | None
) -> Path | None:
    if path is not None and path.suffix.lower() not in REPORTS:
        raise click.BadParameter(f"{path} must end in {' or '.join(REPORTS)}")
    if path is not None and (path.is_dir() or not path.parent.is_dir()):
        raise click.BadParameter(f"{path} is not a file in a directory that exists")
    return path


@wavprune.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", metavar="OUT", type=click.Path(path_type=Path), help="What to write."
)
@click.option(
    "--method", type=click.Choice(METHODS), default=DEFAULT.method, help="What to prune by."
)
@click.option(
    "--wavelet",
    metavar="NAME",
    default=DEFAULT.wavelet,
    help="A discrete wavelet of PyWavelets, or uhaar, dct, klt, identity, auto.",
)
@_transform
@click.option("--sparsity", type=float, help="Pruned fraction, in [0, 1).  [default: 0.5]")
@click.option(
    "--percentile",
    type=float,
    help="Instead of --sparsity: prune the coefficients of a layer below this percentile.",
)
@click.option(
    "--scope",
    type=click.Choice(SCOPES),
    default=DEFAULT.scope,
    help="Rank each layer by itself or all together.",
)
@click.option(
    "--targets",
    metavar="PATTERN",
    multiple=True,
    help="Prune these layers: a name, a glob or re:...; can be repeated.  [default: every layer]",
)
@click.option(
    "--ignore",
    metavar="PATTERN",
    multiple=True,
    help="Leave these layers out: a name, a glob or re:...; can be repeated.",
)
@click.option(
    "--device", metavar="NAME", help="Where to compute: cpu, cuda, cuda:1, ...  [default: cpu]"
)
@click.option(
    "--backend", metavar="NAME", default=DEFAULT.backend, help="What computes; auto chooses."
)
@click.option("--seed", type=int, default=DEFAULT.seed, help="Which mask --method random draws.")
@click.option(
    "--report",
    metavar="FILE",
    type=click.Path(path_type=Path),
    callback=_report_path,
    help="Write the report to a .csv or .json file.",
)
@JSON
@click.option("--force", is_flag=True, help="Replace OUT if it exists; OUT may be IN itself.")
@click.option("--dry-run", is_flag=True, help="Prune in memory and report; OUT is not written.")
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
    config = PruneConfig(targets=targets or None, ignore=ignore or None, **settings)
    result = prune_file(
        source, output, config, force=force, dry_run=dry_run, progress=sys.stderr.isatty()
    )
    if report is not None:
        REPORTS[report.suffix.lower()](result, report)
    if as_json:
        click.echo(result.to_json(), nl=False)
        return
    _print(result.to_table())
    click.echo("dry run: nothing pruned was written" if dry_run else f"pruned: {output}")


class _Layer(NamedTuple):
    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    zeros: int | None

    @property
    def kernel(self) -> Kernel:
        return self.shape[2], self.shape[3]


@wavprune.command()
@click.argument("source", metavar="IN", type=click.Path(path_type=Path))
@JSON
def inspect(source: Path, as_json: bool) -> None:
    """Show the layers of a checkpoint and how deep each wavelet reaches on them.

    IN is what `wavprune prune` takes.
    """
    layers = [_layer(ref.name, ref.weight) for ref in open_checkpoint(source).weights()]
    kernels = Counter(layer.kernel for layer in layers)
    if as_json:
        content = {
            "layers": [{**layer._asdict(), "kernel": layer.kernel} for layer in layers],
            "kernels": [
                {"kernel": kernel, "layers": count, "levels": _levels(kernel)}
                for kernel, count in kernels.items()
            ],
        }
        click.echo(json.dumps(content, indent=2))
        return
    _print(_layer_table(str(source), layers))
    _print(_kernel_table(kernels))


class _Row(NamedTuple):
    basis: str
    level: int
    coefficients: int
    structural_zeros: int
    expansive: bool
    orthonormal: bool


def _kernel(context: click.Context, parameter: click.Parameter, text: str) -> Kernel:
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a kernel size; write it as 3x3 or 3.")
    kernel = int(match[1]), int(match[2] or match[1])
    if kernel[0] * kernel[1] > DENSE_VALUES:
        raise click.BadParameter(f"{text!r} has more than {DENSE_VALUES} values.")
    return kernel


@wavprune.command()
@click.option(
    "--kernel", metavar="HxW", required=True, callback=_kernel, help="The kernel size, as 3x3 or 3."
)
@_transform
@click.option("--all", "show_all", is_flag=True, help="Show the bases that reach level 0 too.")
@JSON
def bases(
    kernel: Kernel, mode: str, level: int | None, force_level: bool, show_all: bool, as_json: bool
) -> None:
    """Show the bases of a kernel size: how deep they reach and what they are like."""
    # On a 1x1 kernel every basis is the identity, whatever is forced.
    force_level = force_level and kernel != (1, 1)
    forced = level is not None and force_level
    flat = [name for name, deepest in _levels(kernel).items() if deepest == 0 and not forced]
    rows = [
        _row(name, kernel, mode, level, force_level)
        for name in BASES
        if show_all or name not in flat
    ]
    if as_json:
        content = {
            "kernel": kernel,
            "mode": mode,
            "bases": [row._asdict() for row in rows],
            "level_0": flat,
        }
        click.echo(json.dumps(content, indent=2))
        return
    size = _size(kernel)
    title = f"Bases of {size} kernels, mode {mode}"
    table = _table(title, "basis", *(field.replace("_", " ") for field in _Row._fields[1:]))
    for row in rows:
        table.add_row(*map(_cell, row))
    if flat:
        hint = "" if show_all else "; --all shows them"
        table.caption = f"{len(flat)} bases reach level 0 on {size}: no transform runs{hint}"
    _print(table)


@wavprune.command()
@JSON
def info(as_json: bool) -> None:
    """Show versions, the backends and why any cannot run here, threads and instruction set."""
    reasons = backends.unavailable()
    facts = {
        **versions(),
        "threads": torch.get_num_threads(),
        "cuda": torch.cuda.is_available(),
        "instruction set": None if "native" in reasons else _instruction_set(),
        "CUDA kernels": None if "native" in reasons else _cuda_architectures(),
    }
    if as_json:
        status = {name: reasons.get(name) for name in backends.names()}
        click.echo(json.dumps({**facts, "unavailable": status}, indent=2))
        return
    table = Table(show_header=False, title="wavprune", title_justify="left")
    for name, fact in facts.items():
        table.add_row(name, escape(str(fact)))
    table.add_section()
    for name in backends.names():
        table.add_row(f"backend {name}", escape(reasons.get(name, "ready")))
    _print(table)


for _command in (*commands.COMMANDS, *CHECKPOINT_COMMANDS):
    wavprune.add_command(_command)


def _instruction_set() -> str:
    from ..ops import instruction_set

    return instruction_set()


def _cuda_architectures() -> str | None:
    from ..ops import cuda_architectures

    return cuda_architectures()


def _row(name: str, kernel: Kernel, mode: str, level: int | None, force_level: bool) -> _Row:
    if name == "klt":
        # Its matrices come from the data; what is shown here does not.
        return _Row(name, max_level(name, kernel), kernel[0] * kernel[1], 0, False, True)
    # Each is looked at once; the cache of dense_basis would hold them all.
    basis = dense_basis.__wrapped__(name, kernel, mode, level, force_level)
    zeros = int(basis.structural.sum())
    return _Row(
        name, basis.level_used, basis.coefficients, zeros, basis.expansive, basis.orthonormal
    )


def _layer(name: str, weight: torch.Tensor) -> _Layer:
    zeros = weight.numel() - int(weight.count_nonzero()) if weight.dtype in DTYPES else None
    dtype = str(weight.dtype).removeprefix("torch.")
    return _Layer(name, tuple(weight.shape), dtype, weight.numel(), zeros)


def _layer_table(title: str, layers: Sequence[_Layer]) -> Table:
    table = _table(escape(title), "layer", "shape", "dtype", "weights", "zeros", "zeros %")
    for layer in layers:
        amounts = _amounts(layer.numel, layer.zeros)
        table.add_row(escape(layer.name), _size(layer.shape), layer.dtype, *amounts)
    table.add_section()
    numel = sum(layer.numel for layer in layers)
    zeros = sum(layer.zeros or 0 for layer in layers)
    table.add_row("total", f"{len(layers)} layers", "", *_amounts(numel, zeros))
    return table


def _kernel_table(kernels: Counter[Kernel]) -> Table:
    table = Table("kernel", "layers", "level", "bases that reach it", title="Levels")
    table.title_justify = "left"
    for kernel, count in kernels.items():
        levels = _levels(kernel)
        for level in sorted(set(levels.values())):
            names = [name for name, deepest in levels.items() if deepest == level]
            # Those that do nothing here are most of them.
            shown = ", ".join(names) if level else f"{len(names)} bases: no transform runs"
            table.add_row(_size(kernel), str(count), str(level), shown)
        table.add_section()
    return table


def _levels(kernel: Kernel) -> dict[str, int]:
    return {name: max_level(name, kernel) for name in BASES if name != "identity"}


def _table(title: str, first: str, *numbers: str) -> Table:
    table = Table(title=title, title_justify="left", caption_justify="left")
    table.add_column(first, overflow="fold")
    for column in numbers:
        table.add_column(column, justify="right", no_wrap=True)
    return table


def _amounts(numel: int, zeros: int | None) -> tuple[str, str, str]:
    if zeros is None:
        return f"{numel:,}", "", ""
    return f"{numel:,}", f"{zeros:,}", f"{zeros / numel:.2%}"


def _cell(value: object) -> str:
    return ("no", "yes")[value] if isinstance(value, bool) else str(value)


def _size(shape: Iterable[int]) -> str:
    return "x".join(map(str, shape))


def _print(table: Table) -> None:
    Console(width=None if sys.stdout.isatty() else WIDE).print(table)


def _fail(message: str, status: int) -> int:
    click.echo(f"wavprune: error: {_one_line(message)}", err=True)
    return status


def _show_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    click.echo(f"wavprune: warning: {_one_line(str(message))}", err=True)


def _one_line(text: str) -> str:
    return " ".join(text.split())
