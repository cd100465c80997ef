"""``wavprune bases``."""

from __future__ import annotations

import re
from typing import NamedTuple

import click
import torch

from ..bases import Kernel, basis_for, family_of, max_level, names
from ..bases.basis import DENSE_VALUES
from ..config import PruneConfig
from .options import JSON, transform_options
from .output import data_table, size, write_json, write_table, yes_or_no


class _Row(NamedTuple):
    basis: str
    level: int
    coefficients: int
    structural_zeros: int
    expansive: bool
    orthonormal: bool


def max_levels(kernel: tuple[int, ...]) -> dict[str, int]:
    """The deepest level of every transform on kernels of this size, of one to three axes."""
    axes = [n for n in kernel if n > 1] or [1]
    depth, plane = axes[:-2], (axes[-1], axes[-2] if len(axes) > 1 else axes[-1])
    parts = [plane, *((n, n) for n in depth)]
    return {
        name: max(max_level(name, part) for part in parts)
        for name in names()
        if family_of(name).transforms
    }


def _kernel_size(context: click.Context, parameter: click.Parameter, text: str) -> Kernel:
    match = re.fullmatch(r"([1-9]\d*)(?:x([1-9]\d*))?", text, re.ASCII)
    if match is None:
        raise click.BadParameter(f"{text!r} is not a kernel size; write it as 3x3 or 3.")
    # More digits than this are too large, and int() would take long or refuse.
    if max(map(len, filter(None, match.groups()))) > len(str(DENSE_VALUES)):
        raise click.BadParameter(f"{text!r} has more than {DENSE_VALUES} values.")
    kernel = int(match[1]), int(match[2] or match[1])
    if kernel[0] * kernel[1] > DENSE_VALUES:
        raise click.BadParameter(f"{text!r} has more than {DENSE_VALUES} values.")
    return kernel


@click.command()
@click.option(
    "--kernel",
    metavar="HxW",
    required=True,
    callback=_kernel_size,
    help="The kernel size, as 3x3 or 3.",
)
@transform_options
@click.option("--all", "show_all", is_flag=True, help="Include the bases that have no level.")
@JSON
def bases(
    kernel: Kernel, mode: str, level: int | None, force_level: bool, show_all: bool, as_json: bool
) -> None:
    """Show the bases of a kernel size: levels, coefficients and properties."""
    # On a 1x1 kernel every basis is the identity, whatever level is forced.
    force_level = force_level and level is not None and kernel != (1, 1)
    levels = max_levels(kernel)
    no_level = [name for name, deepest in levels.items() if deepest == 0 and not force_level]
    shown = [name for name in names() if show_all or name not in no_level]
    rows = [_row(name, kernel, mode, level, force_level) for name in shown]
    if as_json:
        content = {
            "kernel": kernel,
            "mode": mode,
            "bases": [row._asdict() for row in rows],
            "level_0": no_level,
        }
        write_json(content)
        return
    title = f"Bases of {size(kernel)} kernels, mode {mode}"
    table = data_table(title, *(field.replace("_", " ") for field in _Row._fields))
    for row in rows:
        table.add_row(*map(yes_or_no, row))
    if no_level:
        hint = "" if show_all else "; --all shows them"
        table.caption = (
            f"{len(no_level)} bases reach level 0 on {size(kernel)}: no transform runs{hint}"
        )
    write_table(table)


def _row(name: str, kernel: Kernel, mode: str, level: int | None, force_level: bool) -> _Row:
    config = PruneConfig(wavelet=name, level=level, mode=mode, force_level=force_level)
    num_values = kernel[0] * kernel[1]
    # A basis that is computed from the weight needs one; the values do not change these properties.
    weight = torch.eye(num_values).view(num_values, 1, *kernel)
    basis = basis_for(config, weight)
    structural_zeros = int(basis.structural.sum())
    return _Row(
        name,
        basis.level_used,
        basis.coefficients,
        structural_zeros,
        basis.expansive,
        basis.orthonormal,
    )
