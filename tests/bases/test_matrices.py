from __future__ import annotations

import math

import numpy as np
import pytest
import pywt
import torch
from hypothesis import given
from hypothesis import strategies as st

from tests.support.cases import normal, quick
from wavprune.bases import klt
from wavprune.bases.dct import dct_matrix
from wavprune.bases.klt import gram_matrices, klt_matrices, klt_matrix
from wavprune.bases.matrices import Matrix
from wavprune.bases.uhaar import uhaar_matrix, uhaar_spans


def assert_orthonormal(matrix: Matrix) -> None:
    assert np.abs(matrix @ matrix.T - np.eye(len(matrix))).max() < 1e-13


def energies(kernels: torch.Tensor, matrix: Matrix) -> Matrix:
    """How much of the kernels each row of the matrix carries."""
    flat = kernels.reshape(-1, matrix.shape[1]).numpy()
    return np.asarray(np.square(flat @ matrix.T).sum(0))


@pytest.mark.parametrize("length", range(1, 65))
def test_uhaar_and_dct_are_orthonormal(length: int) -> None:
    assert_orthonormal(dct_matrix(length))
    for level in (None, 1, 2, 3, 9):
        assert_orthonormal(uhaar_matrix(length, level))


def test_uhaar_of_three_points() -> None:
    expected = [[1, 1, 1], [1, 1, -2], [1, -1, 0]]
    lengths = np.sqrt([[3], [6], [2]])
    np.testing.assert_allclose(uhaar_matrix(3), expected / lengths, atol=1e-15)


def test_uhaar_of_five_points_and_one_level_moves_the_odd_point_up() -> None:
    half = np.sqrt(0.5)
    expected = [
        [half, half, 0, 0, 0],
        [0, 0, half, half, 0],
        [0, 0, 0, 0, 1],
        [half, -half, 0, 0, 0],
        [0, 0, half, -half, 0],
    ]
    np.testing.assert_allclose(uhaar_matrix(5, 1), expected, atol=1e-15)


@pytest.mark.parametrize("length", [2, 4, 8, 16, 64])
@pytest.mark.parametrize("level", [1, 2, None])
def test_uhaar_of_a_power_of_two_is_haar(length: int, level: int | None) -> None:
    rounds = min(level or 9, length.bit_length() - 1)
    impulses = np.eye(length)
    coefficients = pywt.wavedec(impulses, "haar", mode="periodization", level=rounds, axis=-1)
    np.testing.assert_allclose(
        uhaar_matrix(length, level), np.concatenate(coefficients, axis=-1).T, atol=1e-14
    )


@pytest.mark.parametrize("length", range(1, 20))
@pytest.mark.parametrize("level", [0, 1, 2, 9])
def test_uhaar_spans_tell_the_scale_of_each_row(length: int, level: int) -> None:
    matrix = uhaar_matrix(length, level)
    spans = uhaar_spans(length, level)
    rows = [row for span in spans.values() for row in range(length)[span]]
    assert rows == list(range(length))
    sums = matrix.sum(axis=1)
    assert (sums[spans.pop("a")] > 0.9).all()
    for name, span in spans.items():
        np.testing.assert_allclose(sums[span], 0, atol=1e-14)
        support = np.count_nonzero(matrix[span], axis=1)
        assert ((support > 2 ** (int(name[1:]) - 1)) & (support <= 2 ** int(name[1:]))).all()


@pytest.mark.parametrize("length", [1, 2, 5, 8])
def test_dct_is_a_table_of_cosines(length: int) -> None:
    matrix = dct_matrix(length)
    for k in range(length):
        wave = np.cos(np.pi * (np.arange(length) + 0.5) * k / length)
        np.testing.assert_allclose(matrix[k], wave / np.linalg.norm(wave), atol=1e-14)


