"""Layers that are left as they are, and the warning that says so."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence


class SkippedLayerWarning(UserWarning):
    """Layers of a checkpoint were left as they are although their kind is pruned or compressed."""


def warn_skipped(path: object, skipped: Mapping[str, str]) -> None:
    """Warn of layers that are left as they are, by name and with the reason."""
    if skipped:
        message = f"{path}: left as they are: {describe_skipped(skipped)}"
        warnings.warn(message, SkippedLayerWarning, stacklevel=3)


def describe_skipped(skipped: Mapping[str, str], most: int = 8) -> str:
    """Skipped layers and why, in one line."""
    return first_of([f"{name} ({reason})" for name, reason in skipped.items()], most)


def first_of(entries: Sequence[str], most: int = 8) -> str:
    """The first of some entries, and how many more there are."""
    more = len(entries) - most
    return ", ".join(entries[:most]) + (f" and {more} more" if more > 0 else "")
