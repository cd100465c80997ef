from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch

from tests.support.cases import normal
from wavprune.bases.dct import dct_matrix
from wavprune.bases.klt import klt_matrix
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
    np.testing.assert_allclose(klt_matrix(kernels, rows_at_once=5), expected, atol=1e-10)


def test_klt_points_each_vectors_largest_entry_up() -> None:
    matrix = klt_matrix(KERNELS["many"])
    peaks = np.abs(matrix).argmax(axis=1)
    assert (matrix[np.arange(9), peaks] > 0).all()


def test_matrices_cannot_be_changed() -> None:
    for matrix in (uhaar_matrix(4), dct_matrix(4), klt_matrix(KERNELS["many"])):
        with pytest.raises(ValueError, match="read-only"):
            matrix[0, 0] = 2
