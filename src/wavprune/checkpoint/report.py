"""What saving did."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True, slots=True)
class SavedLayer:
    """One compressed layer.

    Attributes:
        name: the layer's name.
        shape: of its weight.
        wavelet: its basis.
        values: ``"float32"``, ``"float16"`` or ``"symbols"``, whole numbers times a scale.
        coder: what wrote them: ``"zstd"`` or ``"ans"``.
        coefficients: how many the layer has.
        kept: how many are stored.
        bytes: of all that is stored of it.
        squared_error: squared Frobenius norm of the weight as it is loaded less as it was.
        squared_norm: squared Frobenius norm of the weight as it was.
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
    squared_error: float
    squared_norm: float
    checksum: int

    @property
    def numel(self) -> int:
        """How many weights it has."""
        return math.prod(self.shape)

    @property
    def bits_per_weight(self) -> float:
        """Bits that are stored for each weight."""
        return 8 * self.bytes / self.numel

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the change over that of the weight; 0 for a zero weight."""
        return _relative(self.squared_error, self.squared_norm)


@dataclass(frozen=True, slots=True)
class SaveReport:
    """A compressed file.

    Attributes:
        path: where it is.
        bytes: of the whole file.
        uncompressed: bytes of all tensors as they were.
        layers: one entry a compressed layer.
        step: the step that a target came to, or that was asked for; else None.
        seconds: wall time.
    """

    path: Path
    bytes: int
    uncompressed: int
    layers: tuple[SavedLayer, ...]
    step: float | None
    seconds: float

    @property
    def numel(self) -> int:
        """Weights in all compressed layers."""
        return sum(layer.numel for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the compressed layers for each of their weights."""
        return 8 * sum(layer.bytes for layer in self.layers) / self.numel

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the change over that of the weights, all layers as one vector."""
        error = sum(layer.squared_error for layer in self.layers)
        return _relative(error, sum(layer.squared_norm for layer in self.layers))


def _relative(error: float, norm: float) -> float:
    return math.sqrt(error / norm) if norm else 0.0
