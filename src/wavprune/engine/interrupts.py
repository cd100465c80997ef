"""Which pruning is over before a signal can be noticed."""

from __future__ import annotations

from ..backends import Backend
from .device import is_capturing
from .plan import Plan


def cannot_be_interrupted(backend: Backend, plan: Plan) -> bool:
    """True where one call of the backend changes all weights or none."""
    # What is captured runs later, as a whole.
    return (backend.is_atomic and plan.is_uniform) or is_capturing()
