"""What a compressed file holds, of any version: layers, tensors as they were, batch norms."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..common.tables import layers_table
from ..errors import WavpruneError
from .container import KEY
from .decoding import parts_of, values_of
from .formats.names import layer_name
from .formats.safetensors import read_header
from .loading import load, open_file, open_packed, read_entry
from .norms import NormLink
from .packed_layout import FILLED, LOGS, RAW
from .records import PACKED_VERSION
from .sources import tensors_of
from .unpacked import Unpacked

if TYPE_CHECKING:
    from rich.table import Table

EXACT, ONE_VALUE, GRID = "exactly", "as one value", "on a grid"
HOW = {RAW: EXACT, FILLED: ONE_VALUE, LOGS: GRID}


@dataclass(frozen=True)
class CodedLayer:
    """A tensor that is stored as indices or coefficients.

    Attributes:
        name: of its layer; of the tensor where it is no weight.
        tensor: its name.
        dtype: as safetensors calls it.
        shape: of the tensor.
        wavelet: its basis.
        values: ``"float32"``, ``"float16"``, ``"symbols"`` or ``"trellis"``.
        coder: what wrote them.
        coefficients: how many there are.
        kept: how many of them are not 0.
        bytes: of all that is stored of it alone.
        relative_error: of the tensor against another, over that one's norm; None without one.
    """

    name: str
    tensor: str
    dtype: str
    shape: tuple[int, ...]
    wavelet: str
    values: str
    coder: str
    coefficients: int
    kept: int
    bytes: int
    relative_error: float | None = None

    @property
    def numel(self) -> int:
        """How many elements it has."""
        return math.prod(self.shape)

    @property
    def bits_per_coded_weight(self) -> float:
        """Bits that are stored for each element."""
        return 8 * self.bytes / self.numel


class PlainTensor(NamedTuple):
    """A tensor that is not coded.

    Attributes:
        name: of the tensor.
        dtype: as safetensors calls it.
        shape: of the tensor.
        how: ``"exactly"``, ``"as one value"`` or ``"on a grid"``.
        bytes: that it takes; on a grid, about.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    how: str
    bytes: int


@dataclass(frozen=True)
class FileContents:
    """A compressed file.

    Attributes:
        path: where it is.
        version: of its format.
        bytes: of the whole file.
        layers: tensors that are coded.
        plain: all others.
        aliases: tied tensors: name -> name of the one that is stored.
        norms: batch norms that are folded in the file and unfolded when it is read.
        metadata: of the file that was compressed.
    """

    path: Path
    version: int
    bytes: int
    layers: tuple[CodedLayer, ...]
    plain: tuple[PlainTensor, ...]
    aliases: Mapping[str, str]
    norms: tuple[NormLink, ...]
    metadata: Mapping[str, str]

    @property
    def elements(self) -> int:
        """Elements of all tensors, tied ones once."""
        others = sum(math.prod(tensor.shape) for tensor in self.plain)
        return others + sum(layer.numel for layer in self.layers)

    @property
    def bits_per_weight(self) -> float:
        """Bits of the whole file for each element of all tensors."""
        return 8 * self.bytes / self.elements if self.elements else 0.0

    def to_dict(self) -> dict[str, Any]:
        """Names and values, ready for JSON."""
        return {
            "path": str(self.path),
            "version": self.version,
            "bytes": self.bytes,
            "bits_per_weight": self.bits_per_weight,
            "layers": [
                dataclasses.asdict(layer) | {"bits_per_coded_weight": layer.bits_per_coded_weight}
                for layer in self.layers
            ],
            "plain": [tensor._asdict() for tensor in self.plain],
            "aliases": dict(self.aliases),
            "batch_norms": [link._asdict() for link in self.norms],
            "metadata": dict(self.metadata),
        }

    def to_table(self) -> Table:
        """A rich table of the layers, with what else there is below."""
        with_error = any(layer.relative_error is not None for layer in self.layers)
        columns = ("shape", "dtype", "basis", "kept", "values", "coder", "bytes", "bits", "error")
        numel = sum(layer.numel for layer in self.layers)
        size = sum(layer.bytes for layer in self.layers)
        totals = (
            *(f"{numel:,}", "", "", f"{sum(layer.kept for layer in self.layers):,}", "", ""),
            *(f"{size:,}", f"{8 * size / numel:.2f}" if numel else "", ""),
        )
        return layers_table(
            f"{self.path.name}: compressed, version {self.version}, {self.bytes:,} bytes, "
            f"{self.bits_per_weight:.2f} bits per weight",
            columns if with_error else columns[:-1],
            self.layers,
            lambda layer: _cells(layer)[: None if with_error else -1],
            totals if with_error else totals[:-1],
            caption="\n".join(self._lines()),
        )

    def _lines(self) -> list[str]:
        lines = []
        for how in HOW.values():
            tensors = [tensor for tensor in self.plain if tensor.how == how]
            if tensors:
                stored = sum(tensor.bytes for tensor in tensors)
                about = "about " if how == GRID else ""
                names = ", ".join(tensor.name for tensor in tensors[:8])
                more = f" and {len(tensors) - 8} more" if len(tensors) > 8 else ""
                lines.append(f"stored {how}: {names}{more}; {about}{stored:,} bytes.")
        if self.norms:
            pairs = [
                f"{layer_name(link.gamma)} in {layer_name(link.weight)}" for link in self.norms
            ]
            more = f" and {len(pairs) - 8} more" if len(pairs) > 8 else ""
            lines.append(
                f"batch norms folded in the file, and unfolded when it is read: "
                f"{', '.join(pairs[:8])}{more}."
            )
        if self.aliases:
            tied = [f"{name} = {other}" for name, other in self.aliases.items()]
            lines.append(f"tied: {', '.join(tied)}.")
        lines.append("bits: stored for each weight of the layer.")
        return lines


