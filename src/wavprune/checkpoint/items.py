"""Tensors that become indices: a weight in its basis, or a bias."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..errors import WavpruneError
from . import trellis_tables
from .feedback import Factor, divergence_of, factor_of, quantise_matrix
from .formats.names import layer_name
from .index_store import Indices, whole
from .layer import Layer
from .packed import Packer
from .packed_layout import Layout, Matrix
from .stored_basis import Floats, StoredBasis
from .trellis import IndexArray, dequantised, rounded

# From this share of weights that are 0 on, they were pruned, and stay 0.
PRUNED = 0.1


@dataclass(frozen=True)
class Item:
    """A tensor, ready to be quantised.

    Attributes:
        name: of the tensor.
        dtype: as safetensors calls it.
        layout: how the tensor is a matrix.
        matrix: ``(R, C)``, its coefficients over ``2 ** exponent``.
        zeros: ``(R, C)``, coefficients that are 0; None for none.
        unit: the step is this times one number for the whole model.
        factor: how errors weigh; None lets them weigh alike.
        exponent: see ``Layer``.
        basis: of its kernels; None is the identity.
        payload: what a file holds of the basis.
        original: the tensor, for its error.
        layer: what the matrix comes from; None for a tensor that has no basis.
        synthesis: of the basis.
        least_step: what the step is at least.
    """

    name: str
    dtype: str
    layout: Layout
    matrix: Floats
    zeros: npt.NDArray[np.bool_] | None
    unit: float
    factor: Factor | None
    exponent: int
    original: torch.Tensor
    layer: Layer | None = None
    basis: StoredBasis | None = None
    payload: bytes = b""
    synthesis: Floats | None = None
    least_step: float = 0.0

    def quantised(self, c: float) -> Quantised:
        """The item at one number ``c`` for the whole model."""
        # A step that float32 has, and at which the largest coefficient has an index.
        peak = float(np.abs(self.matrix).max(initial=0.0))
        least = max(self.least_step, peak / (1 << 21), 1e-37)
        step = float(np.float32(max(c * self.unit, least)))
        if self.factor is None:
            done = rounded(self.matrix, step, self.zeros, peak=peak)
            return Quantised(self, step, done.indices, done.values)
        indices = quantise_matrix(self.matrix, self.factor, step, self.zeros)
        return Quantised(self, step, indices, dequantised(indices, step))

    def without_feedback(self) -> Item:
        """The item whose errors no other entry makes up for."""
        if self.factor is None:
            return self
        factor = factor_of(self.factor.hessian, feedback=False)
        return replace(self, factor=factor, unit=unit_of(factor))

    def with_weight(self, weight: torch.Tensor) -> Item:
        """The item of another weight, which is pruned where this one is."""
        assert self.layer is not None
        layer = self.layer._replace(kernels=weight.reshape(self.layer.kernels.shape))
        return replace(self, matrix=_matrix(layer, self.layout))


def unit_of(factor: Factor) -> float:
    """The step of a layer over one number for the whole model."""
    return 0.5 / math.sqrt(factor.scale)


class Quantised(NamedTuple):
    """An item at some step.

    Attributes:
        item: what it was.
        step: of the values.
        indices: ``(R, C)``.
        values: ``(R, C)``, as decoding gives them.
    """

    item: Item
    step: float
    indices: IndexArray
    values: Floats

    def tensor(self) -> torch.Tensor:
        """As loading gives it."""
        return self._record(0, None).tensor(self.values, self.item.synthesis)

    def divergence(self) -> float:
        """What the errors add to the divergence of the outputs, about."""
        if self.item.factor is None:
            return 0.0
        return divergence_of(self.item.matrix, self.values, self.item.factor)

    def pack(self, packer: Packer, crc: int) -> None:
        """Add it to a file; ``crc`` is the checksum of what it decodes to."""
        item = self.item
        basis = packer.basis(item.basis, item.payload)
        blocks = whole(self.indices)
        classes = trellis_tables.classify([block.read for block in blocks])
        packer.matrix(item.name, self._record(crc, basis), Indices(blocks, classes))

    def _record(self, crc: int, basis: int | None) -> Matrix:
        item = self.item
        return Matrix(item.dtype, item.layout, basis, self.step, item.exponent, crc)


def coefficients_of(layer: Layer, layout: Layout) -> tuple[Floats, npt.NDArray[np.bool_] | None]:
    """A layer's coefficients ``(R, C)``, pruned ones too, and which are pruned."""
    count = len(layer.kernels)
    matrix = _matrix(layer, layout)
    if layer.keep is None:
        zeros = matrix == 0
        is_pruned = layer.basis is None and zeros.mean() >= PRUNED
        return matrix, (zeros if is_pruned else None)
    step = len(next(iter(layer.chunks()))[1].T)
    kept = [layer.keep(start, min(step, count - start)).T for start in range(0, count, step)]
    return matrix, layout.split(~np.concatenate(kept).reshape(-1, layout.coefficients))


def _matrix(layer: Layer, layout: Layout) -> Floats:
    """A layer's coefficients, pruned ones too."""
    chunks = layer._replace(keep=None).chunks()
    values = np.concatenate([chunk for _, chunk in chunks], axis=1)
    return layout.split(values.T.reshape(-1, layout.coefficients))


def layout_of(layer: Layer, name: str, groups: int = 1, transposed: bool = False) -> Layout:
    """How a layer's weight is a matrix.

    Raises:
        WavpruneError: the layer has a basis of the whole matrix.
    """
    shape = layer.shape
    kernel = int(np.prod(shape[2:])) if len(shape) > 2 else 1
    if layer.basis is not None and kernel != layer.basis.K:
        raise WavpruneError(
            f"layer {layer_name(name)!r}: {layer.basis.name!r} transforms the whole {shape} "
            "matrix, and the coder 'trellis' has no place for its coefficients; allowed: the "
            "identity, or coder='auto'"
        )
    coefficients = kernel if layer.basis is None else layer.M
    return Layout(shape, groups, transposed, kernel, coefficients)
