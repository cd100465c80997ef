"""ONNX models written to files, their external data copied tensor by tensor and never held."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO

import torch

from ..common.atomic import replaced
from ..errors import WavpruneError
from .model import LARGEST_FILE, Model, check_valid, set_metadata
from .tensors import (
    GraphTensor,
    all_tensors,
    copy_region,
    is_external,
    set_location,
    set_values,
    tensor_of,
)

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

# Where tensors begin in external data, so that they can be mapped: small ones need no page.
PAGE, SMALL, SMALL_ALIGNMENT = 4096, 1 << 16, 64
# A model of more bytes than this gets external data.
INLINE = 1 << 30
# Tensors may overlap in external data, and are apart in copies of it.
MOST_COPIES = 8
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
        self._places: dict[Region | str, int] = {}
        self._moved: list[tuple[TensorProto, int, int]] = []
        self._end = 0

    def take(self, model: Model, changing: Collection[str] = ()) -> None:
        """Copy the external data of a model, each part of a file once.

        Args:
            model: the model, whose tensors may be in the same part of a file.
            changing: tensors that get bytes of their own, as others must not change with them.

        Raises:
            WavpruneError: the parts come to far more than the files.
        """
        names = {id(tensor.proto): name for name, tensor in model.tensors.items()}
        found = []
        for proto in all_tensors(model.proto):
            if is_external(proto):
                name = names.get(id(proto), proto.name)
                tensor = tensor_of(proto, name, model.folder)
                found.append((proto, tensor, name if name in changing else _region(tensor)))
        _check_sizes({key: tensor for _, tensor, key in found})
        with self.path.open("wb") as out:
            for proto, tensor, key in found:
                if key not in self._places:
                    self._places[key] = self._align(tensor.size, out)
                    copy_region(*_region(tensor), out)
                    self._end += tensor.size
                self._moved.append((proto, self._places[key], tensor.size))

    def put(self, tensors: Iterable[tuple[TensorProto, torch.Tensor]]) -> None:
        """Write these values, for messages that then say where they are."""
        with self.path.open("ab") as out:
            for proto, values in tensors:
                flat = values.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
                self._moved.append((proto, self._align(len(flat), out), len(flat)))
                self._end += out.write(flat.numpy().data)

    def _align(self, size: int, out: BinaryIO) -> int:
        alignment = PAGE if size >= SMALL else SMALL_ALIGNMENT
        start = -(-self._end // alignment) * alignment
        out.write(b"\0" * (start - self._end))
        self._end = start
        return start

    def mapped(self) -> torch.Tensor:
        """The bytes, to be read and changed where they are."""
        if not self._end:
            return torch.empty(0, dtype=torch.uint8)
        return torch.from_file(str(self.path), shared=True, size=self._end, dtype=torch.uint8)

    def place(self, tensor: GraphTensor) -> int:
        """Where the bytes of a tensor are now that is changing."""
        return self._places[tensor.name]

    def point(self, name: str) -> None:
        """Have the model say that its data is in the file of this name."""
        for proto, start, size in self._moved:
            set_location(proto, name, start, size)


def _region(tensor: GraphTensor) -> Region:
    assert tensor.path is not None
    return tensor.path, tensor.start, tensor.size


def _check_sizes(tensors: Mapping[Region | str, GraphTensor]) -> None:
    """Raise WavpruneError where tensors overlap so often that copies of them fill a disk."""
    files = {path: path.stat().st_size for path, _, _ in map(_region, tensors.values())}
    needed, there = sum(tensor.size for tensor in tensors.values()), sum(files.values())
    if needed > MOST_COPIES * there:
        raise WavpruneError(
            f"its tensors in external data come to {needed:,} bytes, in files of {there:,}; "
            f"allowed: up to {MOST_COPIES} times as many"
        )


def rewrite(
    source: Model,
    target: Path,
    tensors: Mapping[str, torch.Tensor],
    metadata: Mapping[str, str],
    *,
    force: bool,
) -> None:
    """Write a model again with other values in some of its tensors and entries of its metadata.

    Args:
        source: a model of a file.
        target: the ``.onnx`` file, which appears when it is complete.
        tensors: by name, of the shapes that they have in the graph.
        metadata: entries, in place of those of the same keys.
        force: replace what is there.

    Raises:
        WavpruneError: external data would replace a file, without ``force``.
        OSError: reading or writing failed. Nothing is left behind in either case.
    """
    with (
        replaced(target, overwrite=force) as new,
        data_file(source, target, force=force) as data,
    ):
        model = source.copy()
        mapped = None
        if data is not None:
            data.take(model, tensors)
            mapped = data.mapped()
        for name, values in tensors.items():
            tensor = model.tensors[name]
            if tensor.path is None or data is None or mapped is None:
                set_values(tensor.proto, values)
            else:
                part(tensor, mapped, data.place(tensor)).copy_(values)
        set_metadata(model.proto, metadata)
        write_model(model.proto, new, data)


def part(tensor: GraphTensor, data: torch.Tensor, start: int) -> torch.Tensor:
    """The values of a tensor in bytes, from ``start`` on, a view."""
    assert tensor.dtype is not None
    return data[start : start + tensor.size].view(tensor.dtype).view(tensor.shape)


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


def write_model(
    proto: ModelProto,
    path: Path,
    data: DataFile | None = None,
    run: Callable[[Path], None] | None = None,
) -> None:
    """Write a model, and check what was written.

    Args:
        proto: the model.
        path: where, for the time being, beside its data.
        data: its external data.
        run: is called with the path when everything is there.

    Raises:
        WavpruneError: it is not valid.
    """
    if data is not None:
        # The data has another name until everything is complete.
        data.point(data.path.name)
    path.write_bytes(serialized(proto))
    check_valid(path)
    if run is not None:
        run(path)
    if data is not None:
        data.point(data.name)
        path.write_bytes(serialized(proto))


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
