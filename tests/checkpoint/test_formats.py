from __future__ import annotations

import json
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support import checkpoints
from wavprune import PruneConfig
from wavprune.checkpoint.formats import open_checkpoint
from wavprune.checkpoint.formats.safetensors import read_header
from wavprune.errors import WavpruneError


def test_lists_the_4d_weights_and_nothing_else(tmp_path: Path) -> None:
    assert open_checkpoint(checkpoints.save(tmp_path / "a.safetensors")).layers == (
        checkpoints.LAYERS
    )


def test_reads_every_layer(tmp_path: Path) -> None:
    refs = checkpoints.read(checkpoints.save(tmp_path / "a.safetensors"))
    found = {f"{ref.name}.weight": ref.weight for ref in refs}
    state = checkpoints.state()
    checkpoints.assert_same(found, {name: state[name] for name in found})


def test_reading_never_writes(tmp_path: Path) -> None:
    for path in (tmp_path / "a.safetensors", tmp_path / "a.pt"):
        if path.suffix == ".pt":
            torch.save(checkpoints.state(), path)
        else:
            checkpoints.save(path)
        before = path.read_bytes()
        for ref in checkpoints.read(path):
            ref.weight.zero_()
        assert path.read_bytes() == before


@pytest.mark.parametrize("pad", range(1, 8))
def test_reads_at_any_offset(tmp_path: Path, pad: int) -> None:
    weight = torch.arange(18, dtype=torch.float64).reshape(1, 2, 3, 3)
    path = checkpoints.save_raw(
        tmp_path / "a.safetensors",
        {"conv.weight": ("F64", [1, 2, 3, 3], weight.numpy().tobytes())},
        pad,
    )
    (ref,) = checkpoints.read(path)
    assert torch.equal(ref.weight, weight)


def test_a_tensor_of_no_values_is_no_layer(tmp_path: Path) -> None:
    tensors = {"none.weight": torch.zeros(0, 3, 3, 3), "some.weight": torch.ones(1, 1, 3, 3)}
    assert open_checkpoint(checkpoints.save(tmp_path / "a.safetensors", tensors)).layers == ["some"]


def test_a_dtype_that_torch_has_not_is_named(tmp_path: Path) -> None:
    path = checkpoints.save_raw(
        tmp_path / "a.safetensors", {"conv.weight": ("F4", [1, 1, 2, 2], b"\0\0")}
    )
    with pytest.raises(ValueError, match=r"'conv'.*dtype F4"):
        checkpoints.read(path)


@pytest.mark.parametrize("zipped", [True, False])
def test_nested_dicts_give_dotted_names(tmp_path: Path, zipped: bool) -> None:
    content = {
        "epoch": 3,
        "state_dict": checkpoints.state(),
        "optimizer": {"state": {0: {"momentum": torch.zeros(8, 3, 3, 3)}}},
    }
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    assert open_checkpoint(tmp_path / "a.pth").layers == [
        f"state_dict.{name}" for name in checkpoints.LAYERS
    ]


def test_a_compressed_archive_is_read_right(tmp_path: Path) -> None:
    torch.save(checkpoints.state(), tmp_path / "a.pt")
    with (
        zipfile.ZipFile(tmp_path / "a.pt") as stored,
        zipfile.ZipFile(tmp_path / "b.pt", "w", zipfile.ZIP_DEFLATED) as deflated,
    ):
        for name in stored.namelist():
            deflated.writestr(name, stored.read(name))
    found = {ref.name: ref.weight for ref in checkpoints.read(tmp_path / "b.pt")}
    assert torch.equal(found["first"], checkpoints.state()["first.weight"])


