"""Layers that are left as they are, and the warning that says so."""

from __future__ import annotations

import warnings
from collections.abc import Mapping


class SkippedLayerWarning(UserWarning):
    """Layers of a checkpoint were left as they are although their kind is pruned or compressed."""


def warn_skipped(path: object, skipped: Mapping[str, str]) -> None:
    """Warn of layers that are left as they are, by name and with the reason."""
    if skipped:
        message = f"{path}: left as they are: {describe_skipped(skipped)}"
        warnings.warn(message, SkippedLayerWarning, stacklevel=3)


def describe_skipped(skipped: Mapping[str, str], most: int = 8) -> str:
    """Skipped layers and why, in one line."""
    shown = [f"{name} ({reason})" for name, reason in list(skipped.items())[:most]]
    return ", ".join(shown) + (f" and {len(skipped) - most} more" if len(skipped) > most else "")
