from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wavprune.checkpoint import trellis, trellis_coder, trellis_tables
from wavprune.checkpoint.binary import Reader
from wavprune.checkpoint.trellis import IndexArray, Ints
from wavprune.checkpoint.trellis_coder import Classes, Coded, Decoder
from wavprune.common.extension import has_extension
from wavprune.errors import WavpruneError


def laplace(rows: int, columns: int, scale: float, seed: int = 0) -> npt.NDArray[np.float32]:
    return np.random.default_rng(seed).laplace(0, scale, (rows, columns)).astype(np.float32)


def coded(
    matrices: Sequence[IndexArray], compiled: bool = True
) -> tuple[Coded, list[Classes], Ints]:
    classes = [trellis_tables.classify([partial(np.asarray, indices)]) for indices in matrices]
    pairs = list(zip(matrices, classes, strict=True))
    tally = np.stack([trellis_coder.counts(*pair, compiled=compiled) for pair in pairs]).sum(axis=0)
    _, frequencies = trellis_tables.choose(tally)
    room = sum(indices.size for indices in matrices)
    stream = trellis_coder.encode(reversed(pairs), room, frequencies, compiled=compiled)
    return stream, classes, frequencies


def decoded(
    stream: Coded, classes: list[Classes], frequencies: Ints, compiled: bool = True
) -> list[npt.NDArray[np.float32]]:
    decoder = Decoder(stream, trellis_coder.decoding_tables(frequencies), compiled)
    values = [decoder.read(each, 0.25) for each in classes]
    decoder.end()
    return values


def instruction_sets() -> list[int | None]:
    """Those of this processor; None is numpy."""
    if not has_extension():
        return [None]
    from ..support.operators import available_sets

    return [None, *available_sets()]


@pytest.fixture(params=instruction_sets(), ids=lambda index: f"set {index}")
def compiled(request: pytest.FixtureRequest) -> Iterator[bool]:
    """Whether compiled code runs, each instruction set in its turn."""
    if request.param is not None:
        torch.ops.wavprune.use_instruction_set(request.param)
    yield request.param is not None
    if request.param is not None:
        torch.ops.wavprune.use_instruction_set(-1)


def brute_force(x: npt.NDArray[np.float32], weights: npt.NDArray[np.float32]) -> float:
    """The least weighted squared error of any path through the trellis."""
    best = np.inf
    near = [range(int(np.floor(v / 2)) - 1, int(np.ceil(v / 2)) + 2) for v in x]
    for path in itertools.product(*near):
        indices = np.array(path, dtype=np.int32)[:, None]
        values = trellis.values_of(indices)[:, 0]
        best = min(best, float((weights * (x - values) ** 2).sum()))
    return best


@pytest.mark.parametrize("seed", range(6))
def test_the_trellis_finds_the_least_error(compiled: bool, seed: int) -> None:
    generator = np.random.default_rng(seed)
    x = generator.normal(0, 3, (1, 5)).astype(np.float32)
    weights = generator.uniform(0.5, 2, (1, 5)).astype(np.float32)
    for importance in (None, weights):
        indices, errors = trellis.quantise(x, x, 1.0, importance=importance, compiled=compiled)
        assert np.array_equal(errors, x - trellis.values_of(indices.T).T)
        used = np.ones_like(x) if importance is None else weights
        least = brute_force(x[0], used[0])
        assert float((used * errors**2).sum()) == pytest.approx(least, rel=1e-5)


def test_quantising_gives_the_same_indices_everywhere(compiled: bool) -> None:
    targets, weights = laplace(6, 150, 4.0), laplace(6, 150, 4.0, seed=1)
    lower = np.tril(laplace(12, 6, 0.2, seed=2).reshape(2, 6, 6), -1)
    zeros = laplace(6, 150, 1.0, seed=3) > 0.5
    importance = np.abs(laplace(6, 150, 1.0, seed=4)) + 0.1
    cases: list[dict[str, Any]] = [{}, {"lower": lower}, {"zeros": zeros, "importance": importance}]
    for more in cases:
        expected = trellis.quantise(targets, weights, 0.3, **more, compiled=False)
        found = trellis.quantise(targets, weights, 0.3, **more, compiled=compiled)
        assert np.array_equal(expected[0], found[0])
        assert np.array_equal(expected[1], found[1])
    assert not found[0][zeros].any()


