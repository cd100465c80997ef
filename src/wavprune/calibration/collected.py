"""What is known of a network and a few of its inputs."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.layers import LayerRef
from ..engine.moments import Moments
from ..engine.projection import checksum
from ..errors import WavpruneError
from .network import Site
from .statistics import Statistics

# Candidates are repaired and solved in sequence on as many inputs; the one that is taken, on all.
MOST_MATCHED = 512


@dataclass(frozen=True)
class Calibration:
    """What ``calibrate`` found out; nothing in it depends on how the network is to be pruned.

    Attributes:
        statistics: inputs that statistics were taken of, in batches.
        probe: inputs that single layers are tried on.
        guard: inputs that nothing but the comparison of candidates looks at.
        layers: where each layer stands, in the order of execution.
        fitted: statistics of each layer on the first part.
        held: those on the two other parts, to choose a ridge by.
        blocks: into how many blocks the matrices of a layer's groups are cut.
        gradients: the row weights ``gn`` of each layer, or None.
        gains: the row weights ``bn``.
        moments: of inputs of batch norms and outputs of layers, on ``batch``.
        capacity: how many inputs may run in one batch, in two networks at once; 0 where their
            shapes differ.
        never_called: layers that the network did not call.
        checksums: of the weights that were there.
        samples: how many inputs there are.
        seed: of everything that was drawn.
        max_memory: bytes for matrices, and for inputs that run at once.
    """

    statistics: tuple[torch.Tensor, ...]
    probe: tuple[torch.Tensor, ...]
    guard: tuple[torch.Tensor, ...]
    layers: Mapping[str, Site]
    fitted: Mapping[str, Statistics]
    held: Mapping[str, Statistics]
    blocks: Mapping[str, int]
    gradients: Mapping[str, torch.Tensor] | None
    gains: Mapping[str, torch.Tensor]
    moments: Mapping[str, Moments]
    capacity: int
    never_called: tuple[str, ...]
    checksums: Mapping[str, int]
    samples: int
    seed: int
    max_memory: int

    @property
    def few(self) -> bool:
        """True where there are too few inputs to probe single layers."""
        return not self.probe

    @property
    def batch(self) -> torch.Tensor | None:
        """The inputs that repairs are made on, in one batch; None where their shapes differ."""
        return torch.cat(self.statistics)[: self._matched] if self.capacity else None

    @property
    def _matched(self) -> int:
        return min(self.capacity, MOST_MATCHED)

    @property
    def everything(self) -> torch.Tensor | None:
        """All inputs that are kept and fit, in one batch; None where their shapes differ."""
        return torch.cat(self.inputs)[: self.capacity] if self.capacity else None

    @property
    def inputs(self) -> tuple[torch.Tensor, ...]:
        """All inputs that are kept, in batches."""
        return *self.statistics, *self.probe, *self.guard

    def to(self, device: torch.device) -> Calibration:
        """The same with its inputs and statistics on a device."""
        parts = {
            part: tuple(batch.to(device) for batch in getattr(self, part))
            for part in ("statistics", "probe", "guard")
        }
        moments = {
            group: {name: entry.to(device) for name, entry in getattr(self, group).items()}
            for group in ("fitted", "held")
        }
        changes: dict[str, Any] = {**parts, **moments}
        return dataclasses.replace(self, **changes)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write it to a file of safetensors, with its inputs; ``load`` reads it."""
        from .storage import save

        save(self, path)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], device: str | torch.device | None = None
    ) -> Calibration:
        """What ``save`` wrote.

        Args:
            path: of the file.
            device: where its tensors are put; None means the CPU.

        Raises:
            WavpruneError: the file is something else.
        """
        from .storage import load

        return load(path, device)

    def check(self, refs: Sequence[LayerRef]) -> None:
        """Check that these layers are those that it was collected on.

        Raises:
            WavpruneError: it knows nothing of a layer, or the layer's weights are others.
        """
        for ref in refs:
            if ref.name not in self.checksums:
                known = ", ".join(list(self.checksums)[:8])
                raise WavpruneError(
                    f"calibration: it has nothing of layer {ref.name!r}; it has {known}. Give "
                    "calibrate the same targets and ignore"
                )
            if int(checksum(ref.weight)) != self.checksums[ref.name]:
                raise WavpruneError(
                    f"calibration: the weight of layer {ref.name!r} is not the one that it was "
                    "collected on; collect it on this model"
                )
