"""Imports of what an extra installs."""

from __future__ import annotations

import importlib
from typing import Any


class MissingExtraError(ImportError):
    """Something is not installed that comes with an extra; the message says which."""


def require(*modules: str, extra: str, purpose: str | None = None) -> Any:
    """Import modules that come with an extra.

    Args:
        modules: their names; the first is returned.
        extra: the extra of this package that installs them.
        purpose: what needs them, for the message, such as ``"sweeps"``.

    Returns:
        The first module.

    Raises:
        MissingExtraError: one is not installed; the message says what to install.

    Example:
        >>> require("json", extra="report").dumps([1])
        '[1]'
    """
    imported = []
    for module in modules:
        try:
            imported.append(importlib.import_module(module))
        except ImportError as error:
            missing = error.name or module
            who = f"{purpose} needs {missing}" if purpose else f"{missing} is not installed"
            raise MissingExtraError(
                f"{who}; pip install 'wavprune[{extra}]'", name=missing
            ) from error
    return imported[0]
