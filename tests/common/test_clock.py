from __future__ import annotations

import threading
import time

import pytest

from wavprune.common.clock import PARTS, Clock, timed


def test_every_moment_belongs_to_one_part() -> None:
    start = time.perf_counter()
    with Clock.running() as clock:
        time.sleep(0.02)
        with timed("matching"):
            time.sleep(0.02)
            with timed("moments"):
                time.sleep(0.03)
            time.sleep(0.02)
        with timed("moments"):
            time.sleep(0.03)
    wall = time.perf_counter() - start
    assert clock.seconds.keys() == {"other", "matching", "moments"} < set(PARTS)
    assert clock.total == pytest.approx(wall, abs=0.05)
    assert clock.seconds["other"] >= 0.02
    assert 0.04 <= clock.seconds["matching"] < clock.total - 0.07
    assert clock.seconds["moments"] >= 0.06


def test_a_clock_adds_its_time_to_the_one_before() -> None:
    with Clock.running() as outer:
        with timed("pruning"), Clock.running() as inner:
            with timed("forward"):
                time.sleep(0.02)
            time.sleep(0.01)
        time.sleep(0.01)
    assert inner.seconds["forward"] == outer.seconds["forward"] >= 0.02
    assert outer.seconds["pruning"] < 0.01
    assert outer.seconds["other"] >= inner.seconds["other"] + 0.01
    assert outer.total >= inner.total + 0.01


def test_after_an_error_time_counts_as_before() -> None:
    with Clock.running() as clock:
        with pytest.raises(KeyError), timed("metrics"), timed("forward"):
            raise KeyError
        time.sleep(0.02)
    assert clock.seconds["other"] >= 0.02
    assert clock.seconds["forward"] + clock.seconds["metrics"] < 0.02


def test_without_a_clock_and_in_other_threads_nothing_is_counted() -> None:
    with timed("forward"):
        pass

    def work() -> None:
        with timed("forward"):
            time.sleep(0.01)

    with Clock.running() as clock:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
    assert list(clock.seconds) == ["other"]
