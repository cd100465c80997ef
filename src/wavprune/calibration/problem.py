"""One layer as a least-squares problem in its coefficients.

With the coefficients ``c`` of a row of a weight, its synthesis ``B`` and the second moment ``H`` of
what the layer reads, other coefficients ``x`` change the row's output by ``(x - c)' B'HB (x - c)``
in the mean of squares. A ridge adds ``lam`` times the mean diagonal: it stands for inputs that were
not seen, and with ``lam`` to infinity the largest coefficients are what to keep.
"""

from __future__ import annotations

import copy
from typing import NamedTuple

import torch

from ..backends import Layer
from ..engine.layers import LayerRef
from .collected import Calibration
from .rows import Rows, join_columns, split_columns
from .statistics import Statistics

# Larger matrices are decomposed in float32, at half the time.
LARGEST_IN_FLOAT64 = 256
# Of the mean diagonal over all groups, so that a dead channel can be solved for.
SHARED_RIDGE = 1e-3
SMALLEST_EIGENVALUE = 1e-6
TINY = 1e-12


class Spectrum(NamedTuple):
    """The eigenvalues and eigenvectors of a matrix scaled to a diagonal of ones.

    Attributes:
        values: ``(G, m)``.
        vectors: ``(G, m, m)``.
    """

    values: torch.Tensor
    vectors: torch.Tensor


class Problem:
    """One layer in one basis.

    Args:
        layer: the weight and its basis.
        rows: how the weight becomes matrices.
        statistics: of what it reads.
        blocks: into how many blocks those are cut.
        centered: True where a shift of its outputs does not matter.
        ridge: the ridge.
        weight: in place of the layer's own, ``(groups, r, d)``.

    Attributes:
        name: of the layer.
        C: ``(G, r, m)``, its coefficients; ``G`` counts groups and blocks.
        ridge: the ridge.
    """

    def __init__(
        self,
        layer: Layer,
        rows: Rows,
        statistics: Statistics,
        blocks: int = 1,
        centered: bool = True,
        ridge: float = 0.01,
        weight: torch.Tensor | None = None,
    ) -> None:
        self.name, self.layer, self.rows, self.blocks = layer.name, layer, rows, blocks
        self.ridge = ridge
        operator = layer.operator
        device = statistics.covariance.device
        self._analysis, self._synthesis = (
            None if operator.identity else torch.from_numpy(matrix.copy()).to(device)
            for matrix in (operator.analysis, operator.synthesis)
        )
        matrices = rows.of_weight(layer.weight) if weight is None else weight
        C = split_columns(_apply(matrices, self._analysis), blocks)
        H = self.to_coefficients(statistics.second_moment(centered))
        self.dtype = torch.float64 if C.shape[-1] <= LARGEST_IN_FLOAT64 else torch.float32
        self.C, self._H = C.to(self.dtype), H.to(self.dtype)
        diagonal = torch.diagonal(H, dim1=1, dim2=2).clamp_min(0)
        self._diagonal = (diagonal + 1e-6 * diagonal.mean() + TINY).to(self.dtype)
        self._spectrum: tuple[float, Spectrum] | None = None

    @property
    def numel(self) -> int:
        """Coefficients of the layer."""
        return self.C.numel()

    @property
    def diagonal(self) -> torch.Tensor:
        """``(G, m)``: the diagonal of ``H``, with its ridge."""
        mean = self._diagonal.mean(1, keepdim=True)
        return self._diagonal + self.ridge * (mean + SHARED_RIDGE * self._diagonal.mean())

    @property
    def moment(self) -> torch.Tensor:
        """``(G, m, m)``: the second moment of the coefficients' inputs, with its ridge."""
        extra = self.diagonal - torch.diagonal(self._H, dim1=1, dim2=2)
        return self._H + torch.diag_embed(extra)

    def spectrum(self) -> Spectrum:
        """Of ``H`` scaled to a diagonal of ones."""
        if self._spectrum is None or self._spectrum[0] != self.ridge:
            scale = self.diagonal.sqrt()
            correlation = self.moment / (scale[:, :, None] * scale[:, None, :])
            values, vectors = torch.linalg.eigh(correlation)
            if not bool(torch.isfinite(vectors).all()):
                values, vectors = torch.linalg.eigh(correlation.double())
            spectrum = Spectrum(
                values.clamp_min(SMALLEST_EIGENVALUE).to(self.dtype), vectors.to(self.dtype)
            )
            self._spectrum = self.ridge, spectrum
        return self._spectrum[1]

    def on(self, statistics: Statistics, centered: bool) -> Problem:
        """The same layer with other statistics, at the same ridge."""
        return Problem(self.layer, self.rows, statistics, self.blocks, centered, self.ridge)

    def forget(self) -> None:
        """Let the spectrum go, which is as large as ``H``."""
        self._spectrum = None

    def to_coefficients(self, moment: torch.Tensor) -> torch.Tensor:
        """A second moment of patches ``(G, d, d)`` as one of coefficients ``(G, m, m)``."""
        half = _apply(moment, None if self._synthesis is None else self._synthesis.T)
        return _apply(half.mT, None if self._synthesis is None else self._synthesis.T)

    def error(
        self,
        X: torch.Tensor,
        row_weights: torch.Tensor | None = None,
        moment: torch.Tensor | None = None,
    ) -> float:
        """``sum_i w_i (x_i - c_i)' H (x_i - c_i)`` over all rows ``i``.

        Args:
            X: ``(G, r, m)``.
            row_weights: ``(G, r)``; None means ones.
            moment: in place of ``H``, ``(G, m, m)``.
        """
        E = X - self.C
        rows = ((E @ (self.moment if moment is None else moment)) * E).sum(-1).double()
        return float(rows.sum() if row_weights is None else (rows * row_weights.double()).sum())

    def removal_scores(self) -> torch.Tensor:
        """``(G, r, m)``: what removing a coefficient alone costs, the others refitted.

        ``c_j^2 / (H^-1)_jj`` of Hassibi and Stork, "Second order derivatives for network pruning:
        Optimal Brain Surgeon" (1993).
        """
        values, vectors = self.spectrum()
        inverse = (vectors.square() / values[:, None, :]).sum(-1)
        return self.C.square() * (self.diagonal / inverse)[:, None, :]

    def rows_sample(self, most: int) -> torch.Tensor:
        """The indices of at most so many rows of a group, evenly spaced."""
        count = self.C.shape[1]
        if self.C.shape[0] > 1 or count <= most:
            return torch.arange(count, device=self.C.device)
        return torch.linspace(0, count - 1, most, device=self.C.device).long()

    def of_rows(self, rows: torch.Tensor) -> Problem:
        """The same problem for some of its rows only."""
        part = copy.copy(self)
        part.C = self.C[:, rows]
        return part

    def weights(self, row_weights: torch.Tensor) -> torch.Tensor:
        """Row weights ``(groups, r)`` for every block, ``(G, r)``."""
        return row_weights.repeat_interleave(self.blocks, 0).to(self.C)

    def mask(self, M: torch.Tensor) -> torch.Tensor:
        """A mask ``(G, r, m)`` as ``wavprune.backends`` has it: ``(kernels, coefficients)``."""
        joined = self.rows.join(join_columns(M, self.blocks))
        return joined.reshape(self.layer.num_kernels, -1)

    def from_mask(self, bits: torch.Tensor) -> torch.Tensor:
        """The inverse of ``mask``."""
        shape = self.rows.shape
        return split_columns(self.rows.split(bits.reshape(shape[0], shape[1], -1)), self.blocks)

    def to_weight(self, X: torch.Tensor) -> torch.Tensor:
        """Coefficients ``(G, r, m)`` as a weight of the layer's shape, in float64."""
        matrices = _apply(join_columns(X, self.blocks).double(), self._synthesis)
        return self.rows.join(matrices).reshape(self.rows.shape)


