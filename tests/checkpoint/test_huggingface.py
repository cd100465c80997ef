"""Model directories of Hugging Face, compressed and loaded again; nothing is downloaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCTC,
    AutoModelForImageClassification,
    ConvNextConfig,
    ConvNextForImageClassification,
    ResNetConfig,
    ResNetForImageClassification,
)

import wavprune
from wavprune import WavpruneError, checkpoint
from wavprune.checkpoint.formats.directory import COMPRESSED_WEIGHTS
from wavprune.cli import main

SIZES: dict[str, Any] = {"depths": [1, 1], "hidden_sizes": [8, 16], "num_labels": 3}
NETWORKS: dict[str, Callable[[], Any]] = {
    "resnet": lambda: ResNetForImageClassification(
        ResNetConfig(embedding_size=8, layer_type="basic", **SIZES)
    ),
    "convnext": lambda: ConvNextForImageClassification(ConvNextConfig(num_stages=2, **SIZES)),
}


@pytest.fixture(autouse=True)
def model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model directory in the working directory."""
    monkeypatch.chdir(tmp_path)
    return saved("resnet")


def saved(kind: str) -> Path:
    torch.manual_seed(0)
    NETWORKS[kind]().save_pretrained("model")
    Path("model", "preprocessor_config.json").write_text("{}")
    return Path("model")


def outputs(network: Any) -> torch.Tensor:
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits: torch.Tensor = network.eval()(images).logits
    return logits


@pytest.mark.parametrize("kind", NETWORKS)
def test_a_directory_is_compressed_and_loaded_in_one_call_each(
    kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    saved(kind)
    assert main(["compress", "model", "-o", "small", "--bits", "8"]) == 0
    assert "compressed: small/wavprune.safetensors" in capsys.readouterr().out
    names = {path.name for path in Path("small").iterdir()}
    assert names == {COMPRESSED_WEIGHTS, "config.json", "preprocessor_config.json"}
    network: Any = wavprune.from_pretrained("small")
    dense = type(network).from_pretrained("model")
    assert type(network).__name__ == type(NETWORKS[kind]()).__name__
    assert not network.training
    expected = checkpoint.load(Path("small", COMPRESSED_WEIGHTS))
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, expected[name]), name
    torch.testing.assert_close(outputs(network), outputs(dense), rtol=0.1, atol=0.05)


def test_a_class_and_its_options_can_be_given() -> None:
    assert main(["compress", "model", "-o", "small"]) == 0
    network = wavprune.from_pretrained(
        "small", model_class=AutoModelForImageClassification, dtype=torch.bfloat16
    )
    assert isinstance(network, ResNetForImageClassification)
    assert {parameter.dtype for parameter in network.parameters()} == {torch.bfloat16}
    with pytest.raises(WavpruneError, match="model_class=AutoModelForCTC has no network of"):
        wavprune.from_pretrained("small", model_class=AutoModelForCTC)


def test_a_pruned_directory_stays_pruned(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "model", "-o", "pruned", "--wavelet", "haar", "--sparsity", "0.9"]) == 0
    command = capsys.readouterr().out.splitlines()[-1]
    assert command.split() == ["wavprune", "compress", "pruned", "-o", "pruned-small"]
    assert main(command.split()[1:]) == 0
    assert main(["compress", "model", "-o", "dense-small"]) == 0
    sizes = [
        Path(name, COMPRESSED_WEIGHTS).stat().st_size for name in ("pruned-small", "dense-small")
    ]
    assert sizes[0] < 0.8 * sizes[1]
    weights = wavprune.from_pretrained("pruned-small").state_dict()
    pruned = ResNetForImageClassification.from_pretrained("pruned").state_dict()
    for name, tensor in pruned.items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=0.02)