def _cells(layer: CodedLayer) -> tuple[str, ...]:
    return (
        layer.name,
        "x".join(map(str, layer.shape)),
        layer.dtype,
        layer.wavelet,
        f"{layer.kept:,}",
        layer.values,
        layer.coder,
        f"{layer.bytes:,}",
        f"{layer.bits_per_coded_weight:.2f}",
        "" if layer.relative_error is None else f"{layer.relative_error:.4f}",
    )


def is_compressed(path: Path) -> bool:
    """True for a file that ``save`` wrote, whatever its version."""
    return path.suffix.lower() == ".safetensors" and KEY in read_header(path)[1]


def contents_of(
    path: str | os.PathLike[str],
    against: nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str] | None = None,
) -> FileContents:
    """What a compressed file holds; its layers are decoded for that.

    Args:
        path: a file that ``save`` or ``wavprune compress`` wrote.
        against: the model that was compressed, as ``save`` takes it, to compute the errors.

    Raises:
        WavpruneError: there is no such file, it is broken, or ``against`` is another model.

    Example:
        >>> import tempfile
        >>> from wavprune import checkpoint
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(16, 16, 3))
        >>> path = tempfile.mkdtemp() + "/small.safetensors"
        >>> saved = checkpoint.save(net, path, wavelet="dct")
        >>> contents = checkpoint.contents_of(path, against=net)
        >>> [(layer.wavelet, layer.relative_error < 0.01) for layer in contents.layers]
        [('dct', True)]
    """
    path = Path(path)
    packed = open_packed(path, None)
    contents = _of_layers(path) if packed is None else _of_packed(path, packed)
    return contents if against is None else _compared(contents, against)


def _of_packed(path: Path, packed: Unpacked) -> FileContents:
    layers, plain = [], []
    for name, basis, coefficients, size in packed.matrices():
        dtype, shape = packed.kind(name)
        layers.append(
            CodedLayer(
                name=_shown(name),
                tensor=name,
                dtype=dtype,
                shape=shape,
                wavelet="identity" if basis is None else basis.name,
                values="trellis",
                coder="trellis",
                coefficients=coefficients.size,
                kept=int(np.count_nonzero(coefficients)),
                bytes=size,
            )
        )
    for name in packed.names:
        if name not in packed.aliases and not packed.is_matrix(name):
            dtype, shape = packed.kind(name)
            kind, size = packed.plain(name)
            plain.append(PlainTensor(name, dtype, shape, HOW[kind], size))
    return FileContents(
        path=path,
        version=PACKED_VERSION,
        bytes=path.stat().st_size,
        layers=tuple(layers),
        plain=tuple(plain),
        aliases=packed.aliases,
        norms=tuple(packed.links),
        metadata=packed.metadata,
    )


def _of_layers(path: Path) -> FileContents:
    """Of a file of version 1 or 2."""
    file = open_file(path, None)
    layers, plain = [], []
    with path.open("rb") as data:
        for name, entry in file.entries.items():
            record = file.contents.layers.get(name)
            if record is None:
                plain.append(PlainTensor(name, entry.dtype, entry.shape, EXACT, entry.size))
                continue
            parts = parts_of(record, memoryview(read_entry(file, name, data)))
            layers.append(
                CodedLayer(
                    name=_shown(name),
                    tensor=name,
                    dtype=record.dtype,
                    shape=record.shape,
                    wavelet="identity" if record.basis is None else record.basis.name,
                    values=record.values,
                    coder=record.coder,
                    coefficients=record.coefficients,
                    kept=sum(int(np.count_nonzero(v)) for v in values_of(record, parts)),
                    bytes=entry.size,
                )
            )
    return FileContents(
        path=path,
        version=json.loads(read_header(path)[1][KEY])["version"],
        bytes=path.stat().st_size,
        layers=tuple(layers),
        plain=tuple(plain),
        aliases=file.contents.aliases,
        norms=(),
        metadata=file.contents.metadata,
    )


def _shown(tensor: str) -> str:
    return layer_name(tensor) if tensor.endswith("weight") else tensor


def _compared(
    contents: FileContents,
    against: nn.Module | Mapping[str, torch.Tensor] | str | os.PathLike[str],
) -> FileContents:
    source = tensors_of(against)
    loaded = load(contents.path, names=[layer.tensor for layer in contents.layers])
    layers = []
    for layer in contents.layers:
        name = source.aliases.get(layer.tensor, layer.tensor)
        other = source.tensors.get(name)
        if other is None or other.shape != layer.shape:
            there = "no such tensor" if other is None else f"one of {other.shape}"
            raise WavpruneError(
                f"{contents.path} holds {layer.tensor!r} of {layer.shape}; the model to compare it "
                f"with has {there}"
            )
        before = other.read().double()
        norm = float(torch.linalg.vector_norm(before))
        error = float(torch.linalg.vector_norm(loaded[layer.tensor].double() - before))
        layers.append(replace(layer, relative_error=error / norm if norm else 0.0))
    return replace(contents, layers=tuple(layers))
