"""Bases of kernels: PyWavelets' transforms, unbalanced Haar, DCT, KLT, the identity."""

from .basis import Basis, Kernel, LevelCollapsedWarning, Operator, basis_for, max_level, named_basis

__all__ = [
    "Basis",
    "Kernel",
    "LevelCollapsedWarning",
    "Operator",
    "basis_for",
    "max_level",
    "named_basis",
]
