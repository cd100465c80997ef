from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

import wavprune
from tests.support import checkpoints
from wavprune import PruneConfig
from wavprune.checkpoint.prune import prune_file

HAAR = PruneConfig(wavelet="haar")


def contents(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes() if path.is_file() else b""
        for path in directory.rglob("*")
    }


@pytest.fixture
def source(tmp_path: Path) -> Path:
    return checkpoints.save(tmp_path / "in.safetensors")


@pytest.mark.parametrize(
    "settings",
    [
        {"wavelet": "haar", "sparsity": 0.75},
        {"wavelet": "haar", "mode": "symmetric", "percentile": 60},
        {"wavelet": "uhaar", "scope": "global", "targets": ("first", "second")},
        {"wavelet": "klt", "ignore": ("re:th",)},
        {"method": "min_weight", "scope": "global"},
        {"method": "random", "seed": 7},
    ],
    ids=str,
)
def test_a_file_is_pruned_as_its_model_is(
    tmp_path: Path, source: Path, settings: dict[str, Any]
) -> None:
    report = prune_file(source, tmp_path / "out.safetensors", PruneConfig(**settings))
    state, expected = checkpoints.pruned(settings)
    checkpoints.assert_same(load_file(tmp_path / "out.safetensors"), state)
    checkpoints.assert_same_layers(report, expected)
    assert [layer.name for layer in report] == [layer.name for layer in expected]
    assert report.relative_error == pytest.approx(expected.relative_error)
    assert report.settings == expected.settings


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
def test_every_dtype_stays_what_it_is(tmp_path: Path, dtype: torch.dtype) -> None:
    source = checkpoints.save(tmp_path / "in.safetensors", checkpoints.state(dtype))
    prune_file(source, tmp_path / "out.safetensors", HAAR)
    state, _ = checkpoints.pruned({"wavelet": "haar"}, dtype)
    checkpoints.assert_same(load_file(tmp_path / "out.safetensors"), state)


