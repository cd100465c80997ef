"""What a report says was kept is what is stored."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import wavprune
from wavprune import PruneConfig, PruneReport, checkpoint
from wavprune.engine.layers import select_layers
from wavprune.engine.run import prune_layers

CONFIGS = (
    PruneConfig(sparsity=0.75),
    PruneConfig(sparsity=0.75, wavelet="klt"),
    PruneConfig(percentile=70.0, wavelet="haar"),
    PruneConfig(sparsity=0.75, wavelet="identity"),
    PruneConfig(sparsity=0.75, wavelet="auto", scope="global"),
)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 5))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_masks_of_a_report_are_used(tmp_path: Path, config: PruneConfig) -> None:
    net = network()
    report = prune_layers(select_layers(net, config), config, masks=True)
    saved = checkpoint.save(net, tmp_path / "x.safetensors", report=report, values="float32")
    assert [layer.kept for layer in saved.layers] == [layer.kept for layer in report]
    assert saved.relative_error < 1e-6
    # Nothing is thresholded again: masks that keep nothing give zeros.
    assert report.masks is not None
    for mask in report.masks.values():
        mask.zero_()
    checkpoint.save(net, tmp_path / "x.safetensors", report=report)
    assert not checkpoint.load(tmp_path / "x.safetensors")["0.weight"].any()


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_without_masks_they_are_found_again(tmp_path: Path, config: PruneConfig) -> None:
    net = network()
    report = prune_layers(select_layers(net, config), config)
    saved = checkpoint.save(net, tmp_path / "x.safetensors", report=report, values="float32")
    assert [layer.kept for layer in saved.layers] == [layer.kept for layer in report]
    assert saved.relative_error < 1e-6


def test_a_report_from_json_has_no_basis_of_the_layer_s_own(tmp_path: Path) -> None:
    net = network()
    report = PruneReport.from_json(wavprune.fast.prune(net, wavelet="klt").to_json())
    with pytest.raises(ValueError, match=r"what was kept cannot be told .* 'klt'"):
        checkpoint.save(net, tmp_path / "x.safetensors", report=report)
    net = network()
    report = PruneReport.from_json(wavprune.fast.prune(net, sparsity=0.8).to_json())
    saved = checkpoint.save(net, tmp_path / "x.safetensors", report=report, values="float32")
    assert [layer.kept for layer in saved.layers] == [layer.kept for layer in report]
