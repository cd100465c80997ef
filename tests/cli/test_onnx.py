from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import onnx
from tests.support import graphs
from wavprune.cli import main
from wavprune.onnx import session


@pytest.fixture
def source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    onnx.save(graphs.network(), tmp_path / "net.onnx")
    images = np.random.default_rng(0).normal(size=(80, 3, 8, 8)).astype(np.float32)
    np.savez(tmp_path / "inputs.npz", images=images)
    return tmp_path / "net.onnx"


def test_inspect_and_prune(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "net.onnx", "-o", "small.onnx", "--sparsity", "0.75", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert [layer["name"] for layer in report["layers"]] == ["first", "second", "up"]
    assert main(["inspect", "small.onnx", "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [(layer["name"], layer["dtype"]) for layer in layers] == [
        ("first", "float32"),
        ("second", "float32"),
        ("up", "float32"),
    ]
    onnx.checker.check_model("small.onnx", full_check=True)


def test_compress_and_decompress(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "net.onnx", "-o", "small.onnx", "--bits", "6"]) == 0
    said = capsys.readouterr().out
    assert f"compressed: small.safetensors, {Path('small.safetensors').stat().st_size:,} of" in said
    assert f"graph: small.onnx, {Path('small.onnx').stat().st_size:,} bytes" in said
    assert main(["compress", "net.onnx", "-o", "small.onnx"]) == 2
    assert "small.onnx exists already" in capsys.readouterr().err
    assert main(["decompress", "small.onnx", "-o", "back.onnx"]) == 0
    x = torch.ones(2, 3, 8, 8)
    found = session("small.onnx").run(None, {"x": x.numpy()})[0]
    np.testing.assert_array_equal(found, graphs.run("back.onnx", x))


def test_inputs_prune_and_compress(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    inputs = ["--calibration", "inputs.npz"]
    level = ["--calibration-level", "refit"]
    assert main(["prune", "net.onnx", "-o", "small.onnx", *inputs, *level]) == 0
    assert "magnitude, refit" in capsys.readouterr().out
    before, after = graphs.arrays(graphs.network()), graphs.arrays(onnx.load("small.onnx"))
    changed = {name for name, values in after.items() if not np.array_equal(values, before[name])}
    assert {"first.weight", "second", "up.weight"} <= changed
    assert "fc.weight" not in changed
    command = ["compress", "net.onnx", "-o", "few.onnx", *inputs, "--target-kl", "0.001", "--json"]
    assert main(command) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["measured_kl"] < 0.0011
    assert facts["graph_bytes"] == Path("few.onnx").stat().st_size


def test_a_graph_needs_no_other_code(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["compress", "net.onnx", "-o", "a.onnx", "--calibration", "inputs.npz"]
    assert main([*command, "--model", "package:function"]) == 2
    assert "net.onnx is a graph, which runs by itself" in capsys.readouterr().err
    assert main(["prune", "net.onnx", "-o", "a.safetensors"]) == 2
    assert "a.safetensors must end in .onnx, as net.onnx does" in capsys.readouterr().err


def test_a_sweep_runs_graphs(source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    np.savez("data.npz", images=np.load("inputs.npz")["images"], labels=np.arange(80) % 5)
    Path("sweep.yaml").write_text(
        "name: onnx\nmodels: {onnx: net.onnx}\ndata: {npz: data.npz}\nbatch_size: 80\n"
        "grid: {wavelet: [uhaar], sparsity: [0.5]}\n"
    )
    assert main(["sweep", "sweep.yaml", "-o", "r.db", "--jobs", "1", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["ok"] == 2
