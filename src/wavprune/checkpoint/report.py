"""What saving did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from ..common.tables import SHORT_ROWS, as_html, as_text, layers_table

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True)
class SavedLayer:
    """One compressed layer.

    Attributes:
        name: the layer's name.
        shape: of its weight.
        wavelet: its basis.
        values: ``"float32"``, ``"float16"`` or ``"symbols"``, whole numbers times a scale.
        coder: what wrote them, such as ``"zstd"`` or ``"ans"``.
        coefficients: how many the layer has.
        kept: how many are stored.
        bytes: of all that is stored of it.
        error: Frobenius norm of the weight as it is loaded less as it was.
        norm: Frobenius norm of the weight as it was.
        relative_error: of the two; 0 for a zero weight.
        checksum: CRC-32 of the weight as it is loaded.
    """

    name: str
    shape: tuple[int, ...]
    wavelet: str
    values: str
    coder: str
    coefficients: int
    kept: int
    bytes: int
    error: float
    norm: float
    relative_error: float
    checksum: int

    @property
    def numel(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    @property
    def bits_per_coded_weight(self) -> float:
        """Bits of the layer for each of its weights."""
        return 8 * self.bytes / self.numel

    @property
    def squared_error(self) -> float:
        """Squared Frobenius norm of the change."""
        return self.error * self.error

    @property
    def squared_norm(self) -> float:
        """Squared Frobenius norm of the weight as it was."""
        return self.norm * self.norm


@dataclass(frozen=True, slots=True, repr=False)
class SaveReport:
    """A compressed file; printed, and in a notebook, it is a table.

    Attributes:
        path: where it is.
        bytes: of the whole file.
        uncompressed: bytes of all tensors as they were, tied ones once.
        elements: of all tensors, tied ones once.
        layers: one entry a compressed layer.
        step: the step that a target came to, or that was asked for; else None.
        seconds: wall time.
        skipped: layers that are stored as they are because they cannot be compressed, and why.
        left_out: entries of a nested checkpoint that are not in the file: what is no tensor, or
            lies beside the state dict.
        predicted_kl: with calibration: the divergence of the outputs, in nats a sample, that was
            expected: what the errors add up to by the sensitivity of the outputs, and, if
            another step was tried before, in the proportion in which that one's came true.
        measured_kl: with calibration: the divergence on inputs that were held back.
    """

    path: Path
    bytes: int
    uncompressed: int
    elements: int
    layers: tuple[SavedLayer, ...]
    step: float | None
    seconds: float
    skipped: dict[str, str] = field(default_factory=dict)
    left_out: tuple[str, ...] = ()
    predicted_kl: float | None = None
    measured_kl: float | None = None

    @property
    def numel(self) -> int:
        """Weights in all compressed layers."""
        return sum(layer.numel for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file for each element of all tensors."""
        return 8 * self.bytes / self.elements if self.elements else 0.0

    @property
    def bits_per_coded_weight(self) -> float:
        """Bits of the compressed layers for each of their own weights."""
        return 8 * sum(layer.bytes for layer in self.layers) / self.numel if self.numel else 0.0

    @property
    def times_smaller(self) -> float:
        """``uncompressed / bytes``."""
        return self.uncompressed / self.bytes

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the change over that of the weights, all layers as one vector."""
        # hypot neither overflows nor underflows where squares do.
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.error for layer in self.layers)) / norm if norm else 0.0

    def to_table(self, max_layers: int | None = None) -> Table:
        """A rich table: the compressed layers and, last, the totals.

        Args:
            max_layers: of more layers than that the table has the first ones and a count of the
                others; None has all.
        """
        stored = [f"{name}: {reason}" for name, reason in self.skipped.items()]
        return layers_table(
            f"{self.path.name}: {self.bytes:,} bytes, {self.times_smaller:.1f} times smaller, "
            f"{self.bits_per_weight:.2f} bits per weight",
            ("shape", "basis", "kept", "values", "coder", "bytes", "bits", "error"),
            self.layers,
            _cells,
            (
                f"{self.numel:,}",
                "",
                f"{sum(layer.kept for layer in self.layers):,}",
                "",
                "",
                f"{sum(layer.bytes for layer in self.layers):,}",
                f"{self.bits_per_coded_weight:.2f}",
                f"{self.relative_error:.4f}",
            ),
            caption="bits: stored for each weight of the layer. error: relative change of the "
            "weights." + (f" Stored as they are: {'; '.join(stored)}." if stored else ""),
            max_layers=max_layers,
        )

    def __repr__(self) -> str:
        longest = max((len(layer.name) for layer in self.layers), default=0)
        return as_text(self.to_table(SHORT_ROWS), 110 + longest)

    def _repr_html_(self) -> str:
        return as_html(self.to_table(SHORT_ROWS))


def _cells(layer: SavedLayer) -> tuple[str, ...]:
    return (
        layer.name,
        "x".join(map(str, layer.shape)),
        layer.wavelet,
        f"{layer.kept:,}",
        layer.values,
        layer.coder,
        f"{layer.bytes:,}",
        f"{layer.bits_per_coded_weight:.2f}",
        f"{layer.relative_error:.4f}",
    )
