"""The identity: every coefficient is a weight, and pruning is by magnitude."""

from __future__ import annotations

from .basis import Basis, Kernel, Request
from .factors import Factors
from .registry import Family, register
from .separable import separable_basis
from .transform import Array, Transform


class Identity(Family):
    """The basis that transforms nothing."""

    transforms = False

    def max_level(self, name: str, kernel: Kernel) -> int:
        """0: there is nothing to transform."""
        del name, kernel
        return 0

    def build(self, request: Request) -> Basis:
        """The basis; see ``Family``."""
        spans = [{"w": slice(0, n)} for n in request.kernel]
        return separable_basis(request, 0, 0, Factors(request.kernel, request.kernel, ()), spans)

    def transform(self, basis: Basis, kernels: Array) -> Transform:
        """None at all."""
        del basis, kernels
        return _Unchanged()


class _Unchanged(Transform):
    def forward(self, kernels: Array) -> Array:
        return kernels

    def inverse(self, packed: Array) -> Array:
        return packed


register("identity", Identity())