def test_other_commands_find_the_weights_in_the_directory(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["compress", "model", "-o", "small"]) == 0
    assert main(["inspect", "small"]) == 0
    assert "compressed, version 2" in capsys.readouterr().out
    assert main(["decompress", "small", "-o", "back.safetensors"]) == 0
    assert main(["prune", "small", "-o", "again"]) == 2
    assert f"but {COMPRESSED_WEIGHTS}, which `wavprune decompress`" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("compress model -o model --force", "holds the weights to compress"),
        ("compress model -o model/inner", "contains the other"),
        ("compress model -o no/small", "there is no directory no"),
        ("compress model -o small.pt", "names a file"),
        ("compress model/model.safetensors -o small", "must be a file that ends in .safetensors"),
        ("compress model -o other", "other exists already"),
        ("compress model -o other --force", "for it is no model"),
    ],
)
def test_a_wrong_output_is_refused_before_work_starts(
    line: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    Path("other").mkdir()
    Path("other", "precious").touch()

    def never(*_: object, **__: object) -> None:
        raise AssertionError

    monkeypatch.setattr("wavprune.checkpoint.saving.tensors_of", never)
    before = sorted(Path.cwd().rglob("*"))
    assert main(line.split()) == 2
    assert message in capsys.readouterr().err
    assert sorted(Path.cwd().rglob("*")) == before


def test_force_replaces_what_was_compressed_before() -> None:
    assert main(["compress", "model", "-o", "small"]) == 0
    Path("small", "old.txt").touch()
    assert main(["compress", "model", "-o", "small", "--bits", "4", "--force"]) == 0
    assert not Path("small", "old.txt").exists()
    wavprune.from_pretrained("small")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda small: (small / COMPRESSED_WEIGHTS).unlink(), f"holds no {COMPRESSED_WEIGHTS}"),
        (
            lambda small: shutil.copy("model/model.safetensors", small / COMPRESSED_WEIGHTS),
            f"holds no {COMPRESSED_WEIGHTS}",
        ),
        (lambda small: (small / "config.json").unlink(), "holds no config.json"),
        (lambda small: (small / "config.json").write_text("["), "holds no config.json"),
        (lambda small: edit(small, architectures=["object"]), "architectures=['object']"),
        (lambda small: edit(small, architectures=["torch"]), "architectures=['torch']"),
        (lambda small: edit(small, depths=[1, 2]), "is missing or not of a"),
        (lambda small: edit(small, hidden_sizes=[8, 24]), "has not the weights of its config.json"),
    ],
)
def test_a_directory_that_is_not_whole_is_refused(
    change: Callable[[Path], object], message: str
) -> None:
    assert main(["compress", "model", "-o", "small"]) == 0
    change(Path("small"))
    with pytest.raises(WavpruneError) as caught:
        wavprune.from_pretrained("small")
    assert message in str(caught.value)


def edit(directory: Path, **changes: object) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_name_of_the_hub_is_found_in_its_cache() -> None:
    assert main(["compress", "model", "-o", "small"]) == 0
    revision = "0" * 40
    repository = Path("cache", "models--user--network")
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    shutil.copytree("small", repository / "snapshots" / revision)
    network = wavprune.from_pretrained("user/network", cache_dir="cache", local_files_only=True)
    assert isinstance(network, ResNetForImageClassification)
    with pytest.raises(WavpruneError, match="user/other is neither a directory nor in the cache"):
        wavprune.from_pretrained("user/other", cache_dir="cache", local_files_only=True)


def test_a_push_is_checked_before_anything_is_sent() -> None:
    with pytest.raises(WavpruneError, match=f"model holds no {COMPRESSED_WEIGHTS}"):
        wavprune.push_to_hub("model", "user/network")
    with pytest.raises(WavpruneError, match="nowhere is no directory"):
        wavprune.push_to_hub("nowhere", "user/network")
    assert main(["compress", "model", "-o", "small"]) == 0
    with pytest.raises(WavpruneError, match="repo_id: "):
        wavprune.push_to_hub("small", "a/b/c")
