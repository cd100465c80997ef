"""Batch norm after pruning: its running statistics re-estimated, or matched to the unpruned model.

Pruning shifts and shrinks what every batch norm sees, while its running statistics still describe
the unpruned network. Re-estimation replaces them by those of a few batches, which changes even a
network that was not pruned. Matching undoes the change of the inputs instead: with mean ``m`` and
variance ``v`` of a channel's inputs in the unpruned network, and ``m'`` and ``v'`` in the pruned
one, the batch norm with running mean ``R`` and variance ``V`` gets

    R' = m' + (R - m) * sqrt(v' / v)        V' + eps = (V + eps) * v' / v

so that it gives for ``(x' - m') / sqrt(v')`` what it gave for ``(x - m) / sqrt(v)``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm as BatchNorm
from torch.optim.swa_utils import update_bn

from .inference import batches, check_loader, inputs_of, running
from .moments import Moments, Seen, batch_norms, measured, pooled, total_of, watch

# A channel whose variance is this small a part of the running one is constant but for rounding.
CONSTANT = 1e-12
# After the first pass come so many, or fewer if one moves no normalised input by more than this
# part of a standard deviation. A network of L batch norms is exact after L passes.
PASSES = 3
SETTLED = 1e-3


class Normalisation(NamedTuple):
    """What a batch norm subtracts and divides by, float64 on the CPU.

    Attributes:
        mean: ``(C,)``, its running mean.
        var: ``(C,)``, its running variance.
        eps: what it adds to the variance.
    """

    mean: torch.Tensor
    var: torch.Tensor
    eps: float


Normalisations = dict[str, Normalisation]


@dataclass(frozen=True)
class BatchnormStatistics:
    """What the batch norms of an unpruned model see; see ``batchnorm_statistics``.

    Attributes:
        norms: the running statistics of each batch norm, by its name.
        batches: what they saw of each batch of the loader.
    """

    norms: Normalisations
    batches: tuple[Seen, ...]


def batchnorm_statistics(
    model: nn.Module,
    loader: Iterable[Any],
    device: str | torch.device | None = None,
    progress: bool = False,
) -> BatchnormStatistics:
    """Measure what the batch norms of an unpruned model see, for ``match_batchnorm``.

    Args:
        model: the unpruned model; it is not changed.
        loader: batches of inputs ``(N, ...)``, alone, first in a tuple, or as ``pixel_values``;
            the same batches in the same order every time.
        device: where to run; None means where the model lives.
        progress: show a progress bar on standard error.

    Returns:
        The statistics: a few numbers a channel and batch.

    Raises:
        TypeError: the loader cannot be read twice, or a batch has no input tensor.
        ValueError: the loader is empty, or an input of a batch norm is not finite.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> statistics = batchnorm_statistics(net, [torch.randn(8, 1, 5, 5)])
        >>> list(statistics.norms)
        ['1']
    """
    norms = batch_norms(model)
    found = []
    with running(model, device) as place:
        for batch in batches(loader, progress, "batch norm"):
            found.append(measured(model, inputs_of(batch).to(place)))
    return BatchnormStatistics(_normalisations(norms), tuple(found))


def match_batchnorm(
    model: nn.Module,
    reference: nn.Module | BatchnormStatistics,
    loader: Iterable[Any],
    device: str | torch.device | None = None,
    progress: bool = False,
) -> None:
    """Move the input mean and variance of every batch norm back to the unpruned model's.

    Only running means and variances change; the formula stands at the top of this module. A
    channel whose inputs are those of the unpruned model keeps its running statistics to the last
    bit, so an unpruned model stays exactly as it is. A channel that pruning made constant gets the
    unpruned mean.

    One batch norm's repair changes the inputs of the next. Each batch is therefore repaired by its
    own statistics while it runs, and then the statistics of all batches together are set. For a
    loader of one batch that is exact, in one pass. With more batches, up to three more passes come
    closer; if the loader shuffles they are left out.

    Args:
        model: the pruned model; its batch norms change in place.
        reference: the unpruned model, or its ``batchnorm_statistics`` on the same loader.
        loader: batches of inputs ``(N, ...)``, alone, first in a tuple, or as ``pixel_values``;
            labels are not looked at.
        device: where to run; None means where each model lives.
        progress: show a progress bar on standard error.

    Raises:
        TypeError: an argument has the wrong type, the loader cannot be read twice, or a batch has
            no input tensor.
        ValueError: the loader is empty or yields other batches than the statistics were measured
            on, the models' batch norms differ, or an input of one is not finite. No batch norm
            has changed then.

    Example:
        >>> import copy, wavprune
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4))
        >>> pruned, data = copy.deepcopy(net), [torch.randn(64, 1, 5, 5)]
        >>> report = wavprune.fast.prune(pruned, sparsity=0.8)
        >>> wavprune.match_batchnorm(pruned, net, data)
        >>> mean, unpruned = (each.eval()(data[0]).mean((0, 2, 3)) for each in (pruned, net))
        >>> torch.allclose(mean, unpruned, atol=1e-5)
        True
    """
    norms = batch_norms(model)
    if isinstance(reference, nn.Module):
        expected = _normalisations(batch_norms(reference))
    elif isinstance(reference, BatchnormStatistics):
        expected = reference.norms
    else:
        raise TypeError(
            "reference must be the unpruned model or its batchnorm_statistics, not "
            f"{type(reference).__name__}"
        )
    _check_norms(norms, expected)
    check_loader(loader)
    if not norms:
        return
    with ExitStack() as stack:
        stack.enter_context(_undone_on_error(norms))
        place = stack.enter_context(running(model, device))
        if isinstance(reference, nn.Module):
            there = stack.enter_context(running(reference, device))
        want: list[Seen] = []
        have: list[Seen] = []
        for batch in batches(loader, progress, "match batch norm"):
            inputs = inputs_of(batch)
            if isinstance(reference, nn.Module):
                want.append(measured(reference, inputs.to(there)))
            else:
                want.append(_recorded(reference.batches, len(want), inputs))
            have.append(_repaired(model, expected, inputs.to(place), want[-1]))
        if isinstance(reference, BatchnormStatistics) and len(want) < len(reference.batches):
            raise ValueError(
                f"loader yields {len(want)} batches; the statistics were measured on "
                f"{len(reference.batches)}"
            )
        target, found = pooled(want), pooled(have)
        if target.keys() != found.keys():
            names = ", ".join(sorted(target.keys() ^ found.keys())[:8])
            raise ValueError(f"reference: only one of the two models runs its batch norms {names}")
        before = _all_matched(expected, target, found)
        for _ in range(PASSES if len(want) > 1 else 0):
            # Every batch gets the mean and deviation that these statistics gave it, so that a
            # change in one batch norm does not grow from one to the next.
            have = _repeated(model, before, loader, place, have, progress)
            if not have:
                break
            found = pooled(have)
            after = _all_matched(expected, target, found)
            moved, before = _moved(before, after, found), after
            if moved <= SETTLED:
                break
        for name, values in before.items():
            _write(norms[name], values)


def update_batchnorm(
    model: nn.Module,
    loader: Iterable[Any],
    device: str | torch.device | None = None,
    progress: bool = False,
) -> None:
    """Re-estimate the running statistics of every batch norm, by ``torch.optim.swa_utils``.

    It changes an unpruned model too, the more the fewer samples there are: ``match_batchnorm``
    does not. Dropout is active while it runs, as in training.

    Args:
        model: the pruned model; its batch norms change in place.
        loader: batches of inputs ``(N, ...)``, alone, first in a tuple, or as ``pixel_values``.
        device: where to run; None means where the model lives.
        progress: show a progress bar on standard error.

    Raises:
        TypeError: the loader cannot be read twice, or a batch has no input tensor.
        ValueError: the loader is empty.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
        >>> update_batchnorm(net, [torch.randn(64, 1, 5, 5) + 3])
        >>> int(net[1].num_batches_tracked)
        1
    """
    norms = batch_norms(model)
    momenta = {norm: norm.momentum for norm in norms.values()}
    with ExitStack() as stack:
        stack.enter_context(_undone_on_error(norms))
        place = stack.enter_context(running(model, device))

        @stack.callback
        def restore() -> None:
            for norm, momentum in momenta.items():
                norm.momentum = momentum

        inputs = (inputs_of(batch).to(place) for batch in batches(loader, progress, "batch norm"))
        update_bn(inputs, model)


def _buffers(norm: BatchNorm) -> tuple[torch.Tensor, torch.Tensor]:
    assert norm.running_mean is not None
    assert norm.running_var is not None
    return norm.running_mean, norm.running_var


def _normalisations(norms: dict[str, BatchNorm]) -> Normalisations:
    return {
        name: Normalisation(_exact(mean), _exact(var), norm.eps)
        for name, norm in norms.items()
        for mean, var in (_buffers(norm),)
    }


def _exact(buffer: torch.Tensor) -> torch.Tensor:
    return buffer.detach().to("cpu", torch.float64, copy=True)


def _check_norms(norms: dict[str, BatchNorm], expected: Normalisations) -> None:
    if list(norms) != list(expected):
        missing = sorted(set(norms) ^ set(expected)) or list(norms)
        raise ValueError(
            f"reference: its batch norms are not those of the model; {', '.join(missing[:8])} "
            "differ"
        )
    for name, norm in norms.items():
        if norm.num_features != len(expected[name].mean) or norm.eps != expected[name].eps:
            raise ValueError(
                f"reference: batch norm {name!r} has {norm.num_features} channels and "
                f"eps={norm.eps}, in the reference {len(expected[name].mean)} and "
                f"{expected[name].eps}"
            )


@contextmanager
def _undone_on_error(norms: dict[str, BatchNorm]) -> Iterator[None]:
    names = ("running_mean", "running_var", "num_batches_tracked")
    kept = [(norm, name, getattr(norm, name).clone()) for norm in norms.values() for name in names]
    try:
        yield
    except BaseException:
        # By name: a move to another device and back makes new buffers.
        for norm, name, before in kept:
            getattr(norm, name).copy_(before)
        raise


def _repaired(
    model: nn.Module,
    expected: Normalisations,
    inputs: torch.Tensor,
    want: Seen,
) -> Seen:
    """Run a batch, each batch norm set to what is right for this batch alone."""
    found: dict[str, list[Moments]] = {}

    def see(name: str, norm: BatchNorm, moments: Moments) -> None:
        calls = found.setdefault(name, [])
        targets = want.moments.get(name, [])
        if len(calls) == len(targets):
            raise ValueError(
                f"batch norm {name!r} ran more often than the {len(targets)} times that it ran in "
                "the unpruned model"
            )
        _write(norm, _matched(expected[name], targets[len(calls)], moments))
        calls.append(moments)

    watch(model, inputs, see)
    return want._replace(moments=found)


def _repeated(
    model: nn.Module,
    norms: Normalisations,
    loader: Iterable[Any],
    place: torch.device,
    seen: Sequence[Seen],
    progress: bool,
) -> list[Seen]:
    """Run all batches again, each set to what ``norms`` gave it; nothing where they are others."""
    found: list[Seen] = []
    for batch in batches(loader, progress, "match batch norm"):
        inputs = inputs_of(batch)
        if len(found) == len(seen) or not _is(seen[len(found)], inputs):
            return []
        found.append(_repaired(model, norms, inputs.to(place), seen[len(found)]))
    return found if len(found) == len(seen) else []


def _is(batch: Seen, inputs: torch.Tensor) -> bool:
    # Another number of threads adds in another order.
    total = total_of(inputs)
    return batch.shape == tuple(inputs.shape) and math.isclose(total, batch.total, rel_tol=1e-9)


def _recorded(known: Sequence[Seen], index: int, inputs: torch.Tensor) -> Seen:
    """What was measured on these inputs."""
    if index == len(known):
        raise ValueError(
            f"loader yields more batches than the {index} that the statistics were measured on"
        )
    batch = known[index]
    if not _is(batch, inputs):
        raise ValueError(
            f"loader: batch {index}, of shape {tuple(inputs.shape)}, is not the one that the "
            f"statistics were measured on, of shape {batch.shape}; allowed: the same batches in "
            "the same order, so neither shuffled nor augmented at random"
        )
    return batch


def _matched(norm: Normalisation, want: Moments, have: Moments) -> Normalisation:
    """The formula at the top of this module, for every channel."""
    V = norm.var + norm.eps
    least = CONSTANT * V
    ratio = torch.maximum(have.var, least) / torch.maximum(want.var, least)
    # A running variance below 0 is none: what is nearly constant is amplified only so far.
    ratio = torch.maximum(ratio, norm.eps / V)
    mean = have.mean + (norm.mean - want.mean) * ratio.sqrt()
    same = (have.mean == want.mean) & (have.var == want.var)
    return Normalisation(
        torch.where(same, norm.mean, mean),
        torch.where(same, norm.var, (V * ratio - norm.eps).clamp_min(0)),
        norm.eps,
    )


def _write(norm: BatchNorm, values: Normalisation) -> None:
    mean, var = _buffers(norm)
    mean.copy_(values.mean)
    var.copy_(values.var)


def _all_matched(
    norms: Normalisations, want: dict[str, Moments], have: dict[str, Moments]
) -> Normalisations:
    return {name: _matched(norms[name], want[name], have[name]) for name in have}


def _moved(before: Normalisations, after: Normalisations, seen: dict[str, Moments]) -> float:
    """How far the change of the buffers moves a normalised input, in standard deviations.

    It looks at the mean of the inputs and one deviation from it: the buffers themselves say
    nothing of a channel that is constant.
    """
    return max(
        float((_normalised(point, before[name]) - _normalised(point, after[name])).abs().max())
        for name, moments in seen.items()
        for point in (moments.mean, moments.mean + moments.var.sqrt())
    )


def _normalised(point: torch.Tensor, norm: Normalisation) -> torch.Tensor:
    return (point - norm.mean) / (norm.var + norm.eps).sqrt()
