from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from wavprune.common import atomic
from wavprune.common.atomic import replaced
from wavprune.errors import WavpruneError


def test_a_file_appears_when_it_is_complete(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    with replaced(target) as new:
        new.write_text("half")
        assert not target.exists()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert target.read_text() == "half"


def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")

    def fail() -> None:
        with replaced(target) as new:
            new.write_text("half")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail()
    assert [path.name for path in tmp_path.iterdir()] == ["a.txt"]
    assert target.read_text() == "old"


def test_a_directory_replaces_another(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with replaced(target) as new:
        new.mkdir()
        (new / "new").write_text("new")
        assert (target / "old").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in target.iterdir()] == ["new"]


def test_a_directory_comes_back_if_nothing_can_take_its_place(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    with pytest.raises(FileNotFoundError), replaced(target):
        pass
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    assert [path.name for path in target.iterdir()] == ["old"]


@pytest.mark.parametrize("mode", [0o640, 0o600, 0o444, 0o664])
def test_a_file_keeps_its_mode(tmp_path: Path, mode: int) -> None:
    target = tmp_path / "a.txt"
    target.write_text("old")
    target.chmod(mode)
    with replaced(target) as new:
        new.write_text("new")
    assert stat.S_IMODE(target.stat().st_mode) == mode
    assert target.read_text() == "new"


def test_a_directory_keeps_its_mode(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir(0o750)
    with replaced(target) as new:
        new.mkdir()
    assert stat.S_IMODE(target.stat().st_mode) == 0o750


@pytest.mark.parametrize("kind", ["file", "directory"])
def test_a_link_stays_and_what_it_leads_to_is_replaced(tmp_path: Path, kind: str) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    real, link = inside / "real", tmp_path / "link"
    link.symlink_to(Path("inside") / "real")
    if kind == "directory":
        real.mkdir()
    with replaced(link) as new:
        assert new.parent == inside
        if kind == "file":
            new.write_text("new")
        else:
            new.mkdir()
            (new / "a").write_text("new")
    assert link.readlink() == Path("inside/real")
    assert (link if kind == "file" else link / "a").read_text() == "new"
    assert [path.name for path in inside.iterdir()] == ["real"]


def test_what_is_there_is_not_replaced_unasked(tmp_path: Path) -> None:
    for name in ("file", "directory"):
        target = tmp_path / name
        with pytest.raises(WavpruneError, match="exists already"):  # noqa: SIM117, PT012  # the end
            with replaced(target, overwrite=False) as new:
                if name == "file":
                    new.write_text("new")
                    target.write_text("came first")
                else:
                    new.mkdir()
                    target.mkdir()
                    (target / "a").write_text("came first")
    assert (tmp_path / "file").read_text() == "came first"
    assert (tmp_path / "directory" / "a").read_text() == "came first"
    assert len(list(tmp_path.iterdir())) == 2


def test_without_anything_there_it_appears(tmp_path: Path) -> None:
    with replaced(tmp_path / "a", overwrite=False) as new:
        new.write_text("new")
    assert (tmp_path / "a").read_text() == "new"


def test_names_may_be_as_long_as_the_file_system_allows(tmp_path: Path) -> None:
    for name in ("x" * 255, "ü" * 127):
        with replaced(tmp_path / name) as new:
            new.with_name(f"{new.name}.data").write_text("beside")
            new.with_name(f"{new.name}.data").unlink()
            new.write_text("new")
        assert (tmp_path / name).read_text() == "new"


WRITE = """
import os, signal, sys, time
from pathlib import Path
from wavprune.common import atomic
def wait():
    print("ready", flush=True)
    time.sleep(60)
with atomic.replaced(Path(sys.argv[1])) as new:
    if sys.argv[2] == "file":
        new.write_text("half")
        new.with_name(new.name + ".data").write_text("half")
    else:
        new.mkdir()
        (new / "a").write_text("half")
    wait()
"""


def interrupted(target: Path, kind: str, number: int) -> int:
    """Run a writer and send it a signal in the middle; returns its exit status."""
    command = [sys.executable, "-c", WRITE, str(target), kind]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        return process.wait()


@pytest.mark.parametrize("kind", ["file", "directory"])
@pytest.mark.skipif(sys.platform != "linux", reason="start times of processes are Linux's")
def test_what_a_killed_run_left_is_removed_by_the_next(tmp_path: Path, kind: str) -> None:
    target = tmp_path / "target"
    assert interrupted(target, kind, signal.SIGKILL) == -signal.SIGKILL
    assert [path for path in tmp_path.iterdir() if path.name.startswith(".target.")]
    foreign = tmp_path / ".other.wavprune-000000-1-1-00000000.tmp"
    foreign.touch()
    with replaced(tmp_path / "another") as new:
        own = new.name
        new.write_text("new")
        # What runs that go on have is left alone.
        with replaced(tmp_path / "third") as third:
            third.write_text("new")
        assert new.exists()
    assert own.endswith(".tmp")
    assert {path.name for path in tmp_path.iterdir()} == {"another", "third", foreign.name}


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing_behind_and_still_ends_the_run(
    tmp_path: Path, number: signal.Signals
) -> None:
    assert interrupted(tmp_path / "target", "directory", number) == -number
    assert list(tmp_path.iterdir()) == []


def test_signals_that_the_program_handles_are_left_to_it(tmp_path: Path) -> None:
    received: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, frame: received.append(number))
    try:
        with replaced(tmp_path / "a") as new:
            signal.raise_signal(signal.SIGTERM)
            new.write_text("new")
    finally:
        signal.signal(signal.SIGTERM, before)
    assert received == [signal.SIGTERM]
    assert (tmp_path / "a").read_text() == "new"


@pytest.mark.skipif(sys.platform != "linux", reason="two paths are exchanged on Linux")
def test_at_no_moment_is_a_directory_missing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nothing that could take the target away is called."""
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")

    def rename(path: Path, other: Path) -> Path:
        raise AssertionError(f"{path} is moved to {other}")

    monkeypatch.setattr(Path, "rename", rename)
    monkeypatch.setattr(Path, "replace", rename)
    with replaced(target) as new:
        new.mkdir()
        (new / "new").write_text("new")
    assert [path.name for path in target.iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def without_exchange(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(atomic, "_rename", lambda *_: False)


def test_directories_are_replaced_where_they_cannot_be_exchanged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_exchange(monkeypatch)
    test_a_directory_replaces_another(tmp_path)
    (tmp_path / "model" / "new").unlink()
    (tmp_path / "model").rmdir()
    test_what_is_there_is_not_replaced_unasked(tmp_path)


KILLED_BETWEEN = """
import os, sys
from pathlib import Path
from wavprune.common import atomic
atomic._rename = lambda *_: False
Path.replace = lambda *_: os._exit(1)
with atomic.replaced(Path(sys.argv[1])) as new:
    new.mkdir()
"""


def test_a_directory_that_a_kill_hid_comes_back(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "old").write_text("old")
    subprocess.run([sys.executable, "-c", KILLED_BETWEEN, str(target)], check=False)
    assert not target.exists()
    left = atomic.left_behind(target)
    assert left is not None
    assert (left / "old").read_text() == "old"
    with pytest.raises(RuntimeError, match="stop"), replaced(target):  # noqa: PT012  # the end
        assert (target / "old").read_text() == "old"
        raise RuntimeError("stop")
    assert (target / "old").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["model"]


def test_contents_and_names_are_synced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    synced: list[str] = []

    def fsync(descriptor: int) -> None:
        synced.append(str(Path(f"/proc/self/fd/{descriptor}").readlink()))

    monkeypatch.setattr(os, "fsync", fsync)
    with replaced(tmp_path / "model") as new:
        (new / "sub").mkdir(parents=True)
        (new / "sub" / "a").write_text("a")
    names = [Path(path).name for path in synced]
    assert "a" in names
    assert "sub" in names
    assert synced[-1] == str(tmp_path)
