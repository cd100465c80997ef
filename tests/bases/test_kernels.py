from __future__ import annotations

import numpy as np
import pytest
import pywt
import torch

from wavprune import PruneConfig
from wavprune.bases import Basis, as_kernels, basis_for, kernel_shape, named_basis
from wavprune.errors import WavpruneError


@pytest.mark.parametrize(
    ("shape", "kernel", "axes"),
    [
        ((8, 4, 3, 5), (3, 5), None),
        ((8, 4, 1, 1), (1, 1), None),
        ((8, 4, 64, 1), (64, 1), (64,)),
        ((8, 4, 1, 7), (1, 7), (7,)),
        ((8, 4, 5), (5, 1), (5,)),
        ((8, 4, 1), (1, 1), None),
        ((8, 4, 2, 3, 5), (2, 15), (2, 3, 5)),
        ((8, 4, 1, 3, 5), (3, 5), None),
        ((8, 4, 3, 1, 5), (3, 5), None),
        ((8, 4, 1, 3, 1), (3, 1), (3,)),
        ((8, 4, 1, 1, 1), (1, 1), None),
        ((784, 128), (784, 128), None),
    ],
)
def test_kernels_are_the_last_axes_without_those_of_one_value(
    shape: tuple[int, ...], kernel: tuple[int, int], axes: tuple[int, ...] | None
) -> None:
    assert kernel_shape(shape) == (kernel, axes)
    if len(shape) > 2:
        weight = torch.randn(shape)
        view = as_kernels(weight)
        assert view.shape == (*shape[:2], *kernel)
        assert view.data_ptr() == weight.data_ptr()
        assert torch.equal(view.flatten(), weight.flatten())


def test_planes_of_channels_last_3d_weights_are_views_too() -> None:
    weight = torch.randn(4, 6, 3, 3, 2).to(memory_format=torch.channels_last_3d)
    view = as_kernels(weight)
    assert view.data_ptr() == weight.data_ptr()
    assert torch.equal(view, weight.contiguous().view(4, 6, 3, 6))


def of_shape(*shape: int, **settings: object) -> Basis:
    return basis_for(PruneConfig(**settings), torch.zeros(shape))  # type: ignore[arg-type]


@pytest.mark.parametrize("wavelet", ["haar", "db4", "bior2.2", "rbio3.1", "sym8"])
@pytest.mark.parametrize("mode", ["periodization", "symmetric", "zero", "smooth"])
@pytest.mark.parametrize("shape", [(2, 3, 64, 1), (2, 3, 1, 47), (2, 3, 33), (2, 3, 1, 50, 1)])
def test_one_axis_is_transformed_as_by_wavedec(
    wavelet: str, mode: str, shape: tuple[int, ...]
) -> None:
    length = max(shape)
    basis = of_shape(*shape, wavelet=wavelet, mode=mode)
    level = pywt.dwt_max_level(length, pywt.Wavelet(wavelet).dec_len)
    assert basis.level_used == basis.level_max == level >= 1
    rng = np.random.default_rng(0)
    signal = rng.standard_normal(length)
    coeffs = pywt.wavedec(signal, wavelet, mode=mode, level=level)
    found = (basis.analysis @ signal)[~basis.structural]
    expected = np.concatenate(coeffs)[~basis.structural]
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-9 * np.abs(expected).max())

    packed = rng.standard_normal(basis.grid[0] * basis.grid[1])
    ends = np.cumsum([len(band) for band in coeffs])[:-1]
    whole = pywt.waverec(np.split(packed, ends), wavelet, mode=mode)[:length]
    scale = np.abs(packed).max() * np.linalg.norm(basis.synthesis, axis=1).max()
    np.testing.assert_allclose(basis.synthesis @ packed, whole, rtol=0, atol=1e-9 * scale)


def test_by_its_name_a_basis_of_two_axes_is_still_that_of_wavedec2() -> None:
    assert named_basis("db4", (64, 1)).level_used == 0
    assert named_basis("db4", (64, 1), axes=(64,)).level_used == 3
    assert named_basis("db4", (64, 1)) != named_basis("db4", (64, 1), axes=(64,))


@pytest.mark.parametrize(
    ("wavelet", "shape"),
    [("haar", (4, 4, 6)), ("haar", (3, 3, 3)), ("db2", (8, 7, 9)), ("bior2.2", (6, 12, 10))],
)
def test_a_volume_is_transformed_plane_by_plane_then_along_its_depth(
    wavelet: str, shape: tuple[int, int, int]
) -> None:
    depth, *plane = shape
    basis = of_shape(2, 2, *shape, wavelet=wavelet)
    volume = np.random.default_rng(0).standard_normal(shape)
    taps = pywt.Wavelet(wavelet).dec_len
    levels = pywt.dwt_max_level(min(plane), taps), pywt.dwt_max_level(depth, taps)
    assert basis.level_used == max(levels)
    planes = [
        pywt.coeffs_to_array(pywt.wavedec2(p, wavelet, "periodization", levels[0]))[0].ravel()
        for p in volume
    ]
    coeffs = pywt.wavedec(np.stack(planes), wavelet, "periodization", levels[1], axis=0)
    expected = np.concatenate(coeffs).ravel()
    found = basis.analysis @ volume.ravel()
    np.testing.assert_allclose(found, expected, atol=1e-10 * np.abs(expected).max())
    restored = basis.synthesis @ found
    np.testing.assert_allclose(restored, volume.ravel(), atol=1e-10)


@pytest.mark.parametrize("wavelet", ["uhaar", "dct"])
@pytest.mark.parametrize("shape", [(3, 3, 3), (2, 5, 4)])
def test_orthonormal_bases_are_products_of_three(wavelet: str, shape: tuple[int, int, int]) -> None:
    basis = of_shape(2, 2, *shape, wavelet=wavelet)
    assert basis.orthonormal
    assert not basis.expansive
    matrices = [named_basis(wavelet, (n, 1)).analysis for n in shape]
    expected = np.kron(matrices[0], np.kron(*matrices[1:]))
    np.testing.assert_allclose(basis.analysis, expected, atol=1e-12)


def test_a_volume_without_matrices_says_so() -> None:
    with pytest.raises(WavpruneError, match=r"'dct' of 3x40x40 kernels; allowed: at most 1024"):
        of_shape(1, 1, 3, 40, 40, wavelet="dct")
    assert of_shape(1, 1, 3, 40, 40, wavelet="identity").kernel == (3, 1600)
