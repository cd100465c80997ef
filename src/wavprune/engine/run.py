"""The one loop: config -> layers -> basis -> threshold -> apply -> report."""

from __future__ import annotations

import dataclasses
import hashlib
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .._version import versions
from ..backends.masks import unpack
from ..backends.protocol import Backend, Batch, Projector, Target, check_name, resolve
from ..bases.basis import Basis, LevelCollapsedWarning
from ..config import AUTO, PruneConfig
from ..report import LayerStats, Outcome, PruneReport
from .auto import Choice, bases_for, choose, rounds
from .clock import Clock
from .collective import ShardedBackend, sharded_backend
from .layers import LayerRef, non_finite, select_layers
from .sharding import first_channel
from .staging import Stage

# What never waits for a device.
CAPTURED = ("native", "triton")
_SETTINGS = tuple(field.name for field in dataclasses.fields(PruneConfig))
_TORCH = str(Path(torch.__file__).parent)


def prune_model(
    model: nn.Module,
    config: PruneConfig,
    match: PruneReport | None = None,
    progress: bool = False,
) -> PruneReport:
    """Prune a model's selected layers in place; see ``wavprune.fast.prune``."""
    check_name(config.backend)
    return prune_layers(select_layers(model, config), config, match, progress)


@torch.no_grad()
def prune_layers(
    layers: Sequence[LayerRef],
    config: PruneConfig,
    match: PruneReport | None = None,
    progress: bool = False,
    record: Callable[[Sequence[Batch], Sequence[torch.Tensor]], None] | None = None,
    within: Sequence[tuple[Basis, torch.Tensor]] | None = None,
) -> PruneReport:
    """Prune the given weights in place.

    Args:
        layers: checked weights, each once (``select_layers``, ``unique_layers``).
        config: what to do.
        match: a report whose kept counts to use in place of ``config.sparsity``.
        progress: show a tqdm bar on standard error.
        record: gets batches and their masks just before they are pruned, in the layers' order.
        within: each layer's basis and mask of an earlier pruning, as ``record`` got them: these
            bases are used again, and only coefficients of these masks are kept. Not with a device.

    Returns:
        The report, one entry a layer.

    Raises:
        ValueError: a weight is not finite, the backend cannot do this, or ``match`` does not fit;
            no weight has changed then.
    """
    check_name(config.backend)
    if match is not None:
        _check_match(config, match)
    if within is not None and config.device is not None:
        raise ValueError(
            f"device={str(config.device)!r} does not go with within, whose masks are where the "
            "weights live; leave device out"
        )
    device = compute_device(config.device)
    keeps = _keeps(layers, config, match)
    spread = sharded_backend(layers, config)
    bases = None if within is None else [[basis] for basis, _ in within]
    options = layer_batches(layers, config, bases)
    several = [i for i, each in enumerate(options) if len(each) > 1]
    batches = [each[0] for each in options]
    _warn_levels(layers, [batch.basis for batch in batches])
    stage = Stage(batches, device)
    candidates = stage
    if several:
        candidates = Stage([batch for each in options for batch in each], device)
    backend = spread or resolve(
        config.backend,
        candidates.stand_ins,
        scattered=config.scope == "global" and stage.scattered,
        masks=record is not None or within is not None,
    )
    if several or backend.name not in CAPTURED:
        _check_not_captured(backend.name, config)
    clock = Clock(batches)
    choices = [Choice()] * len(batches)
    trials = rounds(config) * sum(len(options[i]) * clock.weights[i] for i in several)
    done: list[torch.Tensor] = []
    if within is not None:
        for ref in layers:
            _raise_non_finite(ref)
        assert isinstance(backend, Projector)
        # What may not be kept ranks last then, but for what an expansive basis leaks.
        backend.project_(stage.everything, [mask for _, mask in within])
    with _bar(progress, sum(clock.weights) + trials) as advance:
        if several:
            with clock.timed(several, stage.stand_ins[0].weight.device):
                sizes = [ref.weight.numel() for ref in layers]
                choices = choose(backend, options, keeps, sizes, config, device, advance)
            batches = [each[choice.option] for each, choice in zip(options, choices, strict=True)]
            stage = Stage(batches, device)
        units = _units(stage.stand_ins, backend.unit, stage.largest_unit)
        thresholds = _thresholds(backend, stage, keeps, config, units, clock, advance)
        if within is not None or all(part.device.type == "cpu" for part in thresholds):
            _check_finite(thresholds, layers)
        else:
            # The host does not look, so as not to wait: nothing is pruned at a threshold of NaN.
            thresholds = _all_or_none(thresholds)
        for unit, members, part in zip(units, stage.each(units), thresholds, strict=True):
            masks: list[torch.Tensor] = []
            if record is not None or within is not None:
                assert isinstance(backend, Projector)
                masks = backend.masks(members, part)
            if within is not None:
                masks = [mask & within[i][1] for i, mask in zip(unit, masks, strict=True)]
            if record is not None:
                record(members, masks)
            with clock.timed(unit, part.device):
                if within is None:
                    done.append(backend.apply_(members, part))
                else:
                    done.append(_projected(backend, members, masks))
            stage.leave(unit, members)
            advance(sum(batches[i].weight.numel() for i in unit))
        stage.finish()
    if stage.copies:
        _check_finite(thresholds, layers)

    facts = [
        (ref.name, ref.weight.shape, batch.kernels, batch.basis, choice)
        for ref, batch, choice in zip(layers, batches, choices, strict=True)
    ]
    unread = [] if all(rows.device.type == "cpu" for rows in done) else layers

    def read() -> Outcome:
        rows = _rows(thresholds, done)
        if unread:
            _check_finite([torch.tensor(row[:1]) for row in rows], unread)
        place = str(done[0].device)
        stats = tuple(
            _layer_stats(*fact, config, backend.name, place, row, seconds)
            for fact, row, seconds in zip(facts, rows, clock.seconds(), strict=True)
        )
        return Outcome(stats, sum(row[4] for row in rows), sum(row[3] for row in rows))

    return PruneReport(read, _settings(config, match))


