"""Prune a model with PyWavelets and numpy only: slow, and the definition of the result."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import wraps
from typing import ParamSpec

from . import fast
from .errors import WavpruneError
from .report import PruneReport

P = ParamSpec("P")


def _by_reference(run: Callable[P, PruneReport]) -> Callable[P, PruneReport]:
    signature = inspect.signature(run)

    @wraps(run)
    def prune(*args: P.args, **kwargs: P.kwargs) -> PruneReport:
        call = signature.bind(*args, **kwargs)
        backend = call.arguments.get("backend", "auto")
        if backend not in ("auto", "reference"):
            raise WavpruneError(f"backend must be 'auto' or 'reference' here, not {backend!r}")
        call.arguments["backend"] = "reference"
        return run(*call.args, **call.kwargs)

    return prune


prune = _by_reference(fast.prune)
