"""Backends by name, and which one prunes some layers."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Sequence
from functools import cache
from typing import NamedTuple

from ..common.registry import Registry
from ..errors import WavpruneError
from .protocol import Backend, Layer


class SlowBackendWarning(UserWarning):
    """``"auto"`` prunes on the CPU without the compiled code; said once in a process."""


class _Entry(NamedTuple):
    module: str
    automatic: bool


_REGISTRY = Registry[_Entry]("backend")


def register(name: str, module: str, *, automatic: bool) -> None:
    """Add a backend.

    Asked for by name a backend runs or says why it cannot; ``"auto"`` tries the automatic ones in
    the order of registration and takes the first that can do the whole job.

    Args:
        name: what users call it.
        module: a module with ``make() -> Backend``, absolute or relative to this package;
            ``make``, or importing the module, raises ImportError with the reason where the
            backend cannot run on this machine.
        automatic: True lets ``"auto"`` take it.
    """
    _REGISTRY.register(name, _Entry(module, automatic))


register("native", ".native", automatic=True)
register("triton", ".triton.backend", automatic=True)
register("eager", ".eager", automatic=True)
register("ptwt", ".ptwt", automatic=False)
register("reference", ".reference", automatic=False)


def registered() -> tuple[object, ...]:
    """What changes when a backend is added or removed."""
    return (_REGISTRY, _REGISTRY.changes)


def names() -> list[str]:
    """The names of all registered backends.

    Example:
        >>> "eager" in names()
        True
    """
    return list(_REGISTRY)


def capturable() -> list[str]:
    """The names of the backends here whose calls a CUDA graph can hold.

    Example:
        >>> "eager" in capturable()
        False
    """
    absent = unavailable()
    here = (name for name in names() if name not in absent)
    return [name for name in here if _load(_REGISTRY[name]).can_capture]


def unavailable() -> dict[str, str]:
    """The backends that cannot run on this machine: name -> why, and what would change it."""
    reasons = {}
    for name in names():
        try:
            _load(_REGISTRY[name])
        except ImportError as error:
            reasons[name] = str(error)
    return reasons


def resolve(
    name: str, layers: Sequence[Layer], scattered: bool = False, masks: bool = False
) -> Backend:
    """The backend that prunes these layers.

    Args:
        name: a registered name, or ``"auto"``.
        layers: all of them; the answer holds for the whole call.
        scattered: True where they share a threshold and are never on one device at one time.
        masks: True where the backend must have masks.

    Raises:
        WavpruneError: the named backend does not exist, cannot run here, or cannot prune a layer.
    """
    check_name(name)
    if name != "auto":
        try:
            backend = _load(_REGISTRY[name])
        except ImportError as error:
            raise WavpruneError(f"backend {name!r} cannot run here: {error}") from error
        reason = _obstacle(backend, layers, scattered, masks)
        if reason is not None:
            raise WavpruneError(f"backend {name!r} cannot do this: {reason}")
        return backend
    absent: dict[str, str] = {}
    for candidate in _REGISTRY:
        if _REGISTRY[candidate].automatic:
            try:
                backend = _load(_REGISTRY[candidate])
            except ImportError as error:
                absent[candidate] = str(error)
                continue
            if _obstacle(backend, layers, scattered, masks) is None:
                if "native" in absent and any(layer.device.type == "cpu" for layer in layers):
                    _warn_slow(candidate, absent["native"])
                return backend
    raise AssertionError("eager runs everything")


@cache
def _warn_slow(name: str, reason: str) -> None:
    warnings.warn(
        f"backend 'auto' takes {name!r}, which is many times slower on a CPU than compiled code: "
        f"{reason}; backend={name!r} asks for it without this warning",
        SlowBackendWarning,
        stacklevel=2,
    )


def check_name(name: str) -> None:
    """Raise WavpruneError unless ``name`` is ``"auto"`` or registered."""
    if name != "auto" and name not in _REGISTRY:
        _REGISTRY.check(name, described=lambda: f"auto, {', '.join(_REGISTRY)}")


def _obstacle(
    backend: Backend, layers: Sequence[Layer], scattered: bool, masks: bool
) -> str | None:
    if masks and not backend.has_masks:
        return "it has no masks, which training needs; 'native', 'triton' and 'eager' have"
    if scattered and not backend.can_stream:
        return (
            "one threshold for weights that do not fit on one device together; "
            "'eager' takes them one after the other"
        )
    for layer in layers:
        reason = backend.unsupported(layer)
        if reason is not None:
            return f"layer {layer.name!r}: {reason}"
    return None


@cache
def _load(entry: _Entry) -> Backend:
    module = importlib.import_module(entry.module, __package__)
    backend: Backend = module.make()
    return backend