def test_all_other_bytes_stay_as_they_are(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out.safetensors"
    prune_file(source, target, PruneConfig(targets=("second",)))
    (header, before), (new_header, after) = map(parts_of, (source, target))
    metadata, new_metadata = (text.pop("__metadata__") for text in (header, new_header))
    assert list(header.items()) == list(new_header.items())
    start, stop = header["second.weight"]["data_offsets"]
    assert before[:start] == after[:start]
    assert before[start:stop] != after[start:stop]
    assert before[stop:] == after[stop:]
    assert set(new_metadata) - set(metadata) == {"wavprune.pruned"}
    with safe_open(target, framework="pt") as file:
        assert file.metadata().items() >= checkpoints.METADATA.items()


def parts_of(path: Path) -> tuple[dict[str, Any], bytes]:
    """The header and the tensors' bytes of a safetensors file."""
    data = path.read_bytes()
    size = 8 + int.from_bytes(data[:8], "little")
    return json.loads(data[8:size]), data[size:]


@pytest.mark.parametrize(("dtype", "pad"), [("F64", 4), ("F32", 1), ("F32", 3), ("BF16", 1)])
def test_unaligned_tensors_are_pruned_alike(tmp_path: Path, dtype: str, pad: int) -> None:
    weight = checkpoints.state()["first.weight"]
    weight = weight.to({"F64": torch.float64, "F32": torch.float32}.get(dtype, torch.bfloat16))
    data = bytes(weight.flatten().view(torch.uint8).tolist())
    tensors = {
        "before": ("U8", [pad], bytes(pad)),
        "first.weight": (dtype, list(weight.shape), data),
        "last": ("U8", [3], b"abc"),
    }
    source = checkpoints.save_raw(tmp_path / "in.safetensors", tensors, 8 - pad)
    before = source.read_bytes()
    prune_file(source, tmp_path / "out.safetensors", HAAR)
    prune_file(source, None, HAAR, dry_run=True)
    _, after = parts_of(tmp_path / "out.safetensors")
    state, _ = checkpoints.pruned({"wavelet": "haar"}, weight.dtype)
    found = torch.tensor(list(after[pad:-3]), dtype=torch.uint8).view(weight.dtype)
    found = found.view(weight.shape)
    checkpoints.assert_same({"first.weight": found}, {"first.weight": state["first.weight"]})
    assert after == bytes(pad) + after[pad:-3] + b"abc"
    assert source.read_bytes() == before


def test_weights_that_cannot_be_pruned_are_named_unless_ignored(tmp_path: Path) -> None:
    tensors = checkpoints.state()
    tensors["counts.weight"] = torch.ones(2, 2, 3, 3, dtype=torch.int8)
    source = checkpoints.save(tmp_path / "in.safetensors", tensors)
    target = tmp_path / "out.safetensors"
    with pytest.raises(ValueError, match=r"'counts': its weight has dtype torch\.int8"):
        prune_file(source, target, HAAR)
    assert contents(tmp_path).keys() == {"in.safetensors"}
    prune_file(source, target, dataclasses.replace(HAAR, ignore=("counts",)))
    state, _ = checkpoints.pruned({"wavelet": "haar"})
    state["counts.weight"] = tensors["counts.weight"]
    checkpoints.assert_same(load_file(target), state)


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_shards_are_pruned_as_one_model(tmp_path: Path, scope: str) -> None:
    directory = checkpoints.save_sharded(tmp_path / "in")
    target = tmp_path / "out"
    report = prune_file(directory, target, PruneConfig(wavelet="haar", scope=scope))
    state, expected = checkpoints.pruned({"wavelet": "haar", "scope": scope})
    first, second = (load_file(target / shard) for shard in checkpoints.SHARDS)
    assert first.keys().isdisjoint(second)
    checkpoints.assert_same(first | second, state)
    checkpoints.assert_same_layers(report, expected)
    assert [layer.name for layer in report] == ["second", "third", "first"]
    assert report.kept == expected.kept
    assert report.relative_error == pytest.approx(expected.relative_error)
    assert report.settings == expected.settings


def test_a_shard_with_nothing_to_prune_is_copied(tmp_path: Path) -> None:
    directory = checkpoints.save_sharded(tmp_path / "in")
    report = prune_file(directory, tmp_path / "out", PruneConfig(targets=("first",)))
    assert [layer.name for layer in report] == ["first"]
    assert report.settings.targets == ("first",)
    before, after = contents(directory), contents(tmp_path / "out")
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {checkpoints.SHARDS[1]}


def model_directory(directory: Path) -> Path:
    """A model directory with all that may lie in one."""
    directory.mkdir()
    checkpoints.save(directory / "model.safetensors")
    (directory / "config.json").write_text(checkpoints.CONFIG)
    (directory / "vocab").mkdir()
    (directory / "vocab" / "merges.txt").write_text("a b")
    for name in ("pytorch_model.bin", "model.onnx", "flax_model.msgpack", "optimizer.pt"):
        (directory / name).write_bytes(b"weights")
    (directory / "pytorch_model.bin.index.json").write_text("{}")
    (directory / "model.safetensors.index.json").write_text('{"stale": true}')
    (directory / ".git").mkdir()
    (directory / ".git" / "object").write_bytes(b"weights")
    return directory


def test_a_model_directory_is_complete_without_other_weights(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "in")
    prune_file(directory, tmp_path / "out", HAAR)
    found = contents(tmp_path / "out")
    assert found.keys() == {"model.safetensors", "config.json", "vocab", "vocab/merges.txt"}
    assert found["config.json"].decode() == checkpoints.CONFIG
    state, _ = checkpoints.pruned({"wavelet": "haar"})
    checkpoints.assert_same(load_file(tmp_path / "out" / "model.safetensors"), state)


def test_in_place_a_directory_loses_nothing(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "in")
    before = contents(directory)
    prune_file(directory, directory, HAAR, force=True)
    after = contents(directory)
    assert before.keys() == after.keys()
    assert {name for name in before if before[name] != after[name]} == {"model.safetensors"}
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_in_place_a_file_is_replaced(tmp_path: Path, source: Path) -> None:
    prune_file(source, source, HAAR, force=True)
    state, _ = checkpoints.pruned({"wavelet": "haar"})
    checkpoints.assert_same(load_file(source), state)
    assert contents(tmp_path).keys() == {"in.safetensors"}


@pytest.mark.parametrize("kind", ["zip", "legacy"])
@pytest.mark.parametrize("nested", [True, False])
def test_a_state_dict_is_pruned_as_its_model_is(tmp_path: Path, kind: str, nested: bool) -> None:
    state = checkpoints.state()
    content = {"epoch": 3, "state_dict": state} if nested else state
    source = tmp_path / "in.pth"
    torch.save(content, source, _use_new_zipfile_serialization=kind == "zip")
    before = source.read_bytes()
    report = prune_file(source, tmp_path / "out.pt", HAAR)
    found = torch.load(tmp_path / "out.pt")
    expected, _ = checkpoints.pruned({"wavelet": "haar"})
    checkpoints.assert_same(found["state_dict"] if nested else found, expected)
    assert not nested or found["epoch"] == 3
    assert [layer.name for layer in report] == [
        f"state_dict.{name}" if nested else name for name in checkpoints.LAYERS
    ]
    assert source.read_bytes() == before


def test_a_state_dict_gives_the_same_file_every_time(tmp_path: Path) -> None:
    source = tmp_path / "in.pt"
    torch.save(checkpoints.state(), source)
    for name in ("a.pt", "b.pt"):
        prune_file(source, tmp_path / name, HAAR)
    assert (tmp_path / "a.pt").read_bytes() == (tmp_path / "b.pt").read_bytes()


def test_a_tensor_of_two_names_is_pruned_once(tmp_path: Path) -> None:
    tied = checkpoints.state()["first.weight"]
    torch.save({"a.weight": tied, "b.weight": tied.detach()}, tmp_path / "in.pt")
    report = prune_file(tmp_path / "in.pt", tmp_path / "out.pt", PruneConfig(percentile=50.0))
    found = torch.load(tmp_path / "out.pt")
    assert [layer.name for layer in report] == ["a"]
    assert found["a.weight"].data_ptr() == found["b.weight"].data_ptr()
    conv = torch.nn.Conv2d(3, 8, 3)
    with torch.no_grad():
        conv.weight.copy_(tied)
    wavprune.fast.prune(conv, percentile=50.0)
    assert torch.equal(found["a.weight"], conv.weight)


def test_in_place_a_state_dict_is_replaced(tmp_path: Path) -> None:
    source = tmp_path / "in.pt"
    torch.save(checkpoints.state(), source)
    prune_file(source, source, HAAR, force=True)
    expected, _ = checkpoints.pruned({"wavelet": "haar"})
    checkpoints.assert_same(torch.load(source), expected)
    assert contents(tmp_path).keys() == {"in.pt"}


@pytest.mark.parametrize("kind", ["safetensors", "state dict", "directory"])
def test_a_dry_run_reports_and_writes_nothing(tmp_path: Path, kind: str) -> None:
    source = tmp_path / {"safetensors": "in.safetensors", "state dict": "in.pt"}.get(kind, "in")
    if kind == "directory":
        checkpoints.save_sharded(source)
    elif kind == "state dict":
        torch.save(checkpoints.state(), source)
    else:
        checkpoints.save(source)
    before = contents(tmp_path)
    target = source.with_stem("out")
    dry = prune_file(source, target, HAAR, dry_run=True)
    assert prune_file(source, None, HAAR, dry_run=True).kept == dry.kept
    assert contents(tmp_path) == before
    checkpoints.assert_same_layers(dry, prune_file(source, target, HAAR))


def test_without_a_target_only_dry(source: Path) -> None:
    with pytest.raises(ValueError, match=r"target is None; allowed only with dry_run=True"):
        prune_file(source, None, HAAR)


@pytest.mark.parametrize("dry_run", [True, False])
def test_nothing_is_overwritten_without_force(tmp_path: Path, source: Path, dry_run: bool) -> None:
    (tmp_path / "out.safetensors").write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"out\.safetensors exists already; only --force"):
        prune_file(source, tmp_path / "out.safetensors", HAAR, dry_run=dry_run)
    assert contents(tmp_path) == before


