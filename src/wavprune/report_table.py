"""The table of a report."""

# ruff: noqa: D102  # LayerStats and PruneReport say what these are

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("shape", "basis", "level", "kept", "sparsity", "weight sp.", "error", "ms")


class Amounts(Protocol):
    """What a layer and all layers together have."""

    @property
    def numel(self) -> int: ...
    @property
    def kept(self) -> int: ...
    @property
    def sparsity(self) -> float: ...
    @property
    def weight_sparsity(self) -> float: ...
    @property
    def relative_error(self) -> float: ...
    @property
    def seconds(self) -> float: ...


class LayerRow(Amounts, Protocol):
    """What a layer has beside that."""

    @property
    def name(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def wavelet(self) -> str: ...
    @property
    def level_requested(self) -> int | None: ...
    @property
    def level_used(self) -> int: ...
    @property
    def note(self) -> str: ...


class Report(Amounts, Protocol):
    """All layers with their totals."""

    @property
    def layers(self) -> Sequence[LayerRow]: ...


def layers_table(report: Report, title: str, caption: str, max_layers: int | None) -> Table:
    """The layers and, last, the totals.

    Args:
        report: what a run did.
        title: above the table.
        caption: below it.
        max_layers: of more layers than that the first ones and a count of the others; None: all.
    """
    from rich.markup import escape
    from rich.table import Table

    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.add_column("layer", overflow="fold")
    for column in COLUMNS:
        table.add_column(column, justify="right", no_wrap=True)
    table.add_column("note")
    layers = report.layers
    shown = layers if max_layers is None or len(layers) <= max_layers else layers[:max_layers]
    for layer in shown:
        table.add_row(
            escape(layer.name),
            "x".join(map(str, layer.shape)),
            layer.wavelet,
            _level(layer),
            f"{layer.kept:,}",
            *_amounts(layer),
            layer.note,
        )
    if len(shown) < len(layers):
        table.add_row(f"{len(layers) - len(shown)} more", *[""] * len(COLUMNS), "see to_table()")
    table.add_section()
    table.add_row("total", f"{report.numel:,}", "", "", f"{report.kept:,}", *_amounts(report), "")
    return table


def _amounts(row: Amounts) -> tuple[str, str, str, str]:
    return (
        f"{row.sparsity:.2%}",
        f"{row.weight_sparsity:.2%}",
        f"{row.relative_error:.4f}",
        f"{row.seconds * 1e3:.2f}",
    )


def _level(layer: LayerRow) -> str:
    asked = layer.level_requested
    shown = str(layer.level_used)
    return shown if asked is None or asked == layer.level_used else f"{shown} of {asked}"
