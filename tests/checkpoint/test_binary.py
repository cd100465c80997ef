from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wavprune.checkpoint.binary import Reader, Writer
from wavprune.errors import WavpruneError

NUMBERS = st.integers(0, (1 << 62) - 1)


@given(st.lists(st.integers(-(1 << 61), 1 << 61)))
def test_several_numbers_are_written_and_read_as_one_by_one(values: list[int]) -> None:
    together, one_by_one = Writer(), Writer()
    together.several_signed(np.array(values, dtype=np.int64))
    for value in values:
        one_by_one.signed(value)
    assert together.data == one_by_one.data
    reader = Reader(bytes(together.data) + b"\5")
    assert reader.several_signed(len(values), 1 << 61).tolist() == values
    assert reader.number() == 5
    reader.end()


@given(st.binary(max_size=60), st.integers(0, 8), st.sampled_from([0, 127, 1 << 20, (1 << 62) - 1]))
def test_bytes_from_anywhere_are_read_alike(data: bytes, count: int, high: int) -> None:
    def result(read: Callable[[Reader], list[int]]) -> tuple[list[int], int] | str:
        reader = Reader(data)
        try:
            return read(reader), reader.position
        except WavpruneError as error:
            return str(error)

    together = result(lambda reader: reader.several(count, high).tolist())
    one_by_one = result(lambda reader: [reader.number(high) for _ in range(count)])
    # Of two numbers that are too large, either may be named.
    assert together == one_by_one or (
        isinstance(together, str) and isinstance(one_by_one, str) and "where at most" in together
    )


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "end early"),
        (b"\x80" * 9, "end early"),
        (b"\x80" * 10, "has no end"),
        (b"\xff" * 9 + b"\x7f", "where at most"),
    ],
)
def test_numbers_without_an_end_are_refused(data: bytes, message: str) -> None:
    with pytest.raises(WavpruneError, match=message):
        Reader(data).number()
    with pytest.raises(WavpruneError, match=message):
        Reader(data).several(1, 1 << 40)
