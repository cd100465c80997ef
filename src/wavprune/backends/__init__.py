"""Backends: where the steps of a pruning run."""

from .protocol import (
    Backend,
    Batch,
    Projector,
    Target,
    check_name,
    names,
    register,
    resolve,
    resolve_projector,
    unavailable,
)

__all__ = [
    "Backend",
    "Batch",
    "Projector",
    "Target",
    "check_name",
    "names",
    "register",
    "resolve",
    "resolve_projector",
    "unavailable",
]
