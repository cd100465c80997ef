"""Running a model without leaving a trace: its modes, its device and its buffers."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..common.interrupts import always
from ..errors import WavpruneError
from .ambient import inference_mode, without_gradients
from .device import compute_device


@contextmanager
def running(model: nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """The model in evaluation mode on ``device``, without gradients.

    Afterwards, after an error or an interrupt too, every module has its own training flag again and
    the model has the very tensors that it had.

    Args:
        model: any module.
        device: where to run; None means where the model lives. ``"cuda"`` without CUDA warns once
            and runs on the CPU.

    Yields:
        The device that runs.

    Raises:
        TypeError: ``model`` is not a module.
        WavpruneError: the device is not available, or the model lives on several.
    """
    check_model(model)
    homes = {value.device for value in (*model.parameters(), *model.buffers())}
    requested = compute_device(device)
    if requested is not None and homes - {requested} and len(homes) > 1:
        names = ", ".join(sorted(map(str, homes)))
        raise WavpruneError(
            f"device={str(device)!r}: the model lives on several devices ({names}); leave device "
            "out to run it where it is"
        )
    home = next(iter(homes), torch.device("cpu"))
    with always(_modes(model)), without_gradients():
        if requested is None or requested == home:
            model.eval()
            yield home
            return
        with always(_tensors(model, home)):
            model.to(requested)
            model.eval()
            yield requested


def check_model(model: object) -> None:
    """Raise TypeError unless ``model`` is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")


def copy_of(model: nn.Module, device: torch.device | None) -> nn.Module:
    """A copy of a model, on another device unless that is None."""
    # One that is made in inference mode could not be trained afterwards.
    with inference_mode(False):
        return copy.deepcopy(model).to(device)


@contextmanager
def private_buffers(modules: Iterable[nn.Module]) -> Iterator[None]:
    """The modules with copies of their buffers, so that nothing that runs changes their own.

    Args:
        modules: whose buffers to copy; not the buffers of their submodules.
    """
    originals = [(module, dict(module._buffers)) for module in modules]
    copies = {
        id(buffer): buffer.detach().clone()
        for _, buffers in originals
        for buffer in buffers.values()
        if buffer is not None
    }

    def restore() -> None:
        for module, buffers in originals:
            _update(module._buffers, buffers)

    with always(restore):
        for module, buffers in originals:
            # A buffer that several modules share is one buffer in the copies too.
            _update(module._buffers, {name: copies.get(id(b)) for name, b in buffers.items()})
        yield


def write_all(values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    """Write values into tensors; after an error or an interrupt no tensor has changed.

    Args:
        values: pairs of a tensor and its new values, broadcastable and of any device.
    """
    previous = [(tensor, tensor.detach().clone()) for tensor, _ in values]
    try:
        _write(values)
    except BaseException:
        _write(previous)
        raise


def _modes(model: nn.Module) -> Callable[[], None]:
    """A function that gives every module its present training flag back."""
    modes = [(module, module.training) for module in model.modules()]

    def restore() -> None:
        for module, training in modes:
            module.training = training

    return restore


def _tensors(model: nn.Module, home: torch.device) -> Callable[[], None]:
    """A function that gives a model on another device its present tensors back."""
    modules = [(m, dict(m._parameters), dict(m._buffers)) for m in model.modules()]
    parameters = [(parameter, parameter.grad) for parameter in model.parameters()]
    data = [(t, t.data) for pair in parameters for t in pair if t is not None]

    def restore() -> None:
        try:
            # For tensors that are neither parameters nor buffers and move by a method of their own.
            model.to(home)
        finally:
            for tensor, values in data:
                tensor.data = values
            for module, own_parameters, own_buffers in modules:
                _update(module._parameters, own_parameters)
                _update(module._buffers, own_buffers)
            for parameter, grad in parameters:
                parameter.grad = grad

    return restore


def _write(values: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> None:
    # Inference tensors can be written to in inference mode alone, other tensors in either mode.
    inference = any(tensor.is_inference() for tensor, _ in values)
    with inference_mode(inference or torch.is_inference_mode_enabled()), without_gradients():
        for tensor, new in values:
            tensor.copy_(new)


def _update(tensors: dict[str, Any], values: Mapping[str, Any]) -> None:
    # One by one: what a TorchScript module has in place of a dict knows no update().
    for name, value in values.items():
        tensors[name] = value
