"""Weights where they are pruned: in place, or on a device that they are copied to and back from.

A model that fits on the device is copied there once. Of a larger one, a few layers at a time are
there: the next ones arrive, and the last ones leave, while the device works on those between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..backends import Budget, Job, Layer
from ..errors import WavpruneError
from .device import is_capturing

# What of a device's free memory may hold weights; the rest is for what backends need themselves.
SHARE = 0.5
# Groups of layers on the device at a time: one arrives, one is pruned, one leaves.
DEPTH = 3


class Stage:
    """The layers of one run, and where their weights are while they are pruned.

    Args:
        layers: with each weight where it lives.
        device: where to compute; None means where each weight lives.
        room: bytes of weights that may be on the device; None asks the device.
    """

    def __init__(
        self, layers: Sequence[Layer], device: torch.device | None, room: int | None = None
    ) -> None:
        self._homes = list(layers)
        self._device = device
        self._away: frozenset[int] = frozenset()
        if device is not None:
            homes = [layer.weight.device for layer in layers]
            self._away = frozenset(i for i, home in enumerate(homes) if home != device)
        self.room = _room(device) if room is None and self._away and device else room
        total = sum(layers[i].weight.nbytes for i in self._away)
        self._streams = self.room is not None and total > self.room
        self._guests: list[Layer] | None = None
        on_gpu = bool(self._away) and _is_cuda(device)
        self._arriving = _new_stream(device) if on_gpu else None
        self._departing = _new_stream(device) if on_gpu else None
        self._leaving: list[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]] = []
        if on_gpu and is_capturing():
            home = layers[min(self._away)].weight.device
            raise WavpruneError(
                f"a CUDA graph cannot hold copies between {home} and {device}; move the model "
                "there before the capture, and leave device=None"
            )

    @property
    def copies(self) -> bool:
        """True where weights are copied to the device and back."""
        return bool(self._away)

    @property
    def scattered(self) -> bool:
        """True where the layers are never on one device at one time."""
        return self._streams or len({layer.device for layer in self._homes}) > 1

    @property
    def layers(self) -> list[Layer]:
        """The layers as they are to be computed; those still to be copied on the meta device."""
        return [
            replace(
                layer,
                weight=torch.empty_like(layer.weight, device="meta"),
                home=layer.weight,
                destination=self._device,
            )
            if i in self._away
            else layer
            for i, layer in enumerate(self._homes)
        ]

    @property
    def bytes_per_call(self) -> int | None:
        """How many bytes may go to the backend in one call, where the model does not fit."""
        return self.room // DEPTH if self._streams and self.room is not None else None

    def job(self, budget: Budget) -> Job:
        """All layers as one job, a stream where they do not fit on the device together."""
        if not self._streams:
            return Job(self.present(), budget)
        one_by_one = [[i] for i in range(len(self._homes))]
        return Job(self.layers, budget, lambda: (layer for (layer,) in self.visit(one_by_one)))

    def visit(self, calls: Sequence[Sequence[int]]) -> Iterator[list[Layer]]:
        """The layers of each call on the device, the next ones on their way meanwhile.

        Args:
            calls: indices of layers that go to the backend together.
        """
        if not self._streams:
            present = self.present()
            for call in calls:
                yield [present[i] for i in call]
            return
        following = self._arrive(calls[0] if calls else [])
        for k in range(len(calls)):
            current = self._ready(following)
            following = self._arrive(calls[k + 1] if k + 1 < len(calls) else [])
            yield current

    def leave(self, layers: Sequence[Layer]) -> None:
        """Start copying pruned weights back to where they live."""
        for layer in layers:
            home = layer.home
            if home is None:
                continue
            if self._departing is None:
                home.copy_(layer.weight)
                continue
            self._departing.wait_stream(torch.cuda.current_stream(layer.weight.device))
            with torch.cuda.stream(self._departing):
                pinned = torch.empty_like(home, pin_memory=home.device.type == "cpu")
                pinned.copy_(layer.weight, non_blocking=True)
                layer.weight.record_stream(self._departing)
            self._leaving.append((home, pinned, _recorded(self._departing)))
            if self._streams:
                self._land(len(layers) * DEPTH)

    def finish(self) -> None:
        """Wait until every weight is back where it lives."""
        self._land(0)

    def _land(self, outstanding: int) -> None:
        while len(self._leaving) > outstanding:
            home, pinned, event = self._leaving.pop(0)
            if event is not None:
                event.synchronize()
            home.copy_(pinned)

    def present(self) -> list[Layer]:
        """All layers, on the device."""
        if not self._away:
            return self._homes
        if self._guests is None:
            self._guests = self._ready(self._arrive(range(len(self._homes))))
        return self._guests

    def _arrive(self, call: Sequence[int]) -> _Arrival:
        layers = []
        for i in call:
            layer = self._homes[i]
            if i in self._away:
                layer = replace(layer, weight=self._copied(layer.weight), home=layer.weight)
            layers.append(layer)
        return _Arrival(layers, None if self._arriving is None else _recorded(self._arriving))

    def _copied(self, home: torch.Tensor) -> torch.Tensor:
        if self._arriving is None:
            return home.to(self._device, copy=True)
        with torch.cuda.stream(self._arriving):
            pinned = home.pin_memory() if home.device.type == "cpu" else home
            return pinned.to(self._device, non_blocking=True)

    def _ready(self, arrival: _Arrival) -> list[Layer]:
        """The layers, after the work that follows was made to wait for their copies."""
        if arrival.event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(arrival.event)
            for layer in arrival.layers:
                layer.weight.record_stream(stream)
        return arrival.layers


class _Arrival(NamedTuple):
    """Weights on their way to the device, and what tells that they are there."""

    layers: list[Layer]
    event: torch.cuda.Event | None


def calls_of(
    layers: Sequence[Layer], max_weights: int, max_bytes: int | None = None
) -> list[list[int]]:
    """Which layers go to the backend in one call: one, or several neighbors on one device.

    Of sharded weights the sizes are those of the whole, so that all ranks make the same calls.

    Args:
        layers: all of them.
        max_weights: how many weights together at most; one layer may have more.
        max_bytes: how many bytes together at most; None sets no limit.

    Returns:
        Indices of the layers of each call.
    """
    calls: list[list[int]] = []
    weights = size = 0
    for i, layer in enumerate(layers):
        count = layer.total_weights
        held = count * layer.weight.element_size() if max_bytes is not None else 0
        full = weights + count > max_weights or (max_bytes is not None and size + held > max_bytes)
        if not calls or full or layer.device != layers[calls[-1][-1]].device:
            calls.append([])
            weights = size = 0
        calls[-1].append(i)
        weights, size = weights + count, size + held
    return calls


def _is_cuda(device: torch.device | None) -> bool:
    return device is not None and device.type == "cuda"


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event()  # type: ignore[no-untyped-call]  # torch has no types for it
    event.record(stream)
    return event


def _new_stream(device: torch.device | None) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)  # type: ignore[no-untyped-call]  # torch has no types for it


def _room(device: torch.device) -> int | None:
    return int(torch.cuda.mem_get_info(device)[0] * SHARE) if _is_cuda(device) else None
