"""Weights where they are pruned: in place, or on a device that they are copied to and back from.

A model that fits on the device is copied there once. Of a larger one, a few layers at a time are
there: the next ones arrive, and the last ones leave, while the device works on those between.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import cached_property
from typing import NamedTuple, overload

import torch

from ..backends.protocol import Batch

# What of a device's free memory may hold weights; the rest is for what backends need themselves.
SHARE = 0.5
# Units on the device at a time: one that arrives, one that is pruned, one that leaves.
DEPTH = 3


class Stage:
    """The batches of one call, and where their weights are while they are pruned.

    Args:
        batches: with each weight where it lives.
        device: where to compute; None means where each weight lives.
        room: bytes of weights that may be on the device; None asks the device.
    """

    def __init__(
        self, batches: Sequence[Batch], device: torch.device | None, room: int | None = None
    ) -> None:
        self._homes = list(batches)
        self._device = device
        away = [i for i, batch in enumerate(batches) if device not in (None, batch.weight.device)]
        self._away = frozenset(away)
        self.room = _room(device) if room is None and away and device else room
        total = sum(_bytes(batches[i]) for i in away)
        self._streams = self.room is not None and total > self.room
        self._guests: list[Batch] | None = None
        on_gpu = bool(away) and _is_cuda(device)
        self._arriving = _new_stream(device) if on_gpu else None
        self._departing = _new_stream(device) if on_gpu else None
        self._leaving: list[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event | None]] = []
        if away and _is_cuda(device) and torch.cuda.is_current_stream_capturing():
            raise ValueError(
                f"a CUDA graph cannot hold copies between {batches[away[0]].weight.device} and "
                f"{device}; move the model there before the capture, and leave device=None"
            )

    @cached_property
    def stand_ins(self) -> list[Batch]:
        """The batches as the backend will see them; of weights to be copied, without values."""
        return [
            replace(batch, weight=_stand_in(batch.weight, self._device))
            if i in self._away
            else batch
            for i, batch in enumerate(self._homes)
        ]

    @property
    def copies(self) -> bool:
        """True where weights are copied to the device and back."""
        return bool(self._away)

    @property
    def scattered(self) -> bool:
        """True where the batches are never on one device at one time."""
        return self._streams or len({batch.weight.device for batch in self.stand_ins}) > 1

    @property
    def largest_unit(self) -> int | None:
        """How many bytes a unit may hold, where the model does not fit on the device."""
        return self.room // DEPTH if self._streams and self.room is not None else None

    @property
    def everything(self) -> Sequence[Batch]:
        """All batches; one at a time on the device where they do not all fit."""
        if self._streams:
            return _Streamed(self)
        self._arrive_all()
        return self._homes if self._guests is None else self._guests

    def each(self, units: Sequence[Sequence[int]]) -> Iterator[list[Batch]]:
        """The batches of each unit on the device, the next unit on its way meanwhile."""
        if not self._streams:
            everything = self.everything
            for unit in units:
                yield [everything[i] for i in unit]
            return
        following = self._arrive(units[0] if units else [])
        for k in range(len(units)):
            current = self._ready(following)
            following = self._arrive(units[k + 1] if k + 1 < len(units) else [])
            yield current

    def leave(self, unit: Sequence[int], batches: Sequence[Batch]) -> None:
        """Start copying pruned weights back to where they live."""
        for i, batch in zip(unit, batches, strict=True):
            if i not in self._away:
                continue
            home = self._homes[i].weight
            if self._departing is None:
                home.copy_(batch.weight)
                continue
            self._departing.wait_stream(torch.cuda.current_stream(batch.weight.device))
            with torch.cuda.stream(self._departing):
                pinned = torch.empty_like(home, pin_memory=home.device.type == "cpu")
                pinned.copy_(batch.weight, non_blocking=True)
                batch.weight.record_stream(self._departing)
            self._leaving.append((home, pinned, _recorded(self._departing)))
            if self._streams:
                self._land(len(unit) * DEPTH)

    def finish(self) -> None:
        """Wait until every weight is back where it lives."""
        self._land(0)

    def _land(self, outstanding: int) -> None:
        while len(self._leaving) > outstanding:
            home, pinned, event = self._leaving.pop(0)
            if event is not None:
                event.synchronize()
            home.copy_(pinned)

    def _arrive_all(self) -> None:
        if self._away and self._guests is None:
            self._guests = self._ready(self._arrive(range(len(self._homes))))

    def _arrive(self, unit: Sequence[int]) -> _Arrival:
        batches = [
            replace(self._homes[i], weight=self._copied(self._homes[i].weight))
            if i in self._away
            else self._homes[i]
            for i in unit
        ]
        return _Arrival(batches, None if self._arriving is None else _recorded(self._arriving))

    def _copied(self, home: torch.Tensor) -> torch.Tensor:
        if self._arriving is None:
            return home.to(self._device, copy=True)
        with torch.cuda.stream(self._arriving):
            pinned = home.pin_memory() if home.device.type == "cpu" else home
            return pinned.to(self._device, non_blocking=True)

    def _ready(self, arrival: _Arrival) -> list[Batch]:
        """The batches, after the work that follows was made to wait for their copies."""
        if arrival.event is not None:
            stream = torch.cuda.current_stream(self._device)
            stream.wait_event(arrival.event)
            for batch in arrival.batches:
                batch.weight.record_stream(stream)
        return arrival.batches


class _Arrival(NamedTuple):
    """Weights on their way to the device, and what tells that they are there."""

    batches: list[Batch]
    event: torch.cuda.Event | None


class _Streamed(Sequence[Batch]):
    """All batches of a stage that has no room for them: each on the device while it is looked at.

    A backend that ranks them together goes through them once a pass.
    """

    def __init__(self, stage: Stage) -> None:
        self._stage = stage
        self._known = stage.stand_ins

    def __len__(self) -> int:
        return len(self._known)

    @overload
    def __getitem__(self, index: int) -> Batch: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Batch]: ...
    def __getitem__(self, index: int | slice) -> Batch | Sequence[Batch]:
        """A stand-in: shape, dtype and device, but no values."""
        return self._known[index]

    def __iter__(self) -> Iterator[Batch]:
        for (batch,) in self._stage.each([[i] for i in range(len(self))]):
            yield batch


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


def _bytes(batch: Batch) -> int:
    return batch.weight.numel() * batch.weight.element_size()


def _stand_in(weight: torch.Tensor, device: torch.device | None) -> torch.Tensor:
    return torch.empty(1, dtype=weight.dtype, device=device).expand(weight.shape)