def is_solvable(ref: LayerRef, layer: Layer) -> bool:
    """True where each coefficient belongs to one row of the weight, and a basis has matrices.

    The weight of a linear map is one large kernel, whose coefficients are of all rows at once; in
    the identity alone each belongs to one.
    """
    return layer.basis.is_dense and (ref.weight.ndim > 2 or layer.operator.identity)


def problem_of(layer: Layer, calibration: Calibration) -> Problem:
    """A layer with what is known of it; of one that was never called, by magnitude alone."""
    site = calibration.layers.get(layer.name)
    if site is not None:
        statistics, blocks = calibration.fitted[layer.name], calibration.blocks[layer.name]
        return Problem(layer, site.rows, statistics, blocks, site.centered)
    rows = Rows(tuple(layer.weight.shape))
    size = rows.kernel_values
    blocks = rows.num_columns // size
    home = layer.weight.device
    identity = torch.eye(size, dtype=torch.float64, device=home).expand(blocks, size, size)
    mean = torch.zeros(blocks, size, dtype=torch.float64, device=home)
    return Problem(layer, rows, Statistics(1, mean, identity), blocks)


def _apply(matrices: torch.Tensor, operator: torch.Tensor | None) -> torch.Tensor:
    """Multiply each kernel in the last axis of ``(G, r, channels * K)`` by ``(M, K)``."""
    if operator is None:
        return matrices
    size = operator.shape[1]
    kernels = matrices.reshape(*matrices.shape[:-1], -1, size)
    product: torch.Tensor = kernels @ operator.T.to(kernels)
    return product.flatten(-2)
