"""``wavelet="auto"``: of a few bases, for each layer the one that changes its weight least."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch

from ..backends import Backend, Budget, Job, Layer
from ..bases import Basis, basis_for, kernel_shape
from ..config import AUTO, PruneConfig
from .staging import Stage, calls_of

BASES = ("identity", "uhaar", "dct")
WAVELETS = ("db4", "sym8")
WAVELETS_FROM = 16
# Errors this close, relatively, are equal but for rounding: uhaar and dct are one on two values.
TIE = 1e-5
# By layer and option, the relative error.
Errors = dict[tuple[int, int], float]


class Choice(NamedTuple):
    """Which basis of a layer was chosen.

    Attributes:
        option: its index among the layer's bases.
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
        WavpruneError: as for ``basis_for``.

    Example:
        >>> config = PruneConfig(wavelet="auto")
        >>> [basis.name for basis in bases_for(config, torch.zeros(8, 4, 3, 3))]
        ['identity', 'uhaar', 'dct']
    """
    if config.basis_name != AUTO:
        return [basis_for(config, weight)]
    kernel, axes = kernel_shape(weight.shape)
    is_long = min(axes or kernel) >= WAVELETS_FROM
    names = (*BASES, *WAVELETS) if is_long else BASES
    bases = [basis_for(replace(config, wavelet=name), weight) for name in names]
    # Without a level, a basis is the identity once more.
    return [bases[0], *(basis for basis in bases[1:] if basis.level_used > 0)]


def choose(
    backend: Backend,
    options: Sequence[Sequence[Layer]],
    budget: Budget | None,
    config: PruneConfig,
    device: torch.device | None,
    advance: Callable[[float], object],
) -> list[Choice]:
    """The option of each layer whose relative error is smallest at the layer's kept count.

    The kept count is that of ``sparsity``; with ``percentile``, as many weights as that percentile
    keeps by magnitude. With scope ``"global"`` a layer's count follows from the threshold that all
    layers share, and that from the choices: they are made at the counts of global minimum-weight
    pruning first, and once more at the counts of the global threshold in the bases so chosen.

    A backend that can measures every option in one pass over the weights: what an orthonormal
    basis drops is what the weight loses. Other options, and weights that storing rounds, are tried
    on copies, of no more weights at a time than the largest layer has.

    Args:
        backend: what tries them.
        options: what each layer may be pruned as, with its weight where it lives; the first of
            several is the identity. Of errors equal but for rounding the first wins.
        budget: what all layers share; None where each has its own.
        config: percentile is read.
        device: where to compute; None means where each weight lives.
        advance: gets twice the number of weights that were tried: for a threshold, and pruned.

    Returns:
        One choice per layer.
    """
    choices = [Choice() for _ in options]
    chosen = [of_layer[0] for of_layer in options]
    several = [i for i, of_layer in enumerate(options) if len(of_layer) > 1]
    for _ in range(rounds(budget)):
        stage = Stage(chosen, device)
        shared, counts = _shared(backend, stage, budget)
        if budget is None and config.percentile is None:
            counts = [_own_count(layer) for layer in chosen]
        errors: Errors = {}
        if counts is not None and not stage.copies:
            errors = _measured(backend, options, several, counts)
            advance(2 * sum(options[i][0].weight.numel() for i, _ in errors))
        left = [i for i in several if any((i, k) not in errors for k in range(len(options[i])))]
        trials = _calls(options, left)
        scratch = _Scratch()
        for call, layers in zip(trials, stage.visit(trials), strict=True):
            if counts is None:
                keeps = _kept(backend, layers, shared, config, scratch)
            else:
                keeps = [counts[i] for i in call]
            for k in range(max(len(options[i]) for i in call)):
                members = [
                    j for j, i in enumerate(call) if k < len(options[i]) and (i, k) not in errors
                ]
                trial = [(layers[j], options[call[j]][k], keeps[j]) for j in members]
                for j, error in zip(members, _errors(backend, trial, scratch), strict=True):
                    errors[call[j], k] = error
                advance(2 * sum(layers[j].weight.numel() for j in members))
        for i in several:
            names = [layer.basis.name for layer in options[i]]
            choices[i] = _best(names, [errors[i, k] for k in range(len(names))])
        pairs = zip(options, choices, strict=True)
        chosen = [of_layer[choice.option] for of_layer, choice in pairs]
    return choices


def rounds(budget: Budget | None) -> int:
    """How often every option is tried."""
    return 1 if budget is None else 2


def _calls(options: Sequence[Sequence[Layer]], chosen: Sequence[int]) -> list[list[int]]:
    """Some layers that are tried together, of no more weights than the largest of them has."""
    layers = [options[i][0] for i in chosen]
    most = max((layer.total_weights for layer in layers), default=0)
    return [[chosen[j] for j in call] for call in calls_of(layers, most)]


def _shared(
    backend: Backend, stage: Stage, budget: Budget | None
) -> tuple[torch.Tensor | None, list[int] | None]:
    """The threshold that all layers share, and what each keeps there where that is known."""
    if budget is None:
        return None, None
    job = stage.job(budget)
    measured = backend.measure([job])
    if measured is None:
        return backend.threshold([job]), None
    kept = measured.rows[:, 0]
    return measured.thresholds, None if kept.isnan().any() else [int(k) for k in kept.tolist()]


def _own_count(layer: Layer) -> int:
    """How many coefficients the layer keeps by its own budget."""
    return 0 if layer.budget is None else layer.budget.keep or 0


def _measured(
    backend: Backend,
    options: Sequence[Sequence[Layer]],
    chosen: Sequence[int],
    counts: Sequence[int],
) -> Errors:
    """The relative errors that a backend finds without a copy, of as many options as it can."""
    trials = [
        (i, k)
        for k in range(max((len(options[i]) for i in chosen), default=0))
        for i in chosen
        if k < len(options[i]) and _loses_what_it_drops(options[i][k])
    ]
    jobs = [Job((options[i][k],), Budget(keep=counts[i])) for i, k in trials]
    measured = backend.measure(jobs) if jobs else None
    if measured is None:
        return {}
    rows = zip(trials, measured.rows.tolist(), strict=True)
    return {
        trial: _relative(dropped, norm)
        for trial, (_, dropped, norm) in rows
        if not math.isnan(dropped)
    }


def _loses_what_it_drops(layer: Layer) -> bool:
    """True where the coefficients that are dropped are what the weight loses."""
    return layer.basis.orthonormal and layer.weight.dtype == layer.compute_dtype


def _kept(
    backend: Backend,
    layers: Sequence[Layer],
    shared: torch.Tensor | None,
    config: PruneConfig,
    scratch: _Scratch,
) -> list[int]:
    """How many coefficients each layer keeps."""
    copies = scratch.copies([(layer, layer) for layer in layers])
    if shared is not None:
        thresholds = shared.to(copies[0].weight.device).expand(len(copies)).contiguous()
    else:
        budget = Budget(percentile=config.percentile)
        thresholds = backend.threshold([Job((copy,), budget) for copy in copies])
    return [int(row[0]) for row in _applied(backend, copies, thresholds)]


def _errors(
    backend: Backend, trials: Sequence[tuple[Layer, Layer, int]], scratch: _Scratch
) -> list[float]:
    """The relative error of each layer as one of its options, at a kept count."""
    if not trials:
        return []
    copies = scratch.copies([(layer, option) for layer, option, _ in trials])
    jobs = [Job((copy,), Budget(keep)) for copy, (_, _, keep) in zip(copies, trials, strict=True)]
    rows = _applied(backend, copies, backend.threshold(jobs))
    return [_relative(error, norm) for _, _, error, norm in rows]


def _relative(error: float, norm: float) -> float:
    ratio = error / norm if norm else 0.0
    # Squares may leave the range of float64; what they say then is worth nothing.
    return math.inf if math.isnan(ratio) else math.sqrt(ratio)


def _applied(
    backend: Backend, layers: Sequence[Layer], thresholds: torch.Tensor
) -> list[list[float]]:
    """What ``apply_`` says of each; where it could not run, nothing kept and an infinite error."""
    rows = backend.apply_(layers, thresholds)
    nothing = torch.tensor([0.0, 0.0, math.inf, 1.0], dtype=rows.dtype, device=rows.device)
    failed = thresholds.to(rows.device).isnan() | rows.isnan().any(dim=1)
    result: list[list[float]] = torch.where(failed[:, None], nothing, rows).tolist()
    return result


class _Scratch:
    """Memory for copies of weights, used again: new memory costs more than a copy does."""

    def __init__(self) -> None:
        self._memory: dict[tuple[torch.device, torch.dtype], torch.Tensor] = {}

    def copies(self, pairs: Sequence[tuple[Layer, Layer]]) -> list[Layer]:
        """Copies of layers, each as one of its options; the last ones are overwritten."""
        needed: dict[tuple[torch.device, torch.dtype], int] = {}
        starts = []
        for layer, _ in pairs:
            kind = (layer.weight.device, layer.weight.dtype)
            starts.append(needed.setdefault(kind, 0))
            # A whole number of cache lines.
            needed[kind] += -(-layer.weight.numel() // 64) * 64
        for (device, dtype), size in needed.items():
            memory = self._memory.get((device, dtype))
            if memory is None or len(memory) < size:
                self._memory[device, dtype] = torch.empty(size, dtype=dtype, device=device)
        result = []
        for (layer, option), start in zip(pairs, starts, strict=True):
            memory = self._memory[layer.weight.device, layer.weight.dtype]
            copy = memory[start : start + layer.weight.numel()].view(option.weight.shape)
            copy.copy_(layer.weight.reshape(option.weight.shape))
            result.append(replace(option, weight=copy, destination=None))
        return result


def _best(names: Sequence[str], errors: Sequence[float]) -> Choice:
    order: list[int] = []
    rest = list(range(len(names)))
    for _ in range(2):
        bound = min(errors[i] for i in rest) * (1 + TIE)
        order.append(next(i for i in rest if errors[i] <= bound))
        rest.remove(order[-1])
    first, second = order
    return Choice(first, names[second], errors[second])
