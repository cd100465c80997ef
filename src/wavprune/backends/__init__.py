"""Backends: where the numbers of a pruning run are computed."""

from .protocol import Backend, Budget, Job, Layer, Measured, Selection
from .registry import (
    SlowBackendWarning,
    capturable,
    check_name,
    names,
    register,
    resolve,
    unavailable,
)

__all__ = [
    "Backend",
    "Budget",
    "Job",
    "Layer",
    "Measured",
    "Selection",
    "SlowBackendWarning",
    "capturable",
    "check_name",
    "names",
    "register",
    "resolve",
    "unavailable",
]
