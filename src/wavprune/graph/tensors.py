"""The tensors of an ONNX model: where their bytes are, checked before one of them is read."""

from __future__ import annotations

import math
import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from ..common.files import read_exactly
from ..common.optional import require
from ..errors import WavpruneError

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

EXTRA = "onnx"
PURPOSE = "an ONNX model"
LARGEST = 1 << 48
# TensorProto.DataType -> its name, the bits of a value, and torch's dtype where it has one. Bits of
# None: strings.
TYPES: dict[int, tuple[str, int | None, torch.dtype | None]] = {
    1: ("FLOAT", 32, torch.float32),
    2: ("UINT8", 8, torch.uint8),
    3: ("INT8", 8, torch.int8),
    4: ("UINT16", 16, torch.uint16),
    5: ("INT16", 16, torch.int16),
    6: ("INT32", 32, torch.int32),
    7: ("INT64", 64, torch.int64),
    8: ("STRING", None, None),
    9: ("BOOL", 8, torch.bool),
    10: ("FLOAT16", 16, torch.float16),
    11: ("DOUBLE", 64, torch.float64),
    12: ("UINT32", 32, torch.uint32),
    13: ("UINT64", 64, torch.uint64),
    14: ("COMPLEX64", 64, torch.complex64),
    15: ("COMPLEX128", 128, torch.complex128),
    16: ("BFLOAT16", 16, torch.bfloat16),
    17: ("FLOAT8E4M3FN", 8, torch.float8_e4m3fn),
    18: ("FLOAT8E4M3FNUZ", 8, torch.float8_e4m3fnuz),
    19: ("FLOAT8E5M2", 8, torch.float8_e5m2),
    20: ("FLOAT8E5M2FNUZ", 8, torch.float8_e5m2fnuz),
    21: ("UINT4", 4, None),
    22: ("INT4", 4, None),
    23: ("FLOAT4E2M1", 4, None),
    24: ("FLOAT8E8M0", 8, torch.float8_e8m0fnu),
    25: ("UINT2", 2, None),
    26: ("INT2", 2, None),
}
FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
# Where values are that are not bytes, and how many entries a value has there.
_FIELDS = {
    **dict.fromkeys((1, 14), "float_data"),
    **dict.fromkeys((11, 15), "double_data"),
    7: "int64_data",
    **dict.fromkeys((12, 13), "uint64_data"),
    8: "string_data",
}
_COMPLEX = (14, 15)


@dataclass(frozen=True, slots=True)
class GraphTensor:
    """A tensor of a graph.

    Attributes:
        name: of the initializer, or of the output of the ``Constant``.
        proto: the message that holds it or says where it is.
        shape: of the tensor.
        path: of the file that holds its bytes; None where the message does.
        start: where they begin in that file.
        size: how many bytes it has, without padding.
    """

    name: str
    proto: TensorProto
    shape: tuple[int, ...]
    path: Path | None
    start: int
    size: int

    @property
    def dtype(self) -> torch.dtype | None:
        """As torch calls it, where it has it."""
        return TYPES[self.proto.data_type][2]

    @property
    def type_name(self) -> str:
        """As ONNX calls the dtype."""
        return TYPES[self.proto.data_type][0]

    @property
    def numel(self) -> int:
        """How many values it has."""
        return math.prod(self.shape)

    def read(self) -> torch.Tensor:
        """The values, in memory of their own.

        Raises:
            WavpruneError: torch lacks the dtype, or the file was cut off.
        """
        if self.path is not None and self.shape:
            return self.read_rows(0, self.shape[0])
        dtype = self._checked_dtype()
        if not self.numel:
            return torch.empty(self.shape, dtype=dtype)
        if self.path is not None:
            data = read_exactly(self.path, self.start, self.size)
        elif self.proto.HasField("raw_data"):
            data = bytearray(self.proto.raw_data)
        else:
            numpy_helper = require("onnx.numpy_helper", extra=EXTRA, purpose=PURPOSE)
            values = np.ascontiguousarray(numpy_helper.to_array(self.proto)).reshape(-1)
            data = bytearray(values.view(np.uint8))
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(self.shape)

    def read_rows(self, start: int, stop: int) -> torch.Tensor:
        """Entries of the first axis, as ``read``; what is in another file is not read beyond them.

        Args:
            start: the first.
            stop: after the last, or more than there are.

        Raises:
            WavpruneError: as ``read``.
        """
        if self.path is None:
            return self.read()[start:stop]
        dtype = self._checked_dtype()
        shape = (min(stop, self.shape[0]) - start, *self.shape[1:])
        if not math.prod(shape):
            return torch.empty(shape, dtype=dtype)
        row = self.size // self.shape[0]
        data = read_exactly(self.path, self.start + start * row, shape[0] * row)
        return torch.frombuffer(data, dtype=torch.uint8).view(dtype).view(shape)

    def _checked_dtype(self) -> torch.dtype:
        if self.dtype is None:
            raise WavpruneError(f"tensor {self.name!r} is {self.type_name}, which torch lacks")
        return self.dtype


