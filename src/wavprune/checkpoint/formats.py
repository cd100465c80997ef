"""The checkpoints that can be pruned: what lies at a path, and its 4-D ``*.weight`` tensors.

Pruning changes neither shapes nor dtypes, so a pruned safetensors file is its input with other
bytes where the pruned tensors lie. It is therefore copied, the copy is mapped into memory, and the
mapped tensors are pruned in place: header, metadata and all other tensors stay as they are, and
the operating system holds no more of the file than it likes.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import warnings
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open

from ..engine.layers import LayerRef

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
SAFETENSORS = (".safetensors",)
STATE_DICTS = (".pt", ".pth", ".bin")
ALLOWED = (
    "a .safetensors file, a .pt, .pth or .bin state dict, or a directory that holds "
    f"{SINGLE} or {INDEX}"
)
DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class WeightFile(Protocol):
    """One file of a checkpoint.

    Attributes:
        path: where it is.
        layers: the names of its layers: those of its 4-D ``*.weight`` tensors, without the suffix.
    """

    path: Path
    layers: list[str]

    def open(
        self, layers: Sequence[str], copy: Path | None
    ) -> AbstractContextManager[list[LayerRef]]:
        """The weights of some layers, to be read or changed.

        When the block ends without an error, ``copy`` is the whole file with the weights as they
        are then; None writes nothing. The file at ``path`` never changes.
        """
        ...


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The weights at a path.

    Attributes:
        path: a file, or the directory of ``files``.
        files: in the order of the index.
        index: the name of the index that lists them, where there is one.
    """

    path: Path
    files: Sequence[WeightFile]
    index: str | None = None

    @property
    def layers(self) -> list[str]:
        """The names of all layers."""
        return [layer for file in self.files for layer in file.layers]

    def weights(self) -> Iterator[LayerRef]:
        """The weights of all layers, one after the other, to be read."""
        for file in self.files:
            for layer in file.layers:
                with file.open([layer], None) as refs:
                    yield from refs