@pytest.mark.parametrize("columns", [1, 9, 16, 37, 140])
@pytest.mark.parametrize("rows", [1, 3, 64, 200])
def test_independent_columns_side_by_side(compiled: bool, rows: int, columns: int) -> None:
    generator = np.random.default_rng(rows)
    matrix = generator.laplace(0, 2, (rows, columns)).astype(np.float32)
    matrix[generator.random(matrix.shape) < 0.2] = 0.0
    zeros = generator.random(matrix.shape) < 0.3
    for masked in (None, zeros):
        indices, values, error = trellis.rounded(matrix, 0.7, masked, compiled=compiled)
        targets = np.ascontiguousarray(matrix.T)
        flipped = None if masked is None else masked.T
        one_by_one, _ = trellis.quantise(targets, targets, 0.7, zeros=flipped, compiled=compiled)
        assert np.array_equal(indices, one_by_one.T)
        assert np.array_equal(values, trellis.dequantised(indices, 0.7, compiled=False))
        assert np.array_equal(values, trellis.dequantised(indices, 0.7, compiled=compiled))
        assert error == trellis.rounded(matrix, 0.7, masked, compiled=False).squared_error
        change = values.astype(np.float64) - matrix
        assert error == pytest.approx(float((change * change).sum()))
    assert not indices[zeros].any()


def test_small_indices_are_bytes_and_values_may_replace_weights(compiled: bool) -> None:
    wide = laplace(70, 200, 2.0)
    matrix = wide[:, 30:175]
    peak = float(np.abs(matrix).max())
    for step in (np.float32(peak / trellis.NARROW) * np.float32(1.0001), 0.001):
        expected = trellis.rounded(matrix.copy(), float(step), compiled=False)
        out = wide.copy()
        part = out[:, 30:175]
        found = trellis.rounded(part, float(step), peak=peak, out=part, compiled=compiled)
        assert found.indices.dtype == (np.int8 if step > 0.01 else np.int32)
        assert np.array_equal(found.indices, expected.indices)
        assert np.array_equal(part, expected.values)
        assert found.squared_error == expected.squared_error
        assert np.array_equal(out[:, :30], wide[:, :30])
        assert np.array_equal(out[:, 175:], wide[:, 175:])
    assert np.abs(found.indices).max() > 1000


@pytest.mark.parametrize("shape", [(1, 1), (3, 9), (40, 32), (17, 70), (64, 24), (5, 40)])
def test_bytes_are_coded_as_wide_indices_are(compiled: bool, shape: tuple[int, int]) -> None:
    indices = np.rint(laplace(*shape, 5.0)).astype(np.int8)
    indices[0, 0] = -127
    wide = indices.astype(np.int32)
    found, classes, frequencies = coded([indices], compiled)
    expected, wide_classes, _ = coded([wide], compiled=False)
    assert np.array_equal(classes[0].table(), wide_classes[0].table())
    assert np.array_equal(found.states, expected.states)
    assert np.array_equal(found.words, expected.words)
    assert np.array_equal(found.escapes, expected.escapes)
    (values,) = decoded(found, classes, frequencies, compiled)
    assert np.array_equal(values, trellis.dequantised(indices, 0.25, compiled=compiled))


@pytest.mark.parametrize("dtype", [np.int8, np.int32])
def test_sums_of_magnitudes(compiled: bool, dtype: type[np.signedinteger[Any]]) -> None:
    generator = np.random.default_rng(0)
    most = min(1 << 21, np.iinfo(dtype).max)
    indices = generator.integers(-most, most, (37, 50)).astype(dtype)
    kinds = generator.integers(0, 3, 37).astype(np.uint8)
    of_rows, of_kinds = trellis_coder.sums(indices, kinds, 3, compiled=compiled)
    magnitudes = np.abs(indices.astype(np.int64))
    assert np.array_equal(of_rows, magnitudes.sum(axis=1))
    for kind in range(3):
        assert np.array_equal(of_kinds[kind], magnitudes[kinds == kind].sum(axis=0))
    alone, none = trellis_coder.sums(indices, kinds[:0], 0, compiled=compiled)
    assert np.array_equal(alone, of_rows)
    assert none.shape == (0, 50)


def test_a_trellis_is_better_than_rounding_at_its_rate(compiled: bool) -> None:
    # 8 states gain 0.8 to 1 dB on an even distribution; rounding to every other value has 1/3.
    x = np.random.default_rng(0).uniform(-40, 40, (8, 500)).astype(np.float32)
    _, errors = trellis.quantise(x, x, 1.0, compiled=compiled)
    assert float((errors**2).mean()) < 0.86 / 3


