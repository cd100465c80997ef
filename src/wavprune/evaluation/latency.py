"""Time of forward passes."""

from __future__ import annotations

import statistics
import time
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

# Enough for a median and a 95th percentile.
MIN_TIMED_BATCHES = 10


class Latency(NamedTuple):
    """Times of batches of one shape.

    Attributes:
        median: seconds per batch.
        p95: the 95th percentile of the same.
        throughput: samples per second.
    """

    median: float
    p95: float
    throughput: float


class Stopwatch:
    """Runs a model and times the batches that have the shape of the first one.

    Args:
        model: the model to run.
        warmup: how many untimed forward passes of the first batch come first.
    """

    def __init__(self, model: nn.Module, warmup: int) -> None:
        self._model = model
        self._warmup = warmup
        self._first_batch: torch.Tensor | None = None
        self._seconds: list[float] = []

    def run(self, inputs: torch.Tensor) -> Any:
        """What the model returns for a batch."""
        if self._first_batch is None:
            self._first_batch = inputs
            for _ in range(self._warmup):
                self._model(inputs)
        _synchronize(inputs.device)
        start = time.perf_counter()
        output = self._model(inputs)
        _synchronize(inputs.device)
        if inputs.shape == self._first_batch.shape:
            self._seconds.append(time.perf_counter() - start)
        return output

    def latency(self) -> Latency:
        """The times, after as many more runs of the first batch as it takes."""
        assert self._first_batch is not None
        while len(self._seconds) < MIN_TIMED_BATCHES:
            self.run(self._first_batch)
        return Latency(
            statistics.median(self._seconds),
            float(np.percentile(self._seconds, 95)),
            len(self._first_batch) * len(self._seconds) / sum(self._seconds),
        )


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
