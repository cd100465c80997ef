from __future__ import annotations

import math
import pickle
import random
import warnings
from contextlib import suppress
from decimal import Decimal
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import wavprune
from tests.support.cases import (
    BACKENDS,
    bits,
    model_of,
    normal,
    prune_weight,
    quick,
    weight_of,
)
from wavprune import (
    LayerRef,
    LevelCollapsedWarning,
    PruneConfig,
    PruneReport,
    backends,
    prune_layers,
)
from wavprune.bases import named_basis
from wavprune.engine.run import _all_or_none, _Call

ORTHONORMAL = ["uhaar", "dct", "identity", "klt"]
METHODS: dict[str, dict[str, Any]] = {
    "dwt": {"wavelet": "uhaar"},
    "haar": {"wavelet": "haar"},
    "min_weight": {"method": "min_weight"},
    "random": {"method": "random"},
}

each_method = pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)
each_backend = pytest.mark.parametrize("backend", BACKENDS)
each_basis = pytest.mark.parametrize("wavelet", ORTHONORMAL)


def distance(a: torch.Tensor, b: torch.Tensor) -> float:
    """The norm of the difference over the norm of ``b``."""
    return float((a.double() - b.double()).norm() / b.double().norm())


# How much is kept.


@st.composite
def layers(draw: st.DrawFn) -> torch.Tensor:
    """Float64 weights without ties."""
    sizes = [draw(st.integers(1, high)) for high in (6, 4, 6, 6)]
    return normal(*sizes, dtype=torch.float64, seed=draw(st.integers(0, 999)))


sparsities = st.decimals(0, Decimal("0.999"), places=3)


@pytest.mark.parametrize("wavelet", ["uhaar", "dct", "identity"])
@quick
@given(weight=layers(), sparsity=sparsities)
def test_as_many_are_kept_as_the_decimal_says(
    wavelet: str, weight: torch.Tensor, sparsity: Decimal
) -> None:
    _, stats = prune_weight(weight, wavelet=wavelet, sparsity=float(sparsity))
    assert stats.kept == math.ceil((1 - sparsity) * weight.numel())
    _, drawn = prune_weight(weight, method="random", sparsity=float(sparsity))
    assert drawn.kept == stats.kept


@pytest.mark.parametrize(("sparsity", "kept"), [(0.7, 3), (0.3, 7), (0.1, 9), (0.99, 1), (0, 10)])
def test_a_decimal_is_taken_as_it_is_written(sparsity: float, kept: int) -> None:
    _, stats = prune_weight(normal(10, 1, 1, 1), sparsity=sparsity)
    assert stats.kept == kept


@pytest.mark.parametrize("method", ["dwt", "min_weight"])
def test_the_last_one_below_sparsity_1_is_kept(method: str) -> None:
    _, stats = prune_weight(normal(2, 2, 3, 3), method=method, sparsity=math.nextafter(1, 0))
    assert stats.kept == 1


@each_backend
def test_all_that_tie_at_the_threshold_are_kept(backend: str) -> None:
    weight = torch.tensor([3.0, -2, 2, 2, -1, 1]).view(6, 1, 1, 1)
    after, stats = prune_weight(weight, method="min_weight", sparsity=2 / 3, backend=backend)
    assert (stats.kept, stats.threshold) == (4, 2.0)
    assert after.flatten().tolist() == [3, -2, 2, 2, 0, 0]


@each_backend
@each_method
def test_a_layer_of_zeros_keeps_nothing(settings: dict[str, Any], backend: str) -> None:
    for amount in ({"sparsity": 0.0}, {"sparsity": 0.5}):
        after, stats = prune_weight(torch.zeros(3, 2, 3, 3), **settings, **amount, backend=backend)
        assert (stats.kept, stats.sparsity, stats.relative_error) == (0, 1.0, 0.0)
        assert (stats.weight_zeros, stats.weight_sparsity) == (54, 1.0)
        assert not after.any()


@each_backend
@each_method
def test_a_layer_with_fewer_than_asked_keeps_those(settings: dict[str, Any], backend: str) -> None:
    weight = torch.zeros(50, 2, 4, 4)
    weight[7, 1] = normal(4, 4)
    after, stats = prune_weight(weight, **settings, sparsity=0.5, backend=backend)
    assert stats.kept == 16
    assert distance(after, weight) < 1e-6