def layer_batches(
    layers: Sequence[LayerRef],
    config: PruneConfig,
    bases: Sequence[Sequence[Basis]] | None = None,
) -> list[list[Batch]]:
    """What each layer may be pruned as: a batch for each of its bases.

    Args:
        layers: checked weights.
        config: what to do.
        bases: each layer's, where they are known; None asks ``config``.

    Raises:
        ValueError: a layer has no such basis.
    """
    if bases is None:
        bases = [_checked_bases(ref, config) for ref in layers]
    return [
        [
            Batch(
                weight=ref.kernels(basis.kernel),
                basis=basis,
                by_importance=config.percentile is None,
                compute_dtype=dtype,
                draw=_draw(config.seed, ref.name) if config.method == "random" else None,
                first=first_channel(ref.weight),
            )
            for basis in each
        ]
        for ref, each, dtype in zip(layers, bases, _compute_dtypes(layers, config), strict=True)
    ]


def _projected(
    backend: Backend, batches: Sequence[Batch], masks: Sequence[torch.Tensor]
) -> torch.Tensor:
    """Prune by masks; the rows of ``Backend.apply_``."""
    assert isinstance(backend, Projector)
    rows = torch.zeros(len(batches), 4, dtype=torch.float64, device=batches[0].weight.device)
    for row, batch, mask in zip(rows, batches, masks, strict=True):
        before = batch.weight.clone()
        backend.project_([batch], [mask])
        kept = unpack(mask, batch.kernels, batch.ranked, flat=batch.flat)
        row[0] = kept.sum()
        row[1] = (batch.weight == 0).sum()
        row[2] = (batch.weight.double() - before.double()).square().sum()
        row[3] = before.double().square().sum()
    return backend.summed(rows) if isinstance(backend, ShardedBackend) else rows


def _thresholds(
    backend: Backend,
    stage: Stage,
    keeps: Sequence[int],
    config: PruneConfig,
    units: Sequence[Sequence[int]],
    clock: Clock,
    advance: Callable[[int], object],
) -> list[torch.Tensor]:
    weights = clock.weights
    if config.scope == "global":
        everything = stage.everything
        with clock.timed(range(len(everything)), everything[0].weight.device):
            shared = backend.threshold([(everything, Target(keep=sum(keeps)))])
        advance(sum(weights))
        return [
            shared.to(everything[unit[0]].weight.device).expand(len(unit)).contiguous()
            for unit in units
        ]
    percentile = config.percentile
    targets = [Target(keep) if percentile is None else Target(None, percentile) for keep in keeps]
    found: list[torch.Tensor] = []
    for unit, members in zip(units, stage.each(units), strict=True):
        jobs = [((batch,), targets[i]) for i, batch in zip(unit, members, strict=True)]
        with clock.timed(unit, members[0].weight.device):
            found.append(backend.threshold(jobs))
        advance(sum(weights[i] for i in unit))
    return found


