"""Files that other programs wrote or left: dtypes, links, pipes, pointers, full disks."""

from __future__ import annotations

import errno
import os
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from tests.support import checkpoints
from wavprune import PruneConfig, checkpoint
from wavprune.checkpoint.formats.safetensors import BITS, SafetensorsFile, read_header
from wavprune.checkpoint.formats.torchfile import load_tensors, save_tensors
from wavprune.checkpoint.prune import prune_file
from wavprune.cli.app import main
from wavprune.errors import WavpruneError

HAAR = PruneConfig(wavelet="haar")


def with_dtype(path: Path, dtype: str) -> tuple[Path, bytes]:
    """A convolution beside a tensor of some dtype, and that tensor's bytes."""
    weight = checkpoints.state()["first.weight"].numpy().tobytes()
    data = bytes(range(1, 1 + 8 * BITS[dtype] // 8))
    tensors = {"first.weight": ("F32", [8, 3, 3, 3], weight), "x.weight": (dtype, [2, 4], data)}
    return checkpoints.save_raw(path, tensors), data


@pytest.mark.parametrize("dtype", BITS)
def test_every_dtype_passes_through(tmp_path: Path, dtype: str) -> None:
    source, data = with_dtype(tmp_path / "in.safetensors", dtype)
    prune_file(source, tmp_path / "out.safetensors", HAAR)
    assert (tmp_path / "out.safetensors").read_bytes().endswith(data)
    saved = checkpoint.save(source, tmp_path / "x.safetensors")
    checkpoint.decompress(saved.path, tmp_path / "y.safetensors")
    for path in (saved.path, tmp_path / "y.safetensors"):
        entry = read_header(path)[0]["x.weight"]
        assert entry[:2] == (dtype, (2, 4))
        assert path.read_bytes()[entry.start : entry.stop] == data
    if dtype in ("F4", "F6_E2M3", "F6_E3M2"):
        with pytest.warns(UserWarning, match=r"torch lacks the dtypes of x\.weight"):
            found = checkpoint.load(saved.path)["x.weight"]
    else:
        found = checkpoint.load(saved.path)["x.weight"]
    assert found.flatten().view(torch.uint8).numpy().tobytes() == data


@pytest.mark.parametrize("dtype", ["U32", "C64", "F8_E8M0", "F6_E2M3"])
def test_a_layer_of_such_a_dtype_is_shown(
    tmp_path: Path, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    data = bytes(24 * BITS[dtype] // 8)
    path = checkpoints.save_raw(
        tmp_path / "in.safetensors", {"x.weight": (dtype, [2, 1, 3, 4], data)}
    )
    assert main(["inspect", str(path)]) == 0
    assert "2x1x3x4" in capsys.readouterr().out


@pytest.mark.parametrize("dtype", [torch.uint16, torch.uint64, torch.complex64])
def test_such_dtypes_in_memory(tmp_path: Path, dtype: torch.dtype) -> None:
    state = {"a.weight": torch.randn(4, 4, 3, 3), "x": torch.ones(3).to(dtype)}
    saved = checkpoint.save(state, tmp_path / "x.safetensors")
    assert torch.equal(checkpoint.load(saved.path)["x"], state["x"])


def test_conjugate_views_are_stored_as_they_read(tmp_path: Path) -> None:
    values = torch.tensor([1 + 2j, 3 - 1j]).conj()
    state = {"a.weight": torch.randn(4, 4, 3, 3), "x": values}
    saved = checkpoint.save(state, tmp_path / "x.safetensors")
    assert torch.equal(checkpoint.load(saved.path)["x"], values.resolve_conj())


def test_a_tensor_of_the_format_s_own_name_is_refused(tmp_path: Path) -> None:
    state = {"__metadata__": torch.ones(3), "a.weight": torch.randn(4, 4, 3, 3)}
    with pytest.raises(WavpruneError, match=r"'__metadata__', which safetensors keeps"):
        checkpoint.save(state, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


COMMANDS: dict[str, Callable[[Path], list[str]]] = {
    "inspect": lambda source: ["inspect", str(source)],
    "prune": lambda source: ["prune", str(source), "-o", str(source.with_stem("out"))],
    "compress": lambda source: ["compress", str(source), "-o", f"{source.parent}/x.safetensors"],
}


@pytest.mark.parametrize("command", COMMANDS)
@pytest.mark.parametrize("suffix", [".safetensors", ".pt", ".bin"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "is a named pipe"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "a Git LFS pointer"),
        (b"\n<!DOCTYPE html><html>", "a web page, not a checkpoint"),
        (b"<?xml version='1.0'?><Error/>", "a web page, not a checkpoint"),
        (b"", "an empty file"),
    ],
    ids=["pipe", "lfs", "html", "xml", "empty"],
)
def test_what_is_no_checkpoint_is_named(
    tmp_path: Path,
    command: str,
    suffix: str,
    content: bytes | None,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    source = tmp_path / f"in{suffix}"
    if content is None:
        os.mkfifo(source)
    else:
        source.write_bytes(content)
    assert main(COMMANDS[command](source)) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == [source]


def test_a_file_that_shrinks_is_refused(tmp_path: Path) -> None:
    path = checkpoints.save(tmp_path / "in.safetensors")
    file = SafetensorsFile(path)
    with path.open("r+b") as opened:
        opened.truncate(path.stat().st_size - 1000)
    with pytest.raises(WavpruneError, match="it was cut off"), file.open(["third"], None):
        pass
    with (
        pytest.raises(WavpruneError, match=r"tensors end at byte"),
        file.open(["first"], tmp_path / "copy"),
    ):
        pass


def test_a_file_may_shrink_while_its_tensors_are_in_use(tmp_path: Path) -> None:
    """Only private copies are mapped: this would be a SIGBUS."""
    state = {"a.weight": torch.ones(64, 64, 5, 5)}
    checkpoints.save(tmp_path / "in.safetensors", state)
    torch.save(state, tmp_path / "in.pt")
    file = SafetensorsFile(tmp_path / "in.safetensors")
    with file.open(["a"], None) as (ref,), (tmp_path / "in.safetensors").open("r+b") as opened:
        opened.truncate(100)
        assert int(ref.weight.sum()) == ref.weight.numel()
    for scratch in (None, tmp_path):
        content = load_tensors(tmp_path / "in.pt", scratch)
        saved = (tmp_path / "in.pt").read_bytes()
        (tmp_path / "in.pt").write_bytes(b"")
        assert int(content["a.weight"].sum()) == 64 * 64 * 25
        (tmp_path / "in.pt").write_bytes(saved)
    assert {path.name for path in tmp_path.iterdir()} == {"in.pt", "in.safetensors"}


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full")
def test_a_full_disk_is_said_in_one_line() -> None:
    with pytest.raises(OSError, match=r"No space left") as caught:
        save_tensors({"a.weight": torch.ones(64, 64, 5, 5)}, Path("/dev/full"))
    assert caught.value.errno == errno.ENOSPC
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("command", ["prune", "compress"])
def test_a_limit_of_the_file_size_is_one_line(tmp_path: Path, suffix: str, command: str) -> None:
    state = {"a.weight": torch.randn(64, 64, 5, 5)}
    source = tmp_path / f"in{suffix}"
    if suffix == ".pt":
        torch.save(state, source)
    else:
        checkpoints.save(source, state)
    out = tmp_path / ("out" + (suffix if command == "prune" else ".safetensors"))
    run = subprocess.run(
        ["bash", "-c", f"ulimit -f 40; {sys.executable} -m wavprune {command} {source} -o {out}"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 2
    assert run.stderr.count("\n") == 1
    assert "File too large" in run.stderr
    assert [path.name for path in tmp_path.iterdir()] == [source.name]


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
def test_in_place_a_file_keeps_its_mode(tmp_path: Path, suffix: str) -> None:
    source = tmp_path / f"in{suffix}"
    if suffix == ".pt":
        torch.save(checkpoints.state(), source)
    else:
        checkpoints.save(source)
    source.chmod(0o640)
    prune_file(source, source, HAAR, force=True)
    assert stat.S_IMODE(source.stat().st_mode) == 0o640
    small = tmp_path / "x.safetensors"
    small.touch(0o600)
    checkpoint.save(source, small)
    assert stat.S_IMODE(small.stat().st_mode) == 0o600
    back = tmp_path / "y.safetensors"
    back.touch(0o664)
    back.chmod(0o664)
    checkpoint.decompress(small, back)
    assert stat.S_IMODE(back.stat().st_mode) == 0o664


def model_directory(directory: Path) -> Path:
    checkpoints.save_sharded(directory)
    (directory / "sub").mkdir()
    (directory / "sub" / "file.txt").write_text("text")
    return directory


def test_in_place_a_directory_keeps_links_and_modes(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model")
    outside = tmp_path / "outside.txt"
    outside.write_text("outside")
    (directory / "out.txt").symlink_to("../outside.txt")
    (directory / "loop").symlink_to(".")
    (directory / "gone").symlink_to("nowhere")
    (directory / checkpoints.SHARDS[0]).chmod(0o640)
    (directory / "config.json").chmod(0o600)
    prune_file(directory, directory, HAAR, force=True)
    assert (directory / "out.txt").readlink() == Path("../outside.txt")
    assert (directory / "loop").readlink() == Path()
    assert (directory / "gone").readlink() == Path("nowhere")
    assert stat.S_IMODE((directory / checkpoints.SHARDS[0]).stat().st_mode) == 0o640
    assert stat.S_IMODE((directory / "config.json").stat().st_mode) == 0o600
    assert (directory / "sub" / "file.txt").read_text() == "text"
    assert {path.name for path in tmp_path.iterdir()} == {"model", "outside.txt"}


def test_links_within_a_directory_are_copied_without_end(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model")
    (directory / "loop").symlink_to(directory)
    (directory / "sub" / "up").symlink_to("..")
    (directory / "again").symlink_to("sub")
    (directory / "file").symlink_to("sub/file.txt")
    prune_file(directory, tmp_path / "out", HAAR)
    out = tmp_path / "out"
    assert (out / "loop").resolve() == out.resolve()
    assert (out / "sub" / "up").resolve() == out.resolve()
    assert (out / "again").resolve() == (out / "sub").resolve()
    assert (out / "file").read_text() == "text"
    assert not (out / "file").is_symlink()


@pytest.mark.parametrize("kind", ["file", "directory", "absolute"])
def test_links_out_of_a_directory_are_not_followed(tmp_path: Path, kind: str) -> None:
    directory = model_directory(tmp_path / "model")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret" / "key").write_text("secret")
    target = {"file": "../secret/key", "directory": "../secret"}.get(kind, tmp_path / "secret/key")
    (directory / "link").symlink_to(target)
    with pytest.raises(WavpruneError, match=r"link is a link to .*, out of the model directory"):
        prune_file(directory, tmp_path / "out", HAAR)
    assert {path.name for path in tmp_path.iterdir()} == {"model", "secret"}


def test_a_hugging_face_cache_is_read(tmp_path: Path) -> None:
    blobs, snapshot = tmp_path / "hub" / "blobs", tmp_path / "hub" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    checkpoints.save(blobs / "1")
    (blobs / "2").write_text("{}")
    (snapshot / "model.safetensors").symlink_to("../../blobs/1")
    (snapshot / "config.json").symlink_to("../../blobs/2")
    before = (blobs / "1").read_bytes()
    prune_file(snapshot, tmp_path / "out", HAAR)
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    prune_file(snapshot, snapshot, HAAR, force=True)
    assert (blobs / "1").read_bytes() == before


def test_a_pipe_in_a_directory_is_refused(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model")
    os.mkfifo(directory / "pipe")
    with pytest.raises(WavpruneError, match=r"pipe is a named pipe"):
        prune_file(directory, tmp_path / "out", HAAR)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_an_interrupted_replacement_is_undone_by_the_next_run(tmp_path: Path) -> None:
    directory = model_directory(tmp_path / "model")
    # As versions before this one left it.
    directory.rename(tmp_path / ".model.0123abcd.old")
    with pytest.raises(WavpruneError, match=r"interrupted run left it at .*\.model\.0123abcd\.old"):
        prune_file(directory, None, HAAR, dry_run=True)
    assert [path.name for path in tmp_path.iterdir()] == [".model.0123abcd.old"]
    prune_file(directory, directory, HAAR, force=True)
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


@pytest.mark.parametrize("max_bytes", [3_999, 4_000])
def test_max_bytes_is_what_the_tensors_have(tmp_path: Path, max_bytes: int) -> None:
    state = {"a.weight": torch.randn(10, 10, 3, 3), "b": torch.zeros(100)}
    saved = checkpoint.save(state, tmp_path / "x.safetensors")
    if max_bytes == 4_000:
        assert len(checkpoint.load(saved.path, max_bytes=max_bytes)) == 2
        return
    with pytest.raises(WavpruneError, match=r"tensors have 4,000 bytes; allowed: up to 3,999"):
        checkpoint.load(saved.path, max_bytes=max_bytes)
