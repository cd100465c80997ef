"""Measures of a network: accuracy or any metric, agreement with the unpruned model, time, bytes."""

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
from ..common.loaders import batches, on_device
from ..common.tables import as_html, as_text, pairs
from ..engine.ambient import neutral
from ..engine.running import running
from ..errors import WavpruneError
from ..graph import as_module
from ..report import PruneReport
from .answers import Answers, tally_of
from .latency import Latency, Stopwatch
from .measure import measure_of
from .measures import against_labels, against_reference, correct, divergence
from .predictions import Predictions
from .size import exact_zeros, stored_bytes
from .spread import paired_error, share_error, standard_error

if TYPE_CHECKING:
    from rich.table import Table

    from onnx import ModelProto

TABLE_WIDTH = 80
# The metric of a classifier.
TOP1 = "top1"
# What only a classifier is measured at.
CLASSIFIER_FIELDS = (
    "classes",
    "top1",
    "top5",
    "loss",
    "precision_macro",
    "recall_macro",
    "f1_macro",
    "precision_weighted",
    "recall_weighted",
    "f1_weighted",
    "confusion",
)


@dataclass(frozen=True, slots=True, repr=False)
class Evaluation:
    """A network on a data set; printed, and in a notebook, it is a table.

    Averages over classes leave out the classes that neither occur nor are predicted, as
    scikit-learn does. What only a classifier has, from ``classes`` to ``f1_weighted`` and
    ``confusion``, is None where another metric was asked for.

    Attributes:
        samples: how many samples the loader yielded.
        metric: the name of the metric, ``"top1"`` unless another one was asked for.
        value: the metric's value.
        higher_is_better: whether larger values of it are better.
        spread: the standard error of ``value``: how far other samples would move it; None where it
            is not known, as of metrics that hold a network, such as FID.
        change_spread: the standard error of its difference from the reference model's on the same
            samples; None without one.
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
    metric: str
    value: float
    higher_is_better: bool
    spread: float | None
    change_spread: float | None
    classes: int | None
    top1: float | None
    top5: float | None
    loss: float | None
    precision_macro: float | None
    recall_macro: float | None
    f1_macro: float | None
    precision_weighted: float | None
    recall_weighted: float | None
    f1_weighted: float | None
    agreement: float | None
    kl: float | None
    latency_median: float | None
    latency_p95: float | None
    throughput: float | None
    parameters: int
    sparsity: float
    weight_sparsity: float
    stored_bytes: int
    confusion: tuple[tuple[int, ...], ...] | None

    def to_dict(self) -> dict[str, Any]:
        """All fields by name, ready for JSON."""
        confusion = None if self.confusion is None else [list(row) for row in self.confusion]
        return {**dataclasses.asdict(self), "confusion": confusion}

    def to_table(self) -> Table:
        """A rich table of what was measured, without the confusion matrix."""
        title = f"{self.samples:,} samples"
        if self.classes is not None:
            title += f", {self.classes} classes"
        return pairs(title, [(name, text) for name, text in self._rows() if text])

    def _rows(self) -> Iterator[tuple[str, str]]:
        if self.top1 is None:
            spread = "" if self.spread is None else f" ± {self.spread:.2g}"
            yield self.metric, f"{self.value:.4g}{spread}"
        else:
            spread = "" if self.spread is None else f" ± {self.spread:.2%}"
            yield "top-1", f"{self.top1:.2%}{spread}"
        many = self.classes is not None and self.classes > 5
        yield "top-5", f"{self.top5:.2%}" if many and self.top5 is not None else ""
        yield "loss", "" if self.loss is None else f"{self.loss:.4f}"
        yield "F1, mean over classes", "" if self.f1_macro is None else f"{self.f1_macro:.4f}"
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
    reference: nn.Module | torch.Tensor | Predictions | Answers | None = None,
    report: PruneReport | None = None,
    device: str | torch.device | None = None,
    timing: bool = True,
    warmup: int = 3,
    progress: bool = False,
    metric: object = None,
) -> Evaluation:
    """Measure a network on a data set: a classifier, or by ``metric`` any other.

    The models run as they would outside of this function: under ``torch.autocast`` with autocast,
    with TF32 where it is allowed. The measures are computed from their outputs in float32 and
    float64 whatever is switched on.

    Args:
        model: returns logits or probabilities ``(N, C)``, or an object with them as ``.logits``,
            as Hugging Face models do; or an ``onnx.ModelProto``; with ``metric``, whatever that
            takes. It is in evaluation mode while it runs, and every module gets its own training
            flag back.
        loader: yields ``(inputs, labels)``, or mappings with ``pixel_values`` and ``labels``; with
            ``metric``, ``(inputs, targets)`` of any kind. It can be read more than once.
        reference: what ``agreement``, ``kl`` and ``change_spread`` compare with: the unpruned
            model, or what ``predict`` returned for it on the same loader, or its outputs alone.
        report: what was pruned in ``model``, for its sparsity and stored bytes.
        device: where to run; None means where the model lives.
        timing: measure the time of the forward passes, at least 10 of them, without data loading.
        warmup: how many forward passes of the first batch precede the timed ones.
        progress: show a progress bar on standard error.
        metric: a ``torchmetrics.Metric``, or a ``Measure`` of one or of a function; None measures
            a classifier by its top-1 accuracy and more.

    Returns:
        All measures.

    Raises:
        TypeError: the loader, a batch or an output is of another kind; the message says which.
        WavpruneError: the loader is empty, an output has another shape or is not finite, a label is
            not a class of the model, the metric fails, or ``reference`` or ``report`` does not fit.

    Example:
        >>> data = [(torch.randn(32, 1, 8, 8), torch.arange(32) % 4)]
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> result = evaluate(net, data, reference=net, timing=False)
        >>> result.samples, result.classes, result.agreement, result.kl
        (32, 4, 1.0, 0.0)
        >>> import wavprune
        >>> error = wavprune.Measure(lambda out, x: (out - x).abs().mean((1, 2, 3)), "L1", False)
        >>> images = torch.ones(4, 1, 8, 8)
        >>> evaluate(nn.Identity(), [(images, images)], metric=error, timing=False).value
        0.0
    """
    warmup = integer("warmup", warmup)
    model = as_module(model)
    measure = measure_of(metric)
    if not isinstance(reference, nn.Module | torch.Tensor | tuple | Answers | None):
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
        tally = tally_of(measure, loader)
        reference_tally = None if reference_model is None else tally_of(measure, loader)
        for batch in batches(loader, progress, "evaluate"):
            inputs, targets = tally.read(batch)
            with timed("forward"):
                tally.add(run(on_device(inputs, run_device)), targets)
            if reference_model is not None and reference_tally is not None:
                with timed("reference"):
                    assert other is not None
                    reference_tally.add(reference_model(on_device(inputs, other)), targets)
        with timed("forward"):
            latency = stopwatch.latency() if stopwatch else None
    answers = reference if reference_tally is None else reference_tally.answers()
    assert not isinstance(answers, nn.Module)
    return measured(model, tally.answers(), answers, report, num_bytes, latency)


def measured(
    model: nn.Module,
    answers: Predictions | Answers,
    reference: torch.Tensor | Predictions | Answers | None,
    report: PruneReport | None,
    num_bytes: int,
    latency: Latency | None = None,
) -> Evaluation:
    """The measures of a network that has run.

    Args:
        model: the network.
        answers: what it predicted, and the labels; or what it was measured at.
        reference: the same of the reference, or its outputs alone.
        report: what was pruned in the model.
        num_bytes: the model's ``stored_bytes``.
        latency: the times of its forward passes; None untimed.

    Raises:
        WavpruneError: ``reference`` or ``report`` does not fit.
    """
    with timed("metrics"):
        with neutral():
            measures = (
                _by_metric(answers, reference)
                if isinstance(answers, Answers)
                else _of_classifier(answers, reference)
            )
        zeros, weights = exact_zeros(model, report)
    return Evaluation(
        **measures,
        latency_median=latency.median if latency else None,
        latency_p95=latency.p95 if latency else None,
        throughput=latency.throughput if latency else None,
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sparsity=0.0 if report is None else report.sparsity,
        weight_sparsity=zeros / weights if weights else 0.0,
        stored_bytes=num_bytes,
    )


def _of_classifier(
    predictions: Predictions, reference: torch.Tensor | Predictions | Answers | None
) -> dict[str, Any]:
    if isinstance(reference, Answers):
        raise WavpruneError(
            f"reference was measured by {reference.measure.name!r}; give metric= here too"
        )
    measures = against_labels(predictions)
    compared = against_reference(predictions, reference)
    change_spread = None
    if reference is not None:
        logits = reference if isinstance(reference, torch.Tensor) else reference[0]
        others = Predictions(logits, predictions.labels)
        change_spread = paired_error(correct(predictions), correct(others))
    samples, classes = predictions.logits.shape
    return {
        "samples": samples,
        "metric": TOP1,
        "value": measures["top1"],
        "higher_is_better": True,
        "spread": share_error(measures["top1"], samples),
        "change_spread": change_spread,
        "classes": classes,
        **measures,
        **compared,
    }


def _by_metric(
    answers: Answers, reference: torch.Tensor | Predictions | Answers | None
) -> dict[str, Any]:
    compared: dict[str, Any] = {"agreement": None, "kl": None}
    parts, logits = None, None
    if isinstance(reference, Answers):
        if reference.measure.name != answers.measure.name:
            raise WavpruneError(
                f"reference was measured by {reference.measure.name!r}, the model by "
                f"{answers.measure.name!r}; allowed: the same metric"
            )
        if reference.samples != answers.samples:
            raise WavpruneError(
                f"reference was measured on {reference.samples} samples, the model on "
                f"{answers.samples}; allowed: the same samples in the same order"
            )
        parts, logits = reference.parts, reference.logits
    elif reference is not None:
        logits = reference if isinstance(reference, torch.Tensor) else reference[0]
    if logits is not None and answers.logits is not None:
        compared = divergence(answers.logits, logits)
    return {
        "samples": answers.samples,
        "metric": answers.measure.name,
        "value": answers.value,
        "higher_is_better": answers.measure.higher_is_better,
        "spread": standard_error(answers.parts),
        "change_spread": paired_error(answers.parts, parts),
        **dict.fromkeys(CLASSIFIER_FIELDS),
        **compared,
    }
