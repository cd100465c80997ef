"""Bases of kernels: PyWavelets' transforms, unbalanced Haar, DCT, KLT, the identity."""

from . import uhaar, dct, klt, identity, wavelets  # isort: skip  # the order of `names`
from .basis import Basis, Kernel, LevelCollapsedWarning, Operator, Request
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
)

__all__ = [
    "Basis",
    "Family",
    "Kernel",
    "LevelCollapsedWarning",
    "Operator",
    "Request",
    "bases_of",
    "basis_for",
    "dct",
    "family_of",
    "identity",
    "klt",
    "max_level",
    "named_basis",
    "names",
    "register",
    "request_for",
    "uhaar",
    "wavelets",
]
