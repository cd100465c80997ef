from __future__ import annotations

import re
from typing import Any

import numpy as np
import pytest
import pywt
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import nn

import wavprune
from tests.support.cases import any_level, assert_pruned, bits, normal, outcomes, quick
from wavprune import Basis, LayerRef, PruneConfig, backends, basis_for, prune_layers
from wavprune.bases import max_level, named_basis
from wavprune.bases.basis import DENSE_VALUES
from wavprune.bases.factors import FactoredTransform
from wavprune.bases.wavelets import unpack
from wavprune.config import MODES

CPU = torch.device("cpu")
WAVELETS = ("haar", "db2", "db4", "sym8", "coif1", "bior2.2", "bior4.4", "rbio3.1", "dmey")
# Odd sizes, level by level down to one value and below, and an axis of one.
AMOUNTS: list[dict[str, Any]] = [{"sparsity": 0.7}, {"percentile": 40.0}]
SMALL = ((8, 8), (9, 7), (1, 13), (12, 5))


def transform(basis: Basis, by_importance: bool = False) -> FactoredTransform:
    assert basis.factors is not None
    return FactoredTransform(basis.factors, by_importance, torch.float64, CPU)


def mlp() -> nn.Sequential:
    model = nn.Sequential(nn.Linear(150, 64), nn.ReLU(), nn.Linear(64, 10))
    for seed, parameter in enumerate(model.parameters()):
        with torch.no_grad():
            parameter.copy_(normal(*parameter.shape, seed=seed))
    return model


# The transform.


@quick
@given(
    wavelet=st.sampled_from(WAVELETS),
    mode=st.sampled_from(MODES),
    level=st.integers(1, 5),
    kernel=st.tuples(st.integers(1, 45), st.integers(1, 45)),
    seed=st.integers(0, 99),
)
def test_a_matrix_is_transformed_as_by_pywavelets(
    wavelet: str, mode: str, level: int, kernel: tuple[int, int], seed: int
) -> None:
    # Some modes cannot extend one value; they say so, which is tested below.
    assume(min(kernel) > 1 or mode not in ("reflect", "antireflect"))
    basis = named_basis(wavelet, kernel, mode, level, True)
    rng = np.random.default_rng(seed)
    kernels = rng.standard_normal((2, *kernel))
    with any_level():
        coeffs = pywt.wavedec2(kernels[1], wavelet, mode, level)
    expected, slices = pywt.coeffs_to_array(coeffs)
    assert expected.shape == basis.grid
    tensor = torch.from_numpy(kernels)
    found = transform(basis).analyse(tensor)[1].view(basis.grid).numpy()
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())

    packed = rng.standard_normal((2, *basis.grid))
    listed = pywt.array_to_coeffs(packed[1], slices, output_format="wavedec2")
    whole = pywt.waverec2(listed, wavelet, mode)[: kernel[0], : kernel[1]]
    back = transform(basis).synthesise(torch.from_numpy(packed).flatten(1))[1].view(kernel)
    np.testing.assert_allclose(back.numpy(), whole, rtol=0, atol=1e-10 * np.abs(packed).max())


def impulses(basis: Basis) -> tuple[Any, Any]:
    """``A`` and ``S`` as PyWavelets answers to unit impulses."""
    kernel, grid, mode = basis.kernel, basis.grid, basis.mode
    K, M = (int(np.prod(size)) for size in (kernel, grid))
    with any_level():
        coeffs = pywt.wavedec2(
            np.eye(K).reshape(K, *kernel), basis.name, mode, basis.level_used, axes=(-2, -1)
        )
    packed, _ = pywt.coeffs_to_array(coeffs, axes=(-2, -1))
    units = unpack(np.eye(M).reshape(M, *grid), basis.bands)
    kernels = pywt.waverec2(units, basis.name, mode, axes=(-2, -1))
    return packed.reshape(K, M).T, kernels[:, : kernel[0], : kernel[1]].reshape(M, K).T


@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "bior2.2", "rbio3.1", "coif1"])
@pytest.mark.parametrize("mode", MODES)
def test_factors_are_the_matrices_of_pywavelets(wavelet: str, mode: str) -> None:
    for kernel, level in [(kernel, level) for kernel in SMALL for level in (1, 2, 3)]:
        try:
            with any_level():
                pywt.wavedec2(np.zeros(kernel), wavelet, mode, level)
        except ValueError as error:
            expected = f"in mode {mode!r} to level {level}: {error}"
            with pytest.raises(ValueError, match=re.escape(expected)):
                named_basis(wavelet, kernel, mode, level, True)
            continue
        basis = named_basis(wavelet, kernel, mode, level, True)
        if basis.grid[0] * basis.grid[1] >= 600:
            continue
        used = ~basis.structural
        for matrix, oracle in zip((basis.analysis, basis.synthesis), impulses(basis), strict=True):
            difference = np.abs(matrix - oracle)
            # PyWavelets leaves a trace of rounding in coefficients that are 0.
            compared = difference[used] if len(used) == len(difference) else difference
            assert compared.max() <= 1e-12 * np.abs(oracle).max()
        assert_factors_multiply(basis)