class Code:
    """Runs code when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_pickled_code_is_refused_and_never_runs(tmp_path: Path, form: str) -> None:
    trace = tmp_path / "ran"
    path = tmp_path / "a.pt"
    content = {"conv.weight": torch.zeros(1, 1, 3, 3), "code": Code(trace)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    with pytest.raises(ValueError, match=r"unpickling.* would run .*refused") as refusal:
        open_checkpoint(path)
    assert "\n" not in str(refusal.value)
    assert not trace.exists()
    torch.load(path, weights_only=False) if form != "pickle" else pickle.loads(path.read_bytes())
    assert trace.exists(), "the code of this test would not have run at all"


def test_a_whole_module_is_refused_by_name(tmp_path: Path) -> None:
    torch.save(torch.nn.Conv2d(1, 1, 3), tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"unpickling of torch\.nn\.modules\.conv\.Conv2d"):
        open_checkpoint(tmp_path / "a.pt")


def test_broken_files_are_named(tmp_path: Path) -> None:
    torch.save(checkpoints.state(), tmp_path / "zip.pt")
    torch.save(checkpoints.state(), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    checkpoints.save(tmp_path / "whole.safetensors")
    for path in list(tmp_path.iterdir()):
        content = path.read_bytes()
        for size in (0, 5, 100, len(content) // 2, len(content) - 4):
            path.write_bytes(content[:size])
            with pytest.raises(ValueError, match=f"{path.name} cannot be read as a"):
                open_checkpoint(path)


@pytest.mark.parametrize("content", [b"hello, world" * 20, b"\x80\x02}q\x00."[:3]])
def test_bytes_that_are_no_checkpoint(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "a.pt"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"a\.pt cannot be read"):
        open_checkpoint(path)


@pytest.mark.parametrize("content", [{}, {"x": torch.zeros(3)}, torch.zeros(1, 1, 3, 3), [1]])
def test_nothing_to_prune(tmp_path: Path, content: Any) -> None:
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ValueError, match=r"holds no '\*\.weight' tensor of 3"):
        open_checkpoint(tmp_path / "a.pt").select(PruneConfig())


@pytest.mark.parametrize("name", ["a.tflite", "model.safetensors.index.json", "noending"])
def test_other_kinds_are_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_bytes(b"{}")
    with pytest.raises(ValueError, match=r"of no kind that can be pruned; allowed: a \.safet"):
        open_checkpoint(tmp_path / name)


def test_a_missing_path(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"a\.safetensors does not exist; allowed"):
        open_checkpoint(tmp_path / "a.safetensors")


def test_a_directory_without_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").touch()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor model\.safet"):
        open_checkpoint(tmp_path)


def test_shards_in_the_order_of_the_index(tmp_path: Path) -> None:
    checkpoint = open_checkpoint(checkpoints.save_sharded(tmp_path / "in"))
    assert [file.path.name for file in checkpoint.files] == list(checkpoints.SHARDS)
    assert checkpoint.layers == ["second", "third", "first"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"more": "model-00003.safetensors"}, r"model-00003\.safetensors, which does not exist"),
        ({"more": "../outside.safetensors"}, r"'\.\./outside\.safetensors', not a safetensors"),
        ({"more": "/etc/outside.safetensors"}, r"not a safetensors file beside it"),
        ({"more": "config.json"}, r"not a safetensors file beside it"),
        ({"more": checkpoints.SHARDS[0]}, r"says that 'more' is in model-00001"),
        ({"first.weight": checkpoints.SHARDS[0]}, r"says that 'first.weight' is in model-00001"),
        ({"more": 3}, r"is not an index"),
        ({"more": []}, r"is not an index"),
    ],
)
def test_an_index_that_errs(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    checkpoints.save(tmp_path / "outside.safetensors", {"more": torch.zeros(1)})
    directory = checkpoints.save_sharded(tmp_path / "in")
    checkpoints.edit_index(directory, change)
    with pytest.raises(ValueError, match=message):
        open_checkpoint(directory)


def test_an_index_that_leaves_out_a_tensor(tmp_path: Path) -> None:
    directory = checkpoints.save_sharded(tmp_path / "in")
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["first.bias"]
    path.write_text(json.dumps(index))
    with pytest.raises(ValueError, match=r"does not say that 'first\.bias' is in model-00002"):
        open_checkpoint(directory)


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"weight_map": 1}', "\xff"])
def test_an_index_that_is_none(tmp_path: Path, content: str) -> None:
    (tmp_path / "model.safetensors.index.json").write_bytes(content.encode("latin-1"))
    with pytest.raises(ValueError, match=r"index\.json is not an index: a JSON object"):
        open_checkpoint(tmp_path)


def test_an_ordered_dict_keeps_what_state_dict_put_beside_it(tmp_path: Path) -> None:
    content = checkpoints.Net().state_dict()
    torch.save(content, tmp_path / "a.pt")
    (file,) = open_checkpoint(tmp_path / "a.pt").files
    with file.open([], tmp_path / "b.pt"):
        pass
    copy = torch.load(tmp_path / "b.pt")
    assert isinstance(copy, OrderedDict)
    assert copy._metadata == content._metadata  # type: ignore[attr-defined]


@pytest.mark.parametrize("shape", [[0, 1 << 40, 1 << 40], [1 << 61, 0]])
def test_an_empty_tensor_that_torch_cannot_have_is_refused(
    tmp_path: Path, shape: list[int]
) -> None:
    path = checkpoints.save_raw(tmp_path / "a.safetensors", {"a": ("F32", shape, b"")})
    with pytest.raises(WavpruneError, match="tensor 'a' has an impossible shape"):
        read_header(path)