@each_backend
@each_basis
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_sparsity_0_changes_nothing(wavelet: str, dtype: torch.dtype, backend: str) -> None:
    weight = normal(8, 4, 3, 3, dtype=dtype)
    after, stats = prune_weight(weight, wavelet=wavelet, sparsity=0, backend=backend)
    assert distance(after, weight) < 8 * torch.finfo(dtype).eps
    assert stats.relative_error == pytest.approx(distance(after, weight), abs=1e-12)
    # Numbers of few digits may well have a coefficient of 0.
    assert stats.kept == pytest.approx(288, abs=0 if dtype.itemsize > 2 else 3)


ADVERSARIAL = {
    "equal": torch.full((6, 5, 3, 3), 0.1),
    "two values": torch.where(normal(6, 5, 3, 3) > 0, 0.25, -1.0),
    "sorted": normal(6, 5, 3, 3).flatten().sort().values.view(6, 5, 3, 3),
    "outlier": torch.full((6, 5, 3, 3), 1e-3).index_fill(0, torch.tensor([0]), 1e6),
    "mostly zero": torch.where(normal(20, 5, 3, 3, seed=1) > 2.3, normal(20, 5, 3, 3), 0.0),
    "tiny": normal(6, 5, 3, 3) * 1e-25,
    "denormal": normal(6, 5, 3, 3) * 1e-40,
    "huge": normal(6, 5, 3, 3) * 1e30,
    "one value": torch.tensor([-2.5]).view(1, 1, 1, 1),
}


each_adversary = pytest.mark.parametrize("weight", ADVERSARIAL.values(), ids=ADVERSARIAL)


@each_backend
@each_method
@each_adversary
def test_the_report_is_true_of_any_data(
    weight: torch.Tensor, settings: dict[str, Any], backend: str
) -> None:
    after, stats = prune_weight(weight, **settings, sparsity=0.8, backend=backend)
    assert torch.isfinite(after).all()
    assert stats.sparsity == 1 - stats.kept / weight.numel()
    assert stats.weight_zeros == int((after == 0).sum())
    assert stats.weight_sparsity == stats.weight_zeros / weight.numel()
    assert stats.relative_error == pytest.approx(distance(after, weight), rel=1e-4, abs=1e-12)


@each_backend
@each_adversary
@pytest.mark.parametrize("sparsity", [Decimal("0.8"), Decimal("0.5"), Decimal(0)])
def test_kept_weights_of_any_data(weight: torch.Tensor, sparsity: Decimal, backend: str) -> None:
    amount = {"sparsity": float(sparsity), "backend": backend}
    nonzero = int(torch.count_nonzero(weight))
    wanted = min(math.ceil((1 - sparsity) * weight.numel()), nonzero)
    after, stats = prune_weight(weight, method="min_weight", **amount)
    threshold = float(weight.abs().flatten().sort(descending=True).values[wanted - 1])
    assert stats.kept == int(((weight.abs() >= threshold) & (weight != 0)).sum())
    assert torch.equal(after, torch.where(weight.abs() >= threshold, weight, 0))
    after, stats = prune_weight(weight, method="random", **amount)
    assert stats.kept == int(torch.count_nonzero(after)) == wanted


def test_an_empty_layer_is_left_as_it_is() -> None:
    for amount in ({"sparsity": 0.5}, {"percentile": 50.0}):
        _, stats = prune_weight(torch.zeros(0, 3, 3, 3), **amount)
        assert (stats.kept, stats.sparsity, stats.relative_error) == (0, 0.0, 0.0)


def test_coefficients_that_overflow_are_refused() -> None:
    weight = torch.full((2, 2, 4, 4), 3e38)
    with pytest.raises(ValueError, match="overflow although every weight is finite"):
        prune_weight(weight, wavelet="haar")


def test_pruning_makes_no_infinity_of_a_finite_weight() -> None:
    weight = (normal(16, 8, 3, 3).sign() * 60000).to(torch.float16)
    with suppress(ValueError):
        prune_layers([LayerRef("conv", weight)], PruneConfig(wavelet="uhaar"))
    assert torch.isfinite(weight).all()


