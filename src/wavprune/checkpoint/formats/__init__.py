"""The checkpoints that can be read: what lies at a path, and the weights in it."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Protocol

from ...common.atomic import left_behind
from ...common.files import check_regular
from ...config import PruneConfig
from ...coverage import Coverage
from ...engine.layers import DTYPES as PRUNABLE
from ...engine.layers import LayerRef
from ...errors import WavpruneError
from ...report import PruneReport
from .directory import COMPRESSED_WEIGHTS, INDEX, SINGLE, shards
from .names import Weight, describe_skipped, select
from .safetensors import BITS, DTYPES, SafetensorsFile
from .torchfile import TorchFile

SAFETENSORS = (".safetensors",)
STATE_DICTS = (".pt", ".pth", ".bin")
ONNX = (".onnx",)
# The endings of each kind of file.
KINDS = (SAFETENSORS, STATE_DICTS, ONNX)
# The metadata of a compressed file.
COMPRESSED = "wavprune"
ALLOWED = (
    "a .safetensors file, a .pt, .pth or .bin state dict, an .onnx model, or a directory that "
    f"holds {SINGLE} or {INDEX}"
)


class WeightFile(Protocol):
    """One file of a checkpoint.

    Attributes:
        path: where it is.
        weights: its layers' weights.
        skipped: layers that cannot be pruned, and why.
    """

    path: Path
    weights: list[Weight]
    skipped: dict[str, str]

    @property
    def prefix(self) -> str:
        """What the names of all its weights begin with, in a file that nests."""
        ...

    def dtype(self, layer: str) -> str:
        """The dtype of a layer's weight, as safetensors calls it where it has it."""
        ...

    def sizes(self) -> list[tuple[int, int]]:
        """Elements and bytes of every tensor, each memory once."""
        ...

    def open(
        self, layers: Sequence[str], copy: Path | None
    ) -> AbstractContextManager[list[LayerRef]]:
        """The weights of some layers, to be read or changed.

        When the block ends without an error, ``copy`` is the whole file with the weights as they
        are then; None writes nothing. The file at ``path`` never changes.
        """
        ...


