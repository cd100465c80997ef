"""The curves of a whole model: made from its file once, kept beside it, read into memory."""

from __future__ import annotations

import json
import math
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..bases import kernel_shape
from ..bases.basis import DENSE_VALUES
from ..checkpoint import formats
from ..checkpoint.formats import WeightFile, open_checkpoint
from ..checkpoint.formats.safetensors import DTYPES
from ..checkpoint.sources import tensors_of
from ..common.atomic import replaced
from ..engine.layers import DTYPES as PRUNABLE
from ..engine.layers import LayerRef, check_finite, unique_layers
from ..errors import WavpruneError
from .curves import Floats, LayerCurves, Measured, bases_shown, measure

# Curves of another version are measured again.
VERSION = 3
MOST_LAYERS = 2048
# Kernels of a layer that are pictured, the strongest; of 1x1 kernels, a corner of all.
PICTURED, CORNER = 8, 16
# A kernel of more values is no picture.
PICTURED_VALUES = 256
# Of matrices that were computed from weights; of layers after these nothing is pictured.
MATRIX_BYTES = 64 << 20
# What a compressed file says of each layer, and of each other tensor.
LAYER_RECORD, TENSOR_RECORD = 330, 75


class LayerFacts(NamedTuple):
    """What a table says of a layer.

    Attributes:
        name: of the layer.
        shape: of its weight.
        dtype: of the weight.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str

    @property
    def numel(self) -> int:
        """How many weights."""
        return math.prod(self.shape)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The kernel size, of one to three axes."""
        return self.shape[2:]

    @property
    def is_pointwise(self) -> bool:
        """True where a kernel is one value, and every basis the identity."""
        return math.prod(self.kernel) == 1


@dataclass(frozen=True)
class ModelCurves:
    """A model in every basis.

    Attributes:
        layers: those that pruning changes.
        bases: names, the identity first.
        norms: ``(L,)`` squared norms of the weights.
        curves: each of its fields ``(L, B, n)``.
        other_bytes: of what a compressed file holds beside these layers, its header among it.
        total_bytes: of all tensors.
        skipped: layers that are left as they are, and why.
        ignored: those of them that pruning would not leave out by itself.
        samples: by layer, some of its kernels ``(n, K)``.
        matrices: by layer and basis, the analysis matrix that was computed from the weight.
    """

    layers: tuple[LayerFacts, ...]
    bases: tuple[str, ...]
    norms: Floats
    curves: LayerCurves
    other_bytes: int
    total_bytes: int
    skipped: dict[str, str]
    ignored: tuple[str, ...]
    samples: dict[int, Floats]
    matrices: dict[tuple[int, str], Floats]

    @property
    def numel(self) -> int:
        """Weights of all its layers."""
        return sum(layer.numel for layer in self.layers)

    @property
    def nbytes(self) -> int:
        """Bytes in memory."""
        small = (*self.samples.values(), *self.matrices.values())
        return sum(array.nbytes for array in (*self.curves, *small))


def analyze(path: Path, progress: Callable[[float], object]) -> ModelCurves:
    """Measure the convolutions of a checkpoint.

    Args:
        path: what ``open_checkpoint`` takes.
        progress: is told how much of it is done, from 0 to 1.

    Raises:
        WavpruneError: it is no checkpoint, or holds no convolution; the message says why.
    """
    checkpoint = open_checkpoint(path)
    checkpoint.check_layers()
    convolutions = [weight for weight in checkpoint.weights if weight.is_convolution]
    if len(convolutions) > MOST_LAYERS:
        raise WavpruneError(
            f"{path.name} has {len(convolutions):,} convolutions; allowed: up to {MOST_LAYERS:,}"
        )
    bases = bases_shown({kernel_shape(weight.shape).kernel for weight in convolutions})
    total = sum(math.prod(weight.shape) for weight in convolutions)
    skipped = dict(checkpoint.skipped)
    facts: list[LayerFacts] = []
    measured: list[Measured] = []
    samples: dict[int, Floats] = {}
    matrices: dict[tuple[int, str], Floats] = {}
    compressed = done = matrix_bytes = 0
    for ref in (ref for file in checkpoint.files for ref in _layers(file, skipped)):
        found = measure(ref, bases)
        index, shape = len(facts), tuple(ref.weight.shape)
        facts.append(LayerFacts(ref.name, shape, str(ref.weight.dtype).removeprefix("torch.")))
        measured.append(found)
        matrix_bytes += sum(matrix.nbytes for matrix in found.matrices.values())
        sample = _sample(ref)
        samples[index] = sample if matrix_bytes <= MATRIX_BYTES else sample[:0]
        if len(samples[index]):
            matrices |= {(index, name): matrix for name, matrix in found.matrices.items()}
        compressed += ref.weight.numel() * ref.weight.element_size()
        done += ref.weight.numel()
        progress(done / total)
    if not facts:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in list(skipped.items())[:4])
        raise WavpruneError(f"{path.name} holds no convolution that can be pruned: {reasons}")
    size, names = _stored(path)
    header = LAYER_RECORD * len(facts) + TENSOR_RECORD * names
    fields = (
        np.array([[getattr(curve, field) for curve in found.curves] for found in measured])
        for field in LayerCurves._fields
    )
    return ModelCurves(
        layers=tuple(facts),
        bases=bases,
        norms=np.array([found.norm for found in measured]),
        curves=LayerCurves(*fields),
        other_bytes=max(0, size - compressed) + header,
        total_bytes=size,
        skipped=skipped,
        ignored=tuple(name for name in skipped if name not in checkpoint.skipped),
        samples=samples,
        matrices=matrices,
    )


