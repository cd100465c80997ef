from __future__ import annotations

import stat
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from wavprune.errors import WavpruneError
from wavprune.service import archives

MOST = 1 << 22
Entries = dict[str, bytes]


def pack(
    path: Path, entries: Entries, change: Callable[[zipfile.ZipInfo], None] | None = None
) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in entries.items():
            entry = zipfile.ZipInfo("placeholder")
            entry.filename, entry.compress_type = name, zipfile.ZIP_DEFLATED
            if change is not None:
                change(entry)
            archive.writestr(entry, content)
    return path


def unpack(path: Path, entries: Entries, **how: Callable[[zipfile.ZipInfo], None]) -> list[str]:
    target = path / "out"
    target.mkdir()
    return archives.unpack(pack(path / "a.zip", entries, **how), target, MOST)


@pytest.mark.parametrize("folder", ["", "model/"])
def test_a_model_is_taken_out_and_code_is_not(tmp_path: Path, folder: str) -> None:
    names = ("config.json", "model.safetensors", "modeling.py", "weights.bin")
    left_out = unpack(tmp_path, {folder + name: b"x" for name in names})
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == list(names[:2])
    assert left_out == [folder + name for name in names[2:]]


@pytest.mark.parametrize(
    "name",
    [
        "../model.safetensors",
        "/model.safetensors",
        "a/../../m.safetensors",
        "..\\m.safetensors",
        "C:m.safetensors",
        "m\n.safetensors",
        " .safetensors",
        "é.safetensors",
    ],
)
def test_names_never_become_paths(tmp_path: Path, name: str) -> None:
    with pytest.raises(WavpruneError, match="the zip has a file named"):
        unpack(tmp_path, {name: b"x"})
    assert not list((tmp_path / "out").iterdir())
    assert {path.name for path in tmp_path.iterdir()} == {"a.zip", "out"}


def test_links_are_refused(tmp_path: Path) -> None:
    def link(entry: zipfile.ZipInfo) -> None:
        entry.external_attr = (stat.S_IFLNK | 0o777) << 16

    with pytest.raises(WavpruneError, match=r"a link or device, 'model\.safetensors'"):
        unpack(tmp_path, {"model.safetensors": b"/etc/passwd"}, change=link)


def test_bombs_are_refused(tmp_path: Path) -> None:
    with pytest.raises(WavpruneError, match=r"unpacks to 8,388,608 bytes from \d,"):
        unpack(tmp_path, {"model.safetensors": bytes(1 << 23)})


def test_a_bomb_that_says_less_is_refused(tmp_path: Path) -> None:
    archive = pack(tmp_path / "a.zip", {"model.safetensors": bytes(1 << 23)})
    content = archive.read_bytes()
    honest, lie = (1 << 23).to_bytes(4, "little"), (1000).to_bytes(4, "little")
    assert content.count(honest) == 2
    archive.write_bytes(content.replace(honest, lie))
    (tmp_path / "out").mkdir()
    with pytest.raises(WavpruneError, match="the zip"):
        archives.unpack(archive, tmp_path / "out", MOST)
    assert sum(path.stat().st_size for path in (tmp_path / "out").iterdir()) <= 1000


def test_what_is_larger_altogether_is_refused(tmp_path: Path) -> None:
    import random

    content = random.Random(0).randbytes(MOST // 2 + 1)
    names = ("model.safetensors", "b.safetensors")
    with pytest.raises(WavpruneError, match="unpacks to more than 4,194,304 bytes"):
        unpack(tmp_path, dict.fromkeys(names, content))


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ({}, "must hold .safetensors files in one folder, and has none"),
        ({"a/x.safetensors": b"x", "b/x.safetensors": b"x"}, "2 folders with them"),
        ({f"{i}.json": b"" for i in range(4097)}, "has 4097 files; allowed: up to 4096"),
    ],
)
def test_what_is_no_model_is_refused(tmp_path: Path, entries: Entries, message: str) -> None:
    with pytest.raises(WavpruneError, match=message):
        unpack(tmp_path, entries)


@pytest.mark.parametrize("cut", [10, 60, 120])
def test_a_broken_zip_is_refused(tmp_path: Path, cut: int) -> None:
    archive = pack(tmp_path / "a.zip", {"model.safetensors": bytes(range(256)) * 8})
    content = bytearray(archive.read_bytes())
    content[cut] ^= 0xFF
    archive.write_bytes(content[:-4] if cut == 10 else content)
    (tmp_path / "out").mkdir()
    with pytest.raises(WavpruneError, match="the zip"):
        archives.unpack(archive, tmp_path / "out", MOST)
