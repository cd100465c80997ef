"""Measures of a classifier: accuracy, agreement with the unpruned model, time and bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from ..common.checks import integer
from ..common.loaders import batches, inputs_and_labels
from ..common.optional import require
from ..engine.ambient import neutral
from ..engine.running import running
from ..errors import WavpruneError
from ..report import PruneReport
from .latency import Stopwatch
from .predictions import Predictions, batch_predictions, joined
from .size import exact_zeros, stored_bytes

if TYPE_CHECKING:
    from torchmetrics import MetricCollection

# Samples per update of the metrics: top-k allocates several arrays of this times the classes.
CHUNK = 4096


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A classifier on a data set.

    Averages over classes leave out the classes that neither occur nor are predicted, as
    scikit-learn does.

    Attributes:
        samples: how many samples the loader yielded.
        classes: how many classes the model tells apart.
        top1: fraction of the samples whose class has the largest logit.
        top5: fraction whose class is among the 5 largest, or among all where there are fewer.
        loss: mean cross entropy, in nats.
        precision_macro: mean over the classes.
        recall_macro: mean over the classes.
        f1_macro: mean over the classes.
        precision_weighted: mean weighted by how often each class occurs.
        recall_weighted: mean weighted by how often each class occurs.
        f1_weighted: mean weighted by how often each class occurs.
        agreement: fraction of the samples that get the reference model's class; None without one.
        kl: mean Kullback-Leibler divergence KL(reference || model), in nats; None without one.
        latency_median: seconds per batch, over the batches as large as the first; None untimed.
        latency_p95: 95th percentile of the same; None untimed.
        throughput: samples per second, over the same; None untimed.
        parameters: values in all parameters, each counted once.
        sparsity: ``1 - kept / weights`` of the pruned layers; 0 without a report.
        weight_sparsity: fraction of exact zeros in the weights of the pruned layers, or in the
            parameters of two or more axes without a report.
        stored_bytes: what a file must hold; see ``wavprune.stored_bytes``.
        confusion: samples of each class (rows) by predicted class (columns).
    """

    samples: int
    classes: int
    top1: float
    top5: float
    loss: float
    precision_macro: float
    recall_macro: float
    f1_macro: float
    precision_weighted: float
    recall_weighted: float
    f1_weighted: float
    agreement: float | None
    kl: float | None
    latency_median: float | None
    latency_p95: float | None
    throughput: float | None
    parameters: int
    sparsity: float
    weight_sparsity: float
    stored_bytes: int
    confusion: tuple[tuple[int, ...], ...]

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, ready for JSON."""
        return {**dataclasses.asdict(self), "confusion": [list(row) for row in self.confusion]}


def evaluate(
    model: nn.Module,
    loader: Iterable[Any],
    reference: nn.Module | torch.Tensor | Predictions | None = None,
    report: PruneReport | None = None,
    device: str | torch.device | None = None,
    timing: bool = True,
    warmup: int = 3,
    progress: bool = False,
) -> Evaluation:
    """Measure a classifier on a data set.

    The models run as they would outside of this function: under ``torch.autocast`` with autocast,
    with TF32 where it is allowed. The measures are computed from their logits in float32 and
    float64 whatever is switched on.

    Args:
        model: returns logits ``(N, C)``, or an object with them as ``.logits``, as Hugging Face
            models do. It is in evaluation mode while it runs, and every module gets its own
            training flag back.
        loader: yields ``(inputs, labels)``, or mappings with ``pixel_values`` and ``labels``;
            it can be read more than once.
        reference: what ``agreement`` and ``kl`` compare with: the unpruned model, or what
            ``predict`` returned for it on the same loader, or its logits alone.
        report: what was pruned in ``model``, for its sparsity and stored bytes.
        device: where to run; None means where the model lives.
        timing: measure the time of the forward passes, at least 10 of them, without data loading.
        warmup: how many forward passes of the first batch precede the timed ones.
        progress: show a progress bar on standard error.

    Returns:
        All measures.

    Raises:
        TypeError: the loader, a batch or an output is of another kind; the message says which.
        WavpruneError: the loader is empty, an output has another shape or is not finite, a label is
            not a class of the model, or ``reference`` or ``report`` does not fit.
        ImportError: torchmetrics is not installed.

    Example:
        >>> data = [(torch.randn(32, 1, 8, 8), torch.arange(32) % 4)]
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> result = evaluate(net, data, reference=net, timing=False)
        >>> result.samples, result.classes, result.agreement, result.kl
        (32, 4, 1.0, 0.0)
    """
    warmup = integer("warmup", warmup)
    _torchmetrics()
    if not (reference is None or isinstance(reference, nn.Module | torch.Tensor | tuple)):
        raise TypeError(
            "reference must be a model, or what predict returned for it, not "
            f"{type(reference).__name__}"
        )
    stopwatch = Stopwatch(model, warmup) if timing else None
    run = stopwatch.run if stopwatch else model
    reference_model = reference if isinstance(reference, nn.Module) else None
    with (
        running(model, device) as run_device,
        nullcontext() if reference_model is None else running(reference_model, device) as other,
    ):
        num_bytes = stored_bytes(model, report)
        outputs: list[Predictions] = []
        reference_outputs: list[Predictions] = []
        for inputs, labels in map(inputs_and_labels, batches(loader, progress, "evaluate")):
            outputs.append(batch_predictions(run(inputs.to(run_device)), labels))
            if reference_model is not None:
                logits = reference_model(inputs.to(other))
                reference_outputs.append(batch_predictions(logits, labels))
        latency = stopwatch.latency() if stopwatch else None
    predictions = joined(outputs)
    if isinstance(reference, nn.Module):
        reference = joined(reference_outputs)
    with neutral():
        measures = {
            **_against_labels(predictions),
            **_against_reference(predictions, reference),
        }
    zeros, weights = exact_zeros(model, report)
    return Evaluation(
        samples=len(predictions.labels),
        classes=predictions.logits.shape[1],
        **measures,
        latency_median=latency.median if latency else None,
        latency_p95=latency.p95 if latency else None,
        throughput=latency.throughput if latency else None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sparsity=0.0 if report is None else report.sparsity,
        weight_sparsity=zeros / weights if weights else 0.0,
        stored_bytes=num_bytes,
    )


def _against_reference(
    predictions: Predictions, reference: torch.Tensor | Predictions | None
) -> dict[str, Any]:
    """Agreement with the reference and KL(reference || model), by their names in ``Evaluation``."""
    if reference is None:
        return {"agreement": None, "kl": None}
    logits = predictions.logits
    expected = reference if isinstance(reference, torch.Tensor) else reference[0]
    if expected.shape != logits.shape:
        raise WavpruneError(
            f"reference: its logits are {tuple(expected.shape)}, the model's {tuple(logits.shape)}"
        )
    if not isinstance(reference, torch.Tensor) and not torch.equal(
        reference[1], predictions.labels
    ):
        raise WavpruneError(
            "reference: the loader yields other labels than when it was measured; allowed: the "
            "same samples in the same order, so not shuffled"
        )
    expected = expected.detach().cpu()
    agreement = float((logits.argmax(1) == expected.argmax(1)).double().mean())
    log_p, log_q = (functional.log_softmax(values.double(), 1) for values in (expected, logits))
    kl = float(functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True))
    # Rounding can leave a sum that should be 0 a little below it.
    return {"agreement": agreement, "kl": max(kl, 0.0)}


def _against_labels(predictions: Predictions) -> dict[str, Any]:
    """The measures of predictions against labels, by their names in ``Evaluation``."""
    metrics = _metrics(predictions.logits.shape[1])
    loss = 0.0
    chunks = (torch.split(tensor, CHUNK) for tensor in predictions)
    for logits, labels in zip(*chunks, strict=True):
        metrics.update(logits.float(), labels)
        loss += float(functional.cross_entropy(logits.double(), labels, reduction="sum"))
    results = metrics.compute()
    confusion = tuple(map(tuple, results.pop("confusion").tolist()))
    values = {name: float(value) for name, value in results.items()}
    return {**values, "loss": loss / len(predictions.labels), "confusion": confusion}


def _torchmetrics() -> Any:
    return require("torchmetrics", extra="evaluate", purpose="evaluation")


def _metrics(classes: int) -> MetricCollection:
    metrics = _torchmetrics().classification
    averaged = {
        "precision": metrics.MulticlassPrecision,
        "recall": metrics.MulticlassRecall,
        "f1": metrics.MulticlassF1Score,
    }
    # Labels were checked batch by batch.
    settings: dict[str, Any] = {"num_classes": classes, "validate_args": False}
    collection: MetricCollection = _torchmetrics().MetricCollection(
        {
            "top1": metrics.MulticlassAccuracy(average="micro", **settings),
            "top5": metrics.MulticlassAccuracy(average="micro", top_k=min(5, classes), **settings),
            "confusion": metrics.MulticlassConfusionMatrix(**settings),
            **{
                f"{name}_{average}": metric(average=average, **settings)
                for name, metric in averaged.items()
                for average in ("macro", "weighted")
            },
        }
    )
    return collection
