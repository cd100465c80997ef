"""Random ranks: how random they are, and that every backend draws the same masks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cases import BACKENDS, normal, quick
from wavprune import LayerRef, PruneConfig, backends, prune_layers
from wavprune.backends import Budget, Job, Layer
from wavprune.backends.eager import EagerBackend
from wavprune.backends.random import uniform
from wavprune.backends.registry import resolve
from wavprune.bases import named_basis

Words = npt.NDArray[np.uint32]

NATIVE = "native" not in backends.unavailable()
SEEDS = [0, 1, 2, -1, 12345, 2**63 - 1, -(2**63)]
COUNT = 1 << 17
# Of a chi-squared statistic, in standard deviations from its mean; no test is worse by chance.
FAR = 5.0


def high_words(seed: int, start: int = 0, count: int = COUNT) -> Words:
    """The high 32 bits of ranks one after the other."""
    ranks = uniform(torch.arange(start, start + count), seed)
    return (ranks.numpy() * 2.0**32).astype(np.uint32)


def deviation(counts: npt.NDArray[np.int64]) -> float:
    """How far equally likely cells are from equally full, in standard deviations."""
    expected = counts.sum() / len(counts)
    statistic = float((np.square(counts - expected) / expected).sum())
    freedom = len(counts) - 1
    return (statistic - freedom) / float(np.sqrt(2 * freedom))


def together(one: Words, other: Words) -> float:
    """``deviation`` of pairs of two sequences."""
    cells = (one >> np.uint32(27)).astype(np.int64) * 32 + (other >> np.uint32(27))
    return deviation(np.bincount(cells, minlength=1024))


def splitmix64(seed: int, index: int) -> int:
    """Vigna's splitmix64.c, the output at an index."""
    mask = (1 << 64) - 1
    x = (seed + (index + 1) * 0x9E3779B97F4A7C15) & mask
    x = ((x ^ (x >> 30)) * 0xBF58476D1CE4E5B9) & mask
    x = ((x ^ (x >> 27)) * 0x94D049BB133111EB) & mask
    return x ^ (x >> 31)


def by_definition(index: int, seed: int) -> float:
    """A rank, in integers of any size."""
    word = (1 << 32) - 1
    keys = [part for i in (0, 1) for part in divmod(splitmix64(seed, i), 1 << 32)[::-1]]
    above, x = index >> 32, (index + keys[0]) & word
    x = ((x ^ (x >> 17)) * 0xED5AD4BB + keys[1] + above * 0x9E3779B9) & word
    x = ((x ^ (x >> 11)) * 0xAC4C1B51) & word
    x = ((x ^ (x >> 15)) * 0x31848BAB) & word
    high = x ^ (x >> 14)
    x = ((high ^ ((keys[2] + above * (keys[3] | 1)) & word)) * 0xED5AD4BB) & word
    low = (((x ^ (x >> 15)) * 0x31848BAB) & word) >> 12
    return ((high << 20 | low) + 0.5) / 2**52


def test_a_seed_means_the_same_ranks_in_every_release() -> None:
    # The first outputs of splitmix64.c for the seed 1234567, whose halves are the keys.
    assert [splitmix64(1234567, i) for i in (0, 1)] == [6457827717110365317, 3203168211198807973]
    numerators = [196928931053315, 3826084482837600, 3254270864423248]
    expected = [(numerator + 0.5) / 2**52 for numerator in numerators]
    assert uniform(torch.arange(3), 1234567).tolist() == expected


@quick
@given(index=st.integers(0, 2**62), seed=st.integers(-(2**63), 2**63 - 1))
def test_ranks_are_those_of_the_definition(index: int, seed: int) -> None:
    assert uniform(torch.tensor([index]), seed).item() == by_definition(index, seed)


@pytest.mark.parametrize("seed", SEEDS)
def test_ranks_are_uniform(seed: int) -> None:
    ranks = uniform(torch.arange(COUNT), seed)
    assert 0 < ranks.min() < 1e-3
    assert 1 - 1e-3 < ranks.max() < 1
    bins = torch.histc(ranks, 1024, 0, 1).to(torch.int64).numpy()
    assert deviation(bins) < FAR
    low = (ranks.numpy() * 2.0**42 % 1 * 1024).astype(np.int64)
    assert deviation(np.bincount(low, minlength=1024)) < FAR


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("distance", [1, 2, 3, 9, 16, 64, 576, 4608, 65536])
def test_neighbouring_indices_are_independent(seed: int, distance: int) -> None:
    words = high_words(seed)
    assert together(words[:-distance], words[distance:]) < FAR


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(
    "changed",
    [
        lambda s: s + 1,
        lambda s: s + 2,
        lambda s: s ^ (1 << 31),
        lambda s: s ^ (1 << 32),
        lambda s: s ^ (1 << 62),
        lambda s: (s + 0x9E3779B97F4A7C15) % 2**64,
    ],
)
@pytest.mark.parametrize("shift", [0, 1, 9])
def test_seeds_are_independent(seed: int, changed: Callable[[int], int], shift: int) -> None:
    one, other = high_words(seed), high_words(changed(seed), shift)
    assert together(one, other) < FAR