def _stored(path: Path) -> tuple[int, int]:
    """Bytes of all tensors of a checkpoint, and how many there are."""
    if path.suffix.lower() in formats.ONNX:
        sizes = [size for file in open_checkpoint(path).files for _, size in file.sizes()]
        return sum(sizes), len(sizes)
    source = tensors_of(path)
    return source.size, len(source.names)


def _layers(file: WeightFile, skipped: dict[str, str]) -> Iterator[LayerRef]:
    """The convolutions of a file that can be pruned; the others are added to ``skipped``."""
    chosen = []
    for weight in file.weights:
        if not weight.is_convolution:
            continue
        dtype = file.dtype(weight.layer)
        rows, columns = kernel_shape(weight.shape).kernel
        if rows * columns > DENSE_VALUES:
            skipped[weight.layer] = (
                f"its kernels have {rows}x{columns} values; allowed: up to {DENSE_VALUES:,}"
            )
        elif DTYPES.get(dtype) in PRUNABLE:
            chosen.append(weight.layer)
        else:
            skipped[weight.layer] = f"its weight has dtype {dtype}"
    with file.open(chosen, None) as refs:
        for ref in unique_layers(refs):
            try:
                check_finite(ref)
            except WavpruneError:
                skipped[ref.name] = "it holds values that are NaN or infinite"
                continue
            yield ref


def _sample(ref: LayerRef) -> Floats:
    """Kernels to picture, ``(n, K)``, or a corner of the weight where kernels have one value."""
    kernel = kernel_shape(ref.weight.shape).kernel
    kernels = ref.kernels(kernel).detach().float()
    if kernel == (1, 1):
        corner = kernels[:CORNER, :CORNER, 0, 0]
        return np.ascontiguousarray(corner.numpy())
    if kernel[0] * kernel[1] > PICTURED_VALUES:
        return np.zeros((0, kernel[0] * kernel[1]), dtype=np.float32)
    flat = kernels.reshape(-1, kernel[0] * kernel[1])
    strongest = torch.linalg.vector_norm(flat, dim=1).argsort(descending=True, stable=True)
    return np.ascontiguousarray(flat[strongest[:PICTURED]].numpy())


def save(curves: ModelCurves, path: Path) -> None:
    """Write curves as an ``.npz`` file, which appears when it is complete."""
    facts = {
        "version": VERSION,
        "layers": curves.layers,
        "bases": curves.bases,
        "other_bytes": curves.other_bytes,
        "total_bytes": curves.total_bytes,
        "skipped": curves.skipped,
        "ignored": curves.ignored,
    }
    arrays: dict[str, Any] = {
        "facts": np.frombuffer(json.dumps(facts).encode(), dtype=np.uint8),
        "norms": curves.norms,
        **curves.curves._asdict(),
    }
    arrays |= {f"sample-{i}": sample for i, sample in curves.samples.items()}
    arrays |= {f"matrix-{i}-{name}": matrix for (i, name), matrix in curves.matrices.items()}
    with replaced(path) as new, new.open("wb") as file:
        np.savez(file, **arrays)


def is_current(path: Path) -> bool:
    """True for curves that this version of ``save`` wrote."""
    try:
        with np.load(path, allow_pickle=False) as file:
            return bool(json.loads(file["facts"].tobytes())["version"] == VERSION)
    except (OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile):
        return False


def load(path: Path) -> ModelCurves:
    """What ``save`` wrote."""
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file}
    facts = json.loads(arrays.pop("facts").tobytes())
    matrices = {}
    samples = {}
    for name, array in arrays.items():
        kind, _, rest = name.partition("-")
        if kind == "sample":
            samples[int(rest)] = array
        elif kind == "matrix":
            index, _, basis = rest.partition("-")
            matrices[int(index), basis] = array
    return ModelCurves(
        layers=tuple(
            LayerFacts(name, tuple(shape), dtype) for name, shape, dtype in facts["layers"]
        ),
        bases=tuple(facts["bases"]),
        norms=arrays["norms"],
        curves=LayerCurves(*(arrays[field] for field in LayerCurves._fields)),
        other_bytes=facts["other_bytes"],
        total_bytes=facts["total_bytes"],
        skipped=facts["skipped"],
        ignored=tuple(facts["ignored"]),
        samples=samples,
        matrices=matrices,
    )
