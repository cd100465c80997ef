"""Measures of a classifier: accuracy, agreement with the unpruned model, time and bytes."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..common.checks import integer
from ..common.clock import timed
from ..common.loaders import batches, inputs_and_labels
from ..common.tables import as_html, as_text, pairs
from ..engine.ambient import neutral
from ..engine.running import running
from ..graph import as_module
from ..report import PruneReport
from .latency import Latency, Stopwatch
from .measures import against_labels, against_reference
from .predictions import Predictions, batch_predictions, joined
from .size import exact_zeros, stored_bytes

if TYPE_CHECKING:
    from onnx import ModelProto
    from rich.table import Table

TABLE_WIDTH = 80


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation:
    """A classifier on a data set; printed, and in a notebook, it is a table.

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

    def to_table(self) -> Table:
        """A rich table of what was measured, without the confusion matrix."""
        title = f"{self.samples:,} samples, {self.classes} classes"
        return pairs(title, [(name, text) for name, text in self._rows() if text])

    def _rows(self) -> Iterator[tuple[str, str]]:
        yield "top-1", f"{self.top1:.2%}"
        yield "top-5", f"{self.top5:.2%}" if self.classes > 5 else ""
        yield "loss", f"{self.loss:.4f}"
        yield "F1, mean over classes", f"{self.f1_macro:.4f}"
        yield "agreement", "" if self.agreement is None else f"{self.agreement:.2%}"
        yield "KL, nats", "" if self.kl is None else f"{self.kl:.4f}"
        yield "samples/s", "" if self.throughput is None else f"{self.throughput:,.0f}"
        yield "parameters", f"{self.parameters:,}"
        yield "sparsity", f"{self.sparsity:.2%}"
        yield "weight sparsity", f"{self.weight_sparsity:.2%}"
        yield "stored bytes", f"{self.stored_bytes:,}"

    def __repr__(self) -> str:
        return as_text(self.to_table(), TABLE_WIDTH)

    def _repr_html_(self) -> str:
        return as_html(self.to_table())


def evaluate(
    model: nn.Module | ModelProto,
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
            models do; or an ``onnx.ModelProto``. It is in evaluation mode while it runs, and every
            module gets its own training flag back.
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

    Example:
        >>> data = [(torch.randn(32, 1, 8, 8), torch.arange(32) % 4)]
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> result = evaluate(net, data, reference=net, timing=False)
        >>> result.samples, result.classes, result.agreement, result.kl
        (32, 4, 1.0, 0.0)
    """
    warmup = integer("warmup", warmup)
    model = as_module(model)
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
            with timed("forward"):
                outputs.append(batch_predictions(run(inputs.to(run_device)), labels))
            if reference_model is not None:
                with timed("reference"):
                    logits = reference_model(inputs.to(other))
                    reference_outputs.append(batch_predictions(logits, labels))
        with timed("forward"):
            latency = stopwatch.latency() if stopwatch else None
    if isinstance(reference, nn.Module):
        reference = joined(reference_outputs)
    return measured(model, joined(outputs), reference, report, num_bytes, latency)


def measured(
    model: nn.Module,
    predictions: Predictions,
    reference: torch.Tensor | Predictions | None,
    report: PruneReport | None,
    num_bytes: int,
    latency: Latency | None = None,
) -> Evaluation:
    """The measures of a classifier that has run.

    Args:
        model: the classifier.
        predictions: what it predicted, and the labels.
        reference: the predictions of the reference, or its logits alone.
        report: what was pruned in the model.
        num_bytes: the model's ``stored_bytes``.
        latency: the times of its forward passes; None untimed.

    Raises:
        WavpruneError: ``reference`` or ``report`` does not fit.
    """
    with timed("metrics"):
        with neutral():
            measures = {
                **against_labels(predictions),
                **against_reference(predictions, reference),
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
