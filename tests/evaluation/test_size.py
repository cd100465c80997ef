from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import save
from torch import nn

import wavprune
from tests.support.cases import any_level, quick
from wavprune import stored_bytes
from wavprune.evaluation.size import exact_zeros


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.Conv2d(16, 8, 5), nn.Flatten(), nn.Linear(8, 4)
    )


def dense(model: nn.Module) -> int:
    return sum(value.numel() * value.element_size() for value in model.state_dict().values())


def test_an_unpruned_model_takes_what_its_file_takes() -> None:
    model = network()
    header = 8 + int.from_bytes(save(model.state_dict())[:8], "little")
    assert stored_bytes(model) == len(save(model.state_dict())) - header


@quick
@given(
    wavelet=st.sampled_from(["uhaar", "haar", "dct", "identity", "db2"]),
    sparsity=st.floats(0, 0.99),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.float64]),
)
def test_a_pruned_layer_is_a_mask_and_its_kept_values(
    wavelet: str, sparsity: float, dtype: torch.dtype
) -> None:
    model = network().to(dtype)
    with any_level():
        report = wavprune.fast.prune(
            model, wavelet=wavelet, sparsity=sparsity, mode="symmetric", level=1, force_level=True
        )
    expected = dense(model)
    for name, layer in (("0", report["0"]), ("2", report["2"])):
        weight = model.get_parameter(f"{name}.weight")
        size = weight.element_size()
        expected -= weight.numel() * size
        expected += min(
            weight.numel() * size, math.ceil(layer.coefficients / 8) + layer.kept * size
        )
    assert stored_bytes(model, report) == expected


def test_a_file_never_takes_more_than_the_dense_one() -> None:
    model = network()
    report = wavprune.fast.prune(model, sparsity=0)
    assert report.kept == report.numel
    assert stored_bytes(model, report) == dense(model)


def test_an_expansive_basis_pays_for_its_mask() -> None:
    sizes = {}
    for mode in ("periodization", "symmetric"):
        model = network()
        with any_level():
            report = wavprune.fast.prune(
                model, wavelet="db2", mode=mode, level=1, force_level=True, sparsity=0.9
            )
        sizes[mode] = stored_bytes(model, report)
        assert report.kept == math.ceil(round(0.1 * 432, 6)) + 320
    assert sizes["symmetric"] > sizes["periodization"]


def test_klt_pays_for_its_matrices() -> None:
    sizes = {}
    for wavelet in ("klt", "dct"):
        model = network()
        sizes[wavelet] = stored_bytes(
            model, wavprune.fast.prune(model, wavelet=wavelet, sparsity=0.9, targets="2")
        )
    assert sizes["klt"] - sizes["dct"] == 25 * 25 * 4


def test_a_report_that_was_read_from_json_says_the_same() -> None:
    model = network()
    report = wavprune.fast.prune(model, wavelet="klt", sparsity=0.9)
    read = wavprune.PruneReport.from_json(report.to_json())
    assert stored_bytes(model, read) == stored_bytes(model, report) < dense(model)


def test_a_shared_tensor_is_stored_once() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False)
            self.second.weight = self.first.weight

    model = Tied()
    assert stored_bytes(model) == 4 * 144
    # Whichever of its names the report knows it by.
    for target in ("first", "second"):
        report = wavprune.fast.prune(model, sparsity=0.75, targets=target)
        assert stored_bytes(model, report) == 144 // 8 + 4 * 36


def test_a_model_that_is_one_layer() -> None:
    model = nn.Conv2d(8, 16, 3, bias=False)
    report = wavprune.fast.prune(model, sparsity=0.5)
    assert [layer.name for layer in report] == [""]
    assert stored_bytes(model, report) == 1152 // 8 + 4 * 576


def test_a_report_of_another_model_is_refused() -> None:
    report = wavprune.fast.prune(network())
    with pytest.raises(ValueError, match=r"the model has no '0.weight'"):
        stored_bytes(nn.ModuleDict({"conv": nn.Conv2d(3, 16, 3)}), report)
    with pytest.raises(ValueError, match=r"layer '0' is \(16, 3, 3, 3\), in the model \(16, 3, 5"):
        stored_bytes(nn.Sequential(nn.Conv2d(3, 16, 5)), report)


def test_zeros_are_counted_where_something_was_pruned() -> None:
    model = network()
    report = wavprune.fast.prune(model, method="min_weight", sparsity=0.5, targets="0")
    assert exact_zeros(model, report) == (report.weight_zeros, 432) == (216, 432)
    with torch.no_grad():
        model.get_parameter("4.weight").zero_()
    assert exact_zeros(model) == (216 + 32, 432 + 3200 + 32)