def set_values(proto: TensorProto, values: torch.Tensor) -> None:
    """Put other values into a message of the same shape and dtype."""
    dtype = TYPES[proto.data_type][2]
    assert dtype is not None
    data = values.detach().cpu().to(dtype).contiguous().reshape(-1).view(torch.uint8)
    clear_values(proto)
    proto.raw_data = data.numpy().tobytes()


def take_in(proto: TensorProto, folder: Path | None) -> None:
    """Put the bytes that a message has in another file into the message.

    Raises:
        WavpruneError: as ``tensor_of``, or the file was cut off.
    """
    tensor = tensor_of(proto, proto.name, folder)
    assert tensor.path is not None
    data = read_exactly(tensor.path, tensor.start, tensor.size)
    clear_values(proto)
    proto.raw_data = bytes(data)


def clear_values(proto: TensorProto) -> None:
    """Take the values out of a message, and the reference to a file."""
    for field in (*_FIELDS.values(), "int32_data", "raw_data", "external_data", "data_location"):
        proto.ClearField(field)


def is_external(proto: TensorProto) -> bool:
    """True where the bytes lie in another file."""
    return proto.data_location == 1


def location(proto: TensorProto) -> dict[str, str]:
    """What a message says of the file that holds its bytes."""
    return {entry.key: entry.value for entry in proto.external_data}


def set_location(proto: TensorProto, name: str, start: int | None, size: int | None) -> None:
    """Say in which file, and where in it, the bytes of a tensor are."""
    clear_values(proto)
    proto.data_location = 1  # type: ignore[assignment]  # TensorProto.EXTERNAL
    said = {"location": name, "offset": start, "length": size}
    for key, value in said.items():
        if value is not None:
            entry = proto.external_data.add()
            entry.key, entry.value = key, str(value)


def tensor_of(proto: TensorProto, name: str, folder: Path | None) -> GraphTensor:
    """A tensor whose shape, dtype and place agree with each other.

    Args:
        proto: the message.
        name: of the tensor.
        folder: which must hold the files that messages name; None for a model in memory.

    Raises:
        WavpruneError: they do not.
    """
    try:
        return _tensor_of(proto, name, folder)
    except WavpruneError as error:
        raise WavpruneError(f"tensor {name!r} {error}") from error


