"""The compiled extension, for those that can do without it."""

from __future__ import annotations

import importlib
from functools import cache


@cache
def has_extension() -> bool:
    """True where ``torch.ops.wavprune`` is there."""
    try:
        # Importing it registers the operators.
        importlib.import_module("wavprune._C")
    except ImportError:
        return False
    return True
