from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cases import quick
from wavprune.engine import moments
from wavprune.engine.moments import BatchKey, moments_of

LAYOUTS = ("contiguous", "channels_last", "expanded", "sliced")


def arranged(values: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values with other strides."""
    if layout == "channels_last" and values.ndim == 4:
        return values.to(memory_format=torch.channels_last)
    if layout == "expanded":
        return values[:1].expand_as(values)
    if layout == "sliced":
        return torch.cat([values, values], 1)[:, : values.shape[1]]
    return values


@quick
@given(
    samples=st.integers(1, 9),
    channels=st.integers(1, 7),
    spatial=st.lists(st.integers(1, 12), max_size=3),
    layout=st.sampled_from(LAYOUTS),
    dtype=st.sampled_from([torch.float32, torch.float64, torch.bfloat16]),
    shift=st.sampled_from([0.0, 30.0]),
    block=st.sampled_from([1, 50, 1 << 16]),
    seed=st.integers(0, 99),
)
def test_they_are_those_of_all_values_in_float64(
    samples: int,
    channels: int,
    spatial: list[int],
    layout: str,
    dtype: torch.dtype,
    shift: float,
    block: int,
    seed: int,
) -> None:
    draw = torch.Generator().manual_seed(seed)
    values = torch.randn(samples, channels, *spatial, generator=draw) + shift
    inputs = arranged(values.to(dtype), layout)
    before, moments.BLOCK = moments.BLOCK, block
    try:
        found = moments_of("bn", inputs)
    finally:
        moments.BLOCK = before
    exact = inputs.double().transpose(0, 1).flatten(1)
    assert found.num_values == exact.shape[1]
    mean, var = exact.mean(1), exact.var(1, correction=0)
    torch.testing.assert_close(found.mean, mean, rtol=1e-6, atol=1e-6)
    # What is constant is so without any rounding, and the rest within that of float32.
    torch.testing.assert_close(found.var, var, rtol=1e-5, atol=1e-9 * (1 + shift**2))


@pytest.mark.parametrize("shape", [(64, 3, 16, 16), (700, 4, 2, 2), (500, 6)])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last"])
def test_the_number_of_threads_changes_no_bit(shape: tuple[int, ...], layout: str) -> None:
    values = arranged(torch.randn(shape) + 3, layout)
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 4):
            torch.set_num_threads(count)
            results.append(moments_of("bn", values))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0].mean, results[1].mean)
    assert torch.equal(results[0].var, results[1].var)


def test_a_constant_channel_has_no_variance_but_that_of_a_rounded_mean() -> None:
    for shape in [(40, 2, 9, 9), (40, 2, 3, 3), (40, 2)]:
        value = 1234.567
        var = moments_of("bn", torch.full(shape, value)).var
        assert float(var.max()) <= (value * torch.finfo(torch.float32).eps) ** 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.int64, torch.bool])
def test_a_batch_is_known_by_its_key(dtype: torch.dtype) -> None:
    batch = (torch.rand(5, 3, 4, 4) * 9).to(dtype)
    key = BatchKey.of(batch)
    assert key.fits(batch)
    assert key.fits(batch.clone())
    assert not key.fits(batch[:4])
    other = batch.clone()
    other[2, 1, 0, 0] = not bool(other[2, 1, 0, 0]) if dtype == torch.bool else 77
    assert not key.fits(other)