def test_a_link_that_leads_nowhere_is_not_overwritten_either(tmp_path: Path, source: Path) -> None:
    link = tmp_path / "out.safetensors"
    link.symlink_to(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"out\.safetensors exists already"):
        prune_file(source, link, HAAR)
    assert link.is_symlink()


def test_force_replaces_a_file(tmp_path: Path, source: Path) -> None:
    target = tmp_path / "out.safetensors"
    target.write_text("old")
    prune_file(source, target, HAAR, force=True)
    state, _ = checkpoints.pruned({"wavelet": "haar"})
    checkpoints.assert_same(load_file(target), state)
    assert contents(tmp_path).keys() == {"in.safetensors", "out.safetensors"}


def test_force_replaces_a_model_directory_and_no_other(tmp_path: Path) -> None:
    directory = checkpoints.save_sharded(tmp_path / "in")
    target = tmp_path / "out"
    target.mkdir()
    (target / "thesis.txt").write_text("precious")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"out is not replaced, for it is no model"):
        prune_file(directory, target, HAAR, force=True)
    assert contents(tmp_path) == before
    checkpoints.save(target / "model.safetensors")
    prune_file(directory, target, HAAR, force=True)
    assert contents(target).keys() == contents(directory).keys()
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path, source: Path) -> None:
    (tmp_path / "link.safetensors").symlink_to(source)
    before = source.read_bytes()
    link = tmp_path / "link.safetensors"
    prune_file(link, link, HAAR, force=True)
    assert link.readlink() == source
    assert source.read_bytes() != before
    assert contents(tmp_path).keys() == {"in.safetensors", "link.safetensors"}