def _tensor_of(proto: TensorProto, name: str, folder: Path | None) -> GraphTensor:
    if proto.data_type not in TYPES:
        known = ", ".join(name for name, _, _ in TYPES.values())
        raise WavpruneError(f"has the dtype {proto.data_type}; known: {known}")
    type_name, bits, _ = TYPES[proto.data_type]
    shape = tuple(proto.dims)
    shown = "x".join(map(str, shape))
    if any(size < 0 for size in shape) or math.prod(shape) > LARGEST:
        raise WavpruneError(f"is said to be {shown}; allowed: up to {LARGEST:,} values")
    numel = math.prod(shape)
    if proto.HasField("segment"):
        raise WavpruneError("is one segment of a tensor; allowed: whole tensors")
    if bits is None:
        if is_external(proto) or len(proto.string_data) != numel:
            raise WavpruneError(f"has {len(proto.string_data):,} strings; {shown} needs {numel:,}")
        return GraphTensor(name, proto, shape, None, 0, 0)
    size = -(-numel * bits // 8)
    if is_external(proto):
        path, start = _place(proto, size, folder)
        return GraphTensor(name, proto, shape, path, start, size)
    if proto.HasField("raw_data"):
        if len(proto.raw_data) != size:
            raise WavpruneError(
                f"has {len(proto.raw_data):,} bytes; {type_name} of {shown} needs {size:,}"
            )
    else:
        field = _FIELDS.get(proto.data_type, "int32_data")
        needed = 2 * numel if proto.data_type in _COMPLEX else numel
        # int32_data holds two values of 4 bits, or four of 2, an entry.
        needed = -(-numel * bits // 8) if bits < 8 else needed
        found = len(getattr(proto, field))
        if found != needed:
            raise WavpruneError(f"has {found:,} values in {field}; {shown} needs {needed:,}")
    return GraphTensor(name, proto, shape, None, 0, size)


def _place(proto: TensorProto, size: int, folder: Path | None) -> tuple[Path, int]:
    """The file of a tensor's bytes, which must be in the model's folder, and where they begin."""
    said = location(proto)
    name = said.get("location", "")
    if folder is None:
        raise WavpruneError(
            f"is in another file, {name!r}, which a model in memory does not know; load it with "
            "its data, or give the path of the .onnx file"
        )
    parts = PurePosixPath(name).parts
    if not parts or "\\" in name or "\0" in name or name.startswith("/") or ".." in parts:
        raise WavpruneError(f"is in {name!r}; allowed: a file in the folder of the model")
    path = folder
    for part in parts:
        path = path / part
        if path.is_symlink():
            raise WavpruneError(f"is in {name!r}, of which {part!r} is a link; allowed: a file")
    try:
        status = path.stat()
    except (OSError, ValueError):
        raise WavpruneError(f"is in {name!r}, which does not exist in {folder}") from None
    if not stat.S_ISREG(status.st_mode):
        raise WavpruneError(f"is in {name!r}, which is no file")
    start = _number(said, "offset", 0)
    length = _number(said, "length", size)
    if length != size:
        raise WavpruneError(f"is said to have {length:,} bytes; its shape needs {size:,}")
    if start + size > status.st_size:
        raise WavpruneError(
            f"ends at byte {start + size:,} of {name!r}, which has {status.st_size:,}"
        )
    return path, start


def _number(said: dict[str, str], key: str, default: int) -> int:
    text = said.get(key, "")
    if not text:
        return default
    if not text.isascii() or not text.isdecimal() or len(text) > 18:
        raise WavpruneError(f"has the {key} {text[:40]!r}; allowed: a natural number")
    return int(text)


def all_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model, in subgraphs, attributes and functions too."""
    yield from model.graph.initializer
    yield from inner_tensors(model)


def inner_tensors(model: ModelProto) -> Iterator[TensorProto]:
    """Every tensor of a model but the initializers of its main graph."""
    graphs: list[Any] = [*model.functions]
    graph: Any = model.graph
    while True:
        for sparse in getattr(graph, "sparse_initializer", ()):
            yield from (sparse.values, sparse.indices)
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.HasField("t"):
                    yield attribute.t
                yield from attribute.tensors
                if attribute.HasField("sparse_tensor"):
                    yield from (attribute.sparse_tensor.values, attribute.sparse_tensor.indices)
                graphs += [*([attribute.g] if attribute.HasField("g") else []), *attribute.graphs]
        if not graphs:
            return
        graph = graphs.pop()
        yield from getattr(graph, "initializer", ())


def copy_region(source: Path, start: int, size: int, target: Any) -> None:
    """Append a part of a file to an open one, without holding it in memory.

    Raises:
        WavpruneError: the file ends before.
    """
    with source.open("rb") as file:
        file.seek(start, os.SEEK_SET)
        left = size
        while left:
            part = file.read(min(left, 1 << 22))
            if not part:
                raise WavpruneError(f"{source} was cut off while it was read")
            target.write(part)
            left -= len(part)
