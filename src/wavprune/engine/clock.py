"""How long each layer took, on the CPU and on a GPU."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch

from ..backends import Layer
from .device import is_capturing


class Clock:
    """Wall time of each layer; layers that run together share it by their number of weights."""

    def __init__(self, layers: Sequence[Layer]) -> None:
        self.weights = [layer.weight.numel() for layer in layers]
        self._spans: list[tuple[Sequence[int], float | tuple[torch.cuda.Event, ...]]] = []
        self._streams: dict[torch.device, torch.cuda.Stream | None] = {}

    def size(self, call: Sequence[int]) -> int:
        """Weights of some layers together."""
        return sum(map(self.weights.__getitem__, call))

    @contextmanager
    def timed(self, call: Sequence[int], device: torch.device) -> Iterator[None]:
        """Measure what these layers take: on a GPU by events, which no one waits for."""
        if device.type != "cuda":
            start = time.perf_counter()
            yield
            self._spans.append((call, time.perf_counter() - start))
            return
        stream = self._stream(device)
        if stream is None:
            yield
            return
        begin = _recorded(stream)
        yield
        self._spans.append((call, (begin, _recorded(stream))))

    def _stream(self, device: torch.device) -> torch.cuda.Stream | None:
        """The current one, which torch takes long to tell; None while a graph is captured."""
        if device not in self._streams:
            capturing = is_capturing()
            self._streams[device] = None if capturing else torch.cuda.current_stream(device)
        return self._streams[device]

    def seconds(self) -> list[float]:
        """One for each layer; on a GPU this waits for the work."""
        result = [0.0] * len(self.weights)
        for call, span in self._spans:
            if isinstance(span, tuple):
                span[1].synchronize()
                spent = span[0].elapsed_time(span[1]) / 1e3
            else:
                spent = span
            total = self.size(call) or 1
            for i in call:
                result[i] += spent * self.weights[i] / total
        return result


def _recorded(stream: torch.cuda.Stream) -> torch.cuda.Event:
    event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]  # torch's lack
    event.record(stream)
    return event