KERNELS = {
    "many": normal(200, 9, dtype=torch.float64),
    "as many as values": normal(9, 9, dtype=torch.float64),
    "fewer": normal(4, 25, dtype=torch.float64),
    "one": normal(1, 49, dtype=torch.float64),
    "one value": normal(7, 1, dtype=torch.float64),
    "single": normal(1, 1, dtype=torch.float64),
    "rank 2": normal(40, 2, dtype=torch.float64) @ normal(2, 9, dtype=torch.float64, seed=1),
    "constant": torch.full((6, 9), 0.3, dtype=torch.float64),
    "zero": torch.zeros(6, 9, dtype=torch.float64),
    "float32": normal(50, 25),
    "bfloat16": normal(50, 9, dtype=torch.bfloat16),
    "weight": normal(8, 4, 3, 5, dtype=torch.float64),
}


@pytest.mark.parametrize("kernels", KERNELS.values(), ids=KERNELS)
def test_klt_is_orthonormal_and_sorted_by_energy(kernels: torch.Tensor) -> None:
    matrix = klt_matrix(kernels)
    assert_orthonormal(matrix)
    assert matrix.shape == (kernels[0].numel() if kernels.ndim == 2 else 15,) * 2
    found = energies(kernels.to(torch.float64), matrix)
    assert (np.diff(found) <= 1e-12 * (found[0] + 1)).all()


@pytest.mark.parametrize("other", [dct_matrix(9), np.eye(9), uhaar_matrix(9)])
@pytest.mark.parametrize("first", range(1, 9))
def test_no_basis_has_more_energy_in_its_first_rows_than_klt(first: int, other: Matrix) -> None:
    kernels = normal(40, 9, dtype=torch.float64)
    best = energies(kernels, klt_matrix(kernels))[:first].sum()
    assert best > np.sort(energies(kernels, other))[::-1][:first].sum()


@pytest.mark.parametrize("name", ["many", "as many as values", "weight", "float32"])
def test_klt_is_the_same_for_the_same_kernels_in_any_order_and_sign(name: str) -> None:
    kernels = KERNELS[name]
    expected = klt_matrix(kernels)
    np.testing.assert_allclose(klt_matrix(-kernels), expected, atol=1e-10)
    np.testing.assert_allclose(klt_matrix(kernels.flip(0)), expected, atol=1e-10)
    (alone,) = klt_matrices([kernels])
    assert alone.tobytes() == expected.tobytes()


def singular_vectors(kernels: torch.Tensor) -> Matrix:
    """What the principal components are, by the SVD of the kernels themselves."""
    flat = kernels.to(torch.float64).reshape(-1, kernels.shape[-1] * kernels.shape[-2]).numpy()
    return np.asarray(np.linalg.svd(flat, full_matrices=True)[2])


def half_pruned(kernels: torch.Tensor, matrix: Matrix, sparsity: float) -> tuple[int, float]:
    """How many coefficients are kept, and the relative error."""
    dtype = np.float64 if kernels.dtype == torch.float64 else np.float32
    flat = kernels.to(torch.float64).reshape(-1, matrix.shape[1]).numpy()
    # Without what float64 cannot square.
    flat = flat / np.abs(flat).max()
    coefficients = flat.astype(dtype) @ matrix.T.astype(dtype)
    sizes = np.abs(coefficients)
    keep = math.ceil(round((1 - sparsity) * sizes.size, 6))
    kept = (sizes >= np.sort(sizes, axis=None)[-keep]) & (sizes > 0)
    pruned = np.where(kept, coefficients, 0) @ matrix.astype(dtype)
    return int(kept.sum()), float(np.linalg.norm(flat - pruned) / np.linalg.norm(flat))


def powers(*exponents: float) -> torch.Tensor:
    return torch.diag(10.0 ** torch.tensor(exponents, dtype=torch.float64))