@pytest.mark.parametrize("shape", [(1, 1), (3, 9), (40, 32), (17, 70), (64, 24), (5, 40)])
def test_decoding_gives_the_same_bits_everywhere(compiled: bool, shape: tuple[int, int]) -> None:
    x = laplace(shape[1], shape[0], 3.0)
    x[0, 0] = 9e5
    first = np.ascontiguousarray(trellis.quantise(x, x, 0.5)[0].T)
    small = (x / 20).astype(np.float32)
    second = np.ascontiguousarray(trellis.quantise(small, small, 0.5)[0].T)
    stream, classes, frequencies = coded([first, second], compiled)
    reference, *_ = coded([first, second], compiled=False)
    assert np.array_equal(stream.states, reference.states)
    assert np.array_equal(stream.words, reference.words)
    assert np.array_equal(stream.escapes, reference.escapes)
    for indices, values in zip(
        [first, second], decoded(stream, classes, frequencies, compiled), strict=True
    ):
        assert np.array_equal(values, trellis.values_of(indices).astype(np.float32) * 0.25)
        assert np.array_equal(values, trellis.dequantised(indices, 0.25, compiled=compiled))


def test_the_bytes_are_near_the_entropy() -> None:
    x = laplace(256, 400, 2.0)
    indices = np.ascontiguousarray(trellis.quantise(x, x, 1.0)[0].T)
    stream, *_ = coded([indices])
    entropy = 0.0
    for z in (0, 1):
        _, tally = np.unique(indices[trellis.quantisers(indices) == z], return_counts=True)
        entropy += float((tally * np.log2(tally.sum() / tally)).sum())
    size = 16 * len(stream.words) + 32 * 32
    assert entropy < size < 1.01 * entropy + 1100


def test_damaged_streams_are_errors(compiled: bool) -> None:
    x = laplace(40, 60, 2.0)
    indices = np.ascontiguousarray(trellis.quantise(x, x, 1.0)[0].T)
    stream, classes, frequencies = coded([indices])
    generator = np.random.default_rng(0)
    for damaged in (
        stream._replace(words=stream.words[:-7]),
        stream._replace(words=stream.words[:0]),
        stream._replace(words=np.append(stream.words, np.uint16(3))),
        stream._replace(escapes=np.append(stream.escapes, np.int32(200))),
        stream._replace(words=generator.permutation(stream.words)),
        stream._replace(states=stream.states[::-1].copy()),
    ):
        with pytest.raises(WavpruneError, match=r"end early|other values"):
            decoded(damaged, classes, frequencies, compiled)


@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_stream_and_no_table_reads_beyond_its_end(data: st.DataObject) -> None:
    words = np.frombuffer(2 * data.draw(st.binary(max_size=100)), "<u2")
    states = np.array(data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=32, max_size=32)))
    entries = data.draw(st.lists(st.integers(0, 2**32 - 1), min_size=1, max_size=50))
    tables = np.resize(np.array(entries, dtype=np.uint32), 2 * 4096 * 3)
    rows, columns = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 70))
    classes = Classes(np.full(rows, 2, np.uint8), np.full(columns, 1, np.uint8), 3)
    stream = Coded(states.astype(np.uint32), words.copy(), np.array([130, -2], np.int32))
    results: list[npt.NDArray[np.float32]] = []
    for compiled in (True, False):
        decoder = Decoder(stream, tables, compiled)
        try:
            results.append(decoder.read(classes, 1.0))
        except WavpruneError:
            results.append(np.zeros(0, dtype=np.float32))
    assert np.array_equal(results[0], results[1])


def test_written_tables_are_read_back() -> None:
    tally = np.zeros((80, 256), dtype=np.int64)
    tally[20, :9] = [9, 5, 900, 3, 2, 70000, 0, 44, 800]  # of no distribution in the family
    tally[21, :4] = [9, 3, 2, 0]
    data, frequencies = trellis_tables.choose(tally)
    assert data[20] == trellis_tables.WRITTEN
    assert 0 < data[21] < trellis_tables.WRITTEN
    reader = Reader(data)
    assert np.array_equal(trellis_tables.read(reader), frequencies)
    reader.end()
    assert set(frequencies.sum(axis=1).tolist()) == {0, 4096}
    for quantiser in (0, 1):
        family, _ = trellis_tables.family(quantiser)
        assert (family.sum(axis=1) == 4096).all()
        assert (family[:, 255] > 0).all()
        assert family.max() < 4096
