"""Data without labels: the answers of the unpruned network are what pruned ones should give."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import torch
from torch import nn

from ..common.loaders import batches, has_targets, inputs_of
from ..common.outputs import are_of_classes
from ..engine.moments import BatchKey
from ..engine.running import running
from ..errors import WavpruneError
from .measure import Measure, default_output
from .measures import divergence

AGREEMENT, CHANGE = "agreement", "output change"


class Answer(NamedTuple):
    """What a network answers to a batch.

    Attributes:
        key: of the batch.
        norms: of its inputs, ``(N,)``, which another order of them changes.
        values: the answers, on the CPU.
    """

    key: BatchKey
    norms: torch.Tensor
    values: torch.Tensor

    def fits(self, inputs: torch.Tensor) -> bool:
        """Whether inputs are those of this batch, in its order."""
        return self.key.fits(inputs) and torch.allclose(_norms(inputs), self.norms, rtol=1e-9)


class Answered:
    """The batches of a loader, each with what a network answers to it.

    Args:
        loader: yields the same batches in the same order every time.
        answers: one for each batch.
    """

    def __init__(self, loader: Iterable[Any], answers: Sequence[Answer]) -> None:
        self._loader, self._answers = loader, answers

    def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """The inputs and the answers of each batch.

        Raises:
            WavpruneError: the loader yields other batches than were answered.
        """
        for batch, known in zip_longest(self._loader, self._answers):
            if batch is None or known is None or not known.fits(inputs_of(batch)):
                raise WavpruneError(
                    "loader: it yields other batches than the unpruned model answered; allowed: "
                    "the same batches in the same order, so neither shuffled nor augmented"
                )
            yield inputs_of(batch), known.values

    def __len__(self) -> int:
        return len(self._answers)


def answered(
    model: nn.Module,
    loader: Iterable[Any],
    device: str | torch.device | None = None,
    progress: bool = False,
) -> tuple[Answered, Measure]:
    """A loader without labels with the answers of a network as its targets, and what they measure.

    Answers ``(N, C)``, C at least 2, are those of a classifier: measured is in which share of the
    inputs the same class is first. Of any other tensor it is the relative change of the output, the
    mean over the inputs; then all outputs of the network are kept in memory.

    Args:
        model: the unpruned network.
        loader: can be read more than once.
        device: where to run; None means where the model lives.
        progress: show a progress bar on standard error.

    Raises:
        TypeError: a batch has no input tensor.
        WavpruneError: the loader is empty, or the network returns no tensor.

    Example:
        >>> loader, measure = answered(nn.Linear(4, 3), [torch.randn(8, 4)])
        >>> measure.name, len(loader)
        ('agreement', 1)
    """
    answers: list[Answer] = []
    measure = None
    with running(model, device) as run_device:
        for batch in batches(loader, progress, "predict"):
            inputs = inputs_of(batch)
            output = _tensor_in(model(inputs.to(run_device)))
            if output is None:
                raise WavpruneError(
                    "loader: it has no labels, and the model returns no floating-point tensor that "
                    "could be compared; give targets and metric="
                )
            if output.ndim == 0 or len(output) != len(inputs):
                raise WavpruneError(
                    f"loader: it has no labels, and the model returns {tuple(output.shape)} for "
                    f"{len(inputs)} inputs; allowed: an output for each, or targets and metric="
                )
            if measure is None:
                measure = _agreement() if are_of_classes(output) else _change()
            answer = (output.argmax(1) if measure.logits else output.float()).cpu()
            answers.append(Answer(BatchKey.of(inputs), _norms(inputs), answer))
    assert measure is not None
    return Answered(loader, answers), measure


def has_labels(loader: Iterable[Any]) -> bool:
    """Whether the first batch of a loader has labels or targets.

    Raises:
        TypeError: the loader is not iterable, or only once.
        WavpruneError: the loader is empty.
    """
    return has_targets(next(batches(loader)))


class Distance(NamedTuple):
    """How far a network is from the one that it was made of.

    Attributes:
        inputs: on how many that was measured.
        output_error: the norm of the change of all outputs over that of the outputs.
        agreement: of classifiers, the share of the inputs that get the same class; else None.
        kl: of classifiers, the mean divergence of the outputs in nats; else None.
    """

    inputs: int
    output_error: float
    agreement: float | None
    kl: float | None


def distance(model: nn.Module, dense: nn.Module, loader: Iterable[Any]) -> Distance:
    """How far a network is from the one that it was made of, without labels.

    Answers ``(N, C)``, C at least 2, are those of a classifier, as logits or as probabilities. No
    output is kept in memory.

    Args:
        model: the network, where ``dense`` lives too.
        dense: the unpruned one.
        loader: can be read more than once.

    Raises:
        TypeError: a batch has no input tensor.
        WavpruneError: the loader is empty, or an output is no tensor or not finite.

    Example:
        >>> dense = nn.Linear(4, 3)
        >>> distance(dense, dense, [torch.randn(8, 4)])
        Distance(inputs=8, output_error=0.0, agreement=1.0, kl=0.0)
    """
    count = 0
    change = norm = alike = kl = 0.0
    are_classes = True
    with running(model, None) as device, running(dense, None):
        for batch in batches(loader, description="compare"):
            inputs = inputs_of(batch).to(device)
            ours, theirs = (_finite(network(inputs)) for network in (model, dense))
            change += float((ours.double() - theirs.double()).square().sum())
            norm += float(theirs.double().square().sum())
            are_classes = are_classes and are_of_classes(theirs)
            if are_classes:
                measures = divergence(ours, theirs)
                alike += len(inputs) * measures["agreement"]
                kl += len(inputs) * measures["kl"]
            count += len(inputs)
    shares = (alike / count, kl / count) if are_classes else (None, None)
    return Distance(count, (change / (norm or 1.0)) ** 0.5, *shares)


def _tensor_in(returned: Any) -> torch.Tensor | None:
    output = default_output(returned)
    is_one = isinstance(output, torch.Tensor) and output.is_floating_point()
    return output if is_one else None


def _finite(returned: Any) -> torch.Tensor:
    output = _tensor_in(returned)
    if output is None:
        raise WavpruneError(
            f"the model returns a {type(returned).__name__}; allowed: a floating-point tensor"
        )
    wrong = output.numel() - int(torch.isfinite(output).sum())
    if wrong:
        raise WavpruneError(f"{wrong} of {output.numel()} outputs are NaN or infinite")
    return output


def _norms(batch: torch.Tensor) -> torch.Tensor:
    norms: torch.Tensor = _rows(batch.detach().cpu().double()).norm(dim=1)
    return norms


def _rows(values: torch.Tensor) -> torch.Tensor:
    return values.reshape(len(values), -1)


def _agreement() -> Measure:
    def same_class(outputs: torch.Tensor, classes: torch.Tensor) -> torch.Tensor:
        same: torch.Tensor = (outputs.argmax(1) == classes).float()
        return same

    return Measure(same_class, AGREEMENT, higher_is_better=True, logits=True)


def _change() -> Measure:
    def relative(outputs: torch.Tensor, answers: torch.Tensor) -> torch.Tensor:
        norms = _rows(answers).norm(dim=1).clamp_min(torch.finfo(torch.float32).tiny)
        change: torch.Tensor = _rows(outputs - answers).norm(dim=1) / norms
        return change

    return Measure(relative, CHANGE, higher_is_better=False, logits=False)
