"""What a compressed file of any version says of itself."""

from __future__ import annotations

import base64
import zlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wavprune
from tests.support.version1 import FILES
from wavprune import PruneConfig, WavpruneError, checkpoint
from wavprune.checkpoint.contents import EXACT, GRID, ONE_VALUE, FileContents
from wavprune.common.tables import as_text


def check_against(contents: FileContents, saved: checkpoint.SaveReport) -> None:
    """The file says what saving said."""
    assert contents.bytes == saved.bytes
    assert contents.bits_per_weight == pytest.approx(saved.bits_per_weight)
    assert len(contents.layers) == len(saved.layers)
    by_name = {layer.name: layer for layer in contents.layers}
    for layer in saved.layers:
        found = by_name[layer.name]
        for field in ("shape", "wavelet", "values", "coder", "coefficients", "kept"):
            assert getattr(found, field) == getattr(layer, field), (layer.name, field)
        assert found.bytes == pytest.approx(layer.bytes, rel=0.1, abs=16)
        assert found.relative_error == pytest.approx(layer.relative_error, rel=1e-4)


@pytest.mark.parametrize(
    "how",
    [
        {"config": PruneConfig(sparsity=0.9)},
        {"values": "float16", "wavelet": "haar"},
        {"target_bytes": 30_000},
        {"coder": "trellis", "step": 0.02},
    ],
    ids=str,
)
def test_the_layers_of_a_file_are_those_of_its_report(how: dict[str, Any], tmp_path: Path) -> None:
    net = wavprune.demo.resnet()
    saved = checkpoint.save(net, tmp_path / "a.safetensors", **how)
    contents = checkpoint.contents_of(saved.path, against=net)
    assert contents.version == (3 if "coder" in how else 2)
    check_against(contents, saved)
    state = net.state_dict()
    plain = {tensor.name: tensor for tensor in contents.plain}
    assert plain.keys() == state.keys() - {layer.tensor for layer in contents.layers}
    assert plain["bn1.weight"].how == EXACT
    assert plain["bn1.weight"].bytes == 64
    text = as_text(contents.to_table(), 200)
    assert f"{saved.bytes:,} bytes" in text
    assert "stored exactly: " in text
    assert all(layer.name in text for layer in saved.layers)


def test_batch_norms_and_what_is_on_a_grid_are_told_apart(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()
    ).eval()
    batches = [torch.randn(16, 3, 6, 6) for _ in range(2)]
    for batchnorm in ("keep", "fold"):
        saved = checkpoint.save(
            *(net, tmp_path / "a.safetensors"),
            calibration=batches,
            target_bytes=700,
            batchnorm=batchnorm,
        )
        contents = checkpoint.contents_of(saved.path)
        how = {tensor.name: tensor.how for tensor in contents.plain}
        text = as_text(contents.to_table(), 200)
        if batchnorm == "keep":
            assert (how["1.weight"], how["1.running_var"]) == (GRID, GRID)
            assert [link.gamma for link in contents.norms] == ["1.weight"]
            assert "unfolded when it is read: 1 in 0." in text
        else:
            assert (how["1.weight"], contents.norms) == (ONE_VALUE, ())
            assert "stored as one value: 0.bias, 1.weight" in text
        assert how["1.num_batches_tracked"] == EXACT


@pytest.mark.parametrize("kind", FILES)
def test_files_of_version_1_too(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(zlib.decompress(base64.b85decode(FILES[kind][1])))
    state = checkpoint.load(path)
    contents = checkpoint.contents_of(path, against=state)
    assert contents.version == 1
    assert {layer.tensor for layer in contents.layers} <= state.keys()
    assert {layer.relative_error for layer in contents.layers} == {0.0}


def test_tied_weights_are_named(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3))
    net[1].weight = net[0].weight
    for how in ({}, {"coder": "trellis", "step": 0.01}):
        saved = checkpoint.save(net, tmp_path / "a.safetensors", **how)  # type: ignore[arg-type]
        contents = checkpoint.contents_of(saved.path, against=net)
        assert contents.aliases == {"1.weight": "0.weight"}
        assert "tied: 1.weight = 0.weight." in as_text(contents.to_table(), 200)


def test_another_model_is_refused(tmp_path: Path) -> None:
    saved = checkpoint.save(nn.Conv2d(4, 4, 3), tmp_path / "a.safetensors")
    with pytest.raises(WavpruneError, match=r"holds 'weight' of \(4, 4, 3, 3\).*one of \(2, 2, "):
        checkpoint.contents_of(saved.path, against=nn.Conv2d(2, 2, 3))
    with pytest.raises(WavpruneError, match="no such tensor"):
        checkpoint.contents_of(saved.path, against=nn.Sequential(nn.Conv2d(4, 4, 3)))
