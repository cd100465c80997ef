"""The outputs of a classifier for every sample of a loader."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import nn

from ..common.clock import timed
from ..common.loaders import batches, inputs_and_labels
from ..engine.running import running
from ..errors import WavpruneError


class Predictions(NamedTuple):
    """Logits and labels of every sample of a loader, in the loader's order.

    Attributes:
        logits: ``(N, C)``, on the CPU; probabilities, where the model returns those.
        labels: ``(N,)``, int64, on the CPU.
    """

    logits: torch.Tensor
    labels: torch.Tensor


def predict(
    model: nn.Module,
    loader: Iterable[Any],
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Predictions:
    """Run a classifier over a loader.

    Under ``torch.autocast`` the model runs with autocast, as it does outside of this function.

    Args:
        model: returns logits or probabilities ``(N, C)``, or an object with them as ``.logits``.
            It is in evaluation mode while it runs.
        loader: yields ``(inputs, labels)``, or mappings with ``pixel_values`` and ``labels``;
            it can be read more than once.
        device: where to run; None means where the model lives.
        progress: show a progress bar on standard error.

    Returns:
        What it returned and the labels, a pair of tensors.

    Raises:
        TypeError: the loader, a batch or an output is of another kind; the message says which.
        WavpruneError: the loader is empty, an output has another shape or is not finite, or a label
            is not a class of the model.

    Example:
        >>> logits, labels = predict(nn.Linear(4, 3), [(torch.randn(8, 4), torch.arange(8) % 3)])
        >>> logits.shape, labels.shape
        (torch.Size([8, 3]), torch.Size([8]))
    """
    with running(model, device) as run_device, timed("reference"):
        return joined(
            [
                batch_predictions(model(inputs.to(run_device)), labels)
                for inputs, labels in map(inputs_and_labels, batches(loader, progress, "predict"))
            ]
        )


def batch_predictions(output: Any, labels: torch.Tensor) -> Predictions:
    """The predictions of one batch, checked.

    Args:
        output: what the model returned.
        labels: ``(N,)``, int64.

    Raises:
        TypeError: there is no tensor in the output.
        WavpruneError: the logits have another shape or are not finite, or a label is not a class.
    """
    logits = _logits_of(output, len(labels))
    labels = labels.cpu()
    classes = logits.shape[1]
    invalid = labels[(labels < 0) | (labels >= classes)]
    if len(invalid):
        raise WavpruneError(
            f"loader: label {int(invalid[0])} is no class of the model, which returns {classes}; "
            f"allowed: 0 to {classes - 1}"
        )
    return Predictions(logits.detach().cpu(), labels)


def joined(predictions: Sequence[Predictions]) -> Predictions:
    """The predictions of all batches.

    Raises:
        WavpruneError: they differ in their number of classes.
    """
    logits, labels = zip(*predictions, strict=True)
    counts = {batch.shape[1] for batch in logits}
    if len(counts) > 1:
        raise WavpruneError(
            f"the model returned {' and '.join(map(str, sorted(counts)))} classes for different "
            "batches; allowed: one number of classes"
        )
    return Predictions(torch.cat(logits), torch.cat(labels))


def _logits_of(output: Any, samples: int) -> torch.Tensor:
    logits = getattr(output, "logits", output)
    if not isinstance(logits, torch.Tensor):
        raise TypeError(
            f"the model returned a {type(output).__name__}; allowed: a tensor (N, C), or an object "
            "with one as .logits"
        )
    if logits.ndim != 2 or len(logits) != samples or logits.shape[1] < 2:
        raise WavpruneError(
            f"the model returned shape {tuple(logits.shape)} for {samples} samples; allowed: "
            f"({samples}, C) with C classes, 2 or more"
        )
    non_finite = int(logits.numel() - torch.isfinite(logits).sum())
    if non_finite:
        raise WavpruneError(
            f"{non_finite} of {logits.numel()} logits that the model returned are NaN or infinite"
        )
    return logits
