from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavprune.training.schedules import Constant, Cubic


@given(
    first=st.floats(0, 0.99),
    last=st.floats(0, 0.99),
    start=st.integers(0, 50),
    length=st.integers(1, 200),
    every=st.integers(1, 60),
)
def test_the_cubic_schedule_goes_from_one_sparsity_to_the_other(
    first: float, last: float, start: int, length: int, every: int
) -> None:
    schedule = Cubic(first, last, start, start + length, every)
    steps = [step for step in range(start + length + 5) if schedule.due(step)]
    assert steps[0] == start
    assert steps[-1] == start + length
    assert all(later - step <= every for step, later in pairwise(steps))
    ramp = [schedule.sparsity(step) for step in steps]
    assert ramp[0] == schedule.sparsity(0) == first
    assert ramp[-1] == last
    assert ramp == sorted(ramp, reverse=first > last)
    assert schedule.sparsity(start + length + 100) == last


def test_the_constant_schedule_prunes_once() -> None:
    schedule = Constant(0.7, start=3)
    assert [step for step in range(10) if schedule.due(step)] == [3]
    assert schedule.sparsity(3) == schedule.sparsity(9) == 0.7


@pytest.mark.parametrize(
    ("kind", "arguments", "error", "message"),
    [
        (Constant, {"final_sparsity": 1.0}, ValueError, r"final_sparsity must be in \[0, 1\)"),
        (Constant, {"final_sparsity": "0.5"}, TypeError, "final_sparsity must be a number"),
        (
            Constant,
            {"final_sparsity": 0.5, "start": -1},
            ValueError,
            "start must be an integer, 0 or more",
        ),
        (Cubic, {"end": 5, "start": 5}, ValueError, "end must be an integer, 6 or more, not 5"),
        (Cubic, {"every": 0}, ValueError, "every must be an integer, 1 or more"),
        (Cubic, {"every": 1.5}, TypeError, "every must be an integer"),
        (
            Cubic,
            {"init_sparsity": float("nan")},
            ValueError,
            "init_sparsity must be a number, not NaN",
        ),
    ],
)
def test_what_is_not_allowed_is_named(
    kind: Any, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    defaults: dict[str, Any] = {}
    if kind is Cubic:
        defaults = {"init_sparsity": 0.0, "final_sparsity": 0.5, "start": 0, "end": 10}
    with pytest.raises(error, match=message):
        kind(**{**defaults, **arguments})
