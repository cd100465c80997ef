from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import pywt
import torch

import wavprune
from tests.support.cases import any_level, bits, model_of, normal, prune_weight, weight_of


def by_hand(
    weight: torch.Tensor, wavelet: str, mode: str, level: int, percentile: float
) -> tuple[torch.Tensor, float, int]:
    """Prune at a percentile with PyWavelets, kernel by kernel."""
    kernels = weight.flatten(0, 1).numpy()
    with any_level():
        packed = [
            pywt.coeffs_to_array(pywt.wavedec2(kernel, wavelet, mode, level)) for kernel in kernels
        ]
    threshold = np.percentile(np.abs([array for array, _ in packed]), percentile)
    restored = []
    kept = 0
    for (array, slices), kernel in zip(packed, kernels, strict=True):
        mask = np.abs(array) >= threshold
        kept += int(np.count_nonzero(mask & (array != 0)))
        coeffs = pywt.array_to_coeffs(array * mask, slices, output_format="wavedec2")
        rows, columns = kernel.shape
        restored.append(pywt.waverec2(coeffs, wavelet, mode)[:rows, :columns])
    return torch.from_numpy(np.stack(restored)).view(weight.shape), float(threshold), kept


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("percentile", [30.0, 50.0, 93.7])
@pytest.mark.parametrize(
    ("wavelet", "mode", "level"),
    [
        ("haar", "periodization", 1),
        ("haar", "symmetric", 2),
        ("db2", "zero", 1),
        ("bior2.2", "symmetric", 1),
        ("coif1", "symmetric", 1),
    ],
)
def test_it_is_pywavelets_kernel_by_kernel(
    wavelet: str, mode: str, level: int, percentile: float, dtype: torch.dtype
) -> None:
    weight = normal(6, 4, 5, 5, dtype=dtype)
    expected, threshold, kept = by_hand(weight, wavelet, mode, level, percentile)
    settings: dict[str, Any] = {"wavelet": wavelet, "mode": mode, "level": level}
    with any_level():
        after, stats = prune_weight(
            weight, **settings, force_level=True, percentile=percentile, backend="reference"
        )
    assert stats.threshold == threshold
    assert stats.kept == kept
    assert bits(after) == bits(expected.to(dtype))


def test_it_runs_the_reference_backend() -> None:
    report = wavprune.reference.prune(model_of(conv=normal(4, 4, 3, 3)), wavelet="haar")
    assert {layer.backend for layer in report} == {"reference"}
    report = wavprune.reference.prune(model_of(conv=normal(4, 4, 3, 3)), backend="reference")
    assert {layer.backend for layer in report} == {"reference"}


def test_it_refuses_any_other_backend() -> None:
    model = model_of(conv=normal(4, 4, 3, 3))
    before = bits(weight_of(model))
    with pytest.raises(ValueError, match="backend must be 'auto' or 'reference' here, not 'eager'"):
        wavprune.reference.prune(model, backend="eager")
    assert bits(weight_of(model)) == before


def test_it_has_the_signature_of_fast() -> None:
    assert inspect.signature(wavprune.reference.prune) == inspect.signature(wavprune.fast.prune)
    with pytest.raises(TypeError, match="wavlet"):
        wavprune.reference.prune(model_of(conv=normal(4, 4, 3, 3)), wavlet="haar")  # type: ignore[call-arg]


def test_arguments_may_be_given_by_position() -> None:
    model = model_of(conv=normal(4, 4, 3, 3))
    report = wavprune.reference.prune(model, "dwt", "haar", 1, "zero", False, 0.9)
    assert report.kept == 15


def test_a_warning_about_levels_points_at_the_caller() -> None:
    with pytest.warns(wavprune.LevelCollapsedWarning, match="3x3") as caught:
        wavprune.reference.prune(model_of(conv=normal(4, 4, 3, 3)), wavelet="db2")
    assert [warning.filename for warning in caught] == [__file__]


def test_coefficients_that_cannot_be_seen_in_the_weight_are_not_kept() -> None:
    # Of bior1.3's 36 coefficients of a 3x3 kernel, 24 show only where the kernel is padded.
    weight = torch.zeros(4, 4, 3, 3)
    weight[0, 0] = normal(3, 3)
    settings: dict[str, Any] = {"wavelet": "bior1.3", "mode": "symmetric", "level": 1}
    with any_level():
        kept = {
            backend: prune_weight(weight, **settings, force_level=True, backend=backend)[1].kept
            for backend in ("eager", "reference")
        }
    assert kept["reference"] == kept["eager"]
