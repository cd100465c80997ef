"""Transforms in numpy, for the ``reference`` backend: written apart from any matrix of a basis."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

from .basis import Basis
from .matrices import NEGLIGIBLE

Array = npt.NDArray[Any]


class Transform:
    """A 2-D transform of many kernels; orthonormal unless ``scales`` says otherwise.

    Attributes:
        scales: True where a coefficient may be larger or smaller than its effect on the weight;
            then ``nonzero`` and ``norms`` say which can be non-zero and how large the effect is.
    """

    scales = False

    def forward(self, kernels: Array) -> Array:
        """Packed coefficients ``(n, Mh, Mw)`` of kernels ``(n, kh, kw)``."""
        raise NotImplementedError

    def inverse(self, packed: Array) -> Array:
        """Kernels ``(n, kh, kw)`` of packed coefficients ``(n, Mh, Mw)``."""
        raise NotImplementedError

    def nonzero(self) -> Array:
        """``(Mh, Mw)``: False at the structural zeros."""
        raise NotImplementedError

    def norms(self) -> Array:
        """``(Mh, Mw)``: the norm of the kernel that each single coefficient makes."""
        raise NotImplementedError


class MatrixTransform(Transform):
    """A basis by its dense matrices: for a family that brings no transform of its own."""

    scales = True

    def __init__(self, basis: Basis) -> None:
        self._basis = basis

    def forward(self, kernels: Array) -> Array:
        """``A @ w`` of every kernel."""
        flat = kernels.reshape(len(kernels), -1)
        packed = flat @ self._basis.analysis.T.astype(flat.dtype)
        return np.asarray(packed.reshape(-1, *self._basis.grid))

    def inverse(self, packed: Array) -> Array:
        """``S @ c`` of every kernel."""
        flat = packed.reshape(len(packed), -1)
        kernels = flat @ self._basis.synthesis.T.astype(flat.dtype)
        return np.asarray(kernels.reshape(-1, *self._basis.kernel))

    def nonzero(self) -> Array:
        """Where a row of ``A`` is not 0."""
        return ~self._basis.structural.reshape(self._basis.grid)

    def norms(self) -> Array:
        """The norms of the columns of ``S``."""
        norms = np.linalg.norm(self._basis.synthesis, axis=0).reshape(self._basis.grid)
        return np.where(norms > NEGLIGIBLE * norms.max(), norms, 0)


class AxisTransform(Transform):
    """A transform of one axis, run along both; its inverse likewise."""

    def forward(self, kernels: Array) -> Array:
        """Along the columns' axis, then along the rows'."""
        return self.along(self.along(kernels).swapaxes(1, 2)).swapaxes(1, 2)

    def inverse(self, packed: Array) -> Array:
        """Back along both axes."""
        return self.back(self.back(packed).swapaxes(1, 2)).swapaxes(1, 2)

    def along(self, x: Array) -> Array:
        """The transform of the last axis."""
        raise NotImplementedError

    def back(self, x: Array) -> Array:
        """The inverse along the last axis."""
        raise NotImplementedError
