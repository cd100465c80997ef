"""The compiled operators: what they compute, for every instruction set, and what they refuse."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wavprune.bases.basis import named_basis

ops = pytest.importorskip("wavprune.ops", reason="the compiled extension is not built here")
call = torch.ops.wavprune


def available_sets() -> list[int]:
    found = []
    for index in range(len(ops.INSTRUCTION_SETS)):
        try:
            call.use_instruction_set(index)
        except RuntimeError:
            continue
        found.append(index)
    call.use_instruction_set(-1)
    return found


@pytest.fixture(autouse=True)
def _restore() -> Iterator[None]:
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    call.use_instruction_set(-1)


def plan(name: str, kernel: tuple[int, int], mode: str = "periodization") -> torch.Tensor:
    result: torch.Tensor = ops.plan_for(named_basis(name, kernel, mode).importance_operator, kernel)
    return result


def prune(
    weight: torch.Tensor, a_plan: torch.Tensor, keep: int, wide: bool = False
) -> tuple[float, torch.Tensor, list[float]]:
    """The threshold, the pruned weight and its row of counts and sums."""
    pruned = weight.clone(memory_format=torch.preserve_format)
    threshold = call.topk_threshold([pruned], [a_plan], [], [0], [keep], wide)
    row = call.prune_([pruned], [a_plan], [], threshold, wide)
    return float(threshold), pruned, row[0].tolist()


def weights(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype) * 0.02


IDENTITY = plan("identity", (1, 1))
IDENTITY_3 = plan("identity", (3, 3))
LOPSIDED = torch.cat([torch.tensor([1.0, 1, 100, 100, 1]), torch.ones(400)]).double()


def order_statistic(values: torch.Tensor, keep: int, wide: bool = False) -> float:
    weight = values.reshape(-1, 1, 1, 1)
    return float(call.topk_threshold([weight], [IDENTITY], [], [0], [keep], wide))


ADVERSARIAL = {
    "all equal": torch.full((70_001,), 0.25),
    "all zero": torch.zeros(70_001),
    "two values": torch.tensor([1.0, -2.0]).repeat(40_000),
    "sorted": torch.linspace(-1, 3, 70_001),
    "one outlier": torch.cat([torch.full((70_000,), 1e-3), torch.tensor([1e30])]),
    "99% zeros": torch.where(torch.arange(70_001) % 100 == 0, weights(1, 70_001), 0),
    "denormals": weights(2, 70_001) * 1e-40,
    "heavy tails": weights(3, 70_001) ** 9,
    "a staircase": (torch.arange(70_001) // 10_000).float(),
    "neighbouring floats": (torch.arange(70_001, dtype=torch.int32) + 2**29).view(torch.float32),
    "one value": torch.tensor([3.0]),
    "seventeen": weights(4, 17),
}


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_order_statistics_equal_numpys(name: str, dtype: torch.dtype) -> None:
    values = ADVERSARIAL[name].to(dtype)
    largest_first = np.sort(np.abs(values.numpy()))[::-1]
    n = len(values)
    for keep in sorted({1, min(2, n), (n + 99) // 100, (n + 1) // 2, max(n - 1, 1), n}):
        found = order_statistic(values, keep, wide=dtype == torch.float64)
        assert found == largest_first[keep - 1], keep


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("percentile", [0, 0.1, 37.5, 50, 99.99, 100])
def test_percentiles_equal_numpys(name: str, percentile: float) -> None:
    values = ADVERSARIAL[name]
    for dropped in (0, 1, 3 * len(values)):
        padded = np.concatenate([np.zeros(dropped, np.float32), np.abs(values.numpy())])
        found = call.percentile_threshold(
            [values.reshape(-1, 1, 1, 1)], [IDENTITY], [dropped], percentile, False
        )
        assert float(found) == float(np.percentile(padded, percentile))


@given(
    size=st.integers(1, 40_000),
    seed=st.integers(0, 99),
    power=st.integers(1, 9),
    rank=st.floats(0, 1, exclude_max=True),
)
@settings(max_examples=60, deadline=None)
def test_any_rank_of_any_size(size: int, seed: int, power: int, rank: float) -> None:
    values = weights(seed, size) ** power
    keep = 1 + int(rank * size)
    assert order_statistic(values, keep) == np.sort(np.abs(values.numpy()))[::-1][keep - 1]


@pytest.mark.parametrize("name", ["haar", "uhaar", "dct", "db2", "identity"])
@pytest.mark.parametrize("size", [2, 3, 5, 7])
@pytest.mark.parametrize("wide", [False, True])
def test_same_bits_for_every_instruction_set_and_thread_count(
    name: str, size: int, wide: bool
) -> None:
    dtype = torch.float64 if wide else torch.float32
    weight = weights(5, 67, 113, size, size, dtype=dtype)
    a_plan = plan(name, (size, size), "symmetric" if name == "db2" else "periodization")
    results = []
    for index in available_sets():
        for threads in (1, 2, 3):
            call.use_instruction_set(index)
            torch.set_num_threads(threads)
            results.append(prune(weight, a_plan, weight.numel() // 3, wide))
    for threshold, pruned, row in results[1:]:
        assert threshold == results[0][0]
        assert torch.equal(pruned, results[0][1])
        assert row == results[0][2]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["contiguous", "channels_last", "strided", "unaligned"])
def test_counts_and_sums_are_those_of_the_stored_weight(dtype: torch.dtype, layout: str) -> None:
    dense = weights(6, 24, 37, 3, 3, dtype=dtype)
    weight = {
        "contiguous": dense,
        "channels_last": dense.contiguous(memory_format=torch.channels_last),
        "strided": weights(6, 48, 37, 3, 6, dtype=dtype)[::2, :, :, ::2],
        "unaligned": torch.cat([dense.flatten()[:1], dense.flatten()])[1:].view(dense.shape),
    }[layout]
    before = weight.clone(memory_format=torch.preserve_format)
    a_plan = plan("haar", (3, 3))
    threshold = call.topk_threshold([weight], [a_plan], [], [0], [4000], False)
    ((kept, zeros, error, norm),) = call.prune_([weight], [a_plan], [], threshold, False).tolist()
    assert 4000 <= kept <= 4000 + (0 if dtype in (torch.float32, torch.float64) else 200)
    assert zeros == int((weight == 0).sum())
    assert error == pytest.approx(float((weight.double() - before.double()).square().sum()), 1e-5)
    assert norm == pytest.approx(float(before.double().square().sum()), 1e-5)


@pytest.mark.parametrize("factor", [1e-30, 1e25])
def test_sums_neither_underflow_nor_overflow(factor: float) -> None:
    weight = weights(7, 8, 8, 3, 3)
    _, _, (_, _, error, norm) = prune(weight, plan("haar", (3, 3)), 200)
    _, _, (_, _, scaled_error, scaled_norm) = prune(weight * factor, plan("haar", (3, 3)), 200)
    assert scaled_error / scaled_norm == pytest.approx(error / norm, 1e-4)


def test_the_norm_is_that_of_the_weights_however_small_the_threshold() -> None:
    weight = weights(13, 64, 64, 3, 3)
    weight[:32] *= 1e-20
    expected = float(weight.double().square().sum())
    _, _, (_, _, _, norm) = prune(weight, IDENTITY_3, weight.numel() * 7 // 10)
    assert norm == pytest.approx(expected, 1e-6)


@pytest.mark.parametrize("extra", [-50, 0, 50])
def test_denormals_rank_and_zeros_do_not_where_torch_flushes_denormals(extra: int) -> None:
    values = torch.where(torch.arange(300_000) % 5 < 3, 0, weights(14, 300_000) * 1e-38)
    nonzero = int((values != 0).sum())
    sorted_values = np.sort(np.abs(values.numpy()))[::-1]
    weight = values.reshape(-1, 1, 1, 1).clone()
    keep = nonzero + extra
    torch.set_flush_denormal(True)
    try:
        threshold = call.topk_threshold([weight], [IDENTITY], [], [0], [keep], False)
        row = call.prune_([weight], [IDENTITY], [], threshold, False)
    finally:
        torch.set_flush_denormal(False)
    assert float(threshold) == sorted_values[keep - 1]
    assert row[0, :2].tolist() == [min(keep, nonzero), len(values) - min(keep, nonzero)]


def test_empty_weights_and_weights_that_are_nowhere_finite() -> None:
    full, empty = weights(15, 100, 100, 3, 3), torch.empty(4, 4, 0, 3)
    plans = [IDENTITY_3, IDENTITY_3]
    threshold = call.topk_threshold([full, empty], plans, [], [0, 0], [10], False)
    assert float(threshold) == float(full.abs().flatten().sort().values[-10])
    nowhere = torch.full((100, 100, 3, 3), float("nan"))
    assert call.topk_threshold([nowhere], [IDENTITY_3], [], [0], [10], False).isnan().all()


@pytest.mark.parametrize("name", ["haar", "db2", "bior2.2", "sym4", "uhaar", "dct", "identity"])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (7, 7), (1, 7), (4, 6), (9, 9), (31, 31)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_dwt2_is_pywavelets(name: str, kernel: tuple[int, int], dtype: torch.dtype) -> None:
    basis = named_basis(name, kernel, "symmetric", None if min(kernel) > 8 else 1, True)
    kernels = weights(8, 19, *kernel, dtype=dtype)
    coefficients = ops.dwt2(kernels, basis)
    flat = kernels.flatten(1).double().numpy() @ basis.analysis.T
    tolerance = 1e-5 if dtype == torch.float32 else 1e-13
    assert np.allclose(coefficients.flatten(1).numpy(), flat, atol=tolerance)
    back = ops.idwt2(coefficients, basis)
    assert back.shape == kernels.shape
    expected = flat @ basis.synthesis.T
    assert np.allclose(back.flatten(1).numpy(), expected, atol=tolerance)
    if name == "haar" and kernel == (4, 6):
        packed, _ = pywt.coeffs_to_array(
            pywt.wavedec2(kernels.numpy(), "haar", "symmetric", level=1, axes=(-2, -1)),
            axes=(-2, -1),
        )
        assert np.allclose(coefficients.numpy(), packed, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 7, 8, 16_385, 50_000])
def test_percentile_mask_packed_or_not(dtype: torch.dtype, count: int) -> None:
    x = weights(9, count, dtype=dtype)
    magnitudes = x.abs().to(torch.float64 if dtype == torch.float64 else torch.float32).numpy()
    expected = magnitudes >= np.percentile(magnitudes, 70)
    mask = ops.percentile_mask(x.view(1, -1), 70)
    assert mask.shape == (1, count)
    assert np.array_equal(mask.numpy()[0], expected)
    packed = ops.percentile_mask(x, 70, packed=True).numpy()
    assert np.array_equal(packed, np.packbits(expected, bitorder="little"))


def test_what_is_not_finite_gives_nan_and_prunes_nothing() -> None:
    for bad in (float("nan"), float("inf"), -float("inf")):
        weight = weights(10, 64, 64, 3, 3)
        weight[40, 3, 1, 2] = bad
        threshold = call.topk_threshold([weight], [plan("haar", (3, 3))], [], [0], [100], False)
        assert threshold.isnan().all()
        before = weight.clone()
        row = call.prune_([weight], [plan("haar", (3, 3))], [], threshold, False)
        assert row.isnan().all()
        assert torch.equal(weight.nan_to_num(), before.nan_to_num())


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda w, p: call.topk_threshold([w[0]], [p], [], [0], [1], False), "not 3-D"),
        (lambda w, p: call.topk_threshold([w.int()], [p], [], [0], [1], False), "float64, float32"),
        (lambda w, p: call.topk_threshold([w], [], [], [0], [1], False), "1 weights came with 0"),
        (lambda w, p: call.topk_threshold([w], [p], [], [], [1], False), "with 0 jobs"),
        (lambda w, p: call.topk_threshold([w], [p], [], [7], [1], False), "job 7 of 1"),
        (lambda w, p: call.topk_threshold([w], [p], [], [0], [-1], False), "cannot keep -1"),
        (lambda w, p: call.topk_threshold([w], [p], [3], [0], [1], True), "identity basis"),
        (lambda w, p: call.topk_threshold([w], [IDENTITY_3], [3], [0], [1], False), "with wide"),
        (lambda w, p: call.dwt2(torch.ones(64, 100), LOPSIDED, 100), "shrink on one side"),
        (lambda w, p: call.topk_threshold([w], [p[:-1]], [], [0], [1], False), "numbers where"),
        (lambda w, p: call.topk_threshold([w], [p.float()], [], [0], [1], False), "float64 vector"),
        (lambda w, p: call.topk_threshold([w], [p * 0 - 1], [], [0], [1], False), "impossible"),
        (
            lambda w, p: call.topk_threshold([w[..., :2]], [p], [], [0], [1], False),
            "9 values met kernels of 6",
        ),
        (lambda w, p: call.percentile_threshold([w], [p], [0], 101.0, False), "not 101"),
        (lambda w, p: call.percentile_threshold([w], [p], [-2], 50.0, False), "-2 dropped"),
        (lambda w, p: call.prune_([w], [p], [], torch.zeros(2), False), "1 contiguous float64"),
        (lambda w, p: call.dwt2(w, p, 9), "matrix"),
        (lambda w, p: call.dwt2(w.view(-1, 9), p, 8), "rows of 8"),
        (lambda w, p: call.idwt2(w.view(-1, 9).half(), p, 9), "float32 or float64"),
        (lambda w, p: call.percentile_mask(w * float("inf"), 50.0, False), "NaN or infinite"),
        (lambda w, p: call.percentile_mask(w.long(), 50.0, False), "contiguous tensor"),
        (lambda w, p: call.use_instruction_set(9), "no instruction set 9"),
    ],
)
def test_bad_arguments_are_errors_and_change_nothing(wrong: object, message: str) -> None:
    weight = weights(11, 4, 4, 3, 3)
    before = weight.clone()
    assert callable(wrong)
    with pytest.raises(RuntimeError, match=message):
        wrong(weight, plan("haar", (3, 3)))
    assert torch.equal(weight, before)


def test_opcheck() -> None:
    weight, a_plan = weights(12, 8, 8, 3, 3), plan("haar", (3, 3))
    rows = weight.view(-1, 9)
    for operator, arguments in (
        (call.topk_threshold, ([weight], [a_plan], [], [0], [50], False)),
        (call.percentile_threshold, ([weight], [a_plan], [0], 50.0, False)),
        (call.prune_, ([weight], [a_plan], [], torch.tensor([0.02], dtype=torch.float64), False)),
        (
            call.mark_,
            (
                [weight],
                [a_plan],
                [],
                torch.tensor([0.02], dtype=torch.float64),
                [torch.zeros(4 * 9 * 2, dtype=torch.uint8)],
                False,
            ),
        ),
        (call.project_, ([weight], [a_plan], [torch.ones(4 * 9 * 2, dtype=torch.uint8)], False)),
        (call.dwt2, (rows, a_plan, 9)),
        (call.idwt2, (rows, a_plan, 9)),
        (call.percentile_mask, (weight, 50.0, True)),
        (call.percentile_mask, (weight, 50.0, False)),
    ):
        torch.library.opcheck(operator.default, arguments)
