"""Imports of what an extra installs."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, TypeGuard

if TYPE_CHECKING:
    from onnx import ModelProto


class MissingExtraError(ImportError):
    """Something is not installed that comes with an extra; the message says which."""


def is_onnx(value: object) -> TypeGuard[ModelProto]:
    """True for an ``onnx.ModelProto``; ``onnx`` is not imported.

    Example:
        >>> is_onnx("net.onnx")
        False
    """
    kind = type(value)
    return kind.__name__ == "ModelProto" and kind.__module__.split(".")[0] == "onnx"


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