# The percentile.


@each_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@quick
@given(
    count=st.integers(1, 400),
    percentile=st.floats(0, 100) | st.sampled_from([0.0, 50.0, 100.0]),
    ties=st.booleans(),
)
def test_the_percentile_of_minimum_weight_is_numpys_to_the_bit(
    backend: str, dtype: torch.dtype, count: int, percentile: float, ties: bool
) -> None:
    weight = normal(count, 1, 1, 1, dtype=dtype, seed=count)
    weight = weight.mul(2).round() if ties else weight
    after, stats = prune_weight(weight, method="min_weight", percentile=percentile, backend=backend)
    expected = np.percentile(weight.abs().numpy(), percentile)
    assert stats.threshold == float(expected)
    below = weight.abs().to(torch.float64) < float(expected)
    assert torch.equal(after, torch.where(below, 0, weight))


@each_backend
def test_percentile_0_keeps_all_but_zeros_and_100_keeps_the_largest(backend: str) -> None:
    weight = torch.tensor([0.0, 1, -5, 5, 2, 0]).view(6, 1, 1, 1)
    settings = {"method": "min_weight", "backend": backend}
    after, stats = prune_weight(weight, **settings, percentile=0)
    assert (stats.kept, stats.threshold) == (4, 0.0)
    assert torch.equal(after, weight)
    after, stats = prune_weight(weight, **settings, percentile=100)
    assert (stats.kept, stats.threshold) == (2, 5.0)
    assert after.flatten().tolist() == [0, 0, -5, 5, 0, 0]


@each_backend
def test_the_percentile_counts_structural_zeros(backend: str) -> None:
    weight = normal(8, 8, 3, 3)
    below = 100 * 7 / 16 - 1
    _, stats = prune_weight(weight, wavelet="haar", percentile=below, backend=backend)
    assert (stats.threshold, stats.kept) == (0.0, 64 * 9)
    _, stats = prune_weight(weight, wavelet="haar", percentile=below + 2, backend=backend)
    assert stats.threshold > 0
    assert stats.kept < 64 * 9


@each_backend
def test_the_percentile_lies_between_the_structural_zeros_and_the_rest(backend: str) -> None:
    weight = normal(1, 1, 3, 3)
    coeffs = pywt.wavedec2(weight[0, 0].numpy(), "haar", "periodization", 1)
    ranks = np.abs(pywt.coeffs_to_array(coeffs)[0])
    between = 100 * 6.5 / 15
    expected = np.percentile(ranks, between)
    _, stats = prune_weight(weight, wavelet="haar", percentile=between, backend=backend)
    assert stats.threshold == pytest.approx(float(expected), rel=1e-5)
    assert stats.kept == 9


# Laws.


@pytest.mark.parametrize("wavelet", ["uhaar", "dct", "identity"])
@quick
@given(weight=layers(), sparsity=sparsities)
def test_pruning_again_changes_nothing(
    wavelet: str, weight: torch.Tensor, sparsity: Decimal
) -> None:
    once, first = prune_weight(weight, wavelet=wavelet, sparsity=float(sparsity))
    twice, second = prune_weight(once, wavelet=wavelet, sparsity=float(sparsity))
    assert distance(twice, once) < 1e-13
    assert second.kept == first.kept


@each_basis
@quick
@given(weight=layers(), pair=st.tuples(sparsities, sparsities).map(sorted))
def test_the_error_grows_with_the_sparsity(
    wavelet: str, weight: torch.Tensor, pair: list[Decimal]
) -> None:
    less, more = (
        prune_weight(weight, wavelet=wavelet, sparsity=float(sparsity))[1] for sparsity in pair
    )
    assert less.relative_error <= more.relative_error + 1e-13
    assert less.kept >= more.kept


