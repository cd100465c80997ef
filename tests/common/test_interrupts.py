from __future__ import annotations

import os
import signal
import threading
from typing import Any

import pytest

from tests.support.interrupts import interrupted
from wavprune.common.interrupts import always, finish


def test_an_interruption_waits_for_the_end(alarm: Any) -> None:
    done: list[int] = []

    def work() -> None:
        for i in range(20):
            threading.Event().wait(0.01)
            done.append(i)

    alarm(0.03)
    with pytest.raises(KeyboardInterrupt):
        finish(work)
    assert done == list(range(20))


def test_what_the_work_raises_is_raised() -> None:
    def work() -> None:
        raise MemoryError("all gone")

    with pytest.raises(MemoryError, match="all gone"):
        finish(work)


def test_handlers_are_as_they_were_and_hear_of_every_signal(alarm: Any) -> None:
    heard: list[int] = []
    before = signal.signal(signal.SIGUSR1, lambda number, _: heard.append(number))
    mine = signal.getsignal(signal.SIGUSR1)
    try:

        def work() -> list[int]:
            os.kill(os.getpid(), signal.SIGUSR1)
            os.kill(os.getpid(), signal.SIGUSR1)
            return list(heard)

        assert finish(work) == []
        assert heard
        assert signal.getsignal(signal.SIGUSR1) is mine
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_in_another_thread_nothing_is_held_back() -> None:
    results: list[int] = []
    thread = threading.Thread(target=lambda: results.append(finish(lambda: 3)))
    thread.start()
    thread.join()
    assert results == [3]


def test_handlers_are_as_they_were_after_an_interrupt_anywhere() -> None:
    own = (signal.SIGINT, signal.SIGUSR1, signal.SIGUSR2)
    before = [signal.signal(number, signal.default_int_handler) for number in own]
    try:
        points = interrupted(lambda: finish(lambda: None), at=0)
        assert points is not None
        for at in range(1, points + 1):
            assert interrupted(lambda: finish(lambda: None), at) is None, at
            handlers = [signal.getsignal(number) for number in own]
            assert handlers == [signal.default_int_handler] * len(own), at
    finally:
        for number, handler in zip(own, before, strict=True):
            signal.signal(number, handler)


def test_what_an_interrupt_cut_short_is_undone_again() -> None:
    undone: list[str] = []

    def undo() -> None:
        undone.append("begun")
        if len(undone) == 1:
            raise KeyboardInterrupt
        undone.append("done")

    with pytest.raises(KeyboardInterrupt), always(undo):
        pass
    assert undone == ["begun", "begun", "done"]