class LayerInfo(NamedTuple):
    """What a file says of a layer.

    Attributes:
        name: of the layer.
        shape: of its weight.
        dtype: torch's name of it, or safetensors' where torch has none.
        numel: how many weights.
        zeros: how many are 0; None where the dtype cannot be pruned.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    numel: int
    zeros: int | None

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel size, of one to three axes; a matrix is one kernel."""
        return self.shape if len(self.shape) == 2 else self.shape[2:]


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
    def weights(self) -> list[Weight]:
        """All weights."""
        return [weight for file in self.files for weight in file.weights]

    @property
    def layers(self) -> list[str]:
        """The names of the layers that are pruned where no ``targets`` are given: convolutions."""
        return [weight.layer for weight in self.weights if weight.is_convolution]

    @property
    def skipped(self) -> dict[str, str]:
        """Layers that cannot be pruned, and why."""
        return {name: reason for file in self.files for name, reason in file.skipped.items()}

    def coverage(self, report: PruneReport) -> Coverage:
        """What share of the tensors' elements the layers of a report are."""
        files = {weight.layer: file for file in self.files for weight in file.weights}
        pruned = {layer.name: layer.numel for layer in report}
        return Coverage.of_tensors(
            [size for file in self.files for size in file.sizes()],
            [(n, n * (BITS[files[name].dtype(name)] // 8)) for name, n in pruned.items()],
            {w.layer: len(w.shape) for w in self.weights if w.layer not in pruned},
            self.skipped,
        )

    def select(self, config: PruneConfig) -> list[str]:
        """The names of the layers that ``targets`` and ``ignore`` select.

        Raises:
            WavpruneError: a pattern matches nothing, nothing is left, or there is no layer.
        """
        self.check_layers(matrices=config.targets is not None)
        return [weight.layer for weight in select(self.weights, config, self.files[0].prefix)]

    def check_layers(self, matrices: bool = False) -> None:
        """Raise WavpruneError unless there is a convolution, or a matrix where those count."""
        if any(weight.is_convolution or matrices for weight in self.weights):
            return
        hints = []
        if any(isinstance(f, SafetensorsFile) and COMPRESSED in f.metadata for f in self.files):
            hints.append(
                "; it is compressed, and `wavprune decompress` makes an ordinary file of it"
            )
        if self.weights:
            names = ", ".join(w.layer for w in self.weights[:8])
            more = ", ..." if len(self.weights) > 8 else ""
            hints.append(f"; its 2-D ones are used where targets names them: {names}{more}")
        if self.skipped:
            hints.append(f"; skipped: {describe_skipped(self.skipped)}")
        if self.path.suffix.lower() in ONNX:
            raise WavpruneError(
                f"the graph of {self.path} has no convolution with a weight of its own"
                f"{' and no matrix' if matrices else ''}, so there is nothing to prune"
                f"{''.join(hints)}"
            )
        raise WavpruneError(
            f"{self.path} holds no '*.weight' tensor of {2 if matrices else 3} to 5 axes, so there "
            f"is nothing to prune{''.join(hints)}"
        )

    def inspect(self) -> Iterator[LayerInfo]:
        """The convolutions, or where there are none the matrices, whatever their dtypes.

        Raises:
            WavpruneError: there are neither.
        """
        if not self.weights:
            self.check_layers()
        has_convolutions = bool(self.layers)
        for file in self.files:
            for weight in file.weights:
                if weight.is_convolution == has_convolutions:
                    yield _info(file, weight)


def open_checkpoint(path: str | os.PathLike[str], scratch: Path | None = None) -> Checkpoint:
    """The checkpoint at a path, with the names of its layers.

    Args:
        path: a ``.safetensors`` file; an ``.onnx`` model; a ``.pt``, ``.pth`` or ``.bin`` file of
            ``torch.save``; or a directory with ``model.safetensors``, or with
            ``model.safetensors.index.json`` and its shards.
        scratch: where a private copy of a file of ``torch.save`` may be made, to be mapped; None
            reads it into memory.

    Raises:
        WavpruneError: there is no such checkpoint, it is broken, or it needs pickle.
    """
    path = Path(path)
    if path.is_dir():
        return _open_directory(path)
    if not path.exists():
        left = left_behind(path)
        hint = "" if left is None else f"; an interrupted run left it at {left}"
        raise WavpruneError(f"{path} does not exist{hint}; allowed: {ALLOWED}")
    suffix = path.suffix.lower()
    if suffix in ONNX:
        return Checkpoint(path, [_onnx_file(path)])
    if suffix not in (*SAFETENSORS, *STATE_DICTS):
        raise WavpruneError(f"{path} is of no kind that can be pruned; allowed: {ALLOWED}")
    check_regular(path)
    return Checkpoint(
        path, [SafetensorsFile(path) if suffix in SAFETENSORS else TorchFile(path, scratch)]
    )


def _onnx_file(path: Path) -> WeightFile:
    # Other files need no graph.
    from .onnxfile import OnnxFile

    return OnnxFile(path)


def _info(file: WeightFile, weight: Weight) -> LayerInfo:
    dtype, zeros = file.dtype(weight.layer), None
    numel = math.prod(weight.shape)
    if dtype in DTYPES:
        dtype = str(DTYPES[dtype]).removeprefix("torch.")
        if DTYPES[file.dtype(weight.layer)] in PRUNABLE:
            with file.open([weight.layer], None) as (ref,):
                zeros = numel - int(ref.weight.count_nonzero())
    return LayerInfo(weight.layer, weight.shape, dtype, numel, zeros)


__all__ = [
    "ALLOWED",
    "INDEX",
    "KINDS",
    "ONNX",
    "SAFETENSORS",
    "SINGLE",
    "STATE_DICTS",
    "Checkpoint",
    "LayerInfo",
    "WeightFile",
    "open_checkpoint",
]


def _open_directory(path: Path) -> Checkpoint:
    if (path / SINGLE).exists():
        return Checkpoint(path, [SafetensorsFile(path / SINGLE)])
    if not (path / INDEX).exists():
        hint = ""
        if (path / COMPRESSED_WEIGHTS).is_file():
            hint = (
                f", but {COMPRESSED_WEIGHTS}, which `wavprune decompress` makes an ordinary file of"
            )
        raise WavpruneError(f"{path} holds neither {SINGLE} nor {INDEX}{hint}; allowed: {ALLOWED}")
    files = []
    for shard, names in shards(path).items():
        file = SafetensorsFile(path / shard)
        wrong = sorted(names ^ file.tensors.keys())
        if wrong:
            says = "says" if wrong[0] in names else "does not say"
            raise WavpruneError(
                f"{path / INDEX} {says} that {wrong[0]!r} is in {shard}, which is wrong"
            )
        files.append(file)
    return Checkpoint(path, files, INDEX)
