"""Ctrl-C at any point of a call."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType


def interrupted(action: Callable[[], object], at: int) -> int | None:
    """Call ``action`` with Ctrl-C at one of the points where Python looks for signals.

    Returns:
        None if it was interrupted, else how many such points there were.
    """
    points = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal points
        del frame, argument
        if event in ("call", "c_return"):
            points += 1
            if points == at:
                sys.setprofile(None)
                signal.raise_signal(signal.SIGINT)

    sys.setprofile(profile)
    try:
        action()
    except KeyboardInterrupt:
        return None
    finally:
        sys.setprofile(None)
    return points
