"""Tensors to compress, each read when its turn comes."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Hashable, Iterator, Mapping
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..common.tensors import memory_key
from ..engine.layers import unwrapped
from ..errors import WavpruneError
from ..graph import GraphWeight, Model, find_weights, parameters
from ..graph.model import metadata_of
from ..graph.tensors import GraphTensor
from ..pruned import KEY as PRUNED
from ..pruned import PrunedLayer, pruned_in
from .compressor import bytes_of
from .file_slice import FileSlice
from .formats import ONNX, open_checkpoint
from .formats.names import Weight, weights_of
from .formats.nesting import Nested, flatten
from .formats.safetensors import (
    BITS,
    COPIED_AT_ONCE,
    DTYPE_NAMES,
    METADATA,
    Entry,
    SafetensorsFile,
    reader_of,
)
from .formats.torchfile import TorchFile
from .pruned import pruned_of

# What other libraries look for.
PLAIN = {"format": "pt"}


class Tensor(NamedTuple):
    """A tensor that can be read.

    Attributes:
        name: in the state dict.
        dtype: as safetensors calls it.
        shape: of the tensor.
        size: bytes.
        read: gives it, contiguous, on the CPU, for the reader alone to change; as bytes where torch
            lacks the dtype.
        place: where these bytes lie in a file; None where they do not.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    read: Callable[[], torch.Tensor]
    place: FileSlice | None = None

    def pieces(self) -> Iterator[memoryview]:
        """Its bytes, not all at once where they lie in a file."""
        if self.place is None:
            yield bytes_of(self.read().reshape(-1).view(torch.uint8).numpy())
            return
        for start in range(0, self.size, COPIED_AT_ONCE):
            yield self.place[start : start + COPIED_AT_ONCE]


class Source(NamedTuple):
    """A model's tensors.

    Attributes:
        tensors: all of them by name, each memory once.
        aliases: name -> name of the tensor that is the same memory (tied weights).
        names: of all tensors and aliases, in the model's order.
        weights: those of layers, aliases among them.
        metadata: of the file they come from.
        skipped: layers that cannot be compressed, and why; they are stored as they are.
        left_out: entries of a nested checkpoint that are not stored: no tensors, or beside the
            state dict.
        prefix: what was taken off every name.
        pruned: layers that the file says were pruned; that entry is not in ``metadata``.
    """

    tensors: dict[str, Tensor]
    aliases: dict[str, str]
    names: list[str]
    weights: list[Weight]
    metadata: dict[str, str]
    skipped: dict[str, str]
    left_out: tuple[str, ...] = ()
    prefix: str = ""
    pruned: Mapping[str, PrunedLayer] = MappingProxyType({})

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(tensor.size for tensor in self.tensors.values())

    @property
    def elements(self) -> int:
        """Elements of all tensors."""
        return sum(math.prod(tensor.shape) for tensor in self.tensors.values())


def tensors_of(
    model: nn.Module | Mapping[str, Any] | Model | str | os.PathLike[str],
    scratch: Path | None = None,
) -> Source:
    """The tensors of a model, of a state dict, of a graph or of a checkpoint on disk.

    Args:
        model: where they are; names are those within wrappers such as ``DataParallel``.
        scratch: see ``open_checkpoint``.

    Raises:
        TypeError: it is none of those.
        WavpruneError: an entry is no dense tensor of a dtype that safetensors has, or the path
            holds no checkpoint.
    """
    if isinstance(model, nn.Module):
        model = unwrapped(model).state_dict()
    if isinstance(model, Mapping):
        return _of_nested(flatten(model))
    if isinstance(model, Model):
        return _of_graph(model)
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            "model must be a torch.nn.Module, a state dict or the path of a checkpoint, not "
            f"{type(model).__name__}"
        )
    if Path(model).suffix.lower() in ONNX:
        raise WavpruneError(
            f"{model} is a graph, which a compressed file does not hold; wavprune.onnx.save stores "
            "both"
        )
    checkpoint = open_checkpoint(model, scratch)
    tensors: dict[str, Tensor] = {}
    metadata: dict[str, str] = {}
    pruned: dict[str, PrunedLayer] = {}
    for file in checkpoint.files:
        if isinstance(file, TorchFile):
            return _of_nested(file.nested)
        assert isinstance(file, SafetensorsFile)
        metadata |= file.metadata
        pruned |= pruned_of(file)
        tensors |= {
            name: _in_file(name, e, file.path)
            # In the order of their bytes.
            for name, e in sorted(file.tensors.items(), key=lambda item: item[1].start)
        }
    weights, skipped = weights_of({name: tensor.shape for name, tensor in tensors.items()})
    metadata.pop(PRUNED, None)
    return Source(tensors, {}, list(tensors), weights, metadata, skipped, pruned=pruned)


