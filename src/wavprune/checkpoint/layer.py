"""A layer's weight, ready to be stored."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from .records import chunks_of
from .stored_basis import Floats, StoredBasis

# From this many values on, BLAS is faster than sums without its threads.
BLAS_FROM = 64


class Layer(NamedTuple):
    """A weight to store.

    What is stored is the weight over ``2 ** exponent``; that is 1 for all but extreme weights.

    Attributes:
        dtype: as safetensors calls it.
        shape: of the weight.
        kernels: ``(N, K)``, a view of its values.
        peak: the largest magnitude of the weight.
        exponent: see above.
        norm: the Frobenius norm of what is stored.
        basis: of its kernels; None is the identity.
        basis_bytes: what the file holds of the basis.
        analysis: ``(M, K)``, float32; None is the identity.
        synthesis: ``(K, M)``, float32, as decoding has it; None is the identity.
        keep: gives the mask ``(M, count)`` of a chunk, by its first kernel and their number; None
            keeps everything.
    """

    dtype: str
    shape: tuple[int, ...]
    kernels: torch.Tensor
    peak: float
    exponent: int
    norm: float
    basis: StoredBasis | None
    basis_bytes: bytes
    analysis: Floats | None
    synthesis: Floats | None
    keep: Callable[[int, int], npt.NDArray[np.bool_]] | None = None

    @property
    def K(self) -> int:  # noqa: N802  # the design's letter
        """Values of a kernel."""
        return self.kernels.shape[1]

    @property
    def M(self) -> int:  # noqa: N802  # the design's letter
        """Coefficients of a kernel."""
        return 1 if self.analysis is None else len(self.analysis)

    def chunks(self) -> Iterator[tuple[int, Floats]]:
        """The start of each chunk, and its coefficients ``(M, kernels)``, float32."""
        for start, count in chunks_of(len(self.kernels), self.M):
            yield start, self.coefficients(start, count)

    def weights(self, start: int, count: int) -> npt.NDArray[Any]:
        """Some kernels, ``(count, K)``, over ``2 ** exponent``, in float32 or float64."""
        kernels = self.kernels[start : start + count]
        if self.exponent:
            scaled: npt.NDArray[Any] = np.ldexp(kernels.to(torch.float64).numpy(), -self.exponent)
            return scaled
        return kernels.to(torch.float64 if self.dtype == "F64" else torch.float32).numpy()

    def coefficients(self, start: int, count: int) -> Floats:
        """Coefficients of some kernels, ``(M, count)``, float32; 0 where they are pruned."""
        values = self.weights(start, count).astype(np.float32, copy=False).T
        if self.analysis is not None:
            values = transform(self.analysis, values)
        if self.keep is None:
            return values
        return np.where(self.keep(start, count), values, np.float32(0))

    def rescaled(self, exponent: int) -> Layer:
        """The layer with another exponent."""
        norm = float(np.ldexp(self.norm, self.exponent - exponent))
        return self._replace(exponent=exponent, norm=norm)


def transform(analysis: Floats, kernels: Floats) -> Floats:
    """``analysis @ kernels``: ``(M, K)`` times ``(K, count)``."""
    if analysis.shape[1] > BLAS_FROM:
        return analysis @ kernels
    # Waking BLAS's threads takes longer than small sums.
    coefficients: Floats = np.einsum("mk,kn->mn", analysis, np.ascontiguousarray(kernels))
    return coefficients
