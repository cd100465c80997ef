from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

import wavprune
from wavprune import PruneConfig, checkpoint
from wavprune.bases import LevelCollapsedWarning, basis_for
from wavprune.engine.layers import LayerRef
from wavprune.errors import WavpruneError
from wavprune.service import analysis
from wavprune.service.curves import GRID, STEPS, bases_shown, measure
from wavprune.service.pictures import as_svg, kernels
from wavprune.service.preview import curves, preview


@pytest.fixture(scope="module")
def model(demo: Path) -> analysis.ModelCurves:
    return analysis.analyze(demo, lambda share: None)


@settings(max_examples=12, deadline=None)
@given(
    st.sampled_from(["identity", "uhaar", "dct", "klt", "haar", "db2", "rbio3.1"]),
    # With fewer kernels than values, klt has coefficients that are rounding alone.
    st.sampled_from([(4, 3, 3), (5, 5, 5), (9, 7, 7), (8, 5), (6, 1, 1), (5, 2, 3, 4)]),
    st.integers(0, len(GRID) - 2),
    st.integers(0, 1000),
)
def test_errors_and_counts_are_those_of_pruning(
    basis: str, shape: tuple[int, ...], index: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(6, *shape, generator=generator)
    found = measure(LayerRef("0", weight), [basis]).curves[0]
    layer = {3: nn.Conv1d, 4: nn.Conv2d, 5: nn.Conv3d}[weight.ndim](1, 1, 1)
    layer.weight = nn.Parameter(weight.clone())
    collapses = basis_for(PruneConfig(wavelet=basis), weight).collapsed
    with pytest.warns(LevelCollapsedWarning) if collapses else nullcontext():
        report = wavprune.fast.prune(
            nn.Sequential(layer), wavelet=basis, sparsity=float(GRID[index]), backend="eager"
        )
    assert found.kept[index] == report.kept
    assert found.errors[index] ** 0.5 == pytest.approx(report.squared_error**0.5, abs=2e-5)


def test_bases_that_are_one_transform_are_shown_once() -> None:
    shown = bases_shown([(1, 1), (7, 7)])
    assert shown[:5] == ("identity", "uhaar", "dct", "klt", "haar")
    assert {"db2", "rbio3.1"} <= set(shown)
    assert not {"db1", "bior1.1", "sym2"} & set(shown)
    assert bases_shown([(1, 1)]) == ("identity",)


def test_sizes_are_those_of_compressed_files(model: analysis.ModelCurves, tmp_path: Path) -> None:
    net = wavprune.demo.resnet()
    for basis, sparsity in (("uhaar", 0.5), ("dct", 0.9)):
        config = PruneConfig(wavelet=basis, sparsity=sparsity)
        saved = checkpoint.save(net, tmp_path / "a.safetensors", config=config)
        assert preview(model, basis, sparsity).bytes == pytest.approx(saved.bytes, rel=0.1)


def test_steps_give_the_sizes_and_errors_of_saving(
    model: analysis.ModelCurves, tmp_path: Path
) -> None:
    index = 18
    step = float(STEPS[index])
    saved = checkpoint.save(
        wavprune.demo.resnet(), tmp_path / "a.safetensors", wavelet="dct", step=step
    )
    series = curves(model, None)["bases"]["dct"]
    assert series["size_errors"][index] == pytest.approx(saved.relative_error, rel=0.02)
    assert series["sizes"][index] == pytest.approx(saved.bytes, rel=0.15)


def test_what_is_written_is_read_again(model: analysis.ModelCurves, tmp_path: Path) -> None:
    analysis.save(model, tmp_path / "curves.npz")
    again = analysis.load(tmp_path / "curves.npz")
    assert again.layers == model.layers
    assert preview(again, "auto", 0.7, "global") == preview(model, "auto", 0.7, "global")
    assert as_svg(kernels(again, 1, "klt", 0.7, "layer")) == as_svg(
        kernels(model, 1, "klt", 0.7, "layer")
    )


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("basis", ["uhaar", "klt", "auto"])
def test_a_preview_says_what_pruning_does(
    model: analysis.ModelCurves, basis: str, scope: str
) -> None:
    found = preview(model, basis, 0.85, scope)
    net = wavprune.demo.resnet()
    report = wavprune.fast.prune(net, wavelet=basis, sparsity=0.85, scope=scope)
    error, kept = (1e-5, 0) if scope == "layer" else (5e-3, 2e-3)
    assert found.error == pytest.approx(report.relative_error, rel=error)
    assert found.kept == pytest.approx(report.kept, rel=kept)
    if scope == "layer":
        assert [layer.basis for layer in found.layers] == [layer.wavelet for layer in report]
    assert min(found.errors, key=found.errors.__getitem__) == "klt"


@pytest.mark.parametrize("sparsity", [0.95, 0.99, 0.995])
def test_layers_may_lose_all_where_they_share_a_threshold(
    model: analysis.ModelCurves, sparsity: float
) -> None:
    found = preview(model, "dct", sparsity, "global").error
    net = wavprune.demo.resnet()
    report = wavprune.fast.prune(net, wavelet="dct", sparsity=sparsity, scope="global")
    assert found == pytest.approx(report.relative_error, abs=5e-3)


@pytest.mark.parametrize("sparsity", [0.95, 0.99])
def test_layers_of_unequal_scale_share_a_threshold(tmp_path: Path, sparsity: float) -> None:
    torch.manual_seed(0)
    first = nn.Conv2d(8, 32, 3)
    net = nn.Sequential(first, nn.Conv2d(32, 8, 3))
    first.weight.data *= 20
    save_file(net.state_dict(), str(tmp_path / "unequal.safetensors"))
    unequal = analysis.analyze(tmp_path / "unequal.safetensors", lambda share: None)
    report = wavprune.fast.prune(net, wavelet="dct", sparsity=sparsity, scope="global")
    found = preview(unequal, "dct", sparsity, "global").error
    assert found == pytest.approx(report.relative_error, abs=5e-3)


def test_kernels_that_are_too_large_are_left_out(tmp_path: Path) -> None:
    tensors = {"a.weight": torch.randn(4, 2, 3, 3), "b.weight": torch.randn(2, 2, 40, 40)}
    save_file(tensors, str(tmp_path / "m.safetensors"))
    found = analysis.analyze(tmp_path / "m.safetensors", lambda share: None)
    assert [layer.name for layer in found.layers] == ["a"]
    assert found.skipped["b"] == "its kernels have 40x40 values; allowed: up to 1,024"


def test_matrices_are_kept_of_layers_that_are_pictured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tensors = {f"{i}.weight": torch.randn(4, 2, 3, 3) for i in range(1, 5)}
    tensors |= {"0.weight": torch.randn(1, 1, 17, 17)}
    # Enough for one that is too large to be pictured, and three of the others.
    monkeypatch.setattr(analysis, "MATRIX_BYTES", 4 * (17**4 + 3 * 3**4))
    save_file(tensors, str(tmp_path / "m.safetensors"))
    found = analysis.analyze(tmp_path / "m.safetensors", lambda share: None)
    assert {layer for layer, _ in found.matrices} == {1, 2, 3}
    for layer in (0, 4):
        for basis in ("klt", "dct"):
            assert "<svg" in as_svg(kernels(found, layer, basis, 0.5, "layer"))


def test_settings_that_were_not_measured_are_refused(model: analysis.ModelCurves) -> None:
    with pytest.raises(WavpruneError, match=r"db9.*allowed here: identity, uhaar"):
        preview(model, "db9", 0.5)
    with pytest.raises(WavpruneError, match=r"sparsity=1\.0"):
        preview(model, "dct", 1.0)


@pytest.mark.parametrize("basis", ["dct", "klt", "haar"])
def test_pictured_kernels_are_those_of_the_pruned_weight(
    model: analysis.ModelCurves, basis: str
) -> None:
    layer = next(i for i, facts in enumerate(model.layers) if facts.kernel == (3, 3))
    found = kernels(model, layer, basis, 0.6, "layer")
    net = wavprune.demo.resnet()
    before = dict(net.named_modules())[found.layer].weight.detach().reshape(-1, 9).clone()
    wavprune.fast.prune(net, wavelet=basis, sparsity=0.6)
    after = dict(net.named_modules())[found.layer].weight.detach().reshape(-1, 9)
    for kernel, pruned in zip(found.before, found.after, strict=True):
        index = int((before == torch.from_numpy(kernel)).all(dim=1).nonzero()[0])
        np.testing.assert_allclose(pruned, after[index].numpy(), atol=1e-5)
    assert 0 < found.kept.mean() < 1


def test_a_model_says_what_it_leaves_out(tmp_path: Path) -> None:
    tensors = {
        "a.weight": torch.ones(4, 2, 3, 3),
        "b.weight": torch.full((4, 2, 3, 3), torch.nan),
        "c.weight": torch.ones(4, 2, 3, 3, dtype=torch.int8),
    }
    save_file(tensors, str(tmp_path / "m.safetensors"))
    found = analysis.analyze(tmp_path / "m.safetensors", lambda share: None)
    assert [layer.name for layer in found.layers] == ["a"]
    assert "NaN" in found.skipped["b"]
    assert "I8" in found.skipped["c"]
    save_file({"b.weight": tensors["b.weight"]}, str(tmp_path / "n.safetensors"))
    with pytest.raises(WavpruneError, match=r"n\.safetensors holds no convolution.*b: .*NaN"):
        analysis.analyze(tmp_path / "n.safetensors", lambda share: None)
