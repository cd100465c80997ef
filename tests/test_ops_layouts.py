"""The compiled operators give the same bits however a weight lies in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from tests.support.cases import any_level, bits
from tests.support.operators import available_sets, call, ops, restored  # noqa: F401
from wavprune.backends.masks import mask_bytes
from wavprune.bases import named_basis

pytestmark = pytest.mark.usefixtures("restored")

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


SETS = available_sets()


class Basis(NamedTuple):
    """A plan, and the bytes of a mask of a weight."""

    plan: torch.Tensor
    mask_bytes: int


def basis_of(name: str, weight: torch.Tensor, mode: str = "periodization") -> Basis:
    kernel = (weight.shape[2], weight.shape[3])
    with any_level():
        operator = named_basis(name, kernel, mode, 1, True).importance_operator
    plan = operator.plan
    identity = plan[0] == ops.IDENTITY
    coefficients = kernel[0] * kernel[1] if identity else int(plan[3] * plan[4])
    kernels = weight.shape[0] * weight.shape[1]
    return Basis(plan, mask_bytes(kernels, coefficients, flat=bool(identity)))


class Outcome(NamedTuple):
    """What the operators make of a weight: bits that no layout may change, and sums."""

    exact: tuple[object, ...]
    sums: torch.Tensor


def outcome(
    view: torch.Tensor, dense: torch.Tensor, basis: Basis, keep: int, compute_float64: bool = False
) -> Outcome:
    """Run every operator on a view that holds what ``dense`` does."""
    plan = basis.plan
    view.copy_(dense)
    percentile = call.percentile_threshold([view], [plan], [0], 40.0, compute_float64)
    threshold = call.topk_threshold([view], [plan], [], [0], [keep], compute_float64)
    mask = torch.zeros(basis.mask_bytes, dtype=torch.uint8)
    call.mark_([view], [plan], [], threshold, [mask], compute_float64)
    assert torch.equal(view, dense)
    pruned, rows = [], []
    for operator, arguments in (
        (call.prune_, ([], threshold)),
        (call.prune_by_mask_, ([mask],)),
        (call.project_, ([mask],)),
    ):
        view.copy_(dense)
        rows.append(operator([view], [plan], *arguments, compute_float64))
        pruned.append(bits(dense.clone().copy_(view)))
    assert pruned[1] == pruned[0]
    assert pruned[2] == pruned[0]
    assert torch.equal(rows[1][:, :2], rows[0][:, :2])
    exact = (bits(percentile), bits(threshold), bits(mask), pruned[0], rows[0][0, :2].tolist())
    return Outcome(exact, torch.cat([rows[0][0, 2:], rows[1][0, 2:]]))


@given(
    outs=st.integers(1, 70),
    ins=st.integers(1, 70),
    kernel=st.sampled_from([(1, 1), (3, 3), (1, 3), (2, 2), (5, 5), (7, 7), (4, 6)]),
    dtype=st.sampled_from(DTYPES),
    compute_float64=st.booleans(),
    order=st.permutations(range(4)),
    steps=st.tuples(*[st.sampled_from([1, 1, 2])] * 4),
    offset=st.integers(0, 3),
    name=st.sampled_from(["haar", "uhaar", "dct", "db2", "identity"]),
    kept=st.floats(0, 1),
    instruction_set=st.sampled_from(SETS),
    threads=st.integers(1, 3),
)
@settings(max_examples=150, deadline=None)
# Fewer kernels than a block has, in rows that lie across memory.
@example(
    outs=2,
    ins=2,
    kernel=(3, 3),
    dtype=torch.float64,
    compute_float64=True,
    order=[2, 3, 1, 0],
    steps=(1, 1, 1, 1),
    offset=2,
    name="dct",
    kept=0.974,
    instruction_set=SETS[0],
    threads=2,
)
def test_the_same_bits_in_every_layout(
    outs: int,
    ins: int,
    kernel: tuple[int, int],
    dtype: torch.dtype,
    compute_float64: bool,
    order: list[int],
    steps: tuple[int, ...],
    offset: int,
    name: str,
    kept: float,
    instruction_set: int,
    threads: int,
) -> None:
    generator = torch.Generator().manual_seed(outs * 71 + ins)
    dense = (torch.randn(outs, ins, *kernel, generator=generator) * 0.02).to(dtype)
    dense[::5] = 0
    basis = basis_of(name, dense, "symmetric")
    keep = int(kept * dense.numel())
    expected = outcome(dense.clone(), dense, basis, keep, compute_float64)
    # Memory in another order of the axes, with gaps, that begins anywhere.
    sizes = [dense.shape[axis] * steps[axis] for axis in order]
    storage = torch.full([offset + torch.Size(sizes).numel()], 7.0, dtype=dtype)
    cut = tuple(slice(None, None, steps[axis]) for axis in order)
    stored = storage[offset:].view(sizes)[cut]
    view = stored.permute([order.index(axis) for axis in range(4)])
    around = storage.clone()
    call.use_instruction_set(instruction_set)
    torch.set_num_threads(threads)
    actual = outcome(view, dense, basis, keep, compute_float64)
    assert actual.exact == expected.exact
    assert torch.allclose(actual.sums, expected.sums, rtol=1e-6, atol=0)
    around[offset:].view(sizes)[cut] = stored
    assert torch.equal(around, storage)


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "channels_last": lambda w: w.contiguous(memory_format=torch.channels_last),
    "tensorflow": lambda w: w.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
    "transposed": lambda w: w.transpose(0, 1).contiguous().transpose(0, 1),
    "sliced": lambda w: torch.cat([w, w], 1)[:, : w.shape[1]],
    "reversed": lambda w: w.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(96, 64, 3, 3), (70, 3, 7, 7), (50, 24, 5, 5), (130, 1, 3, 3)])
def test_sums_depend_on_the_layout_alone(
    layout: str, dtype: torch.dtype, shape: tuple[int, ...]
) -> None:
    dense = (torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.02).to(dtype)
    for name in ("uhaar", "identity"):
        basis = basis_of(name, dense)
        keep = dense.numel() // 3
        in_float64 = dtype == torch.float64
        contiguous = outcome(dense.clone(), dense, basis, keep, in_float64)
        view = LAYOUTS[layout](dense.clone())
        results = []
        for instruction_set in SETS:
            for threads in (1, 3):
                call.use_instruction_set(instruction_set)
                torch.set_num_threads(threads)
                results.append(outcome(view, dense, basis, keep, in_float64))
        call.use_instruction_set(-1)
        assert {bits(result.sums) for result in results} == {bits(results[0].sums)}
        assert all(result.exact == contiguous.exact for result in results)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("scale", [1e-7, 1e-5, 1.0, 4e4])
@pytest.mark.parametrize("instruction_set", SETS)
def test_half_floats_are_rounded_as_torch_rounds(
    dtype: torch.dtype, scale: float, instruction_set: int
) -> None:
    generator = torch.Generator().manual_seed(2)
    weight = (torch.randn(40, 30, 3, 3, generator=generator) * scale).to(dtype)
    limit = torch.finfo(dtype).max
    weight.clamp_(-limit, limit)
    basis = basis_of("uhaar", weight)
    wide = weight.float()
    call.use_instruction_set(instruction_set)
    threshold = call.topk_threshold([weight], [basis.plan], [], [0], [5000], False)
    assert threshold == call.topk_threshold([wide], [basis.plan], [], [0], [5000], False)
    call.prune_([weight], [basis.plan], [], threshold, False)
    call.prune_([wide], [basis.plan], [], threshold, False)
    assert bits(weight) == bits(wide.clamp(-limit, limit).to(dtype))


@pytest.mark.parametrize("axis", range(4))
@pytest.mark.parametrize("name", ["uhaar", "identity"])
def test_an_expanded_weight_is_read_as_its_copy(axis: int, name: str) -> None:
    size = [20, 18, 3, 3]
    one = list(size)
    one[axis] = 1
    expanded = torch.randn(one, generator=torch.Generator().manual_seed(3)).expand(size)
    copy = expanded.contiguous()
    basis = basis_of(name, copy)
    results = []
    for weight in (expanded, copy):
        threshold = call.topk_threshold([weight], [basis.plan], [], [0], [999], False)
        mask = torch.zeros(basis.mask_bytes, dtype=torch.uint8)
        call.mark_([weight], [basis.plan], [], threshold, [mask], False)
        results.append((float(threshold), bits(mask)))
    assert results[0] == results[1]