HARD = {
    "random": normal(64, 64, 3, 3),
    "smooth": normal(64, 32, 5, 5).cumsum(-1).cumsum(-2),
    "half": normal(64, 9, 3, 3, dtype=torch.bfloat16),
    "float64": normal(30, 30, 3, 3, dtype=torch.float64),
    "one kernel": normal(1, 1, 3, 3),
    "three kernels": normal(3, 1, 5, 5),
    "two values that are one": normal(64, 32, 3, 3)[..., [0, 1, 1]],
    "values that are 0": normal(64, 32, 3, 3) * torch.tensor([0.0, 1.0, 1.0]),
    "rank 2": (normal(300, 2, dtype=torch.float64) @ normal(2, 9, dtype=torch.float64))
    .float()
    .view(100, 3, 3, 3),
    "scaled": (normal(300, 9, dtype=torch.float64) @ powers(*range(0, -9, -1)))
    .float()
    .view(100, 3, 3, 3),
    "scaled in float64": (normal(300, 9, dtype=torch.float64) @ powers(*range(0, -18, -2))).view(
        100, 3, 3, 3
    ),
    "one value of all sizes": normal(300, 9, dtype=torch.float64).view(100, 3, 3, 3) ** 9,
    "huge": 1e200 * normal(8, 8, 3, 3, dtype=torch.float64),
    "tiny": 1e-200 * normal(8, 8, 3, 3, dtype=torch.float64),
    "denormal": 1e-40 * normal(8, 8, 3, 3),
}


@pytest.mark.parametrize("kernels", HARD.values(), ids=HARD)
@pytest.mark.parametrize("sparsity", [0.1, 0.5, 0.9, 0.99])
def test_klt_prunes_as_the_singular_vectors_do(kernels: torch.Tensor, sparsity: float) -> None:
    matrix = klt_matrix(kernels)
    assert_orthonormal(matrix)
    kept, error = half_pruned(kernels, matrix, sparsity)
    expected, expected_error = half_pruned(kernels, singular_vectors(kernels), sparsity)
    assert kept == expected
    assert error == pytest.approx(expected_error, abs=1e-6)


@quick
@given(
    kernels=st.integers(1, 60),
    kernel=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    rank=st.integers(1, 25),
    spread=st.floats(0, 6),
    seed=st.integers(0, 99),
    dtype=st.sampled_from([torch.float32, torch.float64]),
)
def test_klt_keeps_the_most_energy_of_any_kernels(
    kernels: int, kernel: tuple[int, int], rank: int, spread: float, seed: int, dtype: torch.dtype
) -> None:
    K = kernel[0] * kernel[1]
    left = normal(kernels, min(rank, K), dtype=torch.float64, seed=seed)
    right = normal(min(rank, K), K, dtype=torch.float64, seed=seed + 1)
    scales = torch.logspace(0, -spread, min(rank, K), dtype=torch.float64)
    weight = ((left * scales) @ right).to(dtype).view(kernels, 1, *kernel)
    matrix = klt_matrix(weight)
    assert_orthonormal(matrix)
    values = np.linalg.svd(weight.double().reshape(-1, K).numpy(), compute_uv=False)
    found = energies(weight.to(torch.float64), matrix)
    best = np.zeros(K)
    best[: len(values)] = values**2
    np.testing.assert_allclose(found.cumsum(), best.cumsum(), rtol=1e-10)


def test_klt_of_many_layers_is_that_of_each() -> None:
    layers = list(HARD.values())
    for together, layer in zip(klt_matrices(layers), layers, strict=True):
        assert together.tobytes() == klt_matrix(layer).tobytes()
    assert klt_matrices([]) == []


def test_klt_without_the_extension(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = [layer for name, layer in HARD.items() if name != "huge"]
    compiled = gram_matrices(layers)
    monkeypatch.setattr(klt, "has_extension", lambda: False)
    monkeypatch.setattr(klt, "VALUES_AT_ONCE", 1000)
    for found, expected in zip(gram_matrices(layers), compiled, strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-11, atol=1e-11 * np.trace(expected))
    assert_orthonormal(klt_matrix(HARD["huge"]))


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_klt_takes_finite_values_only(bad: float) -> None:
    kernels = normal(5, 5, 3, 3)
    kernels[2, 2, 2, 2] = bad
    with pytest.raises(ValueError, match="finite"):
        klt_matrices([normal(5, 5, 3, 3), kernels])


def test_klt_points_each_vectors_largest_entry_up() -> None:
    matrix = klt_matrix(KERNELS["many"])
    peaks = np.abs(matrix).argmax(axis=1)
    assert (matrix[np.arange(9), peaks] > 0).all()


def test_matrices_cannot_be_changed() -> None:
    for matrix in (uhaar_matrix(4), dct_matrix(4), klt_matrix(KERNELS["many"])):
        with pytest.raises(ValueError, match="read-only"):
            matrix[0, 0] = 2
