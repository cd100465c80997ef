"""Layers and the masks that were chosen for them: projected, and compared with them."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from ..bases import Basis
from ..config import PruneConfig
from ..engine.layers import LayerRef, non_finite
from ..engine.plan import Plan
from ..engine.projection import checksum, distances, project_layers, projection_plan, rounding
from .layers import Signature, signatures

# A tensor of a layer, its weight or momentum, with the index of the layer.
Entry = tuple[int, LayerRef]


class _Known(NamedTuple):
    """A plan, and what it was made for."""

    indices: list[int]
    signatures: list[Signature]
    plan: Plan


class MaskedLayers:
    """What was chosen at one pruning, for every layer.

    Args:
        config: of the pruning.
        bases: one per layer.
        masks: one per layer.
        checksums: one per layer, of the weight as it was left; None where unknown.
    """

    def __init__(
        self,
        config: PruneConfig,
        bases: Sequence[Basis],
        masks: Sequence[torch.Tensor],
        checksums: Sequence[torch.Tensor | int | None] | None = None,
    ) -> None:
        self._config = config
        self.bases = list(bases)
        self.masks = list(masks)
        self._checksums = dict(enumerate(checksums or ()))
        self._plans: dict[str, _Known] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_plans": {}}

    def mask(self, entry: Entry) -> torch.Tensor:
        """The mask of a layer, where this tensor of it is."""
        index, ref = entry
        mask, device = self.masks[index], ref.weight.device
        return mask if mask.device == device else mask.to(device)

    def project(self, use: str, entries: Sequence[Entry], guarded: bool = False) -> None:
        """Project some tensors in place; see ``project_layers``.

        Args:
            use: what for: the plan of the last time with this use is used again if it fits.
            entries: the tensors.
            guarded: True where the caller undoes what an error leaves.
        """
        if entries:
            masks = [self.mask(entry) for entry in entries]
            project_layers(self._plan(use, entries), [ref for _, ref in entries], masks, guarded)

    def remember(self, entries: Iterable[Entry]) -> None:
        """Note what these weights are now, where only that tells later that they are pruned."""
        for i, ref in entries:
            if self.bases[i].expansive:
                self._checksums[i] = checksum(ref.weight)

    def strays(self, entries: Sequence[Entry]) -> dict[int, float]:
        """The layers that are not as their masks say, and how much of each that is.

        Warns of weights that are not finite, about which nothing can be said.
        """
        if not entries:
            return {}
        plan = self._plan("compare", entries)
        masks = [self.mask(entry) for entry in entries]
        measured = distances(plan, [ref for _, ref in entries], masks)
        strays = {}
        for (i, ref), layer, distance in zip(entries, plan.layers, measured, strict=True):
            if not math.isfinite(distance):
                warnings.warn(
                    f"layer {ref.name!r}: {non_finite(ref.weight)} of {ref.weight.numel()} weights "
                    "are NaN or infinite; whether it is pruned cannot be told",
                    stacklevel=3,
                )
            elif not (
                self._is_as_left(i, ref) if self.bases[i].expansive else distance <= rounding(layer)
            ):
                strays[i] = distance
        return strays

    def _is_as_left(self, index: int, ref: LayerRef) -> bool:
        # In an expansive basis a projection changes what was projected.
        known = self._checksums.get(index)
        return known is not None and int(known) == int(checksum(ref.weight))

    def _plan(self, use: str, entries: Sequence[Entry]) -> Plan:
        indices = [i for i, _ in entries]
        refs = [ref for _, ref in entries]
        current = signatures(refs)
        known = self._plans.get(use)
        if known is None or known.indices != indices or known.signatures != current:
            bases = [self.bases[i] for i in indices]
            known = _Known(indices, current, projection_plan(refs, self._config, bases))
            self._plans[use] = known
        return known.plan
