from __future__ import annotations

import itertools
import warnings
import zlib

import numpy as np
import pytest
import pywt
import torch

from tests.support.cases import BASES, any_level, normal
from wavprune import Basis, PruneConfig, basis_for
from wavprune.bases import max_level
from wavprune.config import MODES, WAVELETS

SIZES = [(n, n) for n in range(2, 10)] + [(2, 7), (9, 4), (3, 5), (6, 9)]
# Longer filters have no level on kernels this small: only those with one are transformed.
DEEP = [name for name in WAVELETS if max_level(name, (9, 9)) > 0]


def basis(kernel: tuple[int, int], **settings: object) -> Basis:
    return basis_for(PruneConfig(**settings), torch.zeros(1, 1, *kernel))  # type: ignore[arg-type]


def assert_pywavelets(made: Basis) -> None:
    """The two matrices do what wavedec2, waverec2 and a crop do."""
    kh, kw = made.kernel
    K = kh * kw
    rng = np.random.default_rng(zlib.crc32(f"{made.name} {made.mode} {made.kernel}".encode()))
    kernels = np.concatenate([np.eye(K), rng.standard_normal((1, K))]).reshape(-1, kh, kw)
    with any_level():
        coeffs = pywt.wavedec2(kernels, made.name, made.mode, made.level_used)
        _, slices = pywt.coeffs_to_array(
            pywt.wavedec2(kernels[-1], made.name, made.mode, made.level_used)
        )
    expected = pywt.coeffs_to_array(coeffs, axes=(-2, -1))[0][-1]
    assert expected.shape == made.grid
    found = (made.analysis @ kernels[-1].ravel()).reshape(made.grid)
    assert np.abs(found - expected).max() <= 1e-12 * np.abs(expected).max()

    packed = rng.standard_normal(made.grid)
    listed = pywt.array_to_coeffs(packed, slices, output_format="wavedec2")
    expected = pywt.waverec2(listed, made.name, made.mode)[:kh, :kw]
    found = (made.synthesis @ packed.ravel()).reshape(kh, kw)
    assert np.abs(found - expected).max() <= 1e-12 * np.abs(packed).max()

    # The identity wherever PyWavelets brings a kernel back; it does not with dmey.
    restored = pywt.waverec2(coeffs, made.name, made.mode)[:K, :kh, :kw].reshape(K, K)
    assert np.abs((made.synthesis @ made.analysis).T - restored).max() <= 1e-12


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_levels_are_those_of_pywavelets(wavelet: str) -> None:
    taps = pywt.Wavelet(wavelet).dec_len
    for kernel, level in itertools.product(SIZES, (None, 1, 3)):
        made = basis(kernel, wavelet=wavelet, level=level)
        deepest = pywt.dwt_max_level(min(kernel), taps)
        assert made.level_max == deepest
        assert made.level_used == (deepest if level is None else min(level, deepest))
        assert made.level_requested == level
        assert made.collapsed == (deepest == 0)


@pytest.mark.parametrize("wavelet", DEEP)
@pytest.mark.parametrize("mode", MODES)
def test_every_level_that_exists_is_pywavelets(wavelet: str, mode: str) -> None:
    for kernel in SIZES:
        for level in range(1, max_level(wavelet, kernel) + 1):
            made = basis(kernel, wavelet=wavelet, mode=mode, level=level)
            assert made.level_used == level
            assert_pywavelets(made)


@pytest.mark.parametrize("wavelet", WAVELETS)
def test_one_forced_level_is_pywavelets(wavelet: str) -> None:
    # The matrices of long filters take seconds: each of those gets two of the modes.
    taps = pywt.Wavelet(wavelet).dec_len
    other = MODES[WAVELETS.index(wavelet) % len(MODES)]
    for mode in ("periodization", other) if taps > 40 else MODES:
        for kernel in ((4, 3), (2, 5), (9, 9)) if taps <= 12 else ((4, 3),):
            made = basis(kernel, wavelet=wavelet, mode=mode, level=1, force_level=True)
            assert made.level_used == 1
            assert_pywavelets(made)


@pytest.mark.parametrize("wavelet", ["haar", "db3", "sym4", "coif1", "bior2.2", "rbio3.1"])
@pytest.mark.parametrize("mode", MODES)
def test_more_forced_levels_are_pywavelets(wavelet: str, mode: str) -> None:
    for kernel, level in (((3, 3), 2), ((4, 7), 2), ((5, 5), 3)):
        made = basis(kernel, wavelet=wavelet, mode=mode, level=level, force_level=True)
        assert made.level_used == level
        assert_pywavelets(made)


@pytest.mark.parametrize("wavelet", ["db4", "sym3", "coif1", "bior3.3"])
@pytest.mark.parametrize("mode", ["periodization", "reflect"])
def test_large_kernels_are_pywavelets(wavelet: str, mode: str) -> None:
    made = basis((17, 18), wavelet=wavelet, mode=mode)
    assert made.level_used == 1
    assert_pywavelets(made)


def test_haar_on_three_points_has_seven_structural_zeros_in_sixteen() -> None:
    made = basis((3, 3), wavelet="haar")
    assert (len(made.structural), made.structural.sum(), made.coefficients) == (16, 7, 9)
    kernels = np.random.default_rng(0).standard_normal((100, 9))
    assert np.abs(kernels @ made.analysis.T)[:, made.structural].max() < 1e-12
    assert not made.expansive


