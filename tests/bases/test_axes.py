"""Axes of more values than have a matrix."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from typing import Any

import numpy as np
import pytest
import pywt
import torch

from tests.support.cases import any_level, bits, normal
from wavprune import Basis, LayerRef, PruneConfig, WavpruneError, basis_for, prune_layers
from wavprune.bases import family_of, named_basis
from wavprune.bases.axes import LONGEST_DENSE_AXIS, AxisMap
from wavprune.bases.dct import FastCosine, dct_matrix
from wavprune.bases.factors import FactoredTransform
from wavprune.bases.matrices import Matrix
from wavprune.bases.uhaar import Merging, uhaar_matrix
from wavprune.bases.wavelets import wavelet_factors
from wavprune.config import MODES

CPU = torch.device("cpu")
LENGTHS = (LONGEST_DENSE_AXIS + 1, LONGEST_DENSE_AXIS + 2, 1031, 1500)


def transform(
    basis: Basis, dtype: torch.dtype = torch.float64, exact: bool = True
) -> FactoredTransform:
    assert basis.factors is not None
    return FactoredTransform(basis.factors, False, dtype, CPU, exact)


# uhaar and dct.


def assert_multiplies(fast: AxisMap, matrix: Matrix) -> None:
    """Both dimensions, both dtypes, and a strided input."""
    n = matrix.shape[1]
    x = normal(3, n, 5, dtype=torch.float64)
    expected = torch.einsum("mn,bnc->bmc", torch.tensor(matrix), x)
    for dtype, atol in ((torch.float64, 1e-13), (torch.float32, 4e-6)):
        run = fast.bind(dtype, CPU)
        values = x.to(dtype)
        for result in (
            run(values, -2),
            run(values.mT, -1).mT,
            run(values.mT.contiguous(), -1).mT,
        ):
            assert result.dtype == dtype
            torch.testing.assert_close(result.double(), expected, rtol=0, atol=atol)
        torch.testing.assert_close(values, x.to(dtype), rtol=0, atol=0)


@pytest.mark.parametrize("n", [*LENGTHS, 2, 3, 8])
def test_the_fast_cosine_transform_is_the_product_with_the_matrix(n: int) -> None:
    # Of angles below one turn, whose cosines are more exact than those of ``dct_matrix``.
    frequency, position = np.mgrid[:n, :n]
    matrix = np.sqrt(2 / n) * np.cos(np.pi / (2 * n) * (frequency * (2 * position + 1) % (4 * n)))
    matrix[0] = np.sqrt(1 / n)
    np.testing.assert_allclose(matrix, dct_matrix(n), rtol=0, atol=1e-13)
    assert_multiplies(FastCosine(n), matrix)
    assert_multiplies(FastCosine(n, inverse=True), matrix.T)


@pytest.mark.parametrize("n", [*LENGTHS, 1, 2, 3, 7, 8])
@pytest.mark.parametrize("level", [0, 1, 2, 99])
def test_merging_is_the_product_with_the_matrix(n: int, level: int) -> None:
    matrix = uhaar_matrix(n, level)
    merging = Merging(n, level)
    assert_multiplies(merging, matrix)
    assert_multiplies(Merging(n, level, inverse=True), matrix.T)
    assert merging.is_identity == (level == 0 or n == 1)
    np.testing.assert_allclose(merging.reach(), np.abs(matrix).max(axis=1), rtol=1e-14)


@pytest.mark.parametrize("name", ["uhaar", "dct"])
@pytest.mark.parametrize("kernel", [(1100, 3), (4, 2049), (1, 1025), (1040, 1027)])
def test_long_bases_without_a_boundary_are_orthonormal(name: str, kernel: tuple[int, int]) -> None:
    basis = named_basis(name, kernel)
    assert (basis.orthonormal, basis.grid, basis.expansive) == (True, kernel, False)
    assert not basis.structural.any()
    kernels = normal(2, *kernel, dtype=torch.float64)
    run = transform(basis)
    coefficients = run.analyse(kernels)
    norms = [torch.linalg.vector_norm(x.flatten(1), dim=1) for x in (kernels, coefficients)]
    torch.testing.assert_close(norms[0], norms[1], rtol=1e-13, atol=0)
    restored = run.synthesise(coefficients).view(kernels.shape)
    torch.testing.assert_close(restored, kernels, rtol=0, atol=1e-13)


def test_bands_of_a_long_dct_are_named_when_asked_for() -> None:
    bands = named_basis("dct", (50257, 4096)).bands
    assert len(bands) == 50257 * 4096
    assert bands["f50256,f7"] == (slice(50256, 50257), slice(7, 8))
    assert next(iter(bands)) == "f0,f0"
    for name in ("f50257,f0", "f0", "f-1,f0", "x"):
        assert name not in bands


# PyWavelets' wavelets.


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    ("wavelet", "cases"),
    [
        ("haar", [((1025, 6), 1), ((7, 1026), 3), ((1, 1500), 12), ((1030, 1027), 10)]),
        ("db4", [((1025, 1), 1), ((6, 1026), 2), ((1501, 5), 8), ((1027, 1030), 7)]),
        ("bior2.2", [((1026, 3), 2), ((2, 1027), 5)]),
        ("rbio3.1", [((1025, 3), 3)]),
        ("sym8", [((2, 1029), 3), ((1600, 3), 6)]),
        ("dmey", [((3, 1025), 1), ((1100, 2), 3)]),
        ("db38", [((2, 1027), 2)]),
    ],
)
def test_long_axes_are_transformed_as_by_pywavelets(
    wavelet: str, mode: str, cases: list[tuple[tuple[int, int], int]]
) -> None:
    for kernel, level in cases:
        if min(kernel) == 1 and mode in ("reflect", "antireflect"):
            continue
        basis = named_basis(wavelet, kernel, mode, level, True)
        kernels = normal(2, *kernel, dtype=torch.float64)
        with any_level():
            coeffs = pywt.wavedec2(kernels[1].numpy(), wavelet, mode, level)
        expected, slices = pywt.coeffs_to_array(coeffs)
        assert expected.shape == basis.grid
        # PyWavelets leaves a trace of rounding at the structural zeros.
        run = transform(basis, exact=False)
        result = run.analyse(kernels)[1].view(basis.grid).numpy()
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12 * np.abs(expected).max())
        single = transform(basis, torch.float32, exact=False).analyse(kernels.float())[1]
        # "smooth" extrapolates, and large values cancel.
        atol = (1e-3 if mode == "smooth" else 2e-6) * np.abs(expected).max()
        np.testing.assert_allclose(single.view(basis.grid), expected, rtol=0, atol=atol)

        packed = normal(2, *basis.grid, dtype=torch.float64, seed=1)
        listed = pywt.array_to_coeffs(packed[1].numpy(), slices, output_format="wavedec2")
        whole = pywt.waverec2(listed, wavelet, mode)[: kernel[0], : kernel[1]]
        restored = run.synthesise(packed.flatten(1))[1].view(kernel).numpy()
        np.testing.assert_allclose(restored, whole, rtol=0, atol=1e-12 * np.abs(whole).max())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", ["haar", "db2", "db4", "bior4.4", "rbio3.1", "coif1"])
def test_what_is_known_of_a_long_axis_is_what_its_matrices_say(
    monkeypatch: pytest.MonkeyPatch, wavelet: str, mode: str
) -> None:
    for n, level in ((301, 1), (302, 2), (431, 3), (432, 6)):
        kernel = (n, 70)
        with_matrices = wavelet_factors(wavelet, kernel, mode, level)
        with monkeypatch.context() as context:
            context.setattr("wavprune.bases.wavelet_axes.LONGEST_DENSE_AXIS", 99)
            factors = wavelet_factors(wavelet, kernel, mode, level)
        assert factors.grid == with_matrices.grid
        assert factors.orthonormal == with_matrices.orthonormal
        np.testing.assert_array_equal(factors.reachable, with_matrices.reachable)
        norms = with_matrices.norms()
        np.testing.assert_allclose(factors.norms(), norms, rtol=0, atol=1e-12 * norms.max())
        for rows, expected in zip(
            (axes[0] for axes in factors.levels),
            (axes[0] for axes in with_matrices.levels),
            strict=True,
        ):
            np.testing.assert_allclose(
                rows.reach, expected.reach, rtol=0, atol=1e-12 * expected.reach.max()
            )
            for part in ("analysis", "synthesis"):
                matrix = getattr(rows, part).matrix()
                np.testing.assert_allclose(matrix, getattr(expected, part).matrix(), atol=1e-14)


@pytest.mark.parametrize("wavelet", ["haar", "db4", "bior2.2", "sym8", "dmey"])
@pytest.mark.parametrize("mode", ["periodization", "symmetric", "zero"])
def test_a_long_axis_is_orthonormal_where_one_at_the_limit_is(wavelet: str, mode: str) -> None:
    for level in (1, 2):
        at_limit, odd, longer = (
            named_basis(wavelet, (2, n), mode, level, True).orthonormal
            for n in (LONGEST_DENSE_AXIS, LONGEST_DENSE_AXIS + 1, LONGEST_DENSE_AXIS + 4)
        )
        assert at_limit == longer
        assert not odd or wavelet == "haar"


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("wavelet", ["haar", "db4", "bior2.2"])
def test_the_reference_knows_the_same_of_long_kernels(wavelet: str, mode: str) -> None:
    for kernel, level in (((1025, 9), 2), ((40, 1502), 5)):
        basis = named_basis(wavelet, kernel, mode, level, True)
        assert basis.factors is not None
        run = family_of(wavelet).transform(basis, np.zeros((1, *kernel)))
        np.testing.assert_array_equal(run.nonzero(), basis.factors.reachable)
        norms = basis.factors.norms()
        np.testing.assert_allclose(run.norms(), norms, rtol=0, atol=1e-9 * norms.max())


def test_modes_that_cannot_extend_a_long_kernel_say_so() -> None:
    message = "PyWavelets cannot transform 2000x1 kernels by 'haar' in mode 'reflect' to level 1: "
    with pytest.raises(WavpruneError, match=re.escape(message)):
        named_basis("haar", (2000, 1), "reflect", 1, True)
    with pytest.raises(WavpruneError, match="nothing left to transform after 12 levels"):
        named_basis("haar", (2000, 1), "zero", 99, True)
    with pytest.warns(UserWarning, match="is too long for 2x1000 kernels"):
        prune_layers([LayerRef("a", normal(1, 1, 2, 1000))], PruneConfig(wavelet="db4"))


# Pruning.

PRUNED: list[dict[str, Any]] = [
    {"wavelet": "uhaar"},
    {"wavelet": "dct"},
    {"wavelet": "haar", "level": 3, "force_level": True},
    {"wavelet": "db2", "mode": "symmetric", "level": 2, "force_level": True},
    {"wavelet": "bior2.2", "mode": "zero", "level": 1, "force_level": True},
]


@pytest.mark.parametrize("settings", PRUNED, ids=str)
@pytest.mark.parametrize("amount", [{"sparsity": 0.7}, {"percentile": 60.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_backends_prune_long_kernels_alike(
    settings: dict[str, Any], amount: dict[str, Any], dtype: torch.dtype
) -> None:
    for shape in ((1501, 6), (2, 1, 3, 1026)):
        weights, rows = [], []
        for backend in ("eager", "reference"):
            weight = normal(*shape, dtype=dtype)
            config = PruneConfig(backend=backend, **settings, **amount)
            with any_level():
                rows.append(prune_layers([LayerRef("a", weight)], config)["a"])
            weights.append(weight)
        eager, reference = rows
        atol = 1e-5 if dtype == torch.float32 else 1e-12
        assert eager.threshold == pytest.approx(reference.threshold, rel=atol)
        # Coefficients within rounding of the threshold may differ.
        assert abs(eager.kept - reference.kept) <= (2 if dtype == torch.float32 else 0)
        error = torch.linalg.vector_norm(weights[0] - weights[1])
        moved = 2 * eager.threshold * abs(eager.kept - reference.kept)
        assert error <= atol * torch.linalg.vector_norm(weights[1]) + moved
        assert eager.coefficients == reference.coefficients


@pytest.mark.parametrize("wavelet", ["uhaar", "dct", "db4"])
def test_long_kernels_do_not_depend_on_their_neighbours(wavelet: str) -> None:
    # The length at which MKL's FFT takes one signal otherwise than several.
    basis = named_basis(wavelet, (1, 100_000), "periodization", 3, True)
    run = transform(basis, torch.float32)
    kernels = normal(3, 1, 100_000)
    together = run.analyse(kernels)
    restored = run.synthesise(together)
    for i in range(3):
        alone = run.analyse(kernels[i : i + 1])
        assert bits(alone) == bits(together[i : i + 1])
        assert bits(run.synthesise(alone)) == bits(restored[i : i + 1])


def test_the_layout_of_a_long_matrix_does_not_show() -> None:
    for wavelet in ("uhaar", "dct", "db4"):
        config = PruneConfig(wavelet=wavelet, level=1, force_level=True)
        plain = normal(1100, 24)
        transposed = plain.t().contiguous().t()
        for weight in (plain, transposed):
            prune_layers([LayerRef("a", weight)], config)
        assert bits(plain) == bits(transposed)


# Time and memory.

SCRIPT = """
import resource, warnings
import torch, wavprune
from wavprune import LayerRef, PruneConfig, prune_layers
from wavprune.config import MODES

