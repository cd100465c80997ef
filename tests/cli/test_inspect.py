from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.support import checkpoints
from tests.support.commands import cells, json_of
from wavprune.cli import main

pytestmark = pytest.mark.usefixtures("checkpoint")


def test_inspect_shows_layers_zeros_and_levels(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = checkpoints.state()
    tensors["first.weight"][:2] = 0
    tensors["counts.weight"] = torch.ones(1, 1, 2, 3, dtype=torch.int8)
    checkpoints.save(Path("in.safetensors"), tensors)
    assert main(["inspect", "in.safetensors"]) == 0
    rows = cells(capsys.readouterr().out)
    assert ["first", "8x3x3x3", "float32", "216", "54", "25.00%"] in rows
    assert ["counts", "1x1x2x3", "int8", "6", "", ""] in rows
    assert ["3x3", "1", "2", "uhaar"] in rows
    assert ["3x3", "1", "1", "dct, klt, bior1.1, db1, haar, rbio1.1"] in rows
    assert ["3x3", "1", "0", "102 bases: no transform runs"] in rows


def test_inspect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    content = json_of(capsys, "inspect", "in.safetensors")
    layers, kernels = content["layers"], content["kernels"]
    assert isinstance(layers, list)
    assert isinstance(kernels, list)
    assert layers[1] == {
        "name": "second",
        "shape": [4, 8, 5, 5],
        "dtype": "float32",
        "numel": 800,
        "zeros": 0,
        "kernel": [5, 5],
    }
    levels = {tuple(entry["kernel"]): entry["levels"] for entry in kernels}
    assert levels.keys() == {(3, 3), (5, 5), (1, 1)}
    assert levels[3, 3]["haar"] == 1
    assert levels[3, 3]["bior4.4"] == 0
    assert levels[5, 5]["haar"] == 2
    assert set(levels[1, 1].values()) == {0}


def test_dtypes_that_are_never_pruned_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {
        "odd.weight": ("F8_E8M0", [2, 1, 1, 2], bytes(4)),
        "plain.weight": ("F32", [1, 1, 1, 2], bytes(8)),
    }
    checkpoints.save_raw(Path("odd.safetensors"), tensors)
    assert main(["inspect", "odd.safetensors"]) == 0
    rows = cells(capsys.readouterr().out)
    assert ["odd", "2x1x1x2", "float8_e8m0fnu", "4", "", ""] in rows
    assert ["plain", "1x1x1x2", "float32", "2", "2", "100.00%"] in rows


def test_names_cannot_control_the_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = {"\x1b[2Jconv\n[red].weight": torch.ones(1, 1, 3, 3)}
    checkpoints.save(Path("odd.safetensors"), tensors)
    assert main(["inspect", "odd.safetensors"]) == 0
    out = capsys.readouterr().out
    assert "\x1b" not in out
    assert r"\x1b[2Jconv\n[red]" in out


@pytest.mark.parametrize("options", [[], ["--coder", "trellis", "--step", "0.01"]], ids=str)
def test_a_compressed_file_shows_what_it_holds(
    options: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    line = ["compress", "in.safetensors", "-o", "small.safetensors", "--wavelet", "dct", *options]
    assert main(line) == 0
    assert "bits per weight" in capsys.readouterr().out
    assert main(["inspect", "small.safetensors", "--against", "in.safetensors"]) == 0
    out = capsys.readouterr().out
    (second,) = (row for row in cells(out) if row[:1] == ["second"])
    assert second[1:4] == ["4x8x5x5", "F32", "dct"]
    assert 0 < float(second[-1]) < 0.1
    assert "stored exactly: " in out
    content = json_of(capsys, "inspect", "small.safetensors")
    assert content["version"] == (3 if options else 2)
    assert content["bytes"] == Path("small.safetensors").stat().st_size
    assert isinstance(content["layers"], list)
    assert {layer["name"] for layer in content["layers"]} == set(checkpoints.LAYERS)


def test_only_a_compressed_file_is_compared(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["inspect", "in.safetensors", "--against", "in.safetensors"]) == 2
    assert "--against goes with a compressed file" in capsys.readouterr().err


def test_pruning_a_compressed_file_says_what_to_do(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compress", "in.safetensors", "-o", "small.safetensors"]) == 0
    assert main(["prune", "small.safetensors", "--dry-run"]) == 2
    assert "it is compressed, and `wavprune decompress`" in capsys.readouterr().err
