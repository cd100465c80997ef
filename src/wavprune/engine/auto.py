"""``wavelet="auto"``: of a few bases, for each layer the one that changes its weight least."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..backends.protocol import Backend, Batch, Target
from ..bases.basis import Basis, basis_for
from ..config import AUTO, PruneConfig
from .staging import Stage

BASES = ("identity", "uhaar", "dct")
WAVELETS = ("db4", "sym8")
WAVELETS_FROM = 16
# Errors this close, relatively, are equal but for rounding: uhaar and dct are one on two points.
TIE = 1e-5


class Choice(NamedTuple):
    """Which basis of a layer was chosen.

    Attributes:
        option: its place among the layer's bases.
        runner_up: the name of the next best; None where there is but one.
        runner_up_error: the relative error of the next best.
    """

    option: int = 0
    runner_up: str | None = None
    runner_up_error: float | None = None


def bases_for(config: PruneConfig, weight: torch.Tensor) -> list[Basis]:
    """The bases that a layer may be pruned in: one, or for ``"auto"`` all that it chooses among.

    Those are the identity, ``"uhaar"`` and ``"dct"``, and on axes of 16 and longer ``"db4"`` and
    ``"sym8"`` where they have a level.

    Args:
        config: method, wavelet, level, mode and force_level are read.
        weight: ``(Cout, Cin/groups, kh, kw)`` or ``(out, in)``.

    Returns:
        The bases, in the order in which they win a tie.

    Raises:
        ValueError: as for ``basis_for``.

    Example:
        >>> config = PruneConfig(wavelet="auto")
        >>> [basis.name for basis in bases_for(config, torch.zeros(8, 4, 3, 3))]
        ['identity', 'uhaar', 'dct']
    """
    if config.method != "dwt" or config.wavelet != AUTO:
        return [basis_for(config, weight)]
    long = min(weight.shape[-2:]) >= WAVELETS_FROM
    names = (*BASES, *WAVELETS) if long else BASES
    bases = [basis_for(replace(config, wavelet=name), weight) for name in names]
    # Without a level, a basis is the identity once more.
    return [bases[0], *(basis for basis in bases[1:] if basis.level_used > 0)]


def choose(
    backend: Backend,
    options: Sequence[Sequence[Batch]],
    keeps: Sequence[int],
    sizes: Sequence[int],
    config: PruneConfig,
    device: torch.device | None,
    advance: Callable[[int], object],
) -> list[Choice]:
    """The option of each layer whose relative error is smallest at the layer's kept count.

    The kept count is that of ``sparsity``; with ``percentile``, as many weights as that percentile
    keeps by magnitude. With scope ``"global"`` a layer's count follows from the threshold that all
    layers share, and that from the choices: they are made at the counts of global minimum-weight
    pruning first, and once more at the counts of the global threshold in the bases so chosen.

    Every option is tried on a copy, of no more weights at a time than the largest layer has.

    Args:
        backend: what tries them.
        options: the batches that a layer may be pruned as, with its weight where it lives; the
            first of several is the identity. Of errors equal but for rounding the first wins.
        keeps: how many coefficients each layer keeps; for scope "global" only their sum counts.
        sizes: how many weights each layer has, on all ranks where it is sharded.
        config: percentile and scope are read.
        device: where to compute; None means where each weight lives.
        advance: gets twice the number of weights that were tried: for a threshold, and pruned.

    Returns:
        One choice a layer.
    """
    choices = [Choice() for _ in options]
    chosen = [batches[0] for batches in options]
    several = [i for i, batches in enumerate(options) if len(batches) > 1]
    units = _units([batches[0].weight.device for batches in options], sizes, several)
    for _ in range(rounds(config)):
        for unit, counts in _kept(backend, chosen, units, keeps, config, device):
            errors: dict[int, list[float]] = {i: [] for i in unit}
            for k in range(max(len(options[i]) for i in unit)):
                members = [i for i in unit if k < len(options[i])]
                targets = [Target(counts[i]) for i in members]
                trial = [options[i][k] for i in members]
                found = _errors(backend, trial, targets, device)
                for i, error in zip(members, found, strict=True):
                    errors[i].append(error)
                advance(2 * sum(batch.weight.numel() for batch in trial))
            for i in unit:
                choices[i] = _best([batch.basis.name for batch in options[i]], errors[i])
        chosen = [batches[choice.option] for batches, choice in zip(options, choices, strict=True)]
    return choices


def rounds(config: PruneConfig) -> int:
    """How often every option is tried."""
    return 2 if config.scope == "global" else 1


def _kept(
    backend: Backend,
    chosen: Sequence[Batch],
    units: Sequence[Sequence[int]],
    keeps: Sequence[int],
    config: PruneConfig,
    device: torch.device | None,
) -> Iterator[tuple[Sequence[int], dict[int, int]]]:
    """Each unit, and how many coefficients its layers keep."""
    shared = None
    if config.scope == "global" and units:
        shared = backend.threshold([(Stage(chosen, device).everything, Target(keep=sum(keeps)))])
    for unit in units:
        counts = [keeps[i] for i in unit]
        if shared is not None or config.percentile is not None:
            copies = [_copy(chosen[i], device) for i in unit]
            if shared is not None:
                thresholds = shared.to(copies[0].weight.device).expand(len(unit)).contiguous()
            else:
                target = Target(percentile=config.percentile)
                thresholds = backend.threshold([((batch,), target) for batch in copies])
            counts = [int(row[0]) for row in _applied(backend, copies, thresholds)]
        yield unit, dict(zip(unit, counts, strict=True))


def _errors(
    backend: Backend,
    batches: Sequence[Batch],
    targets: Sequence[Target],
    device: torch.device | None,
) -> list[float]:
    copies = [_copy(batch, device) for batch in batches]
    jobs = [((batch,), target) for batch, target in zip(copies, targets, strict=True)]
    rows = _applied(backend, copies, backend.threshold(jobs))
    return [math.sqrt(error / norm) if norm else 0.0 for _, _, error, norm in rows]


def _applied(
    backend: Backend, batches: Sequence[Batch], thresholds: torch.Tensor
) -> list[list[float]]:
    """What ``apply_`` says of each; where it could not run, nothing kept and an infinite error."""
    rows = backend.apply_(batches, thresholds)
    nothing = torch.tensor([0.0, 0.0, math.inf, 1.0], dtype=rows.dtype, device=rows.device)
    failed = thresholds.to(rows.device).isnan() | rows.isnan().any(dim=1)
    result: list[list[float]] = torch.where(failed[:, None], nothing, rows).tolist()
    return result


def _copy(batch: Batch, device: torch.device | None) -> Batch:
    return replace(batch, weight=batch.weight.to(device or batch.weight.device, copy=True))


def _best(names: Sequence[str], errors: Sequence[float]) -> Choice:
    order: list[int] = []
    rest = list(range(len(names)))
    for _ in range(2):
        bound = min(errors[i] for i in rest) * (1 + TIE)
        order.append(next(i for i in rest if errors[i] <= bound))
        rest.remove(order[-1])
    first, second = order
    return Choice(first, names[second], errors[second])


def _units(
    devices: Sequence[torch.device], sizes: Sequence[int], layers: Sequence[int]
) -> list[list[int]]:
    """Layers to try together: on one device, of no more weights than the largest has."""
    most = max((sizes[i] for i in layers), default=0)
    units: list[list[int]] = []
    room = 0
    for i in layers:
        if not units or devices[units[-1][-1]] != devices[i] or sizes[i] > room:
            units.append([])
            room = most
        units[-1].append(i)
        room -= sizes[i]
    return units
