"""Packed files whose steps and errors follow from what they do to the outputs of the network.

One number ``c`` for the whole network: the step of a layer is ``c`` over the root of the geometric
mean of its ``D``, which gives every layer the same trade of bits for divergence; errors are fed
back (``feedback.py``). The divergence that this predicts is then measured on inputs that were held
back, and ``c`` corrected.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn

from ..common.loaders import batches, inputs_of
from ..engine.running import running
from ..errors import WavpruneError
from .packing import Model, finish, reach_bytes
from .plan import Plan
from .report import SaveReport
from .search import Search
from .study import Study, study_of
from .ways import QuantisedNetwork, Tried, Way, best_ways, by_themselves

# Inputs that are held back to measure on, of those there are.
HELD, MOST_HELD = 0.25, 256
# Inputs that go forwards and backwards at once.
AT_ONCE = 16
# How far from its target a measured divergence may be, and what is aimed at, relatively.
KL_TOLERANCE, KL_AIM = 0.1, 0.05
# With a step that will do, more would find the one that is luckiest on the inputs held back.
KL_ROUNDS = 6
# What a target of bytes comes to, about.
USUAL_KL = 0.03


class Target(NamedTuple):
    """What to reach: one of two is not None.

    Attributes:
        kl: the divergence of the outputs.
        bytes: of the file.
    """

    kl: float | None
    bytes: float | None


def save_calibrated(
    model: nn.Module,
    calibration: Iterable[Any],
    held_out: Iterable[Any] | None,
    plan: Plan,
    explicit: bool,
    target: Target,
    batchnorm: str,
    path: Path,
    progress: bool,
) -> SaveReport:
    """Write a packed file for what calibration inputs say of the network.

    Args:
        model: the network, which is not changed.
        calibration: batches of inputs.
        held_out: batches of other inputs, to measure on; None holds back a quarter of the former.
        plan: what is pruned, and in which basis.
        explicit: True where the plan names the layers; else all that are called are compressed.
        target: what to reach.
        batchnorm: ``"fold"`` or ``"keep"``.
        path: the file.
        progress: show progress bars on standard error.

    Raises:
        WavpruneError: see ``save``.
    """
    begin = time.perf_counter()
    samples = _inputs(calibration, "calibration")
    others = None if held_out is None else _inputs(held_out, "held_out")
    for batch in others or []:
        if batch.ndim != samples[0].ndim or batch.dtype != samples[0].dtype:
            given, usual = (f"{one.dtype} {tuple(one.shape)}" for one in (batch, samples[0]))
            raise WavpruneError(
                f"held_out: a batch is {given}; allowed: batches like {usual}, of calibration"
            )
    # The copy is changed, and runs what was quantised.
    network_model = copy.deepcopy(model)
    with running(network_model, None) as device:
        fit, held = _parts(samples) if others is None else (_small(samples), _small(others))
        fit, held = ([batch.to(device) for batch in part] for part in (fit, held))
        study = study_of(
            *(model, network_model, fit, held),
            held_of="calibration" if others is None else "held_out",
            plan=plan,
            explicit=explicit,
            batchnorm=batchnorm,
            kl=target.kl or USUAL_KL,
            progress=progress,
        )
        reached, packed = _search(study, target, path.parent)
    return finish(
        study.source,
        packed,
        path,
        begin,
        step=reached.c,
        predicted_kl=reached.predicted,
        measured_kl=reached.measured,
    )


def _inputs(loader: Iterable[Any], name: str) -> list[torch.Tensor]:
    return [inputs_of(batch, name).detach() for batch in batches(loader, name=name)]


def _parts(
    samples: Sequence[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs to learn from and inputs to measure on, in small batches."""
    total = sum(map(len, samples))
    if total < 2:
        raise WavpruneError(
            "calibration: it has 1 input; allowed: 2 or more, to measure on others, or held_out"
        )
    wanted = max(1, min(MOST_HELD, round(HELD * total)))
    every = total / wanted
    held_at = {int(every * (i + 0.5)) for i in range(wanted)}
    fit, held = [], []
    at = 0
    for batch in samples:
        chosen = torch.tensor([at + i in held_at for i in range(len(batch))], device=batch.device)
        at += len(batch)
        held.append(batch[chosen])
        fit.append(batch[~chosen])
    return _small(fit), _small(held)


def _small(samples: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """In batches that the network runs at once."""
    return [part for batch in samples for part in torch.split(batch, AT_ONCE) if len(part)]


def _search(study: Study, target: Target, folder: Path) -> tuple[Tried, Model]:
    c = study.step_for(target.kl or USUAL_KL)
    if target.bytes is not None:
        # All ways come to about the same bytes, and this one is fast.
        with suppress(WavpruneError):
            c, _, _ = _at_bytes(Way(study, by_themselves), target.bytes, c, folder)
    *ways, last = best_ways(study, c, folder)
    for way in ways:
        with suppress(WavpruneError):
            return _reached(*way, target, folder)
    return _reached(*last, target, folder)


def _reached(way: Way, tried: Tried, target: Target, folder: Path) -> tuple[Tried, Model]:
    if target.bytes is not None:
        c, network, packed = _at_bytes(way, target.bytes, tried.c, folder, tried.network)
        return tried if c == tried.c else way.measured(c, network, tried), packed
    assert target.kl is not None
    # The divergence is quadratic in the errors, and these in the step.
    search = Search(math.log(target.kl), KL_AIM, tried.c, lambda _: 2.0)
    nearest, best = tried, None
    while True:
        # Of a small network the divergence jumps from step to step: the coarsest that will do.
        if tried.measured <= (1 + KL_TOLERANCE) * target.kl and (best is None or tried.c > best.c):
            best = tried
        nearest = min(nearest, tried, key=lambda one: one.measured)
        search.report(tried.level)
        if search.step is None or (best is not None and len(search.tried) >= KL_ROUNDS):
            break
        tried = way.measured(search.step, way.at(search.step), tried)
    if best is None:
        raise WavpruneError(
            f"no step brings the divergence to target_kl={target.kl:g}; the nearest has "
            f"{nearest.measured:g}"
        )
    return best, way.packed(best.network, folder)


def _at_bytes(
    way: Way, wanted: float, first: float, folder: Path, known: QuantisedNetwork | None = None
) -> tuple[float, QuantisedNetwork, Model]:
    """The number at which a file has some bytes, its network and its contents.

    Args:
        way: how to quantise.
        wanted: the bytes.
        first: the first number to try.
        folder: where large streams wait on disk.
        known: the network at ``first``, where there is one already.
    """
    network: QuantisedNetwork

    def pack_at(c: float) -> Model:
        nonlocal network
        network = known if known is not None and c == first else way.at(c)
        return way.packed(network, folder)

    c, packed = reach_bytes(pack_at, wanted, first, way.study.weights)
    return c, network, packed