@pytest.mark.parametrize("name", ["uhaar", "dct", "identity"])
@pytest.mark.parametrize("level", [None, 1, 2])
def test_factors_of_the_librarys_own_bases_are_the_matrices(name: str, level: int | None) -> None:
    for kernel in SMALL:
        assert_factors_multiply(named_basis(name, kernel, "zero", level))


def assert_factors_multiply(basis: Basis) -> None:
    """The transform in factors is the product with the matrices of the operators."""
    K, M = (int(np.prod(size)) for size in (basis.kernel, basis.grid))
    for by_importance in (False, True):
        operator = basis.importance_operator if by_importance else basis.coefficient_operator
        run = transform(basis, by_importance)
        A = run.analyse(torch.eye(K, dtype=torch.float64).view(K, *basis.kernel)).T.numpy()
        S = run.synthesise(torch.eye(M, dtype=torch.float64)).T.numpy()
        for matrix, expected in (
            (A[operator.rows], operator.analysis),
            (S[:, operator.rows], operator.synthesis),
        ):
            assert np.abs(matrix - expected).max() <= 1e-12 * np.abs(expected).max()
        assert not np.delete(A, operator.rows, axis=0).any()
        if operator.axes is not None:
            rows, columns = operator.axes[:2]
            np.testing.assert_allclose(np.kron(rows, columns), operator.analysis, atol=1e-14)


def test_where_the_matrices_end() -> None:
    last, first = named_basis("haar", (32, 32)), named_basis("haar", (33, 32))
    assert (last.is_dense, last.analysis.shape) == (True, (DENSE_VALUES, DENSE_VALUES))
    assert not first.is_dense
    for part in ("analysis", "synthesis", "importance_operator"):
        with pytest.raises(ValueError, match=r"a 33x32 kernel has no matrices of 'haar'.*1024"):
            getattr(first, part)


# Linear layers.


def dwt_by_hand(weight: np.ndarray[Any, Any], wavelet: str, level: int, percentile: float) -> Any:
    coeffs = pywt.wavedec2(weight, wavelet, "periodization", level)
    packed, slices = pywt.coeffs_to_array(coeffs)
    cut = np.percentile(np.abs(packed), percentile)
    packed[np.abs(packed) < cut] = 0
    return cut, pywt.waverec2(
        pywt.array_to_coeffs(packed, slices, output_format="wavedec2"), wavelet, "periodization"
    )


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize(("wavelet", "level"), [("haar", 5), ("haar", 1), ("db2", 4), ("sym8", 2)])
def test_a_linear_weight_is_one_matrix_to_pywavelets(
    backend: str, wavelet: str, level: int
) -> None:
    linear = nn.Linear(128, 64, dtype=torch.float64)
    with torch.no_grad():
        linear.weight.copy_(normal(64, 128, dtype=torch.float64))
    weight, bias = linear.weight, linear.bias.clone()
    cut, expected = dwt_by_hand(weight.detach().clone().numpy(), wavelet, level, 70.0)
    report = wavprune.fast.prune(
        linear, wavelet=wavelet, level=level, percentile=70, targets="", backend=backend
    )
    row = report[""]
    assert (row.shape, row.level_used, row.backend) == ((64, 128), level, backend)
    assert row.threshold == pytest.approx(cut, rel=1e-12)
    assert row.kept == 64 * 128 - int(0.7 * (64 * 128 - 1)) - 1
    assert linear.weight is weight
    np.testing.assert_allclose(weight.detach().numpy(), expected, atol=1e-11)
    assert torch.equal(linear.bias, bias)


MATRIX_BASES: list[dict[str, Any]] = [
    {"wavelet": "haar"},
    {"wavelet": "haar", "level": 5},
    {"wavelet": "db4", "mode": "symmetric"},
    {"wavelet": "sym8", "mode": "zero"},
    {"wavelet": "bior2.2", "level": 2},
    {"wavelet": "uhaar"},
    {"wavelet": "dct"},
    {"method": "min_weight"},
]