warnings.simplefilter("ignore")
torch.set_num_threads(1)
prune_layers([LayerRef("warm", torch.ones(2000, 2))], PruneConfig(backend=BACKEND, wavelet="dct"))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for shape in ((50257, 8), (1, 1, 2, 50000)):
    for name in ("uhaar", "dct", "haar", "db4", "sym8"):
        for mode in MODES if name == "db4" else ("periodization",):
            for settings in ({}, {"level": 2, "force_level": True}):
                if len(shape) == 4 and "reflect" in mode and settings:
                    continue
                config = PruneConfig(backend=BACKEND, wavelet=name, mode=mode, **settings)
                prune_layers([LayerRef("a", torch.randn(shape))], config)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.parametrize("backend", ["eager", "reference"])
def test_long_axes_take_little_memory(backend: str) -> None:
    command = [sys.executable, "-c", SCRIPT.replace("BACKEND", repr(backend))]
    start = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 150, "MiB"
    assert time.monotonic() - start < 60


def test_a_long_basis_is_small() -> None:
    for name in ("uhaar", "dct", "db4"):
        basis = named_basis(name, (50257, 8), "symmetric", 3, True)
        assert basis.factors is not None
        maps = [
            axis_map
            for axes in basis.factors.levels
            for axis in axes
            for axis_map in (axis.analysis, axis.synthesis)
        ]
        assert sum(axis_map.nbytes for axis_map in maps) < 4 * 50257 * 8


def test_klt_of_large_kernels_is_refused_before_its_matrix_is_made() -> None:
    weight = torch.ones(2, 1, 1, 100_000)
    message = "'klt' of 1x100000 kernels needs a matrix of 100000 x 100000; allowed: .* 4096 values"
    with pytest.raises(WavpruneError, match=message):
        basis_for(PruneConfig(wavelet="klt"), weight)
    with pytest.raises(WavpruneError, match=f"layer 'conv': {message}"):
        prune_layers([LayerRef("conv", weight)], PruneConfig(wavelet="klt"))
    assert (weight == 1).all()
