"""The table of a report."""

# ruff: noqa: D102  # LayerStats and PruneReport say what these are

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Protocol

from .common.tables import layers_table

if TYPE_CHECKING:
    from rich.table import Table

COLUMNS = ("shape", "basis", "level", "kept", "sparsity", "weight sp.", "error", "ms", "note")


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


def report_table(report: Report, title: str, caption: str, max_layers: int | None) -> Table:
    """The table of a report; see ``layers_table``."""
    return layers_table(
        title,
        COLUMNS,
        report.layers,
        _cells,
        (f"{report.numel:,}", "", "", f"{report.kept:,}", *_amounts(report), ""),
        caption=caption,
        max_layers=max_layers,
        has_note=True,
    )


def _cells(layer: LayerRow) -> tuple[str, ...]:
    return (
        layer.name,
        "x".join(map(str, layer.shape)),
        layer.wavelet,
        _level(layer),
        f"{layer.kept:,}",
        *_amounts(layer),
        layer.note,
    )


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
