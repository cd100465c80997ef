"""Backends: where the numbers of a pruning run are computed."""

from .protocol import Backend, Budget, Job, Layer, Selection
from .registry import check_name, names, register, resolve, unavailable

__all__ = [
    "Backend",
    "Budget",
    "Job",
    "Layer",
    "Selection",
    "check_name",
    "names",
    "register",
    "resolve",
    "unavailable",
]
