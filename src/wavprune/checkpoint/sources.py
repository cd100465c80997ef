"""Tensors to compress, each read when its turn comes."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from .coders import bytes_of
from .container import read_header
from .formats import DTYPES, SafetensorsFile, open_checkpoint

# What other libraries look for.
PLAIN = {"format": "pt"}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Tensor(NamedTuple):
    """A tensor that can be read.

    Attributes:
        name: in the state dict.
        dtype: as safetensors calls it.
        shape: of the tensor.
        size: bytes.
        read: gives it, contiguous, on the CPU, for the reader alone to change.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    size: int
    read: Callable[[], torch.Tensor]


class Source(NamedTuple):
    """A model's tensors.

    Attributes:
        tensors: all of them.
        metadata: of the file they come from.
    """

    tensors: list[Tensor]
    metadata: dict[str, str]


def tensors_of(model: nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str]) -> Source:
    """The tensors of a model, of a state dict or of a checkpoint on disk.

    Raises:
        TypeError: it is none of those.
        ValueError: an entry is no dense tensor of a dtype that safetensors has, or the path holds
            no checkpoint.
    """
    if isinstance(model, nn.Module):
        model = model.state_dict()
    if isinstance(model, Mapping):
        return Source([_in_memory(name, tensor) for name, tensor in model.items()], dict(PLAIN))
    if not isinstance(model, str | os.PathLike):
        raise TypeError(
            "model must be a torch.nn.Module, a state dict or the path of a checkpoint, not "
            f"{type(model).__name__}"
        )
    checkpoint = open_checkpoint(model)
    tensors: list[Tensor] = []
    metadata: dict[str, str] = {}
    for file in checkpoint.files:
        if not isinstance(file, SafetensorsFile):
            return Source(_of_state_dict(file.path), dict(PLAIN))
        entries, own = read_header(file.path)
        metadata |= own
        tensors += [
            Tensor(name, e.dtype, e.shape, e.stop - e.start, _reader(file.path, *e))
            for name, e in entries.items()
        ]
    return Source(tensors, metadata)


def _in_memory(name: str, tensor: Any) -> Tensor:
    reason = None
    if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
        reason = f"is a {type(tensor).__name__}"
    elif tensor.layout != torch.strided or tensor.is_quantized or tensor.is_meta:
        reason = "is sparse, quantised or on the meta device"
    elif tensor.dtype not in NAMES:
        reason = f"has dtype {tensor.dtype}"
    if reason is not None:
        raise ValueError(
            f"{name!r} {reason}; allowed: dense tensors of {', '.join(NAMES.values())}"
        )

    def read() -> torch.Tensor:
        own: torch.Tensor = tensor.detach()
        return own.to("cpu", copy=True, memory_format=torch.contiguous_format)

    size = tensor.numel() * tensor.element_size()
    return Tensor(name, NAMES[tensor.dtype], tuple(tensor.shape), size, read)


def _reader(
    path: Path, dtype: str, shape: tuple[int, ...], start: int, stop: int
) -> Callable[[], torch.Tensor]:
    def read() -> torch.Tensor:
        data = torch.empty(stop - start, dtype=torch.uint8)
        with path.open("rb") as file:
            file.seek(start)
            if file.readinto(bytes_of(data.numpy())) != stop - start:
                raise ValueError(f"{path} ended while it was read")
        # What torch has no name for is copied as bytes.
        return data.view(DTYPES[dtype]).view(shape) if dtype in DTYPES else data

    return read


def _of_state_dict(path: Path) -> list[Tensor]:
    content = torch.load(path, map_location="cpu", weights_only=True)
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    return [_in_memory(name, tensor) for name, tensor in content.items()]
