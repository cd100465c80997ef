"""The one guard against ambient state: no result depends on what the caller has switched on."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")
# The smallest denormal: 0 once it is multiplied where denormals are flushed.
_DENORMAL = 5e-324


@contextmanager
def neutral(weights: Iterable[torch.Tensor] = ()) -> Iterator[None]:
    """Compute without gradients, autocast and TF32, with torch's own default dtype and device.

    Deterministic mode is switched off too: the results are deterministic anyway, and it refuses
    operators that are used here on integers only. Everything is as it was afterwards.

    Args:
        weights: what will be changed in place. Inference tensors can be changed in inference mode
            alone.

    Example:
        >>> with torch.autocast("cpu"), neutral():
        ...     torch.is_autocast_enabled("cpu")
        False
    """
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        inference = any(map(torch.Tensor.is_inference, weights))
        if inference != torch.is_inference_mode_enabled():
            stack.enter_context(torch.inference_mode(inference))
        for device_type in filter(torch.is_autocast_enabled, _DEVICE_TYPES):
            stack.enter_context(torch.autocast(device_type, enabled=False))
        if torch.get_default_dtype() != torch.float32:
            stack.callback(torch.set_default_dtype, torch.get_default_dtype())
            torch.set_default_dtype(torch.float32)
        if not _creates_on_the_cpu():
            stack.enter_context(torch.device("cpu"))
        if torch.are_deterministic_algorithms_enabled():
            warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            stack.callback(torch.use_deterministic_algorithms, True, warn_only=warn_only)
            torch.use_deterministic_algorithms(False)
        _full_precision(stack)
        _keep_denormals(stack)
        yield


def _creates_on_the_cpu() -> bool:
    """What torch.get_default_device() says, in a third of its time."""
    try:
        return torch.empty(0).is_cpu
    except (RuntimeError, AssertionError):
        # The default is a device that is not here.
        return False


def autocast_enabled() -> bool:
    """Whether autocast is on for any kind of device."""
    return any(map(torch.is_autocast_enabled, _DEVICE_TYPES))


def _full_precision(stack: ExitStack) -> None:
    """Matrix products in the precision of their operands, whichever way that was changed."""
    for matmul in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
        precision = matmul.fp32_precision
        if precision not in ("none", "ieee"):
            stack.callback(setattr, matmul, "fp32_precision", precision)
            matmul.fp32_precision = "ieee"


def _keep_denormals(stack: ExitStack) -> None:
    if _DENORMAL * 1.0 == 0:
        stack.callback(torch.set_flush_denormal, True)
        torch.set_flush_denormal(False)
        # The threads of torch's pool may flush them still, and nothing can tell.
        stack.callback(torch.set_num_threads, torch.get_num_threads())
        torch.set_num_threads(1)
