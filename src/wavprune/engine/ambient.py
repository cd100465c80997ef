"""The one guard against ambient state: no result depends on what the caller has switched on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, _GeneratorContextManager, contextmanager
from functools import partial
from itertools import chain
from typing import Any, NamedTuple

import torch

from ..common.interrupts import always, finish

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")
# The smallest denormal: 0 once it is multiplied where denormals are flushed.
_DENORMAL = 5e-324


def neutral(weights: Iterable[torch.Tensor] = ()) -> _GeneratorContextManager[None]:
    """Compute without gradients, autocast and TF32, with torch's own default dtype and device.

    Deterministic mode is switched off too: the results are deterministic anyway, and it refuses
    operators that are used here on integers only. Everything is as it was afterwards, after an
    interrupt too.

    Args:
        weights: what will be changed in place. Inference tensors can be changed in inference mode
            alone.

    Example:
        >>> with torch.autocast("cpu"), neutral():
        ...     torch.is_autocast_enabled("cpu")
        False
    """
    return _changed(
        lambda: chain(_gradients(), _autocast(_DEVICE_TYPES), _settings()),
        lambda: _modes(weights),
    )


def without_gradients() -> AbstractContextManager[None]:
    """``torch.no_grad()``, after which gradients are as they were, after an interrupt too."""
    return _changed(_gradients)


def without_autocast(device_type: str) -> AbstractContextManager[None]:
    """Without autocast on one kind of device, which is as it was afterwards."""
    return _changed(lambda: _autocast([device_type]))


def autocast_enabled() -> bool:
    """Whether autocast is on for any kind of device."""
    return any(map(torch.is_autocast_enabled, _DEVICE_TYPES))


class _Switch(NamedTuple):
    """A setting of torch that is not what it should be."""

    put: Callable[[Any], object]
    before: Any
    needed: Any


Mode = AbstractContextManager[object]


@contextmanager
def _changed(
    settings: Callable[[], Iterable[_Switch]], modes: Callable[[], Iterable[Mode]] = tuple
) -> Iterator[None]:
    """Within the block torch's settings are what they should be, and modes are entered.

    What is right already is neither: a block that was interrupted on its way out ends when its
    traceback is forgotten, and must not repeat then what an outer one has undone.

    Args:
        settings: those that are not what they should be, asked for in the modes, which change some.
        modes: to enter.
    """
    needed = [*modes()]
    entered = ExitStack()
    switches: list[_Switch] = []

    def enter() -> None:
        for mode in needed:
            entered.enter_context(mode)

    def undo() -> None:
        for switch in switches:
            switch.put(switch.before)
        # They are of the modes that are entered, and not put again where those were left.
        switches.clear()
        # A mode that was entered or left in part cannot be left.
        if needed:
            finish(entered.close)

    with always(undo):
        if needed:
            finish(enter)
        switches += settings()
        for switch in switches:
            switch.put(switch.needed)
        yield


def _modes(weights: Iterable[torch.Tensor]) -> Iterator[Mode]:
    inference = any(map(torch.Tensor.is_inference, weights))
    if inference != torch.is_inference_mode_enabled():
        yield torch.inference_mode(inference)
    if not _creates_on_the_cpu():
        yield torch.device("cpu")


def _gradients() -> Iterator[_Switch]:
    if torch.is_grad_enabled():
        yield _Switch(torch.set_grad_enabled, True, False)


def _autocast(device_types: Iterable[str]) -> Iterator[_Switch]:
    for device_type in filter(torch.is_autocast_enabled, device_types):
        yield _Switch(partial(torch.set_autocast_enabled, device_type), True, False)


def _settings() -> Iterator[_Switch]:
    if (dtype := torch.get_default_dtype()) != torch.float32:
        yield _Switch(torch.set_default_dtype, dtype, torch.float32)
    if torch.are_deterministic_algorithms_enabled():
        warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
        put = partial(torch.use_deterministic_algorithms, warn_only=warn_only)
        yield _Switch(put, True, False)
    # Matrix products in the precision of their operands, whichever way that was changed.
    for matmul in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
        precision = matmul.fp32_precision
        if precision not in ("none", "ieee"):
            yield _Switch(partial(setattr, matmul, "fp32_precision"), precision, "ieee")
    if _DENORMAL * 1.0 == 0:
        yield _Switch(torch.set_flush_denormal, True, False)
        # The threads of torch's pool may flush them still, and nothing can tell.
        yield _Switch(torch.set_num_threads, torch.get_num_threads(), 1)


def _creates_on_the_cpu() -> bool:
    """What torch.get_default_device() says, in a third of its time."""
    try:
        return torch.empty(0).is_cpu
    except (RuntimeError, AssertionError):
        # The default is a device that is not here.
        return False
