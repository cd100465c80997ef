"""What saving did."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path


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
    def bits_per_weight(self) -> float:
        """Bits that are stored for each weight."""
        return 8 * self.bytes / self.numel

    @property
    def squared_error(self) -> float:
        """Squared Frobenius norm of the change."""
        return self.error * self.error

    @property
    def squared_norm(self) -> float:
        """Squared Frobenius norm of the weight as it was."""
        return self.norm * self.norm


@dataclass(frozen=True, slots=True)
class SaveReport:
    """A compressed file.

    Attributes:
        path: where it is.
        bytes: of the whole file.
        uncompressed: bytes of all tensors as they were, tied ones once.
        layers: one entry a compressed layer.
        step: the step that a target came to, or that was asked for; else None.
        seconds: wall time.
        skipped: layers that are stored as they are because they cannot be compressed, and why.
        left_out: entries of a nested checkpoint that are not in the file: what is no tensor, or
            lies beside the state dict.
        predicted_kl: with calibration: the divergence of the outputs that the errors' sensitivities
            add up to, in nats a sample.
        measured_kl: with calibration: the same, measured on inputs that were held back.
    """

    path: Path
    bytes: int
    uncompressed: int
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
        """Bits of the compressed layers for each of their weights."""
        return 8 * sum(layer.bytes for layer in self.layers) / self.numel

    @property
    def relative_error(self) -> float:
        """Frobenius norm of the change over that of the weights, all layers as one vector."""
        # hypot neither overflows nor underflows where squares do.
        norm = math.hypot(*(layer.norm for layer in self.layers))
        return math.hypot(*(layer.error for layer in self.layers)) / norm if norm else 0.0
