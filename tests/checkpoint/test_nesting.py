"""One reader of what training scripts save: the same layers for every command."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import wavprune
from wavprune import PruneConfig, checkpoint
from wavprune.checkpoint.formats.nesting import flatten
from wavprune.checkpoint.prune import prune_file
from wavprune.cli.app import main
from wavprune.errors import WavpruneError


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))


def states() -> dict[str, tuple[Any, str, tuple[str, ...]]]:
    """Content, the prefix of the layers' names when it is pruned, and what is not compressed."""
    state = dict(network().state_dict())
    optimizer = {"state": {0: {"exp_avg": torch.zeros(8, 8, 3, 3)}}, "param_groups": [{"lr": 0.1}]}
    return {
        "plain": (state, "", ()),
        "state_dict": ({"state_dict": state, "epoch": 3}, "state_dict.", ("epoch",)),
        "model": (
            {"model": state, "optimizer": optimizer, "epoch": 3, "losses": [1.0, 2.0]},
            "model.",
            ("epoch", "losses", "optimizer"),
        ),
        "deep": ({"run": {"net": {"module": state}, "n": 1}}, "run.net.module.", ("run.n",)),
        "list": ({"models": [state]}, "models.0.", ()),
        "DDP": ({f"module.{name}": value for name, value in state.items()}, "module.", ()),
    }


@pytest.mark.parametrize("kind", states())
def test_every_command_finds_the_same_layers(
    tmp_path: Path, kind: str, capsys: pytest.CaptureFixture[str]
) -> None:
    content, prefix, left_out = states()[kind]
    source = tmp_path / "in.pt"
    torch.save(content, source)
    report = prune_file(source, tmp_path / "out.pt", PruneConfig())
    assert [layer.name for layer in report] == [f"{prefix}0"]
    assert main(["inspect", str(source), "--json"]) == 0
    layers = json.loads(capsys.readouterr().out)["layers"]
    assert [layer["name"] for layer in layers] == [f"{prefix}0"]
    saved = checkpoint.save(source, tmp_path / "x.safetensors")
    own = "module." if kind == "DDP" else ""
    assert [layer.name for layer in saved.layers] == [f"{own}0"]
    assert tuple(sorted(saved.left_out)) == left_out
    found = checkpoint.load(saved.path)
    assert list(found) == [own + name for name in network().state_dict()]
    # The same in memory.
    same = checkpoint.save(content, tmp_path / "y.safetensors")
    assert [layer.checksum for layer in same.layers] == [layer.checksum for layer in saved.layers]
    # Both spellings of a name select the layer.
    for name in {f"{prefix}0", f"{own}0"}:
        config = PruneConfig(targets=(name,))
        assert len(prune_file(source, None, config, dry_run=True)) == 1
        assert len(checkpoint.save(source, saved.path, targets=(name,)).layers) == 1
        with pytest.raises(ValueError, match="no layer is left to prune"):
            prune_file(source, None, PruneConfig(ignore=(name,)), dry_run=True)
        with pytest.raises(ValueError, match="no layer is left to prune"):
            checkpoint.save(source, saved.path, ignore=(name,))


def test_two_state_dicts_keep_their_names(tmp_path: Path) -> None:
    content: dict[str, Any] = {
        "net": network().state_dict(),
        "ema": network().state_dict(),
        "step": 5,
    }
    source = tmp_path / "in.pt"
    torch.save(content, source)
    report = prune_file(source, tmp_path / "out.pt", PruneConfig())
    saved = checkpoint.save(source, tmp_path / "x.safetensors")
    assert [layer.name for layer in report] == ["net.0", "ema.0"]
    assert [layer.name for layer in saved.layers] == ["net.0", "ema.0"]
    assert saved.left_out == ("step",)
    pruned = torch.load(tmp_path / "out.pt")
    assert pruned["step"] == 5
    assert not torch.equal(pruned["ema"]["0.weight"], content["ema"]["0.weight"])


@pytest.mark.parametrize("suffix", [".pt", ".safetensors"])
def test_matrices_alone(tmp_path: Path, suffix: str, capsys: pytest.CaptureFixture[str]) -> None:
    mlp = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))
    source = tmp_path / f"in{suffix}"
    (torch.save if suffix == ".pt" else save_file)(mlp.state_dict(), source)
    config = PruneConfig(targets=("*",), wavelet="identity")
    report = prune_file(source, tmp_path / f"out{suffix}", config)
    saved = checkpoint.save(source, tmp_path / "x.safetensors", targets=("*",))
    assert [layer.name for layer in report] == ["0", "2"]
    assert [layer.name for layer in saved.layers] == ["0", "2"]
    expected = wavprune.fast.prune(mlp, targets=("*",), wavelet="identity")
    assert report.kept == expected.kept
    assert main(["inspect", str(source), "--json"]) == 0
    shapes = [layer["shape"] for layer in json.loads(capsys.readouterr().out)["layers"]]
    assert shapes == [[32, 64], [10, 32]]
    with pytest.raises(ValueError, match=r"3 to 5 axes.*2-D ones.*: 0, 2"):
        prune_file(source, None, PruneConfig(), dry_run=True)
    with pytest.raises(ValueError, match=r"3 to 5 axes.*2-D ones: 0, 2"):
        checkpoint.save(source, tmp_path / "y.safetensors")


