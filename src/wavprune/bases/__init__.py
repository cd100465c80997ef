"""Bases of kernels: PyWavelets' transforms, unbalanced Haar, DCT, KLT, the identity."""

from . import uhaar, dct, klt, identity, wavelets  # isort: skip  # the order of `names`
from .basis import Basis, Kernel, LevelCollapsedWarning, Operator, Request
from .kernels import KernelShape, as_kernels, kernel_shape
from .registry import (
    Family,
    bases_of,
    basis_for,
    family_of,
    max_level,
    named_basis,
    names,
    register,
    request_for,
    transform_of,
)

__all__ = [
    "Basis",
    "Family",
    "Kernel",
    "KernelShape",
    "LevelCollapsedWarning",
    "Operator",
    "Request",
    "as_kernels",
    "bases_of",
    "basis_for",
    "dct",
    "family_of",
    "identity",
    "kernel_shape",
    "klt",
    "max_level",
    "named_basis",
    "names",
    "register",
    "request_for",
    "transform_of",
    "uhaar",
    "wavelets",
]
