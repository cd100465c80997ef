"""Batch norm after pruning: running statistics re-estimated, or matched to the unpruned model.

Pruning shifts and shrinks the inputs of every batch norm, while its running statistics still
describe the unpruned network. Re-estimation replaces them by those of a few batches, which changes
a network that was not pruned, too. Matching undoes the change of the inputs instead
(``engine/matching.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.optim.swa_utils import update_bn

from ..common.loaders import batches, check_loader, inputs_of
from ..engine.matching import (
    ModelStatistics,
    all_matched,
    largest_shift,
    running_buffers,
    running_statistics,
)
from ..engine.moments import BatchMoments, Moments, batch_norms, measure_moments, observe, pooled
from ..engine.running import always, check_model, private_buffers, running, write_all
from ..errors import WavpruneError

# After the first pass over several batches follow at most this many, fewer if one shifts no
# normalized input by more than this many standard deviations. As many passes as a network has batch
# norms are exact.
MAX_PASSES = 3
SETTLED = 1e-3


@dataclass(frozen=True)
class BatchnormStatistics:
    """The inputs of an unpruned model's batch norms; see ``batchnorm_statistics``.

    Attributes:
        norms: the running statistics of each batch norm, by its name.
        batches: the moments of their inputs, for each batch of the loader.
    """

    norms: ModelStatistics
    batches: tuple[BatchMoments, ...]


def batchnorm_statistics(
    model: nn.Module,
    loader: Iterable[Any],
    device: str | torch.device | None = None,
    progress: bool = False,
) -> BatchnormStatistics:
    """Measure the inputs of an unpruned model's batch norms, for ``match_batchnorm``.

    Autocast is switched off while the model runs.

    Args:
        model: the unpruned model; it is not changed.
        loader: batches of inputs ``(N, ...)``, alone, first in a tuple, or as ``pixel_values``;
            the same batches in the same order every time.
        device: where to run; None means where the model lives.
        progress: show a progress bar on standard error.

    Returns:
        The statistics: a few numbers per channel and batch.

    Raises:
        TypeError: the loader cannot be read twice, or a batch has no input tensor.
        WavpruneError: the loader is empty, or an input of a batch norm is not finite.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> statistics = batchnorm_statistics(net, [torch.randn(8, 1, 5, 5)])
        >>> list(statistics.norms)
        ['1']
    """
    with running(model, device) as run_device:
        moments = tuple(
            measure_moments(model, inputs_of(batch).to(run_device))
            for batch in batches(loader, progress, "batch norm")
        )
    return BatchnormStatistics(running_statistics(batch_norms(model)), moments)


def match_batchnorm(
    model: nn.Module,
    reference: nn.Module | BatchnormStatistics,
    loader: Iterable[Any],
    device: str | torch.device | None = None,
    progress: bool = False,
) -> None:
    """Give the inputs of every batch norm the mean and variance of the unpruned model's.

    Only running means and variances change; ``engine/matching.py`` has the formula. A channel whose
    inputs are those of the unpruned model keeps its running statistics to the last bit, so an
    unpruned model stays exactly as it is. A channel that pruning made constant gets the unpruned
    mean.

    Matching one batch norm changes the inputs of the next. Each batch therefore runs with the batch
    norms matched to this batch, and then the statistics of all batches together are set. For a
    loader of one batch that is exact, in one pass. With more batches, up to three more passes come
    closer; they are left out if the loader shuffles.

    Autocast is switched off while the models run, so that the statistics do not depend on it. After
    an error or an interrupt the model is as it was.

    Args:
        model: the pruned model; its batch norms change in place.
        reference: the unpruned model, or its ``batchnorm_statistics`` on the same loader.
        loader: batches of inputs ``(N, ...)``, alone, first in a tuple, or as ``pixel_values``;
            labels are ignored.
        device: where to run; None means where each model lives.
        progress: show a progress bar on standard error.

    Raises:
        TypeError: an argument has the wrong type, the loader cannot be read twice, or a batch has
            no input tensor.
        WavpruneError: the loader is empty or yields other batches than the statistics were measured
            on, the models' batch norms differ, or an input of one is not finite.

    Example:
        >>> import copy, wavprune
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> pruned, data = copy.deepcopy(net), [torch.randn(64, 1, 5, 5)]
        >>> report = wavprune.fast.prune(pruned, sparsity=0.8)
        >>> wavprune.match_batchnorm(pruned, net, data)
        >>> mean, unpruned = (m.eval()(data[0]).mean((0, 2, 3)) for m in (pruned, net))
        >>> torch.allclose(mean, unpruned, atol=1e-5)
        True
    """
    check_model(model)
    norms = batch_norms(model)
    if isinstance(reference, nn.Module):
        original = running_statistics(batch_norms(reference))
    elif isinstance(reference, BatchnormStatistics):
        original = reference.norms
    else:
        raise TypeError(
            "reference must be the unpruned model or its batchnorm_statistics, not "
            f"{type(reference).__name__}"
        )
    _check_same_norms(norms, original)
    check_loader(loader)
    if not norms:
        return
    with (
        private_buffers(norms.values()),
        running(model, device) as run_device,
        _reference_moments(reference, device) as reference_moments,
    ):
        targets: list[BatchMoments] = []
        actual: list[BatchMoments] = []
        for batch in batches(loader, progress, "match batch norm"):
            inputs = inputs_of(batch)
            targets.append(reference_moments(inputs))
            actual.append(_run_matched(model, original, inputs.to(run_device), targets[-1]))
        if isinstance(reference, BatchnormStatistics) and len(targets) < len(reference.batches):
            raise WavpruneError(
                f"loader yields {len(targets)} batches; the statistics were measured on "
                f"{len(reference.batches)}"
            )

        def rerun(
            statistics: ModelStatistics, previous: Sequence[BatchMoments]
        ) -> list[BatchMoments]:
            return _run_again(model, statistics, loader, run_device, previous, progress)

        matched = _settled(original, pooled(targets), actual, rerun)
    write_all(
        [
            (buffer, values)
            for name, statistics in matched.items()
            for buffer, values in zip(running_buffers(norms[name]), statistics[:2], strict=True)
        ]
    )


def update_batchnorm(
    model: nn.Module,
    loader: Iterable[Any],
    device: str | torch.device | None = None,
    progress: bool = False,
) -> None:
    """Re-estimate the running statistics of every batch norm, by ``torch.optim.swa_utils``.

    It changes an unpruned model too, the more the fewer samples there are: ``match_batchnorm``
    does not. Dropout is active while the model runs, as in training; autocast is switched off. Only
    the buffers of batch norms change, and after an error or an interrupt none.

    Args:
        model: the pruned model; its batch norms change in place.
        loader: batches of inputs ``(N, ...)``, alone, first in a tuple, or as ``pixel_values``.
        device: where to run; None means where the model lives.
        progress: show a progress bar on standard error.

    Raises:
        TypeError: the loader cannot be read twice, or a batch has no input tensor.
        WavpruneError: the loader is empty.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> update_batchnorm(net, [torch.randn(64, 1, 5, 5) + 3])
        >>> int(net[1].num_batches_tracked)
        1
    """
    check_model(model)
    check_loader(loader)
    momenta = [(norm, norm.momentum) for norm in model.modules() if isinstance(norm, BatchNorm)]

    def restore_momenta() -> None:
        for norm, momentum in momenta:
            norm.momentum = momentum

    with (
        private_buffers(model.modules()),
        always(restore_momenta),
        running(model, device) as run_device,
        torch.autocast(run_device.type, enabled=False),
    ):
        inputs = (
            inputs_of(batch).to(run_device) for batch in batches(loader, progress, "batch norm")
        )
        update_bn(inputs, model)
        estimated = [(norm, dict(norm._buffers)) for norm in batch_norms(model).values()]
    write_all(
        [
            (buffer, values)
            for norm, buffers in estimated
            for name, values in buffers.items()
            if values is not None and (buffer := norm._buffers[name]) is not None
        ]
    )


def _check_same_norms(norms: dict[str, BatchNorm], original: ModelStatistics) -> None:
    if list(norms) != list(original):
        different = sorted(set(norms) ^ set(original)) or list(norms)
        raise WavpruneError(
            "reference: its batch norms are not those of the model; different: "
            f"{', '.join(different[:8])}"
        )
    for name, norm in norms.items():
        if norm.num_features != len(original[name].mean) or norm.eps != original[name].eps:
            raise WavpruneError(
                f"reference: batch norm {name!r} has {norm.num_features} channels and "
                f"eps={norm.eps}, in the reference {len(original[name].mean)} and "
                f"{original[name].eps}"
            )


@contextmanager
def _reference_moments(
    reference: nn.Module | BatchnormStatistics, device: str | torch.device | None
) -> Iterator[Callable[[torch.Tensor], BatchMoments]]:
    """A function that measures the unpruned model on the next batch, or looks it up."""
    if isinstance(reference, nn.Module):
        with running(reference, device) as run_device:
            yield lambda inputs: measure_moments(reference, inputs.to(run_device))
        return
    recorded = iter(enumerate(reference.batches))

    def look_up(inputs: torch.Tensor) -> BatchMoments:
        index, moments = next(recorded, (len(reference.batches), None))
        if moments is None:
            raise WavpruneError(
                f"loader yields more batches than the {index} that the statistics were measured on"
            )
        if not moments.measured_on(inputs):
            raise WavpruneError(
                f"loader: batch {index}, of shape {tuple(inputs.shape)}, is not the one that the "
                f"statistics were measured on, of shape {moments.shape}; allowed: the same batches "
                "in the same order, so neither shuffled nor augmented at random"
            )
        return moments

    yield look_up


def _run_matched(
    model: nn.Module, original: ModelStatistics, inputs: torch.Tensor, target: BatchMoments
) -> BatchMoments:
    """Run a batch with every batch norm matched to this batch alone."""
    actual: dict[str, list[Moments]] = {}

    def match(name: str, norm: BatchNorm, moments: Moments) -> None:
        calls = actual.setdefault(name, [])
        target_calls = target.moments.get(name, [])
        if len(calls) == len(target_calls):
            raise WavpruneError(
                f"batch norm {name!r} ran more than the {len(target_calls)} times that it ran in "
                "the unpruned model"
            )
        matched = original[name].matched(target_calls[len(calls)], moments)
        for buffer, values in zip(running_buffers(norm), matched[:2], strict=True):
            buffer.copy_(values)
        calls.append(moments)

    observe(model, inputs, match)
    return target._replace(moments=actual)


def _run_again(
    model: nn.Module,
    statistics: ModelStatistics,
    loader: Iterable[Any],
    device: torch.device,
    previous: Sequence[BatchMoments],
    progress: bool,
) -> list[BatchMoments]:
    """Run all batches again, each matched to its previous moments; empty if the loader shuffles."""
    actual: list[BatchMoments] = []
    for batch in batches(loader, progress, "match batch norm"):
        inputs = inputs_of(batch)
        if len(actual) == len(previous) or not previous[len(actual)].measured_on(inputs):
            return []
        target = previous[len(actual)]
        actual.append(_run_matched(model, statistics, inputs.to(device), target))
    return actual if len(actual) == len(previous) else []


def _settled(
    original: ModelStatistics,
    targets: dict[str, Moments],
    actual: list[BatchMoments],
    rerun: Callable[[ModelStatistics, Sequence[BatchMoments]], list[BatchMoments]],
) -> ModelStatistics:
    """Statistics for all batches together, after as many passes as it takes."""
    total = pooled(actual)
    if targets.keys() != total.keys():
        names = ", ".join(sorted(targets.keys() ^ total.keys())[:8])
        raise WavpruneError(f"reference: only one of the two models runs its batch norms {names}")
    matched = all_matched(original, targets, total)
    for _ in range(MAX_PASSES if len(actual) > 1 else 0):
        # Matched to the batch's own moments of the pass before, so that what a new statistic
        # changes in one batch norm does not add up over those behind it.
        actual = rerun(matched, actual)
        if not actual:
            break
        total = pooled(actual)
        previous, matched = matched, all_matched(original, targets, total)
        if largest_shift(previous, matched, total) <= SETTLED:
            break
    return matched
