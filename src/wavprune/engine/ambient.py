"""The one guard against ambient state: no result depends on what the caller has switched on.

Ctrl-C can come between any two instructions, and torch's own context managers are then left in
part, or end when the traceback is forgotten: gradients stay off, or are switched off later. Blocks
of this module end as a whole and in their order; what is switched anywhere in the library is
switched here.
"""

from __future__ import annotations

import threading
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, TypeVar

import torch
from torch.overrides import TorchFunctionMode

from ..common.interrupts import finish

T = TypeVar("T")

# Typed in part.
overrides: Any = torch.overrides

_DEVICE_TYPES = ("cpu", "cuda", "xpu", "mps")
# The smallest denormal: 0 once it is multiplied where denormals are flushed.
_DENORMAL = 5e-324


@contextmanager
def neutral(weights: Iterable[torch.Tensor] = ()) -> Iterator[None]:
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
    with _block() as changes:
        changes.inference_mode(any(map(torch.Tensor.is_inference, weights)))
        changes.gradients(False)
        changes.no_autocast(_DEVICE_TYPES)
        changes.torch_defaults()
        yield


@contextmanager
def without_gradients() -> Iterator[None]:
    """``torch.no_grad()``, after which gradients are as they were, after an interrupt too."""
    with _block() as changes:
        changes.gradients(False)
        yield


@contextmanager
def with_gradients() -> Iterator[None]:
    """Within the block autograd records, whatever is around it."""
    with _block() as changes:
        changes.inference_mode(False)
        changes.gradients(True)
        yield


@contextmanager
def inference_mode(enabled: bool) -> Iterator[None]:
    """``torch.inference_mode(enabled)``, after which all is as it was, after an interrupt too."""
    with _block() as changes:
        changes.inference_mode(enabled)
        # Functions of torch that copy switch them.
        changes.gradients(torch.is_grad_enabled())
        yield


@contextmanager
def without_autocast(device_type: str) -> Iterator[None]:
    """Without autocast on one kind of device, which is as it was afterwards."""
    with _block() as changes:
        changes.no_autocast([device_type])
        yield


@contextmanager
def function_mode(mode: TorchFunctionMode) -> Iterator[None]:
    """A mode that sees torch's functions; those that were there before are there afterwards."""
    with _block() as changes:
        changes.function_mode(mode)
        yield


def autocast_enabled() -> bool:
    """Whether autocast is on for any kind of device."""
    return any(map(torch.is_autocast_enabled, _DEVICE_TYPES))


class _Changes:
    """What one block has changed, to be undone from the last to the first."""

    def __init__(self) -> None:
        # Each may be called twice.
        self._undos: list[Callable[[], object]] = []

    def undo(self) -> None:
        """Put back what is left to put back."""
        while self._undos:
            self._undos[-1]()
            self._undos.pop()

    def take_over(self, earlier: _Changes) -> None:
        """Undo an earlier block's changes too."""
        self._undos[:0] = earlier._undos

    def put(self, setter: Callable[[T], object], before: T, needed: T) -> None:
        """Change a setting."""
        self._undos.append(partial(setter, before))
        setter(needed)

    def gradients(self, enabled: bool) -> None:
        # Also where they are so already: what runs in the block may change them.
        self.put(torch.set_grad_enabled, torch.is_grad_enabled(), enabled)

    def no_autocast(self, device_types: Iterable[str]) -> None:
        for device_type in filter(torch.is_autocast_enabled, device_types):
            self.put(partial(torch.set_autocast_enabled, device_type), True, False)

    def inference_mode(self, enabled: bool) -> None:
        before = torch.is_inference_mode_enabled()
        if enabled == before:
            return
        mode = torch.inference_mode(enabled)

        def leave() -> None:
            if torch.is_inference_mode_enabled() != before:
                mode.__exit__(None, None, None)

        self._undos.append(leave)
        mode.__enter__()

    def function_mode(self, mode: TorchFunctionMode) -> None:
        before = overrides._get_current_function_mode_stack()

        def leave() -> None:
            # Torch takes a mode aside while it runs, and loses it where that is interrupted.
            while overrides._len_torch_function_stack():
                overrides._pop_mode()
            for each in before:
                overrides._push_mode(each)

        self._undos.append(leave)
        overrides._push_mode(mode)

    def torch_defaults(self) -> None:
        if (dtype := torch.get_default_dtype()) != torch.float32:
            self.put(torch.set_default_dtype, dtype, torch.float32)
        if not _creates_on_the_cpu():
            # A device that was entered or left in part cannot be left.
            entered = ExitStack()
            self._undos.append(lambda: finish(entered.close))
            finish(lambda: entered.enter_context(torch.device("cpu")))
        if torch.are_deterministic_algorithms_enabled():
            warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
            put = partial(torch.use_deterministic_algorithms, warn_only=warn_only)
            self.put(put, True, False)
        # Matrix products in the precision of their operands, whichever way that was changed.
        for matmul in (torch.backends.cuda.matmul, torch.backends.mkldnn.matmul):  # type: ignore[attr-defined]
            precision = matmul.fp32_precision
            if precision not in ("none", "ieee"):
                self.put(partial(setattr, matmul, "fp32_precision"), precision, "ieee")
        if _DENORMAL * 1.0 == 0:
            self.put(torch.set_flush_denormal, True, False)
            # The threads of torch's pool may flush them still, and nothing can tell.
            self.put(torch.set_num_threads, torch.get_num_threads(), 1)


class _Blocks(threading.local):
    """The blocks that a thread is in, the innermost last."""

    def __init__(self) -> None:
        self.entered: list[_Changes] = []

    def leave(self, changes: _Changes, late: bool) -> None:
        """Undo a block's changes, if nothing has; may be called twice.

        Blocks within it that are there still were interrupted on their way out. A late one, which
        ends when the traceback of an interrupt is forgotten, may find blocks of a later call within
        it: the next of them undoes its changes then.
        """
        if late and changes in self.entered[:-1]:
            following = self.entered[self.entered.index(changes) + 1]
            following.take_over(changes)
            self.entered.remove(changes)
        while changes in self.entered:
            self.entered[-1].undo()
            self.entered.pop()


_blocks = _Blocks()


@contextmanager
def _block() -> Iterator[_Changes]:
    """A block whose changes are undone at its end, with those of all blocks within it."""
    changes, late = _Changes(), False
    try:
        _blocks.entered.append(changes)
        yield changes
    except GeneratorExit:
        late = True
        raise
    except (KeyboardInterrupt, SystemExit) as interrupt:
        # What it left in part, torch's own among it, ends now, and not when it is forgotten.
        traceback.clear_frames(interrupt.__traceback__)
        raise
    finally:
        try:
            _blocks.leave(changes, late)
        except BaseException:
            # Interrupted; what was undone is undone once.
            _blocks.leave(changes, late)
            raise


def _creates_on_the_cpu() -> bool:
    """What torch.get_default_device() says, in a third of its time."""
    try:
        return torch.empty(0).is_cpu
    except (RuntimeError, AssertionError):
        # The default is a device that is not here.
        return False
