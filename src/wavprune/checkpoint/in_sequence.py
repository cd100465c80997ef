"""Layers quantised one after the other, each for what the layers before it really feed it.

The network runs twice in one batch: as it was in the first half, quantised in the second. When a
layer is called, its inputs in both are there. Before its weights ``W`` are quantised they become
the least-squares solution for the second onto the outputs of the first (``making_up.py``), so that
each layer makes up for the errors of those before it, as in the asymmetric calibration of Li et al.
2025, "GPTAQ". Then its bias takes up what is left of the mean.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable

import numpy as np
import torch

from ..calibration.calls import Call, NormCall, Tap
from ..calibration.network import channel_moments
from ..calibration.patches import num_positions, patches
from ..calibration.rows import join_columns, split_columns
from ..calibration.sequential import apart, halves
from ..calibration.statistics import (
    choose_blocks,
    generator_of,
    in_blocks,
    positions_per_sample,
    sampled_positions,
)
from .items import Item, Quantised
from .making_up import made_up
from .study import Study
from .twice import LEAST_POSITIONS

# Patches for each column of a layer's matrix.
PER_COLUMN = 25


def quantise_in_sequence(
    study: Study, c: float, done: Callable[[Item], object]
) -> tuple[dict[str, Quantised], dict[str, torch.Tensor]]:
    """All items of a network at one ``c``.

    Args:
        study: of the network, whose tensors are as they were.
        c: every step is a number of its item's own times this.
        done: called with each item.

    Returns:
        By name, what is quantised, and other tensors that took up a shift.
    """
    batch = study.together
    assert batch is not None
    tap = _Quantising(study, c, done)
    study.network.run(tap, torch.cat([batch, batch]))
    tap.finish()
    return tap.quantised, tap.changed


class _Quantising(Tap):
    def __init__(self, study: Study, c: float, done: Callable[[Item], object]) -> None:
        super().__init__(study.network.watched)
        self._study, self._c, self._done = study, c, done
        self._items = {item.name: item for item in study.items}
        self.quantised: dict[str, Quantised] = {}
        self.changed: dict[str, torch.Tensor] = {}
        # What the second half has in place of the network's own.
        self._tensors: dict[str, torch.Tensor] = {}

    def layer(self, name: str, call: Call) -> torch.Tensor:
        weight = f"{name}.weight".removeprefix(".")
        if weight not in self._items:
            return call.run()
        plain, coarse = apart(call)
        is_first = weight not in self._tensors
        if is_first:
            self._quantise(self._solved(name, self._items[weight], plain, coarse))
        before = plain.run()
        after = self._run(name, coarse)
        if is_first and weight in self._study.shifts:
            shift = channel_moments(name, plain, before).mean
            shift = shift - channel_moments(name, coarse, after).mean
            if self._take_up(weight, shift) == f"{name}.bias".removeprefix("."):
                after = self._run(name, coarse)
        return torch.cat([before, after])

    def norm(self, name: str, call: NormCall) -> torch.Tensor:
        plain, coarse = halves(call.input)
        replaced = {
            part: self._tensors[f"{name}.{part}"].to(coarse.device)
            for part in ("bias", "running_mean")
            if f"{name}.{part}" in self._tensors
        }
        return torch.cat([call.run(input=plain), call.run(input=coarse, **replaced)])

    def finish(self) -> None:
        """Quantise what no call has reached."""
        for name, item in self._items.items():
            if name not in self.quantised:
                self._quantise(item)

    def _run(self, name: str, call: Call) -> torch.Tensor:
        weight, bias = (f"{name}.{part}".removeprefix(".") for part in ("weight", "bias"))
        home = call.input.device
        moved = self._tensors.get(bias)
        return call.run(
            weight=self._tensors[weight].to(home), bias=None if moved is None else moved.to(home)
        )

    def _quantise(self, item: Item) -> None:
        found = item.quantised(self._c)
        self.quantised[item.name] = found
        self._tensors[item.name] = found.tensor()
        self._done(item)

    def _take_up(self, weight: str, shift: torch.Tensor) -> str:
        """Move a bias, or a mean the other way; its name."""
        name, _, sign = self._study.shifts[weight]
        if name in self._items:
            item = self._items[name]
            moved = item.matrix + sign * shift.numpy()[:, None]
            self._quantise(dataclasses.replace(item, matrix=moved.astype(np.float32)))
        else:
            before = self._study.plain[name]
            self.changed[name] = (before.double() + sign * shift.to(before.device)).to(before.dtype)
            self._tensors[name] = self.changed[name]
        return name

    def _solved(self, name: str, item: Item, plain: Call, coarse: Call) -> Item:
        """The item of the weights that make up for what the layers before have lost."""
        site = self._study.sites[name]
        if site.calls > 1:
            return item
        wanted = positions_per_sample(site.rows, len(coarse.batched), PER_COLUMN, LEAST_POSITIONS)
        positions = sampled_positions(
            num_positions(coarse), wanted, generator_of(0, "in sequence", name), plain.input.device
        )
        blocks = choose_blocks({name: site.rows}, sys.maxsize, 1)[name]
        read, meant = (in_blocks(patches(call, positions), blocks) for call in (coarse, plain))
        if site.centered:
            read = read - read.mean(-1, keepdim=True)
            meant = meant - meant.mean(-1, keepdim=True)
        weight = split_columns(site.rows.of_weight(item.original.to(read.device)), blocks)
        solved = join_columns(weight + made_up(weight, read, meant), blocks)
        solved = site.rows.join(solved).reshape(item.original.shape)
        most = torch.finfo(item.original.dtype).max
        return item.with_weight(solved.clamp(-most, most).to(item.original))
