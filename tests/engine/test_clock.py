from __future__ import annotations

import time
from unittest.mock import MagicMock

import pytest
import torch

from tests.support.cases import layer_of, normal
from wavprune import PruneConfig
from wavprune.engine.clock import Clock

GPU = torch.device("cuda", 0)


def clock() -> Clock:
    """Of two layers, one with three times the weights of the other."""
    return Clock([layer_of(normal(outs, 2, 3, 3), PruneConfig()) for outs in (3, 1)])


class Event:
    """Notes the stream that it is recorded on."""

    made: list[Event]

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing
        self.stream: object = None
        self.made.append(self)

    def record(self, stream: object) -> None:
        self.stream = stream

    def synchronize(self) -> None:
        assert self.stream is not None

    def elapsed_time(self, end: Event) -> float:
        assert self.made.index(self) < self.made.index(end)
        return 4000.0


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> MagicMock:
    fake = MagicMock(Event=Event)
    fake.is_current_stream_capturing.return_value = False
    monkeypatch.setattr(torch, "cuda", fake)
    monkeypatch.setattr(Event, "made", [], raising=False)
    return fake


def test_layers_that_run_together_share_the_time_by_their_weights() -> None:
    subject = clock()
    with subject.timed([0, 1], torch.device("cpu")):
        time.sleep(0.004)
    with subject.timed([1], torch.device("cpu")):
        time.sleep(0.01)
    first, second = subject.seconds()
    assert first >= 0.003
    assert second >= 0.011


def test_a_gpu_tells_the_time_by_events_on_its_current_stream(cuda: MagicMock) -> None:
    subject = clock()
    for _ in range(2):
        with subject.timed([0, 1], GPU):
            pass
    assert {event.stream for event in Event.made} == {cuda.current_stream.return_value}
    cuda.current_stream.assert_called_once_with(GPU)
    assert subject.seconds() == [6.0, 2.0]


def test_nothing_is_timed_in_a_capture(cuda: MagicMock) -> None:
    cuda.is_current_stream_capturing.return_value = True
    subject = clock()
    with subject.timed([0, 1], GPU):
        pass
    assert Event.made == []
    assert subject.seconds() == [0.0, 0.0]