@each_method
@pytest.mark.parametrize("amount", [{"sparsity": 0.6}, {"percentile": 60.0}], ids=str)
@quick
@given(power=st.integers(-30, 30), seed=st.integers(0, 99))
def test_a_power_of_two_scales_everything_exactly(
    settings: dict[str, Any], amount: dict[str, float], power: int, seed: int
) -> None:
    if settings.get("method") == "random":
        amount = {"sparsity": 0.6}
    weight = normal(4, 3, 3, 3, seed=seed)
    after, stats = prune_weight(weight, **settings, **amount)
    scaled, scaled_stats = prune_weight(weight * 2.0**power, **settings, **amount)
    assert bits(scaled) == bits(after * 2.0**power)
    if settings.get("method") != "random":
        assert scaled_stats.threshold == stats.threshold * 2.0**power
    assert scaled_stats.relative_error == pytest.approx(stats.relative_error, rel=1e-6)


@pytest.mark.parametrize("wavelet", ["uhaar", "haar", "dct", "klt", "identity"])
@quick
@given(order=st.permutations(range(6)), seed=st.integers(0, 99))
def test_the_order_of_the_kernels_does_not_matter(
    wavelet: str, order: list[int], seed: int
) -> None:
    weight = normal(6, 5, 3, 3, dtype=torch.float64, seed=seed)
    after, stats = prune_weight(weight, wavelet=wavelet)
    moved, moved_stats = prune_weight(weight[order], wavelet=wavelet)
    assert moved_stats.kept == stats.kept
    assert distance(moved, after[order]) < 1e-12


@each_method
@each_backend
def test_both_scopes_agree_on_one_layer(settings: dict[str, Any], backend: str) -> None:
    weight = normal(8, 4, 3, 3)
    one, other = (
        prune_weight(weight, **settings, sparsity=0.8, scope=scope, backend=backend)
        for scope in ("layer", "global")
    )
    assert bits(one[0]) == bits(other[0])
    assert (one[1].threshold, one[1].kept) == (other[1].threshold, other[1].kept)


def test_global_scope_has_one_threshold_and_an_exact_total() -> None:
    model = model_of(strong=normal(8, 4, 3, 3) * 9, weak=normal(5, 3, 5, 5, seed=1))
    report = wavprune.fast.prune(model, sparsity=0.7, scope="global")
    assert report.kept == math.ceil(0.3 * report.numel)
    assert len({layer.threshold for layer in report}) == 1
    assert report["weak"].sparsity > 0.7 > report["strong"].sparsity


# Random pruning.


def drawn(weight: torch.Tensor, **settings: Any) -> torch.Tensor:
    return prune_weight(weight, method="random", **settings)[0]


def test_random_keeps_weights_as_they_are_or_makes_them_zero() -> None:
    weight = normal(20, 10, 3, 3)
    after, stats = prune_weight(weight, method="random", sparsity=0.7)
    kept = after != 0
    assert int(kept.sum()) == stats.kept == 540
    assert torch.equal(after[kept], weight[kept])


def test_a_seed_is_a_mask() -> None:
    weight = normal(20, 10, 3, 3)
    assert bits(drawn(weight, seed=3)) == bits(drawn(weight, seed=3))
    assert bits(drawn(weight, seed=3)) != bits(drawn(weight, seed=4))
    assert bits(drawn(weight, seed=2**63 - 1)) != bits(drawn(weight, seed=4))


def test_layers_of_one_shape_get_masks_of_their_own() -> None:
    model = model_of(a=torch.ones(20, 10, 3, 3), b=torch.ones(20, 10, 3, 3))
    wavprune.fast.prune(model, "random")
    same = (weight_of(model, "a") == weight_of(model, "b")).float().mean()
    assert 0.4 < float(same) < 0.6


def test_a_mask_does_not_depend_on_the_other_layers() -> None:
    def model() -> nn.Module:
        return model_of(a=normal(9, 4, 3, 3), b=normal(6, 5, 3, 3), c=normal(4, 4, 1, 1))

    everything, alone = model(), model()
    wavprune.fast.prune(everything, "random", seed=5)
    wavprune.fast.prune(alone, "random", seed=5, targets="b")
    assert bits(weight_of(alone, "b")) == bits(weight_of(everything, "b"))