@pytest.mark.parametrize("backend", ["eager", "reference"])
@pytest.mark.parametrize("settings", MATRIX_BASES, ids=str)
@pytest.mark.parametrize("amount", [*AMOUNTS, {"sparsity": 0.9, "scope": "global"}], ids=str)
def test_matrices_are_pruned_as_the_basis_says(
    backend: str, settings: dict[str, Any], amount: dict[str, Any]
) -> None:
    config = PruneConfig(backend=backend, **settings, **amount)
    before = {"odd": normal(33, 35, seed=1), "even": normal(34, 32, seed=2)}
    after = {name: weight.clone() for name, weight in before.items()}
    with any_level():
        report = prune_layers([LayerRef(*entry) for entry in after.items()], config)
    kernels = {name: weight[None, None] for name, weight in before.items()}
    assert_pruned(
        kernels, outcomes({name: w[None, None] for name, w in after.items()}, report), config
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_dtypes_and_layouts_of_matrices(dtype: torch.dtype) -> None:
    plain = normal(40, 48, dtype=dtype)
    turned = plain.t().contiguous().t()
    for weight in (plain, turned):
        place = (weight.data_ptr(), weight.stride())
        (row,) = prune_layers([LayerRef("fc", weight)], PruneConfig(wavelet="db4", sparsity=0.5))
        assert (row.kept, row.shape) == (960, (40, 48))
        assert (weight.data_ptr(), weight.stride(), weight.dtype) == (*place, dtype)
    assert bits(plain) == bits(turned)


def test_methods_without_a_transform_see_a_matrix_of_single_values() -> None:
    for settings in ({"method": "min_weight"}, {"method": "random", "seed": 3}):
        matrix, conv = normal(300, 40), normal(300, 40)[:, :, None, None].clone()
        one = prune_layers([LayerRef("a", matrix)], PruneConfig(**settings))
        other = prune_layers([LayerRef("a", conv)], PruneConfig(**settings))
        assert bits(matrix) == bits(conv)
        assert (one["a"].kept, one["a"].coefficients) == (6000, 12000)
        # Of no size that the compiled kernels do not take.
        assert one["a"].backend == other["a"].backend


def test_convolutions_and_matrices_share_a_global_threshold() -> None:
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Linear(96, 40), nn.Linear(7, 1))
    model[2].weight = nn.Parameter(torch.zeros(0, 7))
    report = wavprune.fast.prune(model, scope="global", sparsity=0.8, targets="*", wavelet="dct")
    assert [row.shape for row in report] == [(8, 4, 3, 3), (40, 96), (0, 7)]
    assert report.kept == -(-report.numel // 5)
    assert len({row.threshold for row in report}) == 1
    assert {row.backend for row in report} == {"eager"}


def test_a_matrix_can_be_pruned_as_much_as_another_report_says() -> None:
    source = wavprune.fast.prune(mlp(), wavelet="haar", sparsity=0.8, targets="*")
    report = wavprune.fast.prune(mlp(), "random", match=source, targets="*")
    assert [row.kept for row in report] == [row.kept for row in source] == [1920, 128]


def test_levels_of_a_matrix_are_those_of_its_shorter_axis() -> None:
    row = wavprune.fast.prune(mlp(), wavelet="haar", targets="0")["0"]
    assert row.level_used == max_level("haar", (64, 150)) == 6
    with pytest.warns(wavprune.LevelCollapsedWarning, match="'db8' is too long for 10x64 kernels"):
        wavprune.fast.prune(mlp(), wavelet="db8", targets="2")


def test_a_matrix_is_too_few_kernels_for_klt() -> None:
    model = mlp()
    before = [bits(parameter) for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"layer '0': 'klt' finds .* a 64x150 matrix is one"):
        wavprune.fast.prune(model, wavelet="klt", targets="*")
    assert [bits(parameter) for parameter in model.parameters()] == before


@pytest.mark.parametrize("backend", ["native", "ptwt"])
def test_backends_that_take_small_kernels_only_say_so(backend: str) -> None:
    if backend in backends.unavailable():
        pytest.skip(backends.unavailable()[backend])
    with pytest.raises(ValueError, match=f"backend '{backend}' cannot do this: .*64x150"):
        wavprune.fast.prune(mlp(), wavelet="haar", mode="zero", targets="0", backend=backend)


def test_a_nan_in_a_matrix_is_named() -> None:
    model = mlp()
    with torch.no_grad():
        model.get_parameter("0.weight")[3, 4] = torch.nan
    with pytest.raises(ValueError, match="layer '0': 1 of 9600 weights are NaN"):
        wavprune.fast.prune(model, wavelet="haar", targets="*")


def test_large_convolution_kernels_run_in_factors() -> None:
    config = PruneConfig(wavelet="db2", mode="reflect", backend="eager")
    before = {"large": normal(3, 2, 40, 31)}
    assert not basis_for(config, before["large"]).is_dense
    weights = {"large": before["large"].clone()}
    report = prune_layers([LayerRef("large", weights["large"])], config)
    assert_pruned(before, outcomes(weights, report), config)