def test_a_bare_layer(tmp_path: Path) -> None:
    conv = nn.Conv2d(4, 8, 3)
    save_file(conv.state_dict(), tmp_path / "in.safetensors")
    source = tmp_path / "in.safetensors"
    report = prune_file(source, tmp_path / "out.safetensors", PruneConfig(targets=("weight",)))
    assert [layer.name for layer in report] == ["weight"]
    saved = checkpoint.save(source, tmp_path / "x.safetensors", targets=("weight",))
    assert [layer.name for layer in saved.layers] == ["weight"]
    own = wavprune.fast.prune(conv)
    again = checkpoint.save(conv, tmp_path / "y.safetensors", report=own, values="float32")
    assert torch.equal(load_file(tmp_path / "out.safetensors")["weight"], conv.weight)
    assert [layer.kept for layer in again.layers] == [layer.kept for layer in own]


def test_layers_that_cannot_be_pruned_are_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    state = {
        "a.weight": torch.ones(2, 2, 3, 3),
        "b.weight_v": torch.ones(2, 2, 3, 3),
        "b.weight_g": torch.ones(2, 1, 1, 1),
        "c.weight_orig": torch.ones(2, 2, 3, 3),
        "c.weight_mask": torch.ones(2, 2, 3, 3),
        "d.parametrizations.weight.original0": torch.ones(2, 1, 1, 1),
        "d.parametrizations.weight.original1": torch.ones(2, 2, 3, 3),
        "e.weight": torch.ones(2, 2, 3),
        "f.weight": torch.ones(3),
    }
    source = tmp_path / "in.safetensors"
    save_file(state, source)
    assert main(["prune", str(source), "-o", str(tmp_path / "out.safetensors")]) == 0
    said = capsys.readouterr().err
    assert main(["compress", str(source), "-o", str(tmp_path / "x.safetensors")]) == 0
    for text in (said, capsys.readouterr().out):
        for part in (
            "b (its weight is computed from weight_g",
            "c (its weight",
            "d (its",
        ):
            assert part in text
        assert "e (" not in text
        assert "f (" not in text
        assert "a (" not in text
    with pytest.warns(UserWarning, match=r"left as they are: b .*, c .*, d "):
        saved = checkpoint.save(source, tmp_path / "x.safetensors")
    assert saved.skipped.keys() == {"b", "c", "d"}


def test_extra_state_is_left_out_and_named(tmp_path: Path) -> None:
    class Extra(nn.Conv2d):
        def get_extra_state(self) -> dict[str, Any]:
            return {"scale": torch.ones(1)}

    saved = checkpoint.save(nn.Sequential(Extra(4, 4, 3)), tmp_path / "x.safetensors")
    assert saved.left_out == ("0._extra_state",)
    assert list(checkpoint.load(saved.path)) == ["0.weight", "0.bias"]


def test_content_without_an_end_is_refused(tmp_path: Path) -> None:
    state = dict(network().state_dict())
    deep: Any = state
    for _ in range(80):
        deep = {"a": deep}
    circular: dict[str, Any] = {"model": state}
    circular["self"] = circular
    circular_list: list[Any] = [state]
    circular_list.append(circular_list)
    wide: Any = state
    for _ in range(60):
        wide = {"a": wide, "b": wide}
    for content, message in (
        (deep, "nests more than 64 deep"),
        (circular, "'self' contains itself"),
        ({"list": circular_list}, "'list.1' contains itself"),
    ):
        torch.save(content, tmp_path / "in.pt")
        for run in (
            lambda: prune_file(tmp_path / "in.pt", None, PruneConfig(), dry_run=True),
            lambda: checkpoint.save(tmp_path / "in.pt", tmp_path / "x.safetensors"),
        ):
            with pytest.raises(WavpruneError, match=f"in.pt cannot be read .*{message}"):
                run()
    with pytest.raises(WavpruneError, match=r"more than 1,048,576 entries"):
        flatten(wide)


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(WavpruneError, match=r"two of its tensors are called 'a\.b'"):
        flatten({"a": {"b": torch.ones(1)}, "a.b": torch.ones(1)})