def test_the_global_random_states_are_left_alone() -> None:
    def states() -> bytes:
        numpy = np.random.get_state()  # noqa: NPY002
        return pickle.dumps((bits(torch.get_rng_state()), numpy, random.getstate()))

    before = states()
    for settings in METHODS.values():
        prune_weight(normal(4, 4, 3, 3), **settings)
    assert states() == before


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16])
def test_the_mask_is_the_same_in_every_dtype_and_backend(dtype: torch.dtype) -> None:
    ones = torch.ones(9, 4, 3, 3)
    expected = drawn(ones, sparsity=0.7, seed=1)
    for backend in BACKENDS:
        found = drawn(ones.to(dtype), sparsity=0.7, seed=1, backend=backend)
        assert torch.equal(found.float(), expected)


def test_a_zero_is_not_drawn() -> None:
    weight = normal(10, 10, 3, 3)
    weight[:5] = 0
    after, stats = prune_weight(weight, method="random", sparsity=0.6)
    assert stats.kept == int(torch.count_nonzero(after)) == 360


def test_every_weight_is_drawn_as_often_as_any_other() -> None:
    weight = torch.ones(5, 4, 3, 3)
    times = sum(drawn(weight, sparsity=0.75, seed=seed) for seed in range(400))
    # 100 times each on average, with a standard deviation of 8.7.
    assert isinstance(times, torch.Tensor)
    assert float(times.min()) > 60
    assert float(times.max()) < 140
    assert 6 < float(times.std()) < 12


# match.

SOURCES: dict[str, dict[str, Any]] = {
    "sparsity": {"wavelet": "haar", "sparsity": 0.8},
    "percentile": {"wavelet": "haar", "percentile": 75.0},
    "global": {"wavelet": "dct", "sparsity": 0.8, "scope": "global"},
    "min_weight": {"method": "min_weight", "percentile": 60.0},
}


def net() -> nn.ModuleDict:
    return model_of(
        a=normal(8, 4, 3, 3, seed=1), b=2 * normal(6, 8, 5, 5, seed=2), c=normal(8, 8, 1, 1, seed=3)
    )


@pytest.fixture(params=SOURCES)
def source(request: pytest.FixtureRequest) -> PruneReport:
    return wavprune.fast.prune(net(), **SOURCES[request.param])


def test_random_prunes_in_each_layer_what_the_report_pruned_there(source: PruneReport) -> None:
    report = wavprune.fast.prune(net(), "random", match=source)
    assert [layer.kept for layer in report] == [layer.kept for layer in source]


def test_min_weight_prunes_at_the_overall_sparsity_of_the_report(source: PruneReport) -> None:
    report = wavprune.fast.prune(net(), "min_weight", match=source)
    for layer in report:
        assert layer.kept == -(-source.kept * layer.numel // source.numel)
    everywhere = wavprune.fast.prune(net(), "min_weight", match=source, scope="global")
    assert everywhere.kept == source.kept


def test_what_keeps_more_than_there_are_weights_matches_all_of_them() -> None:
    model = model_of(a=normal(8, 4, 3, 3))
    source = wavprune.fast.prune(model, wavelet="haar", mode="zero", percentile=0)
    assert source.kept > source.numel
    for method in ("min_weight", "random"):
        report = wavprune.fast.prune(model_of(a=normal(8, 4, 3, 3)), method, match=source)
        assert report.kept == source.numel


# The weight and its model.


@each_method
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_weight_stays_the_parameter_that_it_was(
    settings: dict[str, Any], dtype: torch.dtype
) -> None:
    model = model_of(
        conv=normal(8, 8, 3, 3, dtype=dtype).to(memory_format=torch.channels_last),
        strided=normal(8, 4, 3, 6, dtype=dtype)[..., ::2],
        frozen=normal(8, 4, 3, 3, dtype=dtype),
    )
    weight_of(model, "frozen").requires_grad = False
    before = dict(model.named_parameters())
    was = {name: (w.dtype, w.stride(), w.data_ptr(), w.requires_grad) for name, w in before.items()}
    wavprune.fast.prune(model, **settings)
    after = dict(model.named_parameters())
    for name, weight in after.items():
        assert weight is before[name]
        assert weight.is_leaf
        assert (weight.dtype, weight.stride(), weight.data_ptr(), weight.requires_grad) == was[name]
    assert weight_of(model).is_contiguous(memory_format=torch.channels_last)


@each_method
def test_the_layout_does_not_change_the_result(settings: dict[str, Any]) -> None:
    plain = normal(8, 8, 3, 3)
    expected, _ = prune_weight(plain, **settings)
    for layout in (
        plain.to(memory_format=torch.channels_last),
        torch.cat([plain, plain], dim=3)[..., :3],
        plain.transpose(0, 1).contiguous().transpose(0, 1),
    ):
        (stats,) = prune_layers([LayerRef("conv", layout)], PruneConfig(**settings))
        assert distance(layout, expected) < 1e-6
        assert stats.kept == 288


def test_only_the_selected_weights_change() -> None:
    model = nn.Sequential(
        nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 3), nn.Linear(4, 4)
    )
    before = {name: value.clone() for name, value in model.state_dict().items()}
    report = wavprune.fast.prune(model, targets="2")
    changed = {
        name for name, value in model.state_dict().items() if not torch.equal(value, before[name])
    }
    assert changed == {"2.weight"}
    assert [layer.name for layer in report] == ["2"]