def open_checkpoint(path: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint at a path, with the names of its layers.

    Args:
        path: a ``.safetensors`` file; a ``.pt``, ``.pth`` or ``.bin`` state dict; or a directory
            with ``model.safetensors``, or with ``model.safetensors.index.json`` and its shards.

    Raises:
        ValueError: there is no such checkpoint, it is broken, it needs pickle, or it holds no 4-D
            ``*.weight`` tensor.
    """
    path = Path(path)
    if path.is_dir():
        checkpoint = _open_directory(path)
    elif not path.exists():
        raise ValueError(f"{path} does not exist; allowed: {ALLOWED}")
    elif path.suffix.lower() in SAFETENSORS:
        checkpoint = Checkpoint(path, [SafetensorsFile(path)])
    elif path.suffix.lower() in STATE_DICTS:
        checkpoint = Checkpoint(path, [StateDictFile(path)])
    else:
        raise ValueError(f"{path} is of no kind that can be pruned; allowed: {ALLOWED}")
    if not checkpoint.layers:
        raise ValueError(f"{path} holds no 4-D '*.weight' tensor, so there is nothing to prune")
    return checkpoint


class Entry(NamedTuple):
    """A tensor of a safetensors file.

    Attributes:
        dtype: as safetensors calls it, such as ``"F32"``.
        shape: of the tensor.
        start: where its bytes begin in the file.
        stop: where they end.
    """

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class SafetensorsFile:
    """A safetensors file; see ``WeightFile``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.tensors, _ = safetensors_header(path)
        self.layers = [
            name.removesuffix(".weight")
            for name, tensor in self.tensors.items()
            if _is_layer(name, tensor.shape)
        ]

    @contextmanager
    def open(self, layers: Sequence[str], copy: Path | None) -> Iterator[list[LayerRef]]:
        """The weights of some layers, mapped; see ``WeightFile``."""
        if copy is not None:
            shutil.copyfile(self.path, copy)
        mapped = copy or self.path
        content = torch.from_file(
            str(mapped), shared=copy is not None, size=mapped.stat().st_size, dtype=torch.uint8
        )
        refs, unaligned = [], []
        for layer in layers:
            tensor = self.tensors[f"{layer}.weight"]
            if tensor.dtype not in DTYPES:
                raise ValueError(
                    f"layer {layer!r}: its weight has dtype {tensor.dtype}; ignore that layer"
                )
            dtype = DTYPES[tensor.dtype]
            values = content[tensor.start : tensor.stop]
            if tensor.start % dtype.itemsize:
                place, values = values, values.clone()
                unaligned.append((place, values))
            refs.append(LayerRef(layer, values.view(dtype).view(tensor.shape)))
        yield refs
        for place, values in unaligned:
            place.copy_(values)
        if copy is not None:
            with copy.open("rb") as file:
                os.fsync(file.fileno())


class StateDictFile:
    """A dict of tensors, or of such dicts, that ``torch.save`` wrote; see ``WeightFile``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._content = _load(path)
        self._weights: dict[str, torch.Tensor] = {}
        # A tensor that is there under several names becomes one object, to be pruned once.
        distinct: dict[Any, torch.Tensor] = {}
        for name, tensor in _walk(self._content, ""):
            if _is_layer(name, tensor.shape):
                layer = name.removesuffix(".weight")
                self._weights[layer] = distinct.setdefault(_place(tensor), tensor)
        self.layers = list(self._weights)

    @contextmanager
    def open(self, layers: Sequence[str], copy: Path | None) -> Iterator[list[LayerRef]]:
        """The weights of some layers; see ``WeightFile``."""
        yield [LayerRef(layer, self._weights[layer]) for layer in layers]
        if copy is not None:
            # Given a path, torch.save writes its name, here a random one, into the file.
            with copy.open("wb") as file:
                torch.save(self._content, file)
                file.flush()
                os.fsync(file.fileno())


def _is_layer(name: str, shape: Sequence[int]) -> bool:
    return name.endswith(".weight") and len(shape) == 4 and 0 not in shape


def safetensors_header(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """The tensors of a safetensors file, in the order of its header, and its metadata.

    Raises:
        ValueError: the file is no whole safetensors file.
    """
    try:
        # It checks that lengths, shapes, offsets and dtypes agree with each other and the file.
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} cannot be read as a safetensors file: {error}") from error
    with path.open("rb") as file:
        size = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(size))
    metadata = header.pop("__metadata__", None) or {}
    entries = {}
    for name, entry in header.items():
        start, stop = (8 + size + offset for offset in entry["data_offsets"])
        entries[name] = Entry(entry["dtype"], tuple(entry["shape"]), start, stop)
    return entries, metadata


def _load(path: Path) -> Any:
    try:
        with warnings.catch_warnings():
            # What torch warns of here, it also fails on, or it does not matter to a state dict.
            warnings.simplefilter("ignore")
            return torch.load(path, map_location="cpu", weights_only=True, mmap=_mappable(path))
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = f" of {named[1]}" if named else ""
        raise ValueError(
            f"{path} cannot be read without unpickling{what}, which would run whatever code is in "
            "the file, so it is refused; save a state dict of plain tensors, or safetensors"
        ) from error
    except Exception as error:  # bytes that are no checkpoint fail in every way there is
        reason = (str(error).splitlines() or [""])[0]
        raise ValueError(
            f"{path} cannot be read as a file of torch.save: {type(error).__name__}: {reason}"
        ) from error


def _mappable(path: Path) -> bool:
    """True where the file is of the zip format and its tensors lie in it as they are."""
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        return all(entry.compress_type == zipfile.ZIP_STORED for entry in archive.infolist())


def _walk(content: Any, prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(content, torch.Tensor):
        yield prefix, content
    elif isinstance(content, dict):
        for key, value in content.items():
            yield from _walk(value, f"{prefix}.{key}" if prefix else str(key))


def _place(tensor: torch.Tensor) -> Any:
    if tensor.layout != torch.strided:
        return id(tensor)
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _open_directory(path: Path) -> Checkpoint:
    if (path / SINGLE).exists():
        return Checkpoint(path, [SafetensorsFile(path / SINGLE)])
    if not (path / INDEX).exists():
        raise ValueError(f"{path} holds neither {SINGLE} nor {INDEX}; allowed: {ALLOWED}")
    files = []
    for shard, names in _read_index(path / INDEX).items():
        if Path(shard).name != shard or not shard.endswith(SAFETENSORS):
            raise ValueError(f"{path / INDEX} names {shard!r}, not a safetensors file beside it")
        if not (path / shard).exists():
            raise ValueError(f"{path / INDEX} names {shard}, which does not exist")
        file = SafetensorsFile(path / shard)
        wrong = sorted(names ^ file.tensors.keys())
        if wrong:
            says = "says" if wrong[0] in names else "does not say"
            raise ValueError(f"{path / INDEX} {says} that {wrong[0]!r} is in {shard}; it errs")
        files.append(file)
    return Checkpoint(path, files, INDEX)


def _read_index(path: Path) -> dict[str, set[str]]:
    """The tensors of each shard, as the index has it."""
    try:
        weight_map = json.loads(path.read_bytes())["weight_map"]
        shards: dict[str, set[str]] = {str(shard): set() for shard in weight_map.values()}
        for name, shard in weight_map.items():
            shards[shard].add(name)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{path} is not an index: a JSON object whose 'weight_map' gives each tensor's file"
        ) from error
    return shards