@pytest.mark.parametrize("bit", range(64))
def test_every_bit_of_index_and_seed_changes_half_of_the_bits(bit: int) -> None:
    base = torch.arange(0, 1 << 22, 511)
    flipped = uniform(base ^ (1 << bit if bit < 62 else 1), 5).numpy()
    seed = 5 ^ (1 << bit)
    other = uniform(base, seed - (1 << 64) if seed >> 63 else seed).numpy()
    words = (uniform(base, 5).numpy() * 2.0**32).astype(np.uint32)
    for ranks in (flipped, other):
        changed = words ^ (ranks * 2.0**32).astype(np.uint32)
        share = np.array([((changed >> np.uint32(k)) & 1).mean() for k in range(32)])
        assert np.abs(share - 0.5).max() < 5 * 0.5 / len(base) ** 0.5


def test_no_two_ranks_of_a_layer_tie() -> None:
    words = high_words(3, count=1 << 21)
    assert len(np.unique(words)) == len(words)


def test_indices_above_32_bits_draw_anew() -> None:
    first, later = high_words(7), high_words(7, 1 << 32)
    assert together(first, later) < FAR
    assert np.count_nonzero(first == later) < 5
    across = uniform(torch.arange(-20, 20) + (3 << 32), 7)
    assert across.tolist() == [by_definition((3 << 32) + i, 7) for i in range(-20, 20)]


def test_ranks_are_read_at_any_place_and_in_any_order() -> None:
    places = torch.arange(1000)
    draws = uniform(places, -5)
    assert uniform(places.flip(0), -5).flip(0).equal(draws)
    assert uniform(places[313:].view(3, 229), -5).equal(draws[313:].view(3, 229))


# Masks.


def weights() -> dict[str, torch.Tensor]:
    """Values that every dtype holds exactly, some of them 0."""
    found = {
        "three": normal(33, 17, 3, 3),
        "point": normal(50, 65, 1, 1, seed=1),
        "seven": normal(7, 5, 7, 7, seed=2),
        "zero": torch.zeros(3, 4, 2, 2),
        "depthwise": normal(19, 1, 3, 3, seed=3),
    }
    found["three"][:3] = 0
    return {name: weight.to(torch.bfloat16) for name, weight in found.items()}


LAYOUTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "contiguous": lambda w: w.clone(memory_format=torch.contiguous_format),
    "channels_last": lambda w: w.clone(memory_format=torch.channels_last),
    "outputs innermost": lambda w: w.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1),
    "sliced": lambda w: w.repeat_interleave(2, 3)[..., ::2],
}
Outcomes = dict[str, tuple[torch.Tensor, int, float]]


def drawn(
    settings: dict[str, object],
    dtype: torch.dtype = torch.float32,
    layout: str = "contiguous",
    names: tuple[str, ...] = (),
) -> Outcomes:
    chosen = {n: w for n, w in weights().items() if not names or n in names}
    refs = [LayerRef(name, LAYOUTS[layout](w.to(dtype))) for name, w in chosen.items()]
    config = PruneConfig(**{"method": "random", "seed": 4, **settings})  # type: ignore[arg-type]
    report = prune_layers(refs, config)
    return {ref.name: (ref.weight != 0, *_numbers(report[ref.name])) for ref in refs}


def _numbers(row: object) -> tuple[int, float]:
    return row.kept, row.threshold  # type: ignore[attr-defined]


def assert_same(found: Outcomes, expected: Outcomes) -> None:
    for name, (mask, *numbers) in found.items():
        assert torch.equal(mask, expected[name][0]), name
        assert numbers == list(expected[name][1:]), name


each_amount = pytest.mark.parametrize(
    "settings",
    [
        {"sparsity": sparsity, "scope": scope}
        for sparsity in (0.0, 0.3, 0.5, 0.97, 0.9999)
        for scope in ("layer", "global")
    ],
    ids=str,
)


@each_amount
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "reference"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_masks_are_those_of_the_reference(
    backend: str, dtype: torch.dtype, settings: dict[str, object]
) -> None:
    expected = drawn({**settings, "backend": "reference"})
    for layout in LAYOUTS:
        assert_same(drawn({**settings, "backend": backend}, dtype, layout), expected)


