"""What a classifier is worth: accuracy, agreement with the unpruned model, time and bytes."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Iterable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import nn
from torch.nn import functional

from ..report import PruneReport
from .inference import batches, labelled, logits_of, running
from .size import exact_zeros, stored_bytes

if TYPE_CHECKING:
    from types import ModuleType

    from torchmetrics import MetricCollection

# So many batches are timed at least, so that a median and a 95th percentile mean something.
TIMED = 10
# Metrics look at so many samples at a time: top-k makes several arrays of this times the classes.
ROWS = 4096


class Predictions(NamedTuple):
    """What a model said about every sample of a loader, in the loader's order.

    Attributes:
        logits: ``(N, C)``, on the CPU.
        labels: ``(N,)``, int64, on the CPU.
    """

    logits: torch.Tensor
    labels: torch.Tensor


@dataclass(frozen=True, slots=True)
class Evaluation:
    """A classifier on a data set.

    Averages over classes leave out the classes that neither occur nor are predicted, as
    scikit-learn does.

    Attributes:
        samples: how many samples the loader yielded.
        classes: how many classes the model tells apart.
        top1: part of the samples whose class has the largest logit, in [0, 1].
        top5: part whose class is among the 5 largest, or among all where there are fewer.
        loss: mean cross entropy, in nats.
        precision_macro: mean over the classes.
        recall_macro: mean over the classes.
        f1_macro: mean over the classes.
        precision_weighted: mean weighted by how often each class occurs.
        recall_weighted: mean weighted by how often each class occurs.
        f1_weighted: mean weighted by how often each class occurs.
        agreement: part of the samples that get the reference model's class; None without one.
        kl: mean Kullback-Leibler divergence KL(reference || model), in nats; None without one.
        latency_median: seconds a batch, of the batches as large as the first; None untimed.
        latency_p95: 95th percentile of the same; None untimed.
        throughput: samples a second, of the same; None untimed.
        parameters: values in all parameters, each once.
        sparsity: ``1 - kept / weights`` of the pruned layers; 0 without a report.
        weight_sparsity: exact zeros in the weights of the pruned layers, in the parameters of two
            or more axes without a report.
        stored_bytes: what a file must hold; see ``wavprune.stored_bytes``.
        confusion: samples of each class (rows) by the class predicted (columns).
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


