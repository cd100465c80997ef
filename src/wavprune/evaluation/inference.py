"""Running a model over a loader: its batches, its modes, its device and its output."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import nn

from ..engine.run import compute_device

INPUTS = "pixel_values"
LABELS = ("labels", "label")


@contextmanager
def running(model: nn.Module, device: str | torch.device | None) -> Iterator[torch.device]:
    """The model in evaluation mode on ``device``, without gradients.

    Afterwards every module has its own training flag again, and the model is where it was.

    Args:
        model: any module.
        device: where to run; None means where the model lives. ``"cuda"`` without CUDA warns once
            and runs on the CPU.

    Yields:
        The device that runs.

    Raises:
        TypeError: ``model`` is not a module.
        ValueError: the device is not available, or the model lives on several.
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, not {type(model).__name__}")
    homes = {value.device for value in (*model.parameters(), *model.buffers())}
    asked = compute_device(device)
    if asked is not None and homes - {asked} and len(homes) > 1:
        places = ", ".join(sorted(map(str, homes)))
        raise ValueError(
            f"device={str(device)!r}: the model lives on several devices ({places}); leave device "
            "out, and it runs where it is"
        )
    home = next(iter(homes), torch.device("cpu"))
    place = asked or home
    with ExitStack() as stack:
        stack.enter_context(modes_restored(model))
        if place != home:
            stack.callback(model.to, home)
            model.to(place)
        model.eval()
        stack.enter_context(torch.no_grad())
        yield place


@contextmanager
def modes_restored(model: nn.Module) -> Iterator[None]:
    """Afterwards every module has its own training flag again."""
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        for module, training in modes:
            module.training = training


def batches(loader: Iterable[Any], progress: bool = False, title: str = "") -> Iterator[Any]:
    """The batches of a loader.

    Args:
        loader: a ``DataLoader``, or anything else that can be iterated over again and again.
        progress: show a tqdm bar on standard error.
        title: what the bar says.

    Raises:
        TypeError: the loader is not iterable, or only once.
        ValueError: there is no batch.
    """
    check_loader(loader)
    if progress:
        from tqdm import tqdm

        shown: Iterable[Any] = tqdm(loader, desc=title, unit="batch", leave=False)
    else:
        shown = loader
    empty = True
    for batch in shown:
        empty = False
        yield batch
    if empty:
        raise ValueError("loader is empty; it must yield at least one batch")


def check_loader(loader: object, name: str = "loader") -> None:
    """Raise TypeError unless ``loader`` can be iterated over more than once."""
    if not isinstance(loader, Iterable):
        raise TypeError(
            f"{name} must yield batches, as a DataLoader does, not be a {type(loader).__name__}"
        )
    if isinstance(loader, Iterator):
        raise TypeError(
            f"{name} is a {type(loader).__name__}, which can be read only once; give a DataLoader "
            "or a list of batches"
        )


def inputs_of(batch: Any) -> torch.Tensor:
    """The inputs ``(N, ...)`` of a batch.

    Args:
        batch: a tensor, a tuple or list that begins with one, or a mapping with ``pixel_values``.

    Raises:
        TypeError: the batch is something else.
        ValueError: the batch holds no sample.
    """
    if isinstance(batch, Mapping):
        inputs = batch.get(INPUTS)
    elif isinstance(batch, tuple | list) and batch:
        inputs = batch[0]
    else:
        inputs = batch
    if not isinstance(inputs, torch.Tensor):
        raise TypeError(
            f"loader: a batch {_described(batch)} has no input tensor; allowed: a tensor, "
            f"(inputs, labels), or a mapping with {INPUTS!r} and {LABELS[0]!r}"
        )
    if inputs.ndim == 0 or len(inputs) == 0:
        raise ValueError(f"loader: a batch of shape {tuple(inputs.shape)} holds no sample")
    return inputs


def labelled(batch: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The inputs ``(N, ...)`` and labels ``(N,)``, int64, of a batch.

    Args:
        batch: ``(inputs, labels)``, or a mapping with ``pixel_values`` and ``labels``.

    Raises:
        TypeError: the batch is something else, or its labels are no integers.
        ValueError: there are not as many labels as samples.
    """
    inputs = inputs_of(batch)
    if isinstance(batch, Mapping):
        labels = next((batch[key] for key in LABELS if key in batch), None)
    else:
        labels = batch[1] if isinstance(batch, tuple | list) and len(batch) > 1 else None
    if labels is None:
        raise TypeError(
            f"loader: a batch {_described(batch)} has no labels; allowed: (inputs, labels), or a "
            f"mapping with {INPUTS!r} and {LABELS[0]!r}"
        )
    labels = torch.as_tensor(labels)
    if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
        raise TypeError(
            f"loader: labels must be integers, class indices, not {labels.dtype}; the first is "
            f"{labels.flatten()[:1].tolist()}"
        )
    if labels.shape != (len(inputs),):
        raise ValueError(
            f"loader: a batch of {len(inputs)} samples has labels of shape {tuple(labels.shape)}; "
            f"allowed: ({len(inputs)},)"
        )
    return inputs, labels.long()


def logits_of(output: Any, samples: int) -> torch.Tensor:
    """The logits ``(N, C)`` in what a model returned.

    Args:
        output: a tensor, or an object with ``.logits``, as Hugging Face models return.
        samples: N, the number of samples that went in.

    Raises:
        TypeError: there is no tensor in it.
        ValueError: its shape is not ``(N, C)`` with two or more classes, or it is not finite.
    """
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(
            f"the model returned a {type(output).__name__}; allowed: a tensor (N, C), or an object "
            "with one as .logits"
        )
    if logits.ndim != 2 or len(logits) != samples or logits.shape[1] < 2:
        raise ValueError(
            f"the model returned shape {tuple(logits.shape)} for {samples} samples; allowed: "
            f"({samples}, C) with C classes, 2 or more"
        )
    broken = int(logits.numel() - torch.isfinite(logits).sum())
    if broken:
        raise ValueError(
            f"{broken} of {logits.numel()} logits that the model returned are NaN or infinite"
        )
    return logits


def _described(batch: Any) -> str:
    if isinstance(batch, Mapping):
        return f"with the keys {list(batch)}"
    if isinstance(batch, tuple | list):
        return f"({', '.join(type(entry).__name__ for entry in batch)})"
    return f"of type {type(batch).__name__}"