def _all_or_none(thresholds: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """NaN for all where one is NaN: an error leaves every weight as it was.

    ``apply_`` sees to the thresholds of one call; minimum and maximum, which pass on a NaN and
    change nothing without one, to those of several.
    """
    if len(thresholds) == 1:
        return list(thresholds)
    home = thresholds[0].device
    lowest = torch.stack([part.amin().to(home) for part in thresholds]).amin()
    return [torch.maximum(part, lowest.to(part.device)) for part in thresholds]


def _check_not_captured(backend: str, config: PruneConfig) -> None:
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        what = f"wavelet={AUTO!r}" if config.wavelet == AUTO else f"backend {backend!r}"
        raise ValueError(
            f"{what} looks at numbers on the host, which a CUDA graph cannot hold; allowed in a "
            f"capture: {' and '.join(CAPTURED)}, with a basis by its name"
        )


def _check_finite(thresholds: Sequence[torch.Tensor], layers: Sequence[LayerRef]) -> None:
    if any(bool(part.isnan().any()) for part in thresholds):
        raise _non_finite(layers)


def _rows(thresholds: Sequence[torch.Tensor], done: Sequence[torch.Tensor]) -> list[list[float]]:
    """Threshold, kept, zeros, squared error and squared norm of each layer: one copy a device."""
    parts = [
        torch.cat([part.unsqueeze(1), rows], dim=1)
        for part, rows in zip(thresholds, done, strict=True)
    ]
    if len({part.device for part in parts}) == 1:
        parts = [torch.cat(parts)]
    return [row for part in parts for row in part.tolist()]


def _keeps(layers: Sequence[LayerRef], config: PruneConfig, match: PruneReport | None) -> list[int]:
    """How many coefficients each layer keeps; for scope "global" only their sum counts."""
    sizes = [ref.weight.numel() for ref in layers]
    if match is not None:
        if config.method == "random":
            return [
                min(_matched(match, ref).kept, size)
                for ref, size in zip(layers, sizes, strict=True)
            ]
        fraction = min(Fraction(match.kept, match.numel), Fraction(1))
    else:
        # The decimal that the caller wrote: 1 - 0.7 is three tenths, not a little more.
        fraction = 1 - Fraction(repr(config.sparsity or 0.0))
    if config.scope == "global":
        sizes = [sum(sizes)] + [0] * (len(sizes) - 1)
    return [-(-fraction.numerator * size // fraction.denominator) for size in sizes]


def _check_match(config: PruneConfig, match: PruneReport) -> None:
    """Raise unless a run with these settings can prune what another run's report pruned."""
    if not isinstance(match, PruneReport):
        raise TypeError(f"match must be a PruneReport, not {type(match).__name__}")
    if config.method == "dwt":
        raise ValueError("match goes with method='min_weight' or 'random', not with 'dwt'")
    if config.method == "random" and config.scope == "global":
        raise ValueError(
            "match prunes at random what the report pruned in each layer, so scope='global' does "
            "not go with it; leave scope='layer'"
        )
    if match.numel == 0:
        raise ValueError("match: the report holds no weights")


def _matched(match: PruneReport, ref: LayerRef) -> LayerStats:
    try:
        stats = match[ref.name]
    except KeyError:
        raise ValueError(
            f"match: the report has no layer {ref.name!r}; it has "
            f"{', '.join(layer.name for layer in match.layers[:8])}"
        ) from None
    if stats.shape != tuple(ref.weight.shape):
        raise ValueError(
            f"match: layer {ref.name!r} is {tuple(ref.weight.shape)}, in the report {stats.shape}"
        )
    return stats


def _checked_bases(ref: LayerRef, config: PruneConfig) -> list[Basis]:
    if config.wavelet == "klt" and config.method == "dwt":
        _raise_non_finite(ref)
    try:
        return bases_for(config, ref.weight)
    except ValueError as error:
        raise ValueError(f"layer {ref.name!r}: {error}") from error


def _warn_levels(layers: Sequence[LayerRef], bases: Sequence[Basis]) -> None:
    collapsed: dict[Basis, list[str]] = {}
    for ref, basis in zip(layers, bases, strict=True):
        if basis.collapsed or basis.too_deep:
            collapsed.setdefault(basis, []).append(ref.name)
    for basis, names in collapsed.items():
        size = "x".join(map(str, basis.kernel))
        where = f"{size} kernels (first layer {names[0]!r}, {len(names)} in all)"
        if basis.too_deep:
            _warn(f"{basis.name!r} on {where}: {basis.too_deep}")
        else:
            _warn(
                f"{basis.name!r} is too long for {where}: the deepest level that exists is "
                f"{basis.level_max}, so no transform runs there and the result is that of "
                "minimum-weight pruning; 'uhaar' fits every kernel, and a forced level transforms "
                "all the same",
                LevelCollapsedWarning,
            )


def compute_device(asked: str | torch.device | None) -> torch.device | None:
    """The device that a caller asked for, with its index; "cuda" without CUDA warns, once.

    Raises:
        ValueError: there is no such device here.
    """
    if asked is None:
        return None
    device = torch.device(asked)
    if device.type == "cuda" and not torch.cuda.is_available():
        _warn_no_cuda(str(asked))
        return torch.device("cpu")
    if device.type == "meta":
        raise ValueError(f"device {str(asked)!r} holds no values; allowed: a device that computes")
    try:
        # With its index: "cuda" is the current one of several.
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device {str(asked)!r} is not available here: {reason}") from error


@cache
def _warn_no_cuda(asked: str) -> None:
    _warn(f"device {asked!r}: torch sees no CUDA here; pruning on the CPU")


def _warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the line that called into this package, by whichever of its entries."""
    package = str(Path(__file__).parents[1])
    frame, level = sys._getframe(1), 1
    while frame.f_back and frame.f_code.co_filename.startswith((package, _TORCH)):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, category, stacklevel=level + 1)


def _draw(seed: int, name: str) -> int:
    """64 bits for one layer's random mask: the same whichever other layers are selected."""
    digest = hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


def _units(batches: Sequence[Batch], unit: int, limit: int | None) -> list[list[int]]:
    """Which layers go to the backend together: one, or several on one device.

    Args:
        batches: all of them.
        unit: how many weights together at most.
        limit: how many bytes together at most; None sets no limit.
    """
    units: list[list[int]] = [[]]
    weights = size = 0
    device = batches[0].weight.device
    for i, batch in enumerate(batches):
        weight = batch.weight
        count = weight.numel()
        held = count * weight.element_size() if limit else 0
        full = weights + count > unit or (limit is not None and size + held > limit)
        if units[-1] and (full or weight.device != device):
            units.append([])
            weights = size = 0
            device = weight.device
        units[-1].append(i)
        weights, size = weights + count, size + held
    return units


def _compute_dtypes(layers: Sequence[LayerRef], config: PruneConfig) -> list[torch.dtype]:
    """float64 for float64 weights and for all that are ranked together with one, else float32."""
    wide = [ref.weight.dtype == torch.float64 for ref in layers]
    if config.scope == "global":
        wide = [any(wide)] * len(wide)
    return [torch.float64 if each else torch.float32 for each in wide]


def _non_finite(layers: Sequence[LayerRef]) -> ValueError:
    for ref in layers:
        _raise_non_finite(ref)
    return ValueError(
        "the coefficients overflow although every weight is finite; scale the weights down"
    )


def _raise_non_finite(ref: LayerRef) -> None:
    count = non_finite(ref.weight)
    if count:
        raise ValueError(
            f"layer {ref.name!r}: {count} of {ref.weight.numel()} weights are NaN or infinite; "
            "allowed: finite weights"
        )


@contextmanager
def _bar(shown: bool, weights: int) -> Iterator[Callable[[int], object]]:
    if not shown:
        yield lambda _: None
        return
    from tqdm import tqdm

    # Every weight is seen twice: for the threshold, and when it is pruned.
    with tqdm(total=2 * weights, unit="weight", unit_scale=0.5, desc="prune") as bar:
        yield bar.update


def _layer_stats(
    name: str,
    shape: torch.Size,
    kernels: int,
    basis: Basis,
    choice: Choice,
    config: PruneConfig,
    backend: str,
    device: str,
    row: Sequence[float],
    seconds: float,
) -> LayerStats:
    threshold, kept, zeros, squared_error, squared_norm = row
    numel = shape.numel()
    return LayerStats(
        name=name,
        shape=tuple(shape),
        method=config.method,
        wavelet=basis.name,
        mode=basis.mode,
        level_requested=config.level if config.method == "dwt" else None,
        level_used=basis.level_used,
        backend=backend,
        device=device,
        threshold=threshold,
        coefficients=kernels * basis.coefficients,
        kept=int(kept),
        sparsity=1 - kept / numel if numel else 0.0,
        weight_zeros=int(zeros),
        weight_sparsity=zeros / numel if numel else 0.0,
        relative_error=math.sqrt(squared_error / squared_norm) if squared_norm else 0.0,
        seconds=seconds,
        runner_up=choice.runner_up,
        runner_up_error=choice.runner_up_error,
    )


def _settings(config: PruneConfig, match: PruneReport | None) -> dict[str, Any]:
    settings = {name: getattr(config, name) for name in _SETTINGS}
    settings["device"] = None if config.device is None else str(config.device)
    if match is not None:
        source = match.settings
        basis = f" {source['wavelet']}" if source["method"] == "dwt" else ""
        settings["sparsity"] = match.sparsity
        settings["match"] = f"{source['method']}{basis}"
    settings["versions"] = dict(versions())
    return settings
