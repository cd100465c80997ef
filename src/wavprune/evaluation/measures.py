"""The measures of a classifier, from its logits or from probabilities.

Averages over classes are those of torchmetrics 1.9 to the last bit: counts are divided in float32,
and classes that neither occur nor are predicted are left out.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch.nn import functional

from ..common.outputs import are_probabilities, log_of
from ..errors import WavpruneError
from .predictions import Predictions
from .spread import Parts

# Samples that are looked at together: their logits are copied in float64.
CHUNK = 4096
TOP = 5


def against_labels(predictions: Predictions) -> dict[str, Any]:
    """The measures of predictions against labels, by their names in ``Evaluation``.

    Args:
        predictions: logits or probabilities ``(N, C)``, and labels ``(N,)``, which are classes.
    """
    samples, classes = predictions.logits.shape
    confusion = torch.zeros(classes * classes, dtype=torch.int64, device="cpu")
    among_top, loss = torch.zeros((), dtype=torch.int64, device="cpu"), 0.0
    probabilities = are_probabilities(predictions.logits)
    for outputs, labels in _chunks(*predictions):
        single = outputs.float()
        confusion += torch.bincount(
            labels * classes + single.argmax(1), minlength=classes * classes
        )
        best = single.topk(min(TOP, classes)).indices
        among_top += (best == labels[:, None]).sum()
        logits = _logits(outputs, probabilities)
        loss += float(functional.cross_entropy(logits, labels, reduction="sum"))
    confusion = confusion.view(classes, classes)
    hits = confusion.diag()
    return {
        "top1": float(_ratio(hits.sum(), confusion.sum())),
        "top5": float(_ratio(among_top, confusion.sum())),
        **_averages(hits, confusion.sum(0), confusion.sum(1)),
        "loss": loss / samples,
        "confusion": tuple(map(tuple, confusion.tolist())),
    }


def against_reference(
    predictions: Predictions, reference: torch.Tensor | Predictions | None
) -> dict[str, Any]:
    """Agreement with the reference and KL(reference || model), by their names in ``Evaluation``.

    Args:
        predictions: logits or probabilities ``(N, C)``, and labels ``(N,)``.
        reference: those of the reference, or its outputs alone.

    Raises:
        WavpruneError: the reference has other shapes or labels.
    """
    if reference is None:
        return {"agreement": None, "kl": None}
    expected = reference if isinstance(reference, torch.Tensor) else reference[0]
    if not isinstance(reference, torch.Tensor) and not torch.equal(
        reference[1], predictions.labels
    ):
        raise WavpruneError(
            "reference: the loader yields other labels than when it was measured; allowed: the "
            "same samples in the same order, so not shuffled"
        )
    return divergence(predictions.logits, expected)


def divergence(logits: torch.Tensor, expected: torch.Tensor) -> dict[str, Any]:
    """Agreement and KL(reference || model), by their names in ``Evaluation``.

    Args:
        logits: the model's, ``(N, C)``, or its probabilities.
        expected: the reference's.

    Raises:
        WavpruneError: the shapes differ.
    """
    if expected.shape != logits.shape:
        raise WavpruneError(
            f"reference: its logits are {tuple(expected.shape)}, the model's {tuple(logits.shape)}"
        )
    alike, total = 0, 0.0
    logits, expected = logits.detach().cpu(), expected.detach().cpu()
    probabilities = are_probabilities(expected) and are_probabilities(logits)
    for found, wanted in _chunks(logits, expected):
        alike += int((found.argmax(1) == wanted.argmax(1)).sum())
        log_p, log_q = (
            functional.log_softmax(_logits(values, probabilities), 1) for values in (wanted, found)
        )
        total += float(functional.kl_div(log_q, log_p, reduction="sum", log_target=True))
    # Rounding can leave a sum that should be 0 a little below it.
    return {"agreement": alike / len(logits), "kl": max(total / len(logits), 0.0)}


def correct(predictions: Predictions) -> Parts:
    """Which samples a classifier is right in, as parts of its accuracy."""
    hits = [
        (logits.float().argmax(1) == labels).double()
        for logits, labels in _chunks(predictions.logits.detach().cpu(), predictions.labels)
    ]
    values = torch.cat(hits)
    return Parts(values, torch.full_like(values, 1 / len(values)))


def _logits(outputs: torch.Tensor, probabilities: bool) -> torch.Tensor:
    """Logits in float64."""
    wide = outputs.double()
    return log_of(wide) if probabilities else wide


def _chunks(*tensors: torch.Tensor) -> Iterator[tuple[torch.Tensor, ...]]:
    return zip(*(torch.split(tensor, CHUNK) for tensor in tensors), strict=True)


def _averages(
    hits: torch.Tensor, predicted: torch.Tensor, occurring: torch.Tensor
) -> dict[str, float]:
    """Precision, recall and F1 over classes.

    Args:
        hits: ``(C,)``, samples of each class that were predicted to be of it.
        predicted: ``(C,)``, samples that were predicted to be of each class.
        occurring: ``(C,)``, samples of each class.
    """
    present = ((predicted + occurring) > 0).float()
    scores = {
        "precision": _ratio(hits, predicted),
        "recall": _ratio(hits, occurring),
        "f1": _ratio(2.0 * hits, predicted + occurring),
    }
    weights = {"macro": present, "weighted": occurring}
    return {
        f"{name}_{average}": float(_ratio(weight * score, weight.sum(-1, keepdim=True)).sum(-1))
        for name, score in scores.items()
        for average, weight in weights.items()
    }


def _ratio(part: torch.Tensor, whole: torch.Tensor) -> torch.Tensor:
    """Their quotient in float32, 0 where the whole is 0."""
    return torch.where(whole != 0, part.float() / whole.float(), 0.0)
