from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import ResNetConfig, ResNetForImageClassification

import wavprune
from wavprune.cli import main

FACTORY = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3),
                         nn.AdaptiveAvgPool2d(1), nn.Flatten()).eval()

def inputs():
    torch.manual_seed(1)
    return [torch.randn(40, 3, 12, 12) for _ in range(2)]

def nothing():
    return 3
"""
WEIGHTS = "model.safetensors"
ANSWER = ["--wavelet", "dct", "--sparsity", ".5", "--calibration-level", "select"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with functions, images, arrays and a model directory."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FACTORY)
    rng = np.random.default_rng(0)
    (tmp_path / "photos" / "more").mkdir(parents=True)
    for i in range(16):
        place = tmp_path / "photos" / ("more" if i % 2 else "") / f"{i}.png"
        Image.fromarray(rng.integers(0, 255, (40, 48, 3), dtype=np.uint8)).save(place)
    images = rng.integers(0, 255, (16, 3, 32, 32), dtype=np.uint8)
    np.savez(tmp_path / "photos.npz", images=images)
    return tmp_path


@pytest.fixture
def directory(folder: Path) -> Path:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained(folder / "model")
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_pct": 0.875,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.25, 0.25, 0.25],
    }
    (folder / "model" / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder / "model"


def test_a_directory_is_pruned_from_a_folder_of_images(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = load_file(directory / "model.safetensors")
    line = ["prune", "model", "-o", "small", "--calibration", "photos", *ANSWER]
    assert main([*line, "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["decision"]["fitted"] == 12
    assert report["decision"]["compared"] == 16
    after = load_file(directory.parent / "small" / "model.safetensors")
    assert after.keys() == before.keys()
    changed = {name for name in after if not torch.equal(after[name], before[name])}
    weights = {f"{layer['name']}.weight" for layer in report["layers"]}
    assert weights <= changed
    assert any(name.endswith("running_mean") for name in changed)
    assert all(after[name].dtype == before[name].dtype for name in after)
    assert (directory.parent / "small" / "config.json").is_file()
    model = ResNetForImageClassification.from_pretrained(directory.parent / "small")
    assert int((model.state_dict()[min(weights)] != 0).sum()) > 0


def test_a_function_is_pruned_from_another_functions_inputs(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["prune", "mine:network", "-o", "small.safetensors", "--calibration", "mine:inputs"]
    assert main([*line, *ANSWER]) == 0
    assert "calibration: " in capsys.readouterr().out
    model, inputs = (_namespace()[name]() for name in ("network", "inputs"))
    wavprune.fast.prune(
        model, wavelet="dct", sparsity=0.5, calibration=inputs, calibration_level="select"
    )
    for name, tensor in load_file(folder / "small.safetensors").items():
        torch.testing.assert_close(tensor, model.state_dict()[name])


def _namespace() -> dict[str, Any]:
    names: dict[str, Any] = {}
    exec(FACTORY, names)
    return names


@pytest.mark.parametrize(
    "options",
    [
        ["--calibration", "photos.npz", "--mean", ".5", "--std", ".2,.2,.3"],
        ["--calibration", "photos", "--image-size", "32x40", "--samples", "8"],
    ],
)
def test_arrays_and_sizes(options: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    line = ["prune", "mine:network", "--dry-run", *options, *ANSWER, "--json"]
    assert main(line) == 0
    decision = json.loads(capsys.readouterr().out)["decision"]
    assert decision["compared"] == (8 if "--samples" in options else 16)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("mine:network --calibration photos", "how large the network's images are is not known"),
        ("mine:network --calibration nowhere", "nowhere is neither a folder of images, nor"),
        ("mine:network --calibration mine:nothing", "returned a int; allowed: a loader"),
        ("mine:network --calibration mine:absent", "mine:absent"),
        ("photos.npz --calibration mine:inputs", "its code is needed; allowed: a Hugging Face"),
        ("mine:network --samples 4", "--samples goes with --calibration"),
        ("mine:network --calibration photos --image-size 0", "'0' is not a size; write it as 224"),
        ("mine:network --calibration photos --std 0", "allowed: numbers above 0"),
        ("mine:network --calibration photos --mean a", "'a'; write one number"),
        ("mine:network --calibration mine:inputs --percentile 50", "ranks magnitudes"),
        ("mine:network --calibration mine:inputs --method random", "'random'; allowed"),
    ],
)
def test_mistakes_are_one_line(
    line: str, said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", *line.split(), "-o", "small.safetensors"]) != 0
    assert said in capsys.readouterr().err
    assert not (folder / "small.safetensors").exists()


@pytest.mark.parametrize("output", ["small", "small.pt", "nowhere/small.safetensors", "photos.npz"])
def test_outputs_that_cannot_be_written_are_refused_before_anything_runs(
    output: str, capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["prune", "mine:network", "--calibration", "mine:absent", "-o", output]
    assert main(line) != 0
    assert "absent" not in capsys.readouterr().err


def test_a_pattern(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    line = ["prune", "mine:network", "-o", "small.safetensors", "--ignore", "0"]
    line += ["--calibration", "mine:inputs", "--calibration-level", "refit"]
    assert main([*line, "--pattern", "2:4", "--method", "min-weight", "--json"]) == 0
    (layer,) = json.loads(capsys.readouterr().out)["layers"]
    assert layer["kept"] == layer["coefficients"] // 2
    weight = load_file(folder / "small.safetensors")["3.weight"]
    assert int((weight.unflatten(1, (-1, 4)) != 0).sum(2).max()) == 2  # type: ignore[no-untyped-call]
    assert main([*line, "--pattern", "2:4", "--sparsity", ".5", "--force"]) != 0
    assert "--pattern says itself" in capsys.readouterr().err


def test_a_directory_that_says_what_was_pruned_is_compressed_from_inputs(
    directory: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["prune", "model", "-o", "pruned", "--wavelet", "haar", "--sparsity", ".9"]) == 0
    pruned = directory.parent / "pruned"
    capsys.readouterr()

    def size(output: str) -> int:
        line = ["compress", "pruned", "-o", output, "--calibration", "photos"]
        assert main([*line, "--target-kl", "1e-5", "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        return int(facts["bytes"])

    said = size("a")
    save_file(load_file(pruned / WEIGHTS), pruned / WEIGHTS, metadata={"format": "pt"})
    assert said < size("b")