def _in_file(name: str, entry: Entry, path: Path) -> Tensor:
    place = FileSlice(path, entry.start, entry.size)
    return Tensor(name, entry.dtype, entry.shape, entry.size, reader_of(path, entry), place)


def _of_graph(model: Model) -> Source:
    found, skipped = find_weights(model)
    names = parameters(model)
    weights = [Weight(w.layer, w.tensor, w.shape) for w in found if w.tensor in names]
    turned = {w.tensor: w for w in found if not w.in_order}
    tensors = {}
    for name in names:
        tensor, weight = model.tensors[name], turned.get(name)
        assert tensor.dtype is not None
        dtype = DTYPE_NAMES[tensor.dtype]
        # As torch has it, since reports, masks and targets of 2:4 are of that order.
        shape, read, place = tensor.shape, tensor.read, None
        if weight is not None:
            shape, read = weight.shape, partial(_read_turned, tensor, weight)
        elif tensor.path is not None:
            place = FileSlice(tensor.path, tensor.start, tensor.size)
        tensors[name] = Tensor(name, dtype, shape, tensor.size, read, place)
    pruned = pruned_in(metadata_of(model.proto))
    return Source(tensors, {}, names, weights, dict(PLAIN), skipped, pruned=pruned)


def _read_turned(tensor: GraphTensor, weight: GraphWeight) -> torch.Tensor:
    """The weight in torch's order, without a second one in the graph's."""
    if tensor.path is None:
        return weight.of(tensor.read()).contiguous()
    assert tensor.dtype is not None
    result = torch.empty(weight.shape, dtype=tensor.dtype)
    rows = weight.back(result)
    at_once = max(1, COPIED_AT_ONCE * len(rows) // max(tensor.size, 1))
    for start in range(0, len(rows), at_once):
        rows[start : start + at_once] = tensor.read_rows(start, start + at_once)
    return result


def _of_nested(nested: Nested) -> Source:
    tensors: dict[str, Tensor] = {}
    aliases: dict[str, str] = {}
    names: list[str] = []
    known: dict[Hashable, str] = {}
    left_out = list(nested.others)
    for path, tensor in nested.tensors.items():
        if not path.startswith(nested.prefix):
            left_out.append(path)
            continue
        name = path.removeprefix(nested.prefix)
        if name == METADATA:
            raise WavpruneError(
                f"a tensor is called {METADATA!r}, which safetensors keeps for itself; rename it"
            )
        names.append(name)
        first = known.setdefault(memory_key(tensor), name)
        if first == name:
            tensors[name] = _in_memory(name, tensor)
        else:
            aliases[name] = first
    weights, skipped = nested.weights, nested.skipped
    if nested.prefix:
        # Without the prefix, a layer may have another name.
        weights, skipped = weights_of(
            {name: nested.tensors[nested.prefix + name].shape for name in names}
        )
    entries = tuple(dict.fromkeys(_entry(path, nested.prefix) for path in left_out))
    return Source(tensors, aliases, names, weights, dict(PLAIN), skipped, entries, nested.prefix)


def _entry(path: str, prefix: str) -> str:
    """The whole name within the state dict, else that of the entry beside it."""
    if path.startswith(prefix):
        return path.removeprefix(prefix)
    beside = 0
    for part in prefix.split("."):
        if not path.startswith(f"{part}.", beside):
            break
        beside += len(part) + 1
    return path[:beside] + path[beside:].partition(".")[0]


def _in_memory(name: str, tensor: torch.Tensor) -> Tensor:
    reason = None
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        reason = "is sparse, quantized or on the meta device"
    elif is_traceable_wrapper_subclass(tensor):
        reason = f"is a {type(tensor).__name__}, a wrapper around other tensors"
    elif tensor.dtype not in DTYPE_NAMES:
        reason = f"has dtype {tensor.dtype}"
    if reason is not None:
        raise WavpruneError(f"{name!r} {reason}; allowed: dense tensors of {', '.join(BITS)}")

    def read() -> torch.Tensor:
        own = tensor.detach().resolve_conj().resolve_neg()
        return own.to("cpu", copy=True, memory_format=torch.contiguous_format)

    size = tensor.numel() * tensor.element_size()
    return Tensor(name, DTYPE_NAMES[tensor.dtype], tuple(tensor.shape), size, read)
