"""Batches of a loader: their inputs and labels, checked."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sized
from typing import Any

import torch

from ..errors import WavpruneError
from .clock import timed
from .progress import progress_bar

INPUTS = "pixel_values"
LABELS = ("labels", "label")
TARGETS = (*LABELS, "targets", "target")
_END = object()


def batches(
    loader: Iterable[Any], progress: bool = False, description: str = "", name: str = "loader"
) -> Iterator[Any]:
    """The batches of a loader.

    Args:
        loader: a ``DataLoader``, or any other iterable that can be iterated over more than once.
        progress: show a progress bar on standard error.
        description: shown before the bar.
        name: of the parameter, for messages.

    Raises:
        TypeError: the loader is not iterable, or only once.
        WavpruneError: the loader is empty.
    """
    check_loader(loader, name)
    empty = True
    with progress_bar(description, num_batches(loader), "batches", progress) as advance:
        iterator = iter(loader)
        while True:
            with timed("loading"):
                batch = next(iterator, _END)
            if batch is _END:
                break
            empty = False
            yield batch
            advance(1)
    if empty:
        raise WavpruneError(f"{name} is empty; it must yield at least one batch")


def check_loader(loader: object, name: str = "loader") -> None:
    """Check that a loader can be iterated over more than once.

    Args:
        loader: what the caller gave.
        name: of the parameter, for the message.

    Raises:
        TypeError: it cannot.
    """
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"{name} must yield batches, as a DataLoader does, not be of type "
            f"{type(loader).__name__}"
        )
    if isinstance(loader, Iterator):
        raise TypeError(
            f"{name} is a {type(loader).__name__}, which can be read only once; give a DataLoader "
            "or a list of batches"
        )


def inputs_of(batch: Any, name: str = "loader") -> torch.Tensor:
    """The inputs ``(N, ...)`` of a batch.

    Args:
        batch: a tensor, a tuple or list that begins with one, or a mapping with ``pixel_values``.
        name: of the parameter that was its loader, for messages.

    Raises:
        TypeError: the batch is something else.
        WavpruneError: the batch is empty.
    """
    if isinstance(batch, Mapping):
        inputs = batch.get(INPUTS)
    elif isinstance(batch, tuple | list) and batch:
        inputs = batch[0]
    else:
        inputs = batch
    if not isinstance(inputs, torch.Tensor):
        raise TypeError(
            f"{name}: a batch {_described(batch)} has no input tensor; allowed: a tensor, "
            f"(inputs, labels), or a mapping with {INPUTS!r} and {LABELS[0]!r}"
        )
    if inputs.ndim == 0 or len(inputs) == 0:
        raise WavpruneError(f"{name}: a batch of shape {tuple(inputs.shape)} holds no sample")
    return inputs


def inputs_and_labels(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs ``(N, ...)`` and labels ``(N,)``, int64, of a batch.

    Args:
        batch: ``(inputs, labels)``, or a mapping with ``pixel_values`` and ``labels``.

    Raises:
        TypeError: the batch is something else, or its labels are not integers.
        WavpruneError: there are not as many labels as samples.
    """
    inputs = inputs_of(batch)
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABELS if key in batch), None)
    else:
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if labels is None:
        allowed = f"(inputs, labels), or a mapping with {INPUTS!r} and {LABELS[0]!r}"
        if has_targets(batch):
            raise TypeError(
                f"loader: a batch {_described(batch)} has targets, and there is no metric that "
                f"compares outputs with them; allowed: metric= of evaluate and compare, or the "
                f"labels of a classifier: {allowed}"
            )
        raise TypeError(f"loader: a batch {_described(batch)} has no labels; allowed: {allowed}")
    if not isinstance(labels, torch.Tensor):
        # Not on torch's default device, which may hold no values.
        labels = torch.as_tensor(labels, device="cpu")
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"loader: labels must be integers, class indices, not {labels.dtype}; the first is "
            f"{labels.flatten()[:1].tolist()}; other targets need a metric that compares outputs "
            "with them: metric= of evaluate and compare"
        )
    if labels.shape != (len(inputs),):
        raise WavpruneError(
            f"loader: a batch of {len(inputs)} samples has labels of shape {tuple(labels.shape)}; "
            f"allowed: ({len(inputs)},)"
        )
    return inputs, labels.long()


def inputs_and_targets(batch: Any) -> tuple[Any, Any]:
    """The inputs and the targets of a batch, whatever they are.

    Args:
        batch: ``(inputs, targets)``, or a mapping with ``pixel_values`` and ``labels`` or
            ``targets``. The inputs are what the model is called with: a tensor, or a list or
            mapping of tensors.

    Raises:
        TypeError: the batch is something else.
        WavpruneError: the batch is empty.
    """
    inputs, targets = _pair(batch)
    if inputs is None or targets is None:
        raise TypeError(
            f"loader: a batch {_described(batch)} has no inputs and targets; allowed: (inputs, "
            f"targets), or a mapping with {INPUTS!r} and {LABELS[0]!r} or {TARGETS[2]!r}"
        )
    if num_samples(inputs) == 0:
        raise WavpruneError(f"loader: a batch {_described(batch)} holds no sample")
    return inputs, targets


def has_targets(batch: Any) -> bool:
    """Whether a batch has labels or targets beside its inputs."""
    return _pair(batch)[1] is not None


def _pair(batch: Any) -> tuple[Any, Any]:
    if isinstance(batch, Mapping):
        return batch.get(INPUTS), next((batch[key] for key in TARGETS if key in batch), None)
    if isinstance(batch, tuple | list) and len(batch) > 1:
        return batch[0], batch[1]
    return None, None


def num_samples(value: Any) -> int:
    """How many samples a tensor ``(N, ...)``, a list of N, or a mapping of these holds.

    Raises:
        TypeError: it is something else.
    """
    if isinstance(value, Mapping) and value:
        return num_samples(next(iter(value.values())))
    if isinstance(value, torch.Tensor) and value.ndim == 0:
        return 1
    if isinstance(value, Sized):
        return len(value)
    raise TypeError(
        f"loader: a {type(value).__name__} has no samples; allowed: a tensor (N, ...), or a list "
        "or mapping of tensors"
    )


def on_device(value: Any, device: torch.device) -> Any:
    """A tensor, or each tensor of lists and mappings, on a device."""
    if isinstance(value, torch.Tensor):
        return value.to(device)
    if isinstance(value, Mapping):
        return {key: on_device(entry, device) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [on_device(entry, device) for entry in value]
    return value


def num_batches(loader: Iterable[Any]) -> int | None:
    """How many batches a loader says it has; None where it does not say."""
    try:
        return len(loader) if isinstance(loader, Sized) else None
    except TypeError:
        # A DataLoader of an iterable dataset has __len__, which raises.
        return None


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"with the keys {list(batch)}"
    if isinstance(batch, tuple | list):
        return f"({', '.join(type(entry).__name__ for entry in batch)})"
    return f"of type {type(batch).__name__}"
