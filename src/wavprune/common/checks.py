"""Checks of numbers that a caller gave: the value in its type, or an error that repeats it."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Sequence
from typing import Any

from ..errors import WavpruneError


def integer(name: str, value: object, low: int = 0, high: int | None = None) -> int:
    """The value as an ``int`` in ``[low, high]``.

    Args:
        name: of the parameter, for the message.
        value: what the caller gave; bool is not a number here.
        low: the least that is allowed.
        high: the most that is allowed; None sets no limit.

    Raises:
        TypeError: it is no integer.
        WavpruneError: it is out of range.

    Example:
        >>> integer("level", 3, low=1)
        3
    """
    allowed = f"{low} or more" if high is None else f"from {low} to {high}"
    message = f"{name} must be an integer, {allowed}, not {value!r}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(message)
    result = int(value)
    if result < low or (high is not None and result > high):
        raise WavpruneError(message)
    return result


def real(name: str, value: object) -> float:
    """The value as a ``float``, infinity allowed.

    Raises:
        TypeError: it is no number.
        WavpruneError: it is NaN.
    """
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if math.isnan(result):
        raise WavpruneError(f"{name} must be a number, not NaN")
    return result


def fraction(name: str, value: object) -> float:
    """The value as a ``float`` in ``[0, 1)``.

    Raises:
        TypeError: it is no number.
        WavpruneError: it is out of range.

    Example:
        >>> fraction("sparsity", 0.5)
        0.5
    """
    result = real(name, value)
    if not 0 <= result < 1:
        raise WavpruneError(f"{name} must be in [0, 1), not {value!r}")
    return result


def positive(name: str, value: object) -> float:
    """The value as a finite ``float`` above 0.

    Raises:
        TypeError: it is no number.
        WavpruneError: it is out of range.
    """
    result = real(name, value)
    if not 0 < result < math.inf:
        raise WavpruneError(f"{name} must be a positive number, not {value!r}")
    return result


def choice(name: str, value: object, allowed: Sequence[str], described: str | None = None) -> str:
    """The value, one of some names.

    Args:
        name: of the parameter, for the message.
        value: what the caller gave.
        allowed: all names.
        described: how the message lists them where they are many; None lists them all.

    Raises:
        TypeError: it is no string.
        WavpruneError: it is none of them; the message names those close to it.

    Example:
        >>> choice("scope", "layer", ("layer", "global"))
        'layer'
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {value!r}")
    if value in allowed:
        return value
    close = difflib.get_close_matches(value.lower(), allowed, n=4, cutoff=0.5)
    hint = f"close to it: {', '.join(close)}; " if close and described else ""
    raise WavpruneError(
        f"unknown {name} {value!r}; {hint}allowed: {described or ', '.join(allowed)}"
    )


def is_count(value: Any, low: int = 0, high: int = 1 << 62) -> bool:
    """True for an integer in ``[low, high]``."""
    return type(value) is int and low <= value <= high