def predict(
    model: nn.Module,
    loader: Iterable[Any],
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Predictions:
    """Run a classifier over a loader.

    Args:
        model: returns logits ``(N, C)``, or an object with them as ``.logits``. It is in
            evaluation mode while it runs.
        loader: yields ``(inputs, labels)``, or mappings with ``pixel_values`` and ``labels``;
            it can be read more than once.
        device: where to run; None means where the model lives.
        progress: show a progress bar on standard error.

    Returns:
        The logits and labels, a pair of tensors.

    Raises:
        TypeError: the loader, a batch or an output is of another kind; the message says which.
        ValueError: the loader is empty, an output has another shape or is not finite, or a label
            is no class of the model.

    Example:
        >>> logits, labels = predict(nn.Linear(4, 3), [(torch.randn(8, 4), torch.arange(8) % 3)])
        >>> logits.shape, labels.shape
        (torch.Size([8, 3]), torch.Size([8]))
    """
    with running(model, device) as place:
        return _gathered(
            [
                _checked(_forward(model, inputs.to(place)), labels)
                for inputs, labels in map(labelled, batches(loader, progress, "predict"))
            ]
        )


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

    Args:
        model: returns logits ``(N, C)``, or an object with them as ``.logits``, as Hugging Face
            models do. It is in evaluation mode while it runs, and every module gets its own
            training flag back.
        loader: yields ``(inputs, labels)``, or mappings with ``pixel_values`` and ``labels``;
            it can be read more than once.
        reference: the unpruned model, or what ``predict`` returned for it on the same loader (or
            its logits alone): what ``agreement`` and ``kl`` compare with.
        report: what was pruned in ``model``, for its sparsity and stored bytes.
        device: where to run; None means where the model lives.
        timing: measure the time of the forward passes, at least 10 of them. Data loading is not
            in it.
        warmup: how many forward passes of the first batch precede the timed ones.
        progress: show a progress bar on standard error.

    Returns:
        All measures.

    Raises:
        TypeError: the loader, a batch or an output is of another kind; the message says which.
        ValueError: the loader is empty, an output has another shape or is not finite, a label is
            no class of the model, or ``reference`` or ``report`` does not fit.
        ImportError: torchmetrics is not installed.

    Example:
        >>> data = [(torch.randn(32, 1, 8, 8), torch.arange(32) % 4)]
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
        >>> result = evaluate(net, data, reference=net, timing=False)
        >>> result.samples, result.classes, result.agreement, result.kl
        (32, 4, 1.0, 0.0)
    """
    if isinstance(warmup, bool) or not isinstance(warmup, int) or warmup < 0:
        raise ValueError(f"warmup must be an integer, 0 or more, not {warmup!r}")
    _torchmetrics()
    if not (reference is None or isinstance(reference, nn.Module | torch.Tensor | tuple)):
        raise TypeError(
            "reference must be a model, or what predict returned for it, not "
            f"{type(reference).__name__}"
        )
    other = reference if isinstance(reference, nn.Module) else None
    known = None if isinstance(reference, nn.Module) else reference
    stopwatch = _Stopwatch(model, warmup) if timing else None
    with ExitStack() as stack:
        place = stack.enter_context(running(model, device))
        there = stack.enter_context(running(other, device)) if other is not None else place
        bytes_ = stored_bytes(model, report)
        outputs: list[tuple[torch.Tensor, torch.Tensor]] = []
        others: list[tuple[torch.Tensor, torch.Tensor]] = []
        for inputs, labels in map(labelled, batches(loader, progress, "evaluate")):
            here = inputs.to(place)
            logits = stopwatch.run(here) if stopwatch else _forward(model, here)
            outputs.append(_checked(logits, labels))
            if other is not None:
                others.append(_checked(_forward(other, inputs.to(there)), labels))
        if stopwatch:
            stopwatch.top_up()
    found = _gathered(outputs)
    if others:
        known = _gathered(others)
    agreement, kl = (None, None) if known is None else _against(found, known)
    zeros, weights = exact_zeros(model, report)
    latency = stopwatch.summary() if stopwatch else (None, None, None)
    return Evaluation(
        samples=len(found.labels),
        classes=found.logits.shape[1],
        **_measures(found),
        agreement=agreement,
        kl=kl,
        latency_median=latency[0],
        latency_p95=latency[1],
        throughput=latency[2],
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        sparsity=0.0 if report is None else report.sparsity,
        weight_sparsity=zeros / weights if weights else 0.0,
        stored_bytes=bytes_,
    )


class _Stopwatch:
    """Times forward passes: of the first batch's shape, so that they can be compared."""

    def __init__(self, model: nn.Module, warmup: int) -> None:
        self.model, self.warmup = model, warmup
        self.seconds: list[float] = []
        self.first: torch.Tensor | None = None

    def run(self, inputs: torch.Tensor) -> torch.Tensor:
        """The model's output, of warmed-up hardware where this is the first batch."""
        if self.first is None:
            self.first = inputs
            for _ in range(self.warmup):
                _forward(self.model, inputs)
        _synchronize(inputs.device)
        start = time.perf_counter()
        output = self.model(inputs)
        _synchronize(inputs.device)
        if inputs.shape == self.first.shape:
            self.seconds.append(time.perf_counter() - start)
        return logits_of(output, len(inputs))

    def top_up(self) -> None:
        """Time the first batch again, up to ``TIMED`` times in all."""
        assert self.first is not None
        while len(self.seconds) < TIMED:
            self.run(self.first)

    def summary(self) -> tuple[float, float, float]:
        """Median and 95th percentile of the seconds a batch, and samples a second."""
        assert self.first is not None
        return (
            statistics.median(self.seconds),
            float(np.percentile(self.seconds, 95)),
            len(self.first) * len(self.seconds) / sum(self.seconds),
        )


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _forward(model: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
    return logits_of(model(inputs), len(inputs))


def _checked(logits: torch.Tensor, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch on the CPU, after a look at every label."""
    labels = labels.cpu()
    classes = logits.shape[1]
    wrong = labels[(labels < 0) | (labels >= classes)]
    if len(wrong):
        raise ValueError(
            f"loader: label {int(wrong[0])} is no class of the model, which returns {classes}; "
            f"allowed: 0 to {classes - 1}"
        )
    return logits.detach().cpu(), labels


def _gathered(outputs: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> Predictions:
    """All batches as one."""
    logits, labels = zip(*outputs, strict=True)
    counts = {each.shape[1] for each in logits}
    if len(counts) > 1:
        raise ValueError(
            f"the model returned {' and '.join(map(str, sorted(counts)))} classes for different "
            "batches; allowed: one number of classes"
        )
    return Predictions(torch.cat(logits), torch.cat(labels))


def _against(found: Predictions, reference: torch.Tensor | Predictions) -> tuple[float, float]:
    """Agreement with the reference, and KL(reference || model)."""
    known = (reference if isinstance(reference, torch.Tensor) else reference[0]).detach().cpu()
    if known.shape != found.logits.shape:
        raise ValueError(
            f"reference: its logits are {tuple(known.shape)}, the model's "
            f"{tuple(found.logits.shape)}"
        )
    if not isinstance(reference, torch.Tensor) and not torch.equal(reference[1], found.labels):
        raise ValueError(
            "reference: the loader yields other labels than when it was measured; allowed: the "
            "same samples in the same order, so not shuffled"
        )
    agreement = float((found.logits.argmax(1) == known.argmax(1)).double().mean())
    log_p, log_q = (functional.log_softmax(logits.double(), 1) for logits in (known, found.logits))
    kl = float(functional.kl_div(log_q, log_p, reduction="batchmean", log_target=True))
    # A sum of rounded terms can be a little below the 0 that it stands for.
    return agreement, max(kl, 0.0)


def _measures(found: Predictions) -> dict[str, Any]:
    """The measures of predictions against labels, by their names in ``Evaluation``."""
    metrics = _metrics(found.logits.shape[1])
    loss = 0.0
    for logits, labels in zip(*(torch.split(tensor, ROWS) for tensor in found), strict=True):
        metrics.update(logits.float(), labels)
        loss += float(functional.cross_entropy(logits.double(), labels, reduction="sum"))
    results = metrics.compute()
    confusion = tuple(map(tuple, results.pop("confusion").tolist()))
    values = {name: float(value) for name, value in results.items()}
    return {**values, "loss": loss / len(found.labels), "confusion": confusion}


def _torchmetrics() -> ModuleType:
    try:
        import torchmetrics
    except ImportError as error:
        raise ImportError(
            "evaluation needs torchmetrics; pip install 'wavprune[evaluate]'"
        ) from error
    return torchmetrics


def _metrics(classes: int) -> MetricCollection:
    metrics = _torchmetrics().classification
    averaged = {
        "precision": metrics.MulticlassPrecision,
        "recall": metrics.MulticlassRecall,
        "f1": metrics.MulticlassF1Score,
    }
    # Labels are checked when they come.
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
