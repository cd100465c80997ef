"""The device that computes, and warnings at the caller's line."""

from __future__ import annotations

import sys
import warnings
from functools import cache
from pathlib import Path

import torch

from ..errors import WavpruneError

_TORCH = str(Path(torch.__file__).parent)
_PACKAGE = str(Path(__file__).parents[1])


def compute_device(asked: str | torch.device | None) -> torch.device | None:
    """The device that a caller asked for, with its index; "cuda" without CUDA warns, once.

    Raises:
        WavpruneError: there is no such device here.
    """
    if asked is None:
        return None
    device = torch.device(asked)
    if device.type == "cuda" and not torch.cuda.is_available():
        _warn_no_cuda(str(asked))
        return torch.device("cpu")
    return present_device(asked)


def present_device(asked: str | torch.device) -> torch.device:
    """The device that a caller asked for, with its index.

    Raises:
        TypeError: it is no name of a device.
        WavpruneError: there is no such device here.
    """
    if not isinstance(asked, str | torch.device):
        raise TypeError(f"device must be a str or a torch.device, not {asked!r}")
    try:
        device = torch.device(asked)
        if device.type != "meta":
            # With its index: "cuda" is the current one of several.
            return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise WavpruneError(f"device {str(asked)!r} is not available here: {reason}") from error
    raise WavpruneError(f"device {str(asked)!r} holds no values; allowed: a device that computes")


@cache
def _warn_no_cuda(asked: str) -> None:
    warn(f"device {asked!r}: torch sees no CUDA here; pruning on the CPU")


def is_capturing() -> bool:
    """True while a CUDA graph is captured on the current stream."""
    if not torch.cuda.is_initialized():  # type: ignore[no-untyped-call]  # torch has no types for it
        return False
    return torch.cuda.is_current_stream_capturing()


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called into this package, by whichever of its entries."""
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_code.co_filename.startswith((_PACKAGE, _TORCH)):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level + 1)
