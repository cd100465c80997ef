"""Packed files whose steps follow from the weights alone, a tensor and then a block at a time.

What is in memory is one tensor, which becomes what loading gives, and some blocks of its columns;
indices and coded streams wait on disk where they are many.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..common.progress import progress_bar
from .encoding import scaled
from .formats.names import layer_name
from .index_store import Block, IndexStore, Indices
from .items import PRUNED, layout_of
from .layer import Layer
from .packed import Packer
from .packed_layout import Layout, Matrix, crc_of
from .packing import Model, finish, put_all, reach_bytes
from .plan import Plan
from .report import SavedLayer, SaveReport
from .sources import Source, Tensor
from .stored_basis import Floats
from .trellis import LARGEST_INDEX, IndexArray, rounded
from .trellis_tables import classify

# The first step that is tried, over the norm of a weight.
FIRST = 0.01

Mask = npt.NDArray[np.bool_]
# Gives the coefficients of some columns, start to stop, that are 0, from their matrix.
ZerosOf = Callable[[int, int, Floats], Mask | None]


def save_from_weights(
    source: Source,
    chosen: Sequence[Tensor],
    plan: Plan,
    step: float | None,
    goal: float | None,
    path: Path,
    progress: bool,
) -> SaveReport:
    """Write a file whose steps follow from the weights alone: one number times each norm.

    Args:
        source: all tensors.
        chosen: those to compress.
        plan: in which basis, and what is pruned.
        step: that number.
        goal: bytes, which choose it.
        path: the file.
        progress: show a progress bar on standard error, for each step that is tried.

    Raises:
        WavpruneError: a weight is not finite, or the goal is out of reach.
    """
    begin = time.perf_counter()
    known: dict[str, Layer] = {}

    def at(c: float) -> Model:
        return _pack(
            source, {tensor.name: tensor for tensor in chosen}, plan, known, c, path, progress
        )

    if goal is None:
        assert step is not None
        return finish(source, at(step), path, begin, step=step)
    weights = sum(math.prod(tensor.shape) for tensor in chosen)
    c, done = reach_bytes(at, goal, FIRST, weights)
    return finish(source, done, path, begin, step=c)


def _pack(
    source: Source,
    chosen: dict[str, Tensor],
    plan: Plan,
    known: dict[str, Layer],
    c: float,
    path: Path,
    progress: bool,
) -> Model:
    packer = Packer(source.metadata)
    store = IndexStore(path.parent)
    stored: list[SavedLayer] = []

    total = sum(math.prod(tensor.shape) for tensor in chosen.values())
    with progress_bar("compress", total, "weights", progress) as advance:

        def put(name: str) -> bool:
            if name not in chosen:
                return False
            stored.append(_put(_layer(chosen[name], plan, known), name, packer, store, c))
            advance(math.prod(chosen[name].shape))
            return True

        put_all(source, packer, put)
    packed = packer.finish(path.parent)

    def layers() -> list[SavedLayer]:
        return [
            replace(layer, bytes=size) for layer, size in zip(stored, packed.sizes, strict=True)
        ]

    return Model(packed, layers)


def _layer(tensor: Tensor, plan: Plan, known: dict[str, Layer]) -> Layer:
    """A weight; its basis is chosen once."""
    layer = known.get(tensor.name)
    if layer is not None:
        return layer._replace(kernels=tensor.read().view(-1, layer.kernels.shape[1]))
    layer = plan.layer(tensor)
    # Masks of all layers together could be large.
    if layer.keep is None:
        known[tensor.name] = layer._replace(kernels=layer.kernels.new_empty(0, layer.K))
    return layer


def _put(layer: Layer, name: str, packer: Packer, store: IndexStore, c: float) -> SavedLayer:
    """Put a weight into a file. What has its memory becomes what loading gives."""
    layout = layout_of(layer, name)
    step, peak = _step(layer, layout, c)
    record = Matrix(
        *(layer.dtype, layout, packer.basis(layer.basis, layer.basis_bytes)),
        *(step, layer.exponent, 0),
    )
    weight = layer.kernels.view(layer.shape)
    zeros_of = _zeros_of(layer, layout)
    blocks: list[Block] = []
    squared_error, kept = 0.0, 0
    for start, stop in layout.blocks():
        columns = Columns(start, stop, peak)
        put = _put_directly if record.is_direct else _put_block
        indices, error = put(layer, record, zeros_of, weight, columns)
        kept += int(np.count_nonzero(indices))
        squared_error += error
        blocks.append(store.add(start, indices))
    record = replace(record, crc=crc_of(weight))
    classes = classify([block.read for block in blocks])
    packer.matrix(name, record, Indices(blocks, classes))
    error = math.sqrt(squared_error)
    return SavedLayer(
        name=layer_name(name),
        shape=layer.shape,
        wavelet="identity" if layer.basis is None else layer.basis.name,
        values="trellis",
        coder="trellis",
        coefficients=layout.rows * layout.columns,
        kept=kept,
        bytes=0,
        error=scaled(error, layer.exponent),
        norm=scaled(layer.norm, layer.exponent),
        relative_error=error / layer.norm if layer.norm else 0.0,
        checksum=record.crc,
    )


class Columns(NamedTuple):
    """Some columns of a matrix.

    Attributes:
        start: the first.
        stop: behind the last.
        peak: what no magnitude in them is above.
    """

    start: int
    stop: int
    peak: float


def _put_directly(
    layer: Layer, record: Matrix, zeros_of: ZerosOf, weight: torch.Tensor, columns: Columns
) -> tuple[IndexArray, float]:
    """Quantise some columns that are weights, in place: their indices and squared error."""
    start, stop, peak = columns
    matrix = weight.view(record.layout.rows, -1).numpy()[:, start:stop]
    zeros = zeros_of(start, stop, matrix)
    done = rounded(matrix, record.step, zeros, peak=peak, out=matrix)
    return done.indices, done.squared_error


def _put_block(
    layer: Layer, record: Matrix, zeros_of: ZerosOf, weight: torch.Tensor, columns: Columns
) -> tuple[IndexArray, float]:
    """Quantise some columns: their indices and squared error.

    In a function of its own, so that what one block needs is gone before the next.
    """
    start, stop, peak = columns
    part = _part(layer, record.layout, start, stop)
    matrix = _matrix(part, record.layout)
    zeros = zeros_of(start, stop, matrix)
    indices, values, _ = rounded(matrix, record.step, zeros, peak=peak)
    del matrix
    decoded = record.kernels(values, layer.synthesis)
    del values
    after = part._replace(kernels=decoded.view(-1, layer.K))
    change = after.weights(0, len(part.kernels)) - part.weights(0, len(part.kernels))
    record.put(weight, start, stop, decoded)
    return indices, float(np.vdot(change, change))


def _part(layer: Layer, layout: Layout, start: int, stop: int) -> Layer:
    """The kernels of some columns."""
    block = layout.block(layer.kernels, start, stop)
    return layer._replace(kernels=block.reshape(-1, layer.K), keep=None)


def _matrix(part: Layer, layout: Layout) -> npt.NDArray[np.float32]:
    coefficients = part.coefficients(0, len(part.kernels))
    return np.ascontiguousarray(coefficients.T.reshape(layout.rows, -1))


def _step(layer: Layer, layout: Layout, c: float) -> tuple[float, float]:
    """A step that float32 has, and at which the largest coefficient has an index.

    And what no coefficient is above.
    """
    step = max(c / 2 * (layer.norm or 1.0), 1e-37)
    peak = float(np.ldexp(layer.peak, -layer.exponent))
    if layer.analysis is not None:
        peak *= float(np.abs(layer.analysis).sum(axis=1).max())
    if step < peak / LARGEST_INDEX:
        blocks = (_matrix(_part(layer, layout, *block), layout) for block in layout.blocks())
        peak = max(float(np.abs(matrix).max(initial=0.0)) for matrix in blocks)
        step = max(step, peak / LARGEST_INDEX)
    return float(np.float32(step)), peak


def _zeros_of(layer: Layer, layout: Layout) -> ZerosOf:
    """What gives the coefficients of some columns that are 0, from their matrix."""
    keep = layer.keep
    if keep is None:
        count = layer.kernels.numel()
        is_pruned = layer.basis is None and bool(
            count - torch.count_nonzero(layer.kernels) >= PRUNED * count
        )
        return lambda start, stop, matrix: matrix == 0 if is_pruned else None
    M = layer.M

    def zeros(start: int, stop: int, matrix: Floats) -> Mask:
        first, count, row = start // M, (stop - start) // M, layout.columns // M
        # Kernels of one row lie together.
        rows = range(1) if count == row else range(layout.rows)
        count = layout.rows * row if count == row else count
        parts = [keep(i * row + first, count).T for i in rows]
        return ~np.concatenate(parts).reshape(matrix.shape)

    return zeros
