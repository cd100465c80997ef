"""``wavprune inspect``."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import click
from rich.table import Table

from ..checkpoint.contents import contents_of, is_compressed
from ..checkpoint.formats import LayerInfo, open_checkpoint
from ..checkpoint.huggingface import compressed_weights
from .bases import max_levels
from .options import JSON, SOURCE
from .output import data_table, literal, size, write_json, write_table


@click.command()
@SOURCE
@click.option(
    "--against",
    metavar="ORIGINAL",
    type=click.Path(path_type=Path),
    help="Of a compressed file: the checkpoint that was compressed, to show each layer's error.",
)
@JSON
def inspect(source: Path, against: Path | None, as_json: bool) -> None:
    """Show the layers of a checkpoint, and the levels that each wavelet has on their kernels.

    IN is what `wavprune prune` takes. Of what `wavprune compress` wrote, the layers are shown with
    their bases, kept coefficients, bytes and bits, then what is stored as it was, and batch norms.
    """
    compressed = compressed_weights(source) or source
    if compressed.is_file() and is_compressed(compressed):
        contents = contents_of(compressed, against)
        if as_json:
            write_json(contents.to_dict())
        else:
            write_table(contents.to_table())
        return
    if against is not None:
        raise click.UsageError(f"--against goes with a compressed file, and {source} is none.")
    layers = list(open_checkpoint(source).inspect())
    kernels = Counter(layer.kernel for layer in layers)
    if as_json:
        content = {
            "layers": [{**layer._asdict(), "kernel": layer.kernel} for layer in layers],
            "kernels": [
                {"kernel": kernel, "layers": count, "levels": max_levels(kernel)}
                for kernel, count in kernels.items()
            ],
        }
        write_json(content)
        return
    write_table(_layer_table(str(source), layers))
    write_table(_kernel_table(kernels))


def _layer_table(title: str, layers: Sequence[LayerInfo]) -> Table:
    table = data_table(literal(title), "layer", "shape", "dtype", "weights", "zeros", "zeros %")
    for layer in layers:
        table.add_row(
            literal(layer.name),
            size(layer.shape),
            layer.dtype,
            *_zero_cells(layer.numel, layer.zeros),
        )
    table.add_section()
    numel = sum(layer.numel for layer in layers)
    zeros = sum(layer.zeros or 0 for layer in layers)
    table.add_row("total", f"{len(layers)} layers", "", *_zero_cells(numel, zeros))
    return table


def _kernel_table(kernels: Counter[tuple[int, ...]]) -> Table:
    table = Table("kernel", "layers", "level", "bases whose deepest level this is", title="Levels")
    table.title_justify = "left"
    for kernel, count in kernels.items():
        levels = max_levels(kernel)
        for level in sorted(set(levels.values())):
            names = [name for name, deepest in levels.items() if deepest == level]
            # On small kernels most bases have no level; a list of them all would hide the rest.
            shown = ", ".join(names) if level else f"{len(names)} bases: no transform runs"
            table.add_row(size(kernel), str(count), str(level), shown)
        table.add_section()
    return table


def _zero_cells(numel: int, zeros: int | None) -> tuple[str, str, str]:
    if zeros is None:
        return f"{numel:,}", "", ""
    return f"{numel:,}", f"{zeros:,}", f"{zeros / numel:.2%}"