def _file(path: Path) -> Path:
    return checkpoints.save(path / "in.safetensors")


def _state_dict(path: Path) -> Path:
    torch.save(checkpoints.state(), path / "in.pt")
    return path / "in.pt"


def _directory(path: Path) -> Path:
    return checkpoints.save_sharded(path / "in")


@pytest.mark.parametrize(
    ("make", "target", "message"),
    [
        (_file, "missing/out.safetensors", r"there is no directory .*missing"),
        (_file, "out.pt", r"out\.pt must end in \.safetensors, as .*in\.safetensors does"),
        (_file, "out", r"out must end in \.safetensors"),
        (_file, "folder.safetensors", r"is a directory, but .*in\.safetensors is a file"),
        (_file, "..", r"invalid output path"),
        (_state_dict, "out.safetensors", r"must end in \.pt or \.pth or \.bin, as .*in\.pt does"),
        (_directory, "missing/out", r"there is no directory .*missing"),
        (_directory, "out.safetensors", r"names a file, but .*in is a directory"),
        (_directory, "some.txt", r"names a file, but .*in is a directory"),
        (_directory, "in/out", r"contains the other"),
        (_directory, "in/../../test", r"contains the other"),
        (_directory, "in", r"exists already; only --force"),
    ],
)
def test_targets_that_cannot_be(
    tmp_path: Path, make: Callable[[Path], Path], target: str, message: str
) -> None:
    work = tmp_path / "test"
    work.mkdir()
    (work / "folder.safetensors").mkdir()
    (work / "some.txt").touch()
    source = make(work)
    before = contents(tmp_path)
    force = "exists already" not in message
    with pytest.raises(ValueError, match=message):
        prune_file(source, work / target, HAAR, force=force)
    assert contents(tmp_path) == before


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_failure_in_the_middle_leaves_nothing_behind(tmp_path: Path, scope: str) -> None:
    directory = checkpoints.save_sharded(tmp_path / "in")
    shard = load_file(directory / checkpoints.SHARDS[1])
    shard["first.weight"][0, 0, 0, 0] = torch.nan
    checkpoints.save(directory / checkpoints.SHARDS[1], shard)
    model_directory(tmp_path / "out")
    before = contents(tmp_path)
    with pytest.raises(ValueError, match=r"'first': 1 of 216 weights are NaN"):
        prune_file(directory, tmp_path / "out", PruneConfig(scope=scope), force=True)
    assert contents(tmp_path) == before


def test_a_failure_while_the_rest_is_copied_leaves_nothing_behind(tmp_path: Path) -> None:
    directory = checkpoints.save_sharded(tmp_path / "in")
    (directory / "dangling").symlink_to(tmp_path / "nowhere")
    with pytest.raises(OSError, match="in/dangling"):
        prune_file(directory, tmp_path / "out", HAAR)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]
