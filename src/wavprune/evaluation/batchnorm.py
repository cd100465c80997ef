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

from ..common.clock import Part, timed
from ..common.interrupts import always
from ..common.loaders import batches, check_loader, inputs_of
from ..engine.ambient import without_autocast
from ..engine.matching import (
    ModelStatistics,
    all_matched,
    largest_shift,
    running_buffers,
    running_statistics,
)
from ..engine.moments import BatchMoments, Moments, batch_norms, moments_of, observe, pooled
from ..engine.running import check_model, private_buffers, running, write_all
from ..errors import WavpruneError
from .joining import Group, OtherBatchesError, joined_inputs, measured, replayed

# After the first pass over batches that could not be joined follow at most this many, fewer if one
# shifts no normalized input by more than this many standard deviations. As many passes as a network
# has batch norms are exact.
MAX_PASSES = 3
SETTLED = 1e-3


@dataclass(frozen=True)
class BatchnormStatistics:
    """The inputs of an unpruned model's batch norms; see ``batchnorm_statistics``.

    Attributes:
        norms: the running statistics of each batch norm, by its name.
        batches: the moments of their inputs; batches of the loader that ran as one share an entry.
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
    with running(model, device) as run_device, timed("reference"):
        groups = measured(model, batches(loader, progress, "batch norm"), run_device)
        moments = tuple(measured_moments for measured_moments, _ in groups)
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

    Matching one batch norm changes the inputs of the next. The batches of the loader therefore run
    as one, and each batch norm is matched just before it normalizes: that is exact, in one pass.
    Where they do not fit into memory together, differ in shape or influence each other, or where a
    batch norm runs more than once, each runs with the batch norms matched to this batch, and then
    the statistics of all batches together are set. Up to three more passes come closer; they are
    left out if the loader shuffles.

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
    match_and_run(model, reference, loader, device, progress)


def match_and_run(
    model: nn.Module,
    reference: nn.Module | BatchnormStatistics,
    loader: Iterable[Any],
    device: str | torch.device | None = None,
    progress: bool = False,
    part: Part = "matching",
) -> tuple[Any, Group] | None:
    """As ``match_batchnorm``; what the matched model returned, where that took one pass.

    Args:
        model: the pruned model.
        reference: the unpruned model, or its ``batchnorm_statistics`` on the same loader.
        loader: batches of inputs.
        device: where to run; None means where each model lives.
        progress: show a progress bar on standard error.
        part: what the clock calls the time of the first forward pass.

    Returns:
        The output for all batches together, and the batches; None where there were more passes, or
        none, because the model has no batch norms.

    Raises:
        TypeError, WavpruneError: as ``match_batchnorm``.
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
        return None
    with (
        private_buffers(norms.values()),
        running(model, device) as run_device,
        _reference_moments(reference, device) as reference_moments,
    ):
        targets: list[BatchMoments] = []
        actual: list[BatchMoments] = []
        result: tuple[Any, Group] | None = None
        for target, group in reference_moments(batches(loader, progress, "match batch norm")):
            moments, output = _run_matched(
                model, original, joined_inputs(group, run_device), target, part
            )
            targets.append(target)
            actual.append(moments)
            result = None if len(targets) > 1 else (output, group)

        def rerun(
            statistics: ModelStatistics, previous: Sequence[BatchMoments]
        ) -> list[BatchMoments]:
            return _run_again(model, statistics, loader, run_device, previous, progress)

        with timed("moments"):
            matched = _settled(original, pooled(targets), actual, rerun)
    write_all(
        [
            (buffer, values)
            for name, statistics in matched.items()
            for buffer, values in zip(running_buffers(norms[name]), statistics[:2], strict=True)
        ]
    )
    # The last statistics of a batch norm that runs twice are those of both calls together.
    once = all(len(calls) == 1 for calls in actual[0].moments.values())
    return result if once else None


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
        without_autocast(run_device.type),
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
) -> Iterator[Callable[[Iterable[Any]], Iterator[tuple[BatchMoments, Group]]]]:
    """A function that measures the unpruned model on a loader's batches, or looks that up."""
    if isinstance(reference, nn.Module):
        with running(reference, device) as run_device:
            yield lambda loader: measured(reference, loader, run_device)
    else:
        yield lambda loader: replayed(loader, reference.batches)


def _run_matched(
    model: nn.Module,
    original: ModelStatistics,
    inputs: torch.Tensor,
    target: BatchMoments,
    part: Part,
) -> tuple[BatchMoments, Any]:
    """Run a batch with every batch norm matched to this batch alone; its moments and output."""
    actual: dict[str, list[Moments]] = {}

    def match(name: str, norm: BatchNorm, values: torch.Tensor) -> None:
        calls = actual.setdefault(name, [])
        target_calls = target.moments.get(name, [])
        if len(calls) == len(target_calls):
            raise WavpruneError(
                f"batch norm {name!r} ran more than the {len(target_calls)} times that it ran in "
                "the unpruned model"
            )
        calls.append(moments_of(name, values))
        matched = original[name].matched(target_calls[len(calls) - 1], calls[-1])
        for buffer, statistic in zip(running_buffers(norm), matched[:2], strict=True):
            buffer.copy_(statistic)

    output = observe(model, inputs, match, part)
    return target._replace(moments=actual), output


def _run_again(
    model: nn.Module,
    statistics: ModelStatistics,
    loader: Iterable[Any],
    device: torch.device,
    previous: Sequence[BatchMoments],
    progress: bool,
) -> list[BatchMoments]:
    """Run all batches again, each matched to its previous moments; empty if the loader shuffles."""
    groups = replayed(batches(loader, progress, "match batch norm"), previous)
    try:
        return [
            _run_matched(model, statistics, joined_inputs(group, device), target, "matching")[0]
            for target, group in groups
        ]
    except OtherBatchesError:
        return []


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