def test_a_shared_weight_is_pruned_once() -> None:
    model = model_of(a=normal(8, 8, 3, 3), b=normal(8, 8, 3, 3))
    twin = model["b"]
    twin.weight = weight_of(model, "a")
    expected, _ = prune_weight(normal(8, 8, 3, 3), percentile=50.0)
    report = wavprune.fast.prune(model, percentile=50.0)
    assert [layer.name for layer in report] == ["a"]
    assert bits(weight_of(model, "b")) == bits(expected)


def test_progress_is_shown_when_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    wavprune.fast.prune(net())
    assert capsys.readouterr() == ("", "")
    wavprune.fast.prune(net(), progress=True)
    shown = capsys.readouterr()
    assert "100%" in shown.err
    assert shown.out == ""


# Levels and devices.


def test_a_collapsed_level_warns_once_a_kernel_size_and_is_minimum_weight() -> None:
    model, plain = net(), net()
    expected = r"'bior4\.4' is too long for {} kernels .*'{}'.*deepest level that exists is 0"
    with (
        pytest.warns(LevelCollapsedWarning, match=expected.format("3x3", "a")),
        pytest.warns(LevelCollapsedWarning, match=expected.format("5x5", "b")) as caught,
    ):
        report = wavprune.fast.prune(model, wavelet="bior4.4", level=2)
    assert [warning.filename for warning in caught] == [__file__] * len(caught)
    assert [(layer.level_requested, layer.level_used) for layer in report] == [(2, 0)] * 3
    wavprune.fast.prune(plain, "min_weight")
    for name, weight in model.named_parameters():
        assert bits(weight) == bits(plain.get_parameter(name))


def test_layers_of_one_kernel_size_share_a_warning() -> None:
    model = model_of(x=normal(2, 2, 3, 3), y=normal(4, 2, 3, 3), z=normal(4, 2, 1, 1))
    with pytest.warns(LevelCollapsedWarning, match=r"3x3 kernels .*'x'.*2") as caught:
        wavprune.fast.prune(model, wavelet="db2")
    assert len(caught) == 1


def test_1x1_kernels_do_not_warn() -> None:
    report = wavprune.fast.prune(model_of(conv=normal(8, 8, 1, 1)), wavelet="bior4.4")
    assert (report["conv"].wavelet, report["conv"].level_used) == ("identity", 0)


def test_a_forced_level_runs_and_passes_on_what_pywavelets_says() -> None:
    model = model_of(conv=normal(8, 8, 3, 3))
    with pytest.warns(UserWarning, match="Level value of 3 is too high") as caught:
        report = wavprune.fast.prune(model, wavelet="haar", level=3, force_level=True)
    assert [warning.filename for warning in caught] == [__file__]
    assert (report["conv"].level_requested, report["conv"].level_used) == (3, 3)


def test_a_level_that_exists_needs_no_force_and_no_warning() -> None:
    models = net(), net()
    for model, force in zip(models, (True, False), strict=True):
        wavprune.fast.prune(model, wavelet="haar", level=1, force_level=force, ignore="c")
    assert bits(weight_of(models[0], "b")) == bits(weight_of(models[1], "b"))


