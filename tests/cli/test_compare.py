from __future__ import annotations

import csv
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from transformers import ResNetConfig, ResNetForImageClassification

import onnx
import wavprune
from tests.support import graphs
from wavprune.cli import main

FACTORY = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.AdaptiveAvgPool2d(1), nn.Flatten())

def inputs():
    torch.manual_seed(1)
    return [torch.randn(40, 3, 8, 8)]

def pairs():
    return [(x, x.mean((1, 2, 3))) for x in inputs()]

def sounds():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv1d(2, 6, 9), nn.ReLU(), nn.Conv1d(6, 5, 24), nn.Flatten())

def distance(outputs, targets):
    return (outputs.mean(1) - targets).abs()
"""
FEW = ["--sparsity", ".5", "--wavelet", "dct", "--seeds", "1", "--json"]


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(FACTORY)
    onnx.save(graphs.network(), tmp_path / "net.onnx")
    rng = np.random.default_rng(0)
    images = rng.normal(size=(80, 3, 8, 8)).astype(np.float32)
    np.savez("images.npz", images=images)
    np.savez("labelled.npz", images=images, labels=np.arange(80) % 5)
    for i in range(12):
        place = tmp_path / "photos" / ("cats" if i < 4 else "dogs")
        place.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(place / f"{i}.png")
    return tmp_path


def compared(capsys: pytest.CaptureFixture[str], *line: str) -> dict[str, dict[str, object]]:
    """The trials of a comparison by their bases."""
    assert main(["compare", *line, *FEW]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    return {trial["wavelet"] or trial["method"]: trial for trial in trials}


def test_a_graph_is_compared_with_its_own_answers(capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(capsys, "net.onnx", "--data", "images.npz", "--batchnorm", "off")
    assert list(found) == ["none", "dct", "min_weight", "random"]
    assert found["none"]["metric"] == "agreement"
    assert found["none"]["value"] == 1
    assert found["dct"]["top1"] is None
    # What the library gives for the same images, by another way.
    model = onnx.load("net.onnx")
    dense = wavprune.onnx.to_torch(model)
    report = wavprune.fast.prune(model, wavelet="dct", sparsity=0.5, scope="global")
    images = torch.from_numpy(np.load("images.npz")["images"])
    labels = dense(images).argmax(1)
    known = wavprune.evaluate(model, [(images, labels)], dense, report, timing=False)
    assert found["dct"]["value"] == pytest.approx(known.top1)
    assert found["dct"]["kl"] == pytest.approx(known.kl, rel=1e-4)
    assert found["dct"]["stored_bytes"] == known.stored_bytes


def test_labels_give_the_accuracy(capsys: pytest.CaptureFixture[str]) -> None:
    found = compared(capsys, "net.onnx", "--data", "labelled.npz")
    dense = wavprune.onnx.to_torch("net.onnx")
    arrays = np.load("labelled.npz")
    images, labels = (torch.from_numpy(arrays[name]) for name in ("images", "labels"))
    assert found["none"]["metric"] == "top1"
    assert found["none"]["value"] == pytest.approx(
        float((dense(images).argmax(1) == labels).float().mean())
    )


def test_subfolders_are_classes_where_that_is_said(capsys: pytest.CaptureFixture[str]) -> None:
    # The graph says how large its images are.
    line = ["net.onnx", "--data", "photos"]
    assert compared(capsys, *line)["none"]["metric"] == "agreement"
    found = compared(capsys, *line, "--class-folders")
    assert found["none"]["metric"] == "top1"
    assert found["none"]["samples"] == 12
    few = compared(capsys, *line, "--class-folders", "--samples", "6")
    assert few["none"]["samples"] == 6


def test_networks_of_one_axis_are_compared(capsys: pytest.CaptureFixture[str]) -> None:
    sounds = np.random.default_rng(0).normal(size=(40, 2, 32)).astype(np.float32)
    np.savez("sounds.npz", inputs=sounds, labels=np.arange(40) % 5)
    np.savez("unlabelled.npz", inputs=sounds)
    labelled = compared(capsys, "mine:sounds", "--data", "sounds.npz")
    assert labelled["none"]["metric"] == "top1"
    assert labelled["none"]["samples"] == 40
    found = compared(capsys, "mine:sounds", "--data", "unlabelled.npz")
    assert found["none"]["metric"] == "agreement"
    assert found["dct"]["kl"] == pytest.approx(labelled["dct"]["kl"], rel=1e-4)


def test_rows_from_inputs_and_other_metrics(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["mine:network", "--data", "mine:pairs", "--metric", "mine:distance"]
    found = compared(
        capsys, *line, "--better", "lower", "--calibrated", "refit", "--calibration", "mine:inputs"
    )
    assert found["none"]["metric"] == "distance"
    assert found["dct"]["calibrated"] == "refit"
    assert found["random"]["calibrated"] == ""


def test_directories_and_checkpoints_with_their_code(capsys: pytest.CaptureFixture[str]) -> None:
    torch.manual_seed(0)
    config = ResNetConfig(embedding_size=8, hidden_sizes=[8], depths=[1], layer_type="basic")
    ResNetForImageClassification(config).save_pretrained("model")
    processor = {
        "image_processor_type": "ConvNextImageProcessor",
        "size": {"shortest_edge": 32},
        "crop_pct": 0.875,
    }
    Path("model/preprocessor_config.json").write_text(json.dumps(processor))
    found = compared(capsys, "model", "--data", "photos", "--class-folders")
    assert found["none"]["metric"] == "top1"
    state = {"0.weight": torch.ones(4, 3, 3, 3), "0.bias": torch.arange(4.0)}
    save_file(state, "w.safetensors")
    found = compared(capsys, "w.safetensors", "--model", "mine:network", "--data", "images.npz")
    # The bias decides, whatever is pruned.
    assert found["random"]["value"] == 1


def test_tables_and_files(capsys: pytest.CaptureFixture[str]) -> None:
    line = ["compare", "net.onnx", "--data", "images.npz", *FEW[:-1]]
    for suffix in ("csv", "json", "html"):
        assert main([*line, "-o", f"out.{suffix}"]) == 0
        out = capsys.readouterr().out
        assert "agreement %" in out
        assert out.endswith(f"comparison: out.{suffix}\n")
    rows = list(csv.DictReader(io.StringIO(Path("out.csv").read_text())))
    assert [row["method"] for row in rows] == ["none", "dwt", "min_weight", "random"]
    assert len(json.loads(Path("out.json").read_text())["trials"]) == 4
    page = Path("out.html").read_text()
    assert page.startswith("<!DOCTYPE html>")
    assert page.count("<tr>") == 5
    assert "http" not in page
    before = Path("out.csv").read_bytes()
    assert main([*line, "-o", "out.csv"]) == 2
    assert "out.csv exists already; only --force replaces it" in capsys.readouterr().err
    assert Path("out.csv").read_bytes() == before


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("net.onnx", "Missing option '--data'"),
        ("net.onnx --data no.npz", "no.npz does not exist"),
        ("net.onnx --data images.npz --class-folders", "images.npz is no folder"),
        ("net.onnx --data images.npz --model mine:network", "is a graph, which runs by itself"),
        ("w.safetensors --data images.npz", "comparing runs the network, and w.safetensors has"),
        ("mine:nothing --data images.npz", "'mine:nothing' cannot be imported"),
        ("net.onnx --data images.npz --sparsity 1.5", "sparsity must be in [0, 1), not 1.5"),
        ("net.onnx --data images.npz --wavelet harr", "close to it: haar"),
        ("net.onnx --data images.npz --better lower", "--better goes with --metric"),
        ("net.onnx --data images.npz --metric psnr", "write it as package.module:name"),
        ("net.onnx --data mine:pairs --metric mine:distance", "does not say whether higher is"),
        ("net.onnx --data images.npz -o out.txt", "must end in .csv, .json, .html"),
        ("mine:network --data photos", "how large the network's images are is not known"),
    ],
)
def test_a_mistake_is_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    save_file({"0.weight": torch.ones(4, 3, 3, 3)}, "w.safetensors")
    assert main(["compare", *line.split()]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("wavprune: error: ")
    assert err.count("\n") == 1
    assert message in err
