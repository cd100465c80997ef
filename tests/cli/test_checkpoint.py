from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file

from tests.support import checkpoints
from wavprune import checkpoint
from wavprune.cli.app import main


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "in.safetensors")


def test_compress_and_decompress(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small, out = tmp_path / "small.safetensors", tmp_path / "out.safetensors"
    assert main(["compress", str(source), "-o", str(small), "--bits", "6"]) == 0
    assert f"compressed: {small}, {small.stat().st_size:,} of " in capsys.readouterr().out
    assert small.stat().st_size < source.stat().st_size
    assert main(["decompress", str(small), "-o", str(out)]) == 0
    assert f"decompressed: {out}, {out.stat().st_size:,} bytes" in capsys.readouterr().out
    expected = checkpoint.save(checkpoints.state(), tmp_path / "x.safetensors", bits=6)
    checkpoints.assert_same(load_file(out), checkpoint.load(expected.path))


def test_pruning_and_json(tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]) -> None:
    small = tmp_path / "small.safetensors"
    options = ["--sparsity", "0.9", "--wavelet", "dct", "--targets", "first", "--json"]
    assert main(["compress", str(source), "-o", str(small), *options]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["layers"] == 1
    assert facts["bytes"] == small.stat().st_size
    assert 0.3 < facts["relative_error"] < 1
    elements = sum(tensor.numel() for tensor in checkpoints.state().values())
    assert facts["bits_per_weight"] == 8 * facts["bytes"] / elements
    assert facts["times_smaller"] == facts["uncompressed"] / facts["bytes"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--bits", "8", "--step", "0.1"], "give one of them"),
        (["--wavelet", "dtc"], "unknown wavelet 'dtc'"),
        (["--target-bytes", "1"], "no step brings the file to 1 bytes"),
        (["--sparsity", "1.5"], "sparsity must be in [0, 1)"),
        (["--samples", "5"], "--samples goes with --calibration"),
        (["--image-size", "32"], "--image-size goes with --calibration"),
        (["--model", "mine:network"], "nothing runs the network"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_writes_nothing(
    tmp_path: Path,
    source: Path,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    message: str,
) -> None:
    assert main(["compress", str(source), "-o", str(tmp_path / "y.safetensors"), *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


def test_only_force_replaces_a_file(
    tmp_path: Path, source: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = source.read_bytes()
    assert main(["compress", str(source), "-o", str(source)]) == 2
    assert "exists already; only --force replaces it" in capsys.readouterr().err
    assert source.read_bytes() == before
    assert main(["compress", str(source), "-o", str(source), "--force"]) == 0
    assert source.stat().st_size < len(before)
    assert main(["decompress", str(source), "-o", str(source), "--force"]) == 0
    assert load_file(source).keys() == checkpoints.state().keys()