def test_what_is_orthonormal_and_what_is_expansive() -> None:
    for name in ("uhaar", "dct", "identity"):
        for kernel in ((1, 7), (3, 3), (5, 4), (9, 9)):
            made = basis(kernel, wavelet=name)
            assert made.orthonormal
            assert not made.expansive
    assert basis((4, 4), wavelet="haar").orthonormal
    assert not basis((3, 3), wavelet="haar").orthonormal
    assert not basis((4, 4), wavelet="bior2.2", level=1, force_level=True).orthonormal
    padded = basis((3, 3), wavelet="db2", mode="symmetric", level=1, force_level=True)
    assert padded.expansive
    assert not padded.orthonormal


@pytest.mark.parametrize("settings", BASES.values(), ids=BASES)
def test_a_coefficients_importance_is_what_removing_it_costs(settings: dict[str, object]) -> None:
    weight = normal(20, 1, 5, 4, dtype=torch.float64)
    operator = basis_for(PruneConfig(**settings), weight).importance_operator  # type: ignore[arg-type]
    kernels = weight.flatten(1).numpy()
    coefficients = kernels @ operator.analysis.T
    restored = coefficients @ operator.synthesis.T
    np.testing.assert_allclose(restored, kernels, atol=1e-9)
    for m in range(len(operator.analysis)):
        without = coefficients.copy()
        without[:, m] = 0
        cost = np.linalg.norm(restored - without @ operator.synthesis.T, axis=1)
        np.testing.assert_allclose(np.abs(coefficients[:, m]), cost, atol=1e-9)


@pytest.mark.parametrize("settings", BASES.values(), ids=BASES)
@pytest.mark.parametrize("kernel", [(1, 7), (3, 3), (8, 5)])
def test_the_bands_cover_the_grid_once(
    settings: dict[str, object], kernel: tuple[int, int]
) -> None:
    weight = normal(4, 2, *kernel)
    made = basis_for(PruneConfig(**settings), weight)  # type: ignore[arg-type]
    seen = np.zeros(made.grid, dtype=int)
    for place in made.bands.values():
        seen[place] += 1
    assert (seen <= 1).all()
    uncovered = made.structural.reshape(made.grid)[seen == 0]
    assert uncovered.all()


@pytest.mark.parametrize("wavelet", ["haar", "bior4.4", "uhaar", "dct", "klt", "identity"])
def test_a_1x1_kernel_has_the_identity_and_does_not_count_as_collapsed(wavelet: str) -> None:
    made = basis_for(PruneConfig(wavelet=wavelet), torch.ones(4, 4, 1, 1))
    assert (made.name, made.level_used, made.collapsed) == ("identity", 0, False)
    assert made.analysis.tolist() == [[1.0]]


def test_levels_of_the_librarys_own_bases() -> None:
    assert basis((3, 3), wavelet="uhaar").level_used == 2
    assert basis((2, 9), wavelet="uhaar").level_used == 4
    assert basis((2, 9), wavelet="uhaar", level=2).level_used == 2
    assert basis((2, 9), wavelet="uhaar", level=9).level_used == 4
    assert basis((5, 5), wavelet="dct", level=3).level_used == 1
    assert basis((5, 5), wavelet="klt").level_used == 1
    assert basis((5, 5), wavelet="identity").level_used == 0


def test_uhaar_stops_on_the_shorter_axis() -> None:
    made = basis((2, 8), wavelet="uhaar", level=2)
    constant = made.analysis @ np.ones(16)
    assert np.flatnonzero(np.abs(constant) > 1e-12).tolist() == [0, 1]


def test_one_basis_serves_all_layers_of_a_kernel_size() -> None:
    config = PruneConfig(wavelet="db2")
    assert basis_for(config, torch.zeros(8, 4, 7, 7)) is basis_for(config, torch.zeros(2, 1, 7, 7))
    assert basis_for(config, torch.zeros(8, 4, 7, 6)) is not basis((7, 7), wavelet="db2")


def test_only_klt_looks_at_the_weight() -> None:
    config = PruneConfig(wavelet="klt")
    first, second = normal(20, 2, 3, 3, seed=1), normal(20, 2, 3, 3, seed=2)
    assert (
        np.abs(basis_for(config, first).analysis - basis_for(config, second).analysis).max() > 0.1
    )


def test_building_a_basis_warns_of_nothing_and_remembers_what_pywavelets_said() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        forced = basis((3, 3), wavelet="haar", level=3, force_level=True)
        quiet = basis((3, 3), wavelet="haar", level=3)
    assert not caught
    assert forced.too_deep is not None
    assert "Level value of 3 is too high" in forced.too_deep
    assert (forced.level_used, quiet.level_used, quiet.too_deep) == (3, 1, None)


def test_which_wavelets_bring_a_kernel_back() -> None:
    def loss(wavelet: str) -> float:
        made = basis((5, 4), wavelet=wavelet, mode="symmetric", level=1, force_level=True)
        return float(np.abs(made.synthesis @ made.analysis - np.eye(20)).max())

    assert max(loss(name) for name in ("haar", "db2", "bior2.2", "rbio3.1", "coif1")) < 1e-11
    assert loss("dmey") > 1e-9