def test_levels_of_the_report() -> None:
    model = model_of(tall=normal(4, 4, 9, 2), small=normal(4, 4, 3, 3), point=normal(4, 4, 1, 1))
    assert [layer.level_used for layer in wavprune.fast.prune(model)] == [4, 2, 0]
    report = wavprune.fast.prune(model, level=1)
    assert [layer.level_used for layer in report] == [1, 1, 0]
    assert {layer.level_requested for layer in report} == {1}
    assert {
        layer.level_requested for layer in wavprune.fast.prune(model, "min_weight", level=1)
    } == {None}


def test_the_cpu_by_any_name_is_the_cpu() -> None:
    expected, _ = prune_weight(normal(8, 4, 3, 3))
    for device in ("cpu", torch.device("cpu"), "cpu:0"):
        found, stats = prune_weight(normal(8, 4, 3, 3), device=device)
        assert bits(found) == bits(expected)
        assert stats.device.startswith("cpu")


@pytest.mark.skipif(torch.cuda.is_available(), reason="CUDA is there")
def test_cuda_where_there_is_none_warns_once_and_runs_on_the_cpu() -> None:
    expected, _ = prune_weight(normal(8, 4, 3, 3))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            model = model_of(conv=normal(8, 4, 3, 3))
            report = wavprune.fast.prune(model, device="cuda:3")
    assert report["conv"].device == "cpu"
    assert bits(weight_of(model)) == bits(expected)
    (warning,) = caught
    assert "'cuda:3': torch sees no CUDA here; pruning on the CPU" in str(warning.message)
    assert warning.filename == __file__


def test_one_threshold_that_is_nan_stops_all_calls() -> None:
    fine, bad = torch.tensor([1.0, math.inf]), torch.tensor([3.0, math.nan])

    def together(*parts: torch.Tensor) -> list[torch.Tensor]:
        calls = _all_or_none([_Call([0, 1], part) for part in parts])
        return [call.thresholds for call in calls]

    for part, same in zip([fine, fine + 1], together(fine, fine + 1), strict=True):
        assert torch.equal(part, same)
    for parts in ([fine, bad], [bad, fine]):
        assert all(bool(part.isnan().all()) for part in together(*parts))


@pytest.mark.parametrize("name", ["native", "eager", "reference"])
def test_one_threshold_that_is_nan_stops_a_whole_call(name: str) -> None:
    if name in backends.unavailable():
        pytest.skip(backends.unavailable()[name])
    weights = [normal(8, 4, 3, 3), normal(4, 8, 3, 3, seed=1)]
    before = [weight.clone() for weight in weights]
    basis = named_basis("haar", (3, 3))
    layers = [backends.Layer("conv", weight, basis) for weight in weights]
    backend = backends.resolve(name, layers)
    cuts = torch.tensor([0.1, math.nan], dtype=torch.float64)
    backend.apply_(layers, cuts)
    assert all(torch.equal(weight, was) for weight, was in zip(weights, before, strict=True))
    backend.apply_(layers, torch.full((2,), 0.5, dtype=torch.float64))
    assert not any(torch.equal(weight, was) for weight, was in zip(weights, before, strict=True))


@each_backend
@pytest.mark.parametrize("shape", [(0, 4, 3, 3), (4, 0, 3, 3)])
@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"percentile": 50.0}], ids=str)
def test_a_weight_without_values_is_pruned_to_nothing(
    backend: str, shape: tuple[int, ...], amount: dict[str, float]
) -> None:
    if backend in backends.unavailable():
        pytest.skip(backends.unavailable()[backend])
    config = PruneConfig(wavelet="haar", mode="symmetric", backend=backend, **amount)  # type: ignore[arg-type]  # by name
    full = normal(8, 4, 3, 3)
    report = prune_layers([LayerRef("none", torch.empty(shape)), LayerRef("full", full)], config)
    assert report["none"].kept == report["none"].numel == 0
    assert 0 < report["full"].kept < full.numel()


def test_two_views_of_one_memory_are_pruned_once() -> None:
    point = nn.Conv2d(16, 16, 1, bias=False)
    linear = nn.Linear(16, 16, bias=False)
    linear.weight = nn.Parameter(point.weight.detach().view(16, 16))
    model = nn.ModuleList([point, linear])
    report = wavprune.fast.prune(model, method="min_weight", targets="*")
    assert [layer.name for layer in report] == ["0"]
