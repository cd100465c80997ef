"""The compiled operators: what they compute, for every instruction set, and what they refuse."""

from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.support.cases import any_level, bits, quick
from tests.support.operators import available_sets, call, ops, restored  # noqa: F401
from wavprune.backends.masks import mask_bytes, unpack
from wavprune.bases import named_basis

pytestmark = pytest.mark.usefixtures("restored")


def plan(name: str, kernel: tuple[int, int], mode: str = "periodization") -> torch.Tensor:
    result: torch.Tensor = named_basis(name, kernel, mode).importance_operator.plan
    return result


def prune(
    weight: torch.Tensor, a_plan: torch.Tensor, keep: int, compute_float64: bool = False
) -> tuple[float, torch.Tensor, list[float]]:
    """The threshold, the pruned weight and its row of counts and sums."""
    pruned = weight.clone(memory_format=torch.preserve_format)
    threshold = call.topk_threshold([pruned], [a_plan], [], [0], [keep], compute_float64)
    row = call.prune_([pruned], [a_plan], [], threshold, compute_float64)
    return float(threshold), pruned, row[0].tolist()


def kind(a_plan: torch.Tensor, number: float) -> torch.Tensor:
    """The same matrices under another kind."""
    return torch.cat([torch.tensor([number]).double(), a_plan[1:]])


def mask_for(weight: torch.Tensor, a_plan: torch.Tensor) -> torch.Tensor:
    """A mask of zeros; see ``wavprune.backends.masks``."""
    kernels, values = weight.shape[0] * weight.shape[1], weight.shape[2] * weight.shape[3]
    identity = a_plan[0] == ops.IDENTITY
    coefficients = values if identity else int(a_plan[3] * a_plan[4])
    size = mask_bytes(kernels, coefficients, flat=bool(identity))
    return torch.zeros(size, dtype=torch.uint8)


def weights(seed: int, *shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator).to(dtype) * 0.02


IDENTITY = plan("identity", (1, 1))
IDENTITY_3 = plan("identity", (3, 3))
LOPSIDED = torch.cat([torch.tensor([1.0, 1, 100, 100, 1]), torch.ones(400)]).double()


def order_statistic(values: torch.Tensor, keep: int, compute_float64: bool = False) -> float:
    weight = values.reshape(-1, 1, 1, 1)
    return float(call.topk_threshold([weight], [IDENTITY], [], [0], [keep], compute_float64))


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
        threshold = order_statistic(values, keep, compute_float64=dtype == torch.float64)
        assert threshold == largest_first[keep - 1], keep


@pytest.mark.parametrize("name", ADVERSARIAL)
@pytest.mark.parametrize("percentile", [0, 0.1, 37.5, 50, 99.99, 100])
def test_percentiles_equal_numpys(name: str, percentile: float) -> None:
    values = ADVERSARIAL[name]
    for dropped in (0, 1, 3 * len(values)):
        padded = np.concatenate([np.zeros(dropped, np.float32), np.abs(values.numpy())])
        threshold = call.percentile_threshold(
            [values.reshape(-1, 1, 1, 1)], [IDENTITY], [dropped], percentile, False
        )
        assert float(threshold) == float(np.percentile(padded, percentile))


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
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_same_bits_for_every_instruction_set_and_thread_count(
    name: str, size: int, dtype: torch.dtype
) -> None:
    weight = weights(5, 67, 113, size, size, dtype=dtype)
    a_plan = plan(name, (size, size), "symmetric" if name == "db2" else "periodization")
    results = []
    for index in available_sets():
        for threads in (1, 2, 3):
            call.use_instruction_set(index)
            torch.set_num_threads(threads)
            results.append(prune(weight, a_plan, weight.numel() // 3, dtype == torch.float64))
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


@pytest.mark.parametrize("instruction_set", available_sets())
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["haar", "db2", "uhaar", "identity"])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (2, 7)])
def test_the_last_rows_are_transformed_too(
    instruction_set: int, dtype: torch.dtype, name: str, kernel: tuple[int, int]
) -> None:
    call.use_instruction_set(instruction_set)
    with any_level():
        operator = named_basis(name, kernel, "symmetric", 1, True).whole_operator
    analysis, synthesis = (
        torch.tensor(matrix, dtype=dtype) for matrix in (operator.analysis, operator.synthesis)
    )
    for number in range(1, 40):
        rows = weights(number, number, kernel[0] * kernel[1], dtype=dtype)
        coefficients = call.dwt2(rows, operator.plan, len(analysis))
        torch.testing.assert_close(coefficients, rows @ analysis.T, rtol=1e-5, atol=1e-6)
        back = call.idwt2(coefficients, operator.plan, rows.shape[1])
        torch.testing.assert_close(back, coefficients @ synthesis.T, rtol=1e-5, atol=1e-6)


DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


@given(
    shape=st.tuples(st.integers(0, 60), st.integers(1, 60)),
    kernel=st.tuples(st.integers(1, 7), st.integers(1, 7)),
    dtype=st.sampled_from(DTYPES),
    compute_float64=st.booleans(),
    order=st.permutations(range(4)),
    step=st.integers(1, 2),
    basis=st.sampled_from(["haar", "uhaar", "dct", "db2", "bior1.3", "identity"]),
    mode=st.sampled_from(["periodization", "symmetric"]),
    kept=st.floats(0, 1),
    random_seed=st.none() | st.integers(-(2**63), 2**63 - 1),
    instruction_set=st.sampled_from(available_sets()),
)
@settings(max_examples=200, deadline=None)
def test_a_mask_prunes_as_the_threshold_that_it_was_marked_by(
    shape: tuple[int, int],
    kernel: tuple[int, int],
    dtype: torch.dtype,
    compute_float64: bool,
    order: list[int],
    step: int,
    basis: str,
    mode: str,
    kept: float,
    random_seed: int | None,
    instruction_set: int,
) -> None:
    seeds = [] if random_seed is None else [random_seed]
    if seeds:
        basis = "identity"
    with any_level():
        operator = named_basis(basis, kernel, mode, 1, True).importance_operator
    a_plan = operator.plan
    dense = weights(16, *shape, *kernel, dtype=dtype)
    dense[::3] = 0
    # Memory in another order of the axes, and with gaps.
    stored = torch.zeros([dense.shape[axis] * step for axis in order], dtype=dtype)
    view = stored[::step, ::step, ::step, ::step].permute([order.index(axis) for axis in range(4)])
    call.use_instruction_set(instruction_set)
    results = []
    view.copy_(dense)
    threshold = call.topk_threshold(
        [view], [a_plan], seeds, [0], [int(kept * dense.numel())], compute_float64
    )
    mask = mask_for(view, a_plan)
    call.mark_([view], [a_plan], seeds, threshold, [mask], compute_float64)
    for prune_it, arguments in (
        (call.prune_, (seeds, threshold)),
        (call.prune_by_mask_, ([mask],)),
        (call.project_, ([mask],)),
    ):
        view.copy_(dense)
        rows = prune_it([view], [a_plan], *arguments, compute_float64)
        results.append((bits(stored), rows))
    (by_threshold, expected), (by_mask, rows), (projected, _) = results
    assert by_mask == projected == by_threshold
    assert torch.equal(rows[:, :2], expected[:, :2])
    # Sums of random pruning are in float64, those of masks in float32.
    assert torch.allclose(rows[:, 2:], expected[:, 2:], rtol=4e-6, atol=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("name", ["haar", "uhaar", "identity"])
def test_rows_of_a_mask_have_the_bits_of_the_thresholds_rows(name: str, threads: int) -> None:
    torch.set_num_threads(threads)
    weight, a_plan = weights(17, 300, 200, 3, 3), plan(name, (3, 3))
    threshold = call.topk_threshold([weight], [a_plan], [], [0], [100_000], False)
    mask, by_mask = mask_for(weight, a_plan), weight.clone()
    call.mark_([weight], [a_plan], [], threshold, [mask], False)
    rows = call.prune_by_mask_([by_mask], [a_plan], [mask], False)
    assert bits(rows) == bits(call.prune_([weight], [a_plan], [], threshold, False))
    assert bits(by_mask) == bits(weight)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("factor", [1e-30, 1, 1e25])
def test_rows_of_any_mask_are_those_of_the_stored_weight(dtype: torch.dtype, factor: float) -> None:
    if dtype == torch.float16:
        factor = 1.0
    weight, a_plan = weights(18, 40, 30, 3, 3).mul(factor).to(dtype), plan("haar", (3, 3))
    weight[:9] = 0
    before = weight.double().clone()
    generator = torch.Generator().manual_seed(0)
    mask = torch.randint(0, 256, mask_for(weight, a_plan).shape, generator=generator).byte()
    coefficients = call.dwt2(weight.float().view(-1, 9), a_plan, 9)
    kept = unpack(mask, 1200, 9, flat=False) & (coefficients != 0)
    ((count, zeros, error, norm),) = call.prune_by_mask_([weight], [a_plan], [mask], False).tolist()
    assert count == int(kept.sum())
    assert zeros == int((weight == 0).sum())
    assert error == pytest.approx(float((weight.double() - before).square().sum()), 1e-5)
    assert norm == pytest.approx(float(before.square().sum()), 1e-5)


def test_nothing_to_prune_gives_empty_results() -> None:
    none = torch.zeros(0, dtype=torch.float64)
    assert call.topk_threshold([], [], [], [], [], False).shape == (0,)
    assert call.topk_threshold([], [], [], [], [3], False).tolist() == [float("inf")]
    assert call.percentile_threshold([], [], [], 50.0, True).shape == (0,)
    assert call.prune_([], [], [], none, False).shape == (0, 4)
    assert call.prune_by_mask_([], [], [], False).shape == (0, 4)
    call.mark_([], [], [], none, [], False)
    call.project_([], [], [], True)


@pytest.mark.parametrize(
    ("name", "mode", "expected"),
    [
        ("identity", "periodization", ops.IDENTITY),
        ("dct", "periodization", ops.SEPARABLE),
        ("haar", "periodization", ops.PAIRS_3X3),
        ("haar", "symmetric", ops.PAIRS_3X3),
        ("uhaar", "periodization", ops.MERGES_3X3),
    ],
)
def test_a_plan_says_its_kind(name: str, mode: str, expected: float) -> None:
    assert plan(name, (3, 3), mode)[0] == expected
    assert plan(name, (5, 5), mode)[0] in (ops.IDENTITY, ops.SEPARABLE, ops.GENERAL)


@pytest.mark.parametrize("name", ["haar", "uhaar"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_special_kind_computes_what_the_separable_one_does(name: str, dtype: torch.dtype) -> None:
    a_plan = plan(name, (3, 3))
    rows = weights(19, 500, 9, dtype=dtype)
    special = call.dwt2(rows, a_plan, 9)
    separable = call.dwt2(rows, kind(a_plan, ops.SEPARABLE), 9)
    assert torch.allclose(special, separable, rtol=1e-6, atol=1e-8)
    # In float64 there is one way to compute it.
    assert dtype == torch.float32 or torch.equal(special, separable)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entry", range(36))
def test_a_plan_without_the_form_that_it_claims_is_an_error(dtype: torch.dtype, entry: int) -> None:
    rows = weights(20, 5, 9, dtype=dtype)
    for name, axis in (("haar", "pairs"), ("uhaar", "merges")):
        a_plan = plan(name, (3, 3)).clone()
        a_plan[5 + entry] += 1e-12
        call.dwt2(rows, a_plan, 9)
        # An entry that is alone in its row scales the row; twice that is fine.
        a_plan[5 + entry] += 1e-6
        alone = name == "haar" and entry % 9 == (5 if entry < 18 else 7)
        if alone:
            call.dwt2(rows, a_plan, 9)
            continue
        with pytest.raises(RuntimeError, match=f'do not have the form of a plan of kind "{axis}"'):
            call.dwt2(rows, a_plan, 9)
        with pytest.raises(RuntimeError, match="do not have the form"):
            call.dwt2(rows, torch.where(torch.arange(41) == 5 + entry, torch.nan, a_plan), 9)
    with pytest.raises(RuntimeError, match="do not have the form"):
        call.dwt2(rows, kind(plan("dct", (3, 3)), ops.MERGES_3X3), 9)
    with pytest.raises(RuntimeError, match="must be 3x3 to 3x3, got 2x2 to 2x2"):
        call.dwt2(rows[:, :4].contiguous(), kind(plan("haar", (2, 2)), ops.PAIRS_3X3), 4)


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
        (lambda w, p: call.dwt2(torch.ones(64, 100), LOPSIDED, 100), "shrink on one axis"),
        (
            lambda w, p: call.topk_threshold([w], [p[:-1]], [], [0], [1], False),
            "expects 41 numbers, got 40",
        ),
        (lambda w, p: call.topk_threshold([w], [p.float()], [], [0], [1], False), "float64 vector"),
        (lambda w, p: call.topk_threshold([w], [p * 0 - 1], [], [0], [1], False), "impossible"),
        (
            lambda w, p: call.topk_threshold([w[..., :2]], [p], [], [0], [1], False),
            "plan expects 9 values per kernel, got 6",
        ),
        (lambda w, p: call.percentile_threshold([w], [p], [0], 101.0, False), "not 101"),
        (lambda w, p: call.percentile_threshold([w], [p], [-2], 50.0, False), "-2 dropped"),
        (
            lambda w, p: call.percentile_threshold([w], [p], [2**63 - 1], 50.0, False),
            "9223372036854775807 dropped",
        ),
        (lambda w, p: call.topk_threshold([w], [kind(p, 5)], [], [0], [1], False), "unknown kind"),
        (lambda w, p: call.topk_measure([w], [p], [], [1], False), "1 weights came with 0 jobs"),
        (lambda w, p: call.topk_measure([w], [p], [1], [1], False), "belongs to job 1 of 1"),
        (lambda w, p: call.topk_measure([w], [p], [0], [-1], False), "cannot keep -1"),
        (lambda w, p: call.gram([w.long()]), "a weight must be float64"),
        (lambda w, p: call.gram([w.view(-1, 9)]), "not 2-D"),
        (lambda w, p: call.topk_threshold([w], [kind(p, 0.5)], [], [0], [1], False), "unknown"),
        (lambda w, p: call.prune_by_mask_([w], [p], [], False), "1 weights came with 0 masks"),
        (
            lambda w, p: call.prune_by_mask_([w], [p], [torch.zeros(17).byte()], False),
            "mask of weight 0 must be 18 contiguous bytes",
        ),
        (lambda w, p: call.prune_([w], [p], [], torch.zeros(2), False), "1 contiguous float64"),
        (lambda w, p: call.dwt2(w, p, 9), "matrix"),
        (lambda w, p: call.dwt2(w.view(-1, 9), p, 8), "rows of 8"),
        (lambda w, p: call.idwt2(w.view(-1, 9).half(), p, 9), "float32 or float64"),
        (lambda w, p: call.percentile_mask(w * float("inf"), 50.0, False), "NaN or infinite"),
        (lambda w, p: call.percentile_mask(w.long(), 50.0, False), "the input must be float64"),
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
        (call.topk_measure, ([weight], [a_plan], [0], [50], False)),
        (call.gram, ([weight, weight[..., :1]],)),
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
        (
            call.prune_by_mask_,
            ([weight], [a_plan], [torch.ones(4 * 9 * 2, dtype=torch.uint8)], False),
        ),
        (call.dwt2, (rows, a_plan, 9)),
        (call.idwt2, (rows, a_plan, 9)),
        (call.percentile_mask, (weight, 50.0, True)),
        (call.percentile_mask, (weight, 50.0, False)),
    ):
        torch.library.opcheck(operator.default, arguments)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("outs", "ins", "kh", "kw"), [(67, 113, 3, 3), (9, 7, 5, 5), (3, 2, 7, 4)])
def test_gram_matrices_are_sums_of_products(
    dtype: torch.dtype, outs: int, ins: int, kh: int, kw: int
) -> None:
    dense = weights(21, outs, ins, kh, kw, dtype=dtype)
    matrix = dense.double().view(-1, kh * kw)
    expected = call.gram([dense])
    torch.testing.assert_close(
        expected.view(kh * kw, kh * kw), matrix.T @ matrix, rtol=1e-12, atol=1e-12
    )
    layouts = [
        dense,
        dense.contiguous(memory_format=torch.channels_last),
        dense.repeat_interleave(2, 3)[..., ::2],
    ]
    for index in available_sets():
        for threads in (1, 2, 3):
            call.use_instruction_set(index)
            torch.set_num_threads(threads)
            for layout in layouts:
                assert bits(call.gram([layout])) == bits(expected)
    other = weights(22, 5, 5, 2, 2)
    together = call.gram([other, dense, other[:0]])
    assert bits(together) == bits(
        torch.cat([call.gram([other]), expected, torch.zeros(16).double()])
    )


@quick
@given(
    sizes=st.lists(st.integers(1, 3000), min_size=1, max_size=3),
    name=st.sampled_from(["uhaar", "dct", "identity"]),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    kept=st.floats(0.001, 0.999),
    power=st.sampled_from([1, 3]),
    zeros=st.booleans(),
    shared=st.booleans(),
    instruction_set=st.sampled_from(available_sets()),
)
def test_measured_is_what_pruning_changes(
    sizes: list[int],
    name: str,
    dtype: torch.dtype,
    kept: float,
    power: int,
    zeros: bool,
    shared: bool,
    instruction_set: int,
) -> None:
    in_float64 = dtype == torch.float64
    made = [weights(i, size, 3, 3, 3, dtype=dtype) ** power for i, size in enumerate(sizes)]
    if zeros:
        made[0][::2] = 0
    plans = [plan(name, (3, 3))] * len(made)
    jobs = [0] * len(made) if shared else list(range(len(made)))
    counts = [weight.numel() for weight in made]
    keep = [int(kept * count) for count in ([sum(counts)] if shared else counts)]
    call.use_instruction_set(instruction_set)
    found = call.topk_measure(made, plans, jobs, keep, in_float64)
    thresholds, rows = found[: len(keep)], found[len(keep) :].view(-1, 3)
    assert torch.equal(thresholds, call.topk_threshold(made, plans, [], jobs, keep, in_float64))
    for threads in (2, 3):
        torch.set_num_threads(threads)
        assert bits(call.topk_measure(made, plans, jobs, keep, in_float64)) == bits(found)
    changes = call.prune_(
        [w.clone() for w in made], plans, [], thresholds[torch.tensor(jobs)], in_float64
    )
    # What it does not tell has to be found by pruning: ties, and thresholds of 0.
    told = ~rows.isnan()
    assert told.all() or zeros or power == 3 or min(keep) == 0
    assert torch.equal(rows[told[:, 0], 0], changes[told[:, 0], 0])
    sure = told[:, 1]
    scale = changes[sure, 3]
    assert ((rows[sure, 1] - changes[sure, 2]).abs() <= 1e-5 * scale).all()
    assert ((rows[sure, 2] - scale).abs() <= 1e-5 * scale).all()


def test_measuring_says_where_it_cannot_tell() -> None:
    identity = [plan("identity", (3, 3))]
    for weight in (
        torch.zeros(4, 4, 3, 3),
        weights(1, 4, 4, 3, 3) * 1e-30,
        weights(1, 4, 4, 3, 3) * torch.tensor([1.0] * 3 + [1e30]).view(4, 1, 1, 1),
    ):
        found = call.topk_measure([weight], identity, [0], [100], False)
        assert found[2].isnan()
    weight = weights(1, 4, 4, 3, 3)
    weight[0, 0, 0, 0] = float("nan")
    assert call.topk_measure([weight], identity, [0], [9], False)[:3].isnan().all()


GRADIENT_BASES = [
    ("haar", (3, 3), "periodization"),
    ("uhaar", (3, 3), "periodization"),
    ("haar", (4, 4), "periodization"),
    ("db2", (4, 5), "symmetric"),
    ("dct", (5, 5), "periodization"),
    ("identity", (3, 3), "periodization"),
]


@pytest.mark.parametrize(("name", "kernel", "mode"), GRADIENT_BASES)
def test_gradients_of_any_order(name: str, kernel: tuple[int, int], mode: str) -> None:
    level = 1 if mode == "symmetric" else None
    basis = named_basis(name, kernel, mode, level, level is not None)
    for transform, size in ((ops.dwt2, basis.kernel), (ops.idwt2, basis.grid)):
        values = weights(5, 3 * size[0] * size[1]).double().view(3, *size).requires_grad_()
        assert torch.autograd.gradcheck(lambda x, run=transform: run(x, basis), values)
        assert torch.autograd.gradgradcheck(lambda x, run=transform: run(x, basis), values)


@pytest.mark.parametrize(("name", "kernel", "mode"), GRADIENT_BASES[:3])
def test_gradients_under_compile_and_vmap(name: str, kernel: tuple[int, int], mode: str) -> None:
    basis = named_basis(name, kernel, mode)
    values = weights(6, 8 * kernel[0] * kernel[1]).view(2, 4, *kernel)

    def penalty(x: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = ops.dwt2(x, basis).abs().sum()
        return result

    compiled = torch.compile(penalty, backend="aot_eager", fullgraph=True)
    for run in (penalty, compiled):
        x = values.clone().requires_grad_()
        run(x).backward()  # type: ignore[no-untyped-call]
        A = torch.tensor(basis.analysis, dtype=torch.float32)
        coefficients = values.flatten(2) @ A.T
        torch.testing.assert_close(x.grad, (coefficients.sign() @ A).view_as(values))
    for run in (ops.dwt2, ops.idwt2):
        size = basis.kernel if run is ops.dwt2 else basis.grid
        many = weights(7, 10 * size[0] * size[1]).view(5, 2, *size)
        for dim in (0, 1):
            mapped = torch.func.vmap(lambda x, run=run: run(x, basis), in_dims=dim, out_dims=dim)
            assert torch.equal(mapped(many), run(many, basis))


def test_what_dwt2_does_not_take_is_named() -> None:
    basis = named_basis("haar", (4, 4))
    with pytest.raises(ValueError, match=r"kernels are \(2, 3, 3\); the basis is of \(4, 4\)"):
        ops.dwt2(torch.zeros(2, 3, 3), basis)
    with pytest.raises(TypeError, match=r"coefficients are torch.float16; allowed: torch.float32"):
        ops.idwt2(torch.zeros(2, 4, 4).half(), basis)
    with pytest.raises(TypeError, match=r"kernels must be a torch.Tensor, not ndarray"):
        ops.dwt2(np.zeros((2, 4, 4)), basis)
