"""ONNX models written to files, their external data copied tensor by tensor and never held."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from ..common.atomic import replaced
from ..errors import WavpruneError
from .model import LARGEST_FILE, Model, check_valid
from .tensors import (
    GraphTensor,
    all_tensors,
    copy_region,
    is_external,
    set_location,
    tensor_of,
)

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

# Where tensors begin in external data, so that they can be mapped: small ones need no page.
PAGE, SMALL, SMALL_ALIGNMENT = 4096, 1 << 16, 64
Region = tuple[Path, int, int]


def data_name(target: Path) -> str:
    """The name of a model's external data.

    Example:
        >>> data_name(Path("folder/net.onnx"))
        'net.onnx.data'
    """
    return f"{target.name}.data"


class DataFile:
    """External data that is being written.

    Args:
        path: where it is until it is complete.
        name: what it is called then.
    """

    def __init__(self, path: Path, name: str) -> None:
        self.path, self.name = path, name
        self._places: dict[Region, int] = {}
        self._moved: list[tuple[TensorProto, int, int]] = []
        self._end = 0

    def take(self, model: Model) -> None:
        """Copy the external data of a model, each part of a file once."""
        with self.path.open("wb") as out:
            for proto in all_tensors(model.proto):
                if is_external(proto):
                    tensor = tensor_of(proto, proto.name, model.folder)
                    self._moved.append((proto, self._copy(tensor, out), tensor.size))

    def _copy(self, tensor: GraphTensor, out: BinaryIO) -> int:
        assert tensor.path is not None
        region = (tensor.path, tensor.start, tensor.size)
        if region not in self._places:
            alignment = PAGE if tensor.size >= SMALL else SMALL_ALIGNMENT
            start = -(-self._end // alignment) * alignment
            out.write(b"\0" * (start - self._end))
            copy_region(*region, out)
            self._places[region], self._end = start, start + tensor.size
        return self._places[region]

    def mapped(self) -> torch.Tensor:
        """The bytes, to be read and changed where they are."""
        if not self._end:
            return torch.empty(0, dtype=torch.uint8)
        return torch.from_file(str(self.path), shared=True, size=self._end, dtype=torch.uint8)

    def place(self, tensor: GraphTensor) -> int:
        """Where the bytes of a tensor of the model are now."""
        assert tensor.path is not None
        return self._places[tensor.path, tensor.start, tensor.size]

    def point(self, name: str) -> None:
        """Have the model say that its data is in the file of this name."""
        for proto, start, size in self._moved:
            set_location(proto, name, start, size)


@contextmanager
def data_file(model: Model, target: Path, *, force: bool) -> Iterator[DataFile | None]:
    """The external data of a model that is to be at ``target``; None for one that has none.

    Raises:
        WavpruneError: it would replace a file, without ``force``.
    """
    if not model.has_external:
        yield None
        return
    path = target.parent / data_name(target)
    if not force and (path.exists() or path.is_symlink()):
        raise WavpruneError(f"{path} exists already; only --force replaces it")
    with replaced(path, overwrite=force) as new:
        yield DataFile(new, path.name)


def write_model(proto: ModelProto, path: Path, data: DataFile | None = None) -> None:
    """Write a model, and check what was written.

    Args:
        proto: the model.
        path: where, for the time being, beside its data.
        data: its external data.

    Raises:
        WavpruneError: it is not valid.
    """
    if data is not None:
        # The checker looks for the data, which has another name until everything is complete.
        data.point(data.path.name)
        path.write_bytes(serialized(proto))
        check_valid(path)
        data.point(data.name)
    path.write_bytes(serialized(proto))
    if data is None:
        check_valid(path)


def serialized(proto: ModelProto) -> bytes:
    """The bytes of a model, the same each time.

    Raises:
        WavpruneError: they are more than a file can have.
    """
    size = proto.ByteSize()
    if size > LARGEST_FILE:
        raise WavpruneError(f"the model would have {size:,} bytes; an .onnx file has at most 2 GB")
    data: bytes = proto.SerializeToString(deterministic=True)
    return data
