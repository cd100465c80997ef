"""Model directories: their weights, and everything else in them, copied with care for links."""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Collection, Iterator
from pathlib import Path

from ...common.files import check_regular
from ...errors import WavpruneError

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
# What compress writes in place of these.
COMPRESSED_WEIGHTS = "wavprune.safetensors"
LARGEST_INDEX = 1 << 28
# A copy of a model directory holds the pruned weights and no others.
WEIGHTS = (
    *(".safetensors", ".pt", ".pth", ".bin"),
    *(".ckpt", ".gguf", ".h5", ".keras", ".msgpack", ".npy", ".npz", ".onnx", ".onnx_data"),
    *(".ot", ".pb", ".pickle", ".pkl", ".tflite"),
)
CACHES = (".git", ".cache")


def shards(directory: Path) -> dict[str, set[str]]:
    """The tensors of each shard, as the directory's index has it.

    Raises:
        WavpruneError: the index is none, or names a file that is not beside it.
    """
    path = directory / INDEX
    check_regular(path)
    if path.stat().st_size > LARGEST_INDEX:
        raise WavpruneError(f"{path} is not an index: it has {path.stat().st_size:,} bytes")
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        result: dict[str, set[str]] = {str(shard): set() for shard in weight_map.values()}
        for name, shard in weight_map.items():
            result[shard].add(name)
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        raise WavpruneError(
            f"{path} is not an index: a JSON object whose 'weight_map' gives each tensor's file"
        ) from error
    for shard in result:
        if Path(shard).name != shard or not shard.endswith(".safetensors"):
            raise WavpruneError(f"{path} names {shard!r}, not a safetensors file beside it")
        if not (directory / shard).exists():
            raise WavpruneError(f"{path} names {shard}, which does not exist")
    return result


def copy_others(
    source: Path, new: Path, pruned: Collection[str], index: str | None, *, in_place: bool
) -> None:
    """Copy what makes a model directory complete: all of it in place, else all but weights.

    In place, links stay links. In a copy, a link within the directory is kept if it leads to a
    directory and followed if it leads to a file; so are files of a Hugging Face cache, where every
    file is a link into its ``blobs``.

    Args:
        source: the model directory.
        new: the copy, which holds the pruned weights already.
        pruned: the names of those.
        index: the name of the shards' index, if there is one.
        in_place: True where the copy will take the place of the source.

    Raises:
        OSError: a link leads nowhere, or reading or writing failed.
        WavpruneError: a link leads out of the directory, or an entry is no file.
    """
    root = source.resolve()
    for path in _entries(source):
        relative = path.relative_to(source)
        name = path.name
        if len(relative.parts) == 1 and name in pruned:
            continue
        if not in_place and name != index and _left_out(relative):
            continue
        target = new / relative
        if path.is_symlink() and (in_place or path.is_dir()):
            link = path.readlink()
            if not in_place:
                link = Path(os.path.relpath(_within(path, root), path.parent.resolve()))
            target.symlink_to(link)
        elif path.is_dir():
            target.mkdir()
            shutil.copystat(path, target)
        else:
            if path.is_symlink():
                _check_link(path, root)
            check_regular(path)
            shutil.copy2(path, target)
    if in_place:
        for name in pruned:
            shutil.copymode(source / name, new / name)


def _entries(directory: Path) -> Iterator[Path]:
    """Everything below a directory, each directory before what is in it; links not followed."""
    for path in sorted(directory.iterdir()):
        yield path
        if path.is_dir() and not path.is_symlink():
            yield from _entries(path)


def _left_out(relative: Path) -> bool:
    """True for weight files of every format, the indices of their shards, and caches."""
    if any(part in CACHES for part in relative.parts):
        return True
    return Path(relative.name.removesuffix(".index.json")).suffix.lower() in WEIGHTS


def _within(path: Path, root: Path) -> Path:
    """What a link leads to, which must lie in the directory."""
    target = path.resolve()
    if target != root and root not in target.parents:
        raise WavpruneError(
            f"{path} is a link to {target}, out of the model directory, and is not followed; put a "
            "copy in its place or remove it"
        )
    return target


def _check_link(path: Path, root: Path) -> None:
    try:
        target = path.resolve(strict=True)
    except OSError as error:
        raise OSError(error.errno or errno.ENOENT, "broken link", str(path)) from error
    # <model>/snapshots/<revision>/<file> -> <model>/blobs/<hash>
    if root.parent.name == "snapshots" and target.parent == root.parent.parent / "blobs":
        return
    _within(path, root)
