"""Zips of model directories: what is taken out of them, and what is refused."""

from __future__ import annotations

import re
import stat
import zipfile
from pathlib import Path, PurePosixPath

from ..errors import WavpruneError

# What a Hugging Face directory needs to be pruned and run; code, caches and other formats stay out.
SUFFIXES = (".safetensors", ".json", ".txt", ".model")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
MOST_ENTRIES = 4096
COPIED_AT_ONCE = 1 << 20
# Weights hardly shrink in a zip, and the longest runs of text by this much.
RATIO = 200
ALWAYS = 1 << 20


def unpack(archive: Path, directory: Path, most: int) -> list[str]:
    """Take the files of a model directory out of a zip.

    They lie at its top or in one folder. No name in the zip becomes a path: each must be a plain
    file name, and what it says of its size is checked against what comes out.

    Args:
        archive: the zip.
        directory: an empty directory for the files.
        most: bytes that all of them may have together.

    Returns:
        The names of the entries that were left out.

    Raises:
        WavpruneError: it is no zip, is hostile, too large, or holds no model.
    """
    try:
        with zipfile.ZipFile(archive) as file:
            return _unpack(file, directory, most)
    except (zipfile.BadZipFile, NotImplementedError, EOFError, ValueError, OSError) as error:
        if isinstance(error, WavpruneError):
            raise
        raise WavpruneError(f"the zip cannot be read: {error}") from error
    except Exception as error:
        # Broken streams end in zlib's and lzma's own errors.
        if type(error).__module__ not in ("zlib", "lzma", "_lzma", "bz2"):
            raise
        raise WavpruneError(f"the zip cannot be read: {error}") from error


def _unpack(file: zipfile.ZipFile, directory: Path, most: int) -> list[str]:
    entries = [entry for entry in file.infolist() if not entry.is_dir()]
    if len(entries) > MOST_ENTRIES:
        raise WavpruneError(f"the zip has {len(entries)} files; allowed: up to {MOST_ENTRIES}")
    for entry in entries:
        _check(entry)
    folders = {str(PurePosixPath(entry.filename).parent) for entry in entries}
    configs = {
        str(PurePosixPath(entry.filename).parent)
        for entry in entries
        if entry.filename.endswith((".safetensors", ".safetensors.index.json"))
    }
    if len(configs) != 1:
        found = "none" if not configs else f"{len(configs)} folders with them"
        raise WavpruneError(
            f"the zip must hold .safetensors files in one folder, and has {found}"
            + (f" ({', '.join(sorted(folders)[:4])})" if folders else "")
        )
    (folder,) = configs
    left_out, left, seen = [], most, set()
    for entry in entries:
        path = PurePosixPath(entry.filename)
        if str(path.parent) != folder or path.suffix not in SUFFIXES:
            left_out.append(entry.filename)
            continue
        if not NAME.fullmatch(path.name):
            raise WavpruneError(f"the zip has a file named {entry.filename!r}, which is refused")
        if path.name in seen:
            raise WavpruneError(f"the zip has two files named {entry.filename!r}")
        seen.add(path.name)
        left -= _extract(file, entry, directory / path.name, left, most)
    return left_out


def _check(entry: zipfile.ZipInfo) -> None:
    name = entry.orig_filename
    path = PurePosixPath(name)
    if path.is_absolute() or ".." in path.parts or re.search(r"[\\:\0-\x1f]", name):
        raise WavpruneError(f"the zip has a file named {name!r}, which leads out of it; refused")
    kind = stat.S_IFMT(entry.external_attr >> 16)
    if kind not in (0, stat.S_IFREG):
        raise WavpruneError(f"the zip has a link or device, {name!r}; refused")
    if entry.flag_bits & 1:
        raise WavpruneError(f"the zip has an encrypted file, {name!r}; refused")
    if entry.file_size > ALWAYS and entry.file_size > RATIO * max(1, entry.compress_size):
        raise WavpruneError(
            f"the zip has a file that unpacks to {entry.file_size:,} bytes from "
            f"{entry.compress_size:,}, {name!r}; allowed: up to {RATIO} times as many"
        )


def _extract(
    file: zipfile.ZipFile, entry: zipfile.ZipInfo, target: Path, left: int, most: int
) -> int:
    """Write one file; returns its bytes."""
    size = 0
    with file.open(entry) as source, target.open("xb") as out:
        while part := source.read(COPIED_AT_ONCE):
            size += len(part)
            if size > min(left, max(ALWAYS, RATIO * max(1, entry.compress_size))):
                raise WavpruneError(
                    f"the zip unpacks to more than {most:,} bytes, or {entry.filename!r} to more "
                    f"than {RATIO} times its own"
                )
            out.write(part)
    return size
