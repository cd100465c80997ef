"""Ctrl-C at any point of a call."""

from __future__ import annotations

import signal
import sys
from collections.abc import Callable
from types import FrameType


def interrupted(
    action: Callable[[], object], at: int, files: tuple[str, ...] = ("",)
) -> int | None:
    """Call ``action`` with Ctrl-C at one of the points where Python looks for signals.

    Args:
        action: what is interrupted.
        at: which point, from 1; 0 interrupts nothing.
        files: how the names of the files end whose points count.

    Returns:
        None if it was interrupted, else how many such points there were.
    """
    points = 0

    def profile(frame: FrameType, event: str, argument: object) -> None:
        nonlocal points
        del argument
        if event in ("call", "c_return") and frame.f_code.co_filename.endswith(files):
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