@pytest.mark.skipif(not NATIVE, reason="the compiled extension is not built here")
@each_amount
def test_masks_depend_on_neither_instructions_nor_threads(settings: dict[str, object]) -> None:
    chosen = {**settings, "backend": "native"}
    before = torch.get_num_threads()
    expected = drawn({**settings, "backend": "eager"})
    try:
        for index in range(3):
            try:
                torch.ops.wavprune.use_instruction_set(index)
            except RuntimeError:
                continue  # this processor lacks it
            for threads in (1, 3):
                torch.set_num_threads(threads)
                for dtype in (torch.float32, torch.float64):
                    assert_same(drawn(chosen, dtype), expected)
    finally:
        torch.ops.wavprune.use_instruction_set(-1)
        torch.set_num_threads(before)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_mask_stays_whichever_other_layers_are_pruned(backend: str) -> None:
    settings: dict[str, object] = {"backend": backend, "sparsity": 0.6}
    everything = drawn(settings)
    for name in weights():
        assert_same(drawn(settings, names=(name,)), everything)


@pytest.mark.parametrize("backend", BACKENDS)
def test_pruning_once_more_keeps_a_part_of_what_was_kept(backend: str) -> None:
    # What is left are the highest ranks, far from uniform.
    weight = normal(60, 50, 3, 3)
    kept = weight.numel()
    for sparsity in (0.5, 0.8, 0.9, 0.99):
        before = weight.clone()
        config = PruneConfig(method="random", sparsity=sparsity, backend=backend)
        (row,) = prune_layers([LayerRef("conv", weight)], config)
        assert row.kept == int((weight != 0).sum()) < kept
        assert torch.equal(weight, before * (weight != 0))
        kept = row.kept


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_weight_that_is_not_finite_has_no_threshold(backend: str, bad: float) -> None:
    weight = normal(20, 10, 3, 3)
    weight[19, 9, 2, 2] = bad
    layer = Layer("conv", weight, named_basis("identity", (3, 3)), seed=3)
    chosen = resolve(backend, [layer])
    assert chosen.threshold([Job([layer], Budget(keep=9))]).isnan().all()


def at(indices: npt.NDArray[np.int64], seed: int, dtype: torch.dtype) -> Layer:
    """A layer that is 0 but at some indices."""
    weight = torch.zeros(COUNT, 1, 1, 1, dtype=dtype)
    weight.view(-1)[torch.from_numpy(indices)] = 1
    return Layer("conv", weight, named_basis("identity", (1, 1)), seed=seed, compute_dtype=dtype)


@pytest.mark.skipif(not NATIVE, reason="the compiled extension is not built here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ranks_that_are_equal_in_their_high_bits_are_told_apart(dtype: torch.dtype) -> None:
    # The compiled code selects by 30 bits, which tie now and then, here always.
    one, other = (high_words(seed) >> np.uint32(2) for seed in (1, 2))
    _, first, second = np.intersect1d(one, other, return_indices=True)
    assert len(first) >= 4
    layers = [at(first, 1, dtype), at(second, 2, dtype)]
    native, eager = resolve("native", layers), EagerBackend()
    for keep in range(1, 2 * len(first) + 3):
        job = [Job(layers, Budget(keep=keep))]
        threshold = native.threshold(job)
        assert threshold.equal(eager.threshold(job))
        copies = [replace(layer, weight=layer.weight.clone()) for layer in layers]
        rows = native.apply_(copies, threshold.expand(2).contiguous())
        assert int(rows[:, 0].sum()) == min(keep, 2 * len(first))


@pytest.mark.skipif(not NATIVE, reason="the compiled extension is not built here")
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_of_one_seed_tie_and_are_kept_together(dtype: torch.dtype) -> None:
    indices = np.arange(0, COUNT, 1000)
    layers = [at(indices, 9, dtype) for _ in range(3)]
    native = resolve("native", layers)
    job = Job(layers, Budget(keep=10))
    threshold = native.threshold([job])
    assert threshold.equal(EagerBackend().threshold([job]))
    rows = native.apply_(layers, threshold.expand(3).contiguous())
    assert rows[:, 0].tolist() == [4, 4, 4]


@quick
@given(
    threshold=st.floats(0, 1.5) | st.integers(0, COUNT - 1),
    seed=st.integers(-(2**63), 2**63 - 1),
)
@pytest.mark.skipif(not NATIVE, reason="the compiled extension is not built here")
def test_any_threshold_keeps_the_ranks_that_are_not_below_it(
    threshold: float | int, seed: int
) -> None:
    ranks = uniform(torch.arange(4000), seed)
    cut = threshold if isinstance(threshold, float) else float(ranks[threshold % 4000])
    expected = (ranks >= cut).view(4000, 1, 1, 1)
    layer = Layer("conv", torch.ones(4000, 1, 1, 1), named_basis("identity", (1, 1)), seed=seed)
    native, cuts = resolve("native", [layer]), torch.tensor([cut], dtype=torch.float64)
    (mask,) = native.masks([layer], cuts)
    found = np.unpackbits(mask.numpy(), bitorder="little")[:4000].astype(bool)
    assert found.tolist() == expected.flatten().tolist()
    (row,) = native.apply_([layer], cuts)
    assert torch.equal(layer.weight != 0, expected)
    kept = int(expected.sum())
    assert row.tolist() == [kept, 4000 - kept, 4000 - kept, 4000]
