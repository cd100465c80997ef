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
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..common.loaders import batches, check_loader, inputs_of
from ..common.progress import progress_bar
from ..engine.running import running
from ..errors import WavpruneError
from .feedback import Doubles
from .in_sequence import quantise_in_sequence
from .items import Item, Quantised
from .packing import Model, finish, pack, reach_bytes
from .plan import Plan
from .report import SaveReport
from .search import Search
from .study import Study, study_of

# Inputs that are held back to measure on, of those there are.
HELD, MOST_HELD = 0.25, 256
# Inputs that go forwards and backwards at once.
AT_ONCE = 16
# How far from its target a measured divergence may be, and what is aimed at, relatively.
KL_TOLERANCE, KL_AIM = 0.1, 0.05
# More would find the step that is luckiest on the inputs that are held back.
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
    check_loader(calibration, "calibration")
    samples = [inputs_of(batch).detach() for batch in batches(calibration)]
    # The copy is changed, and runs what was quantised.
    network_model = copy.deepcopy(model)
    with running(network_model, None) as device:
        fit, held = _parts([batch.to(device) for batch in samples])
        study = study_of(
            *(model, network_model, fit, held),
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
        predicted_kl=reached.found.predicted,
        measured_kl=reached.measured,
    )


def _parts(
    samples: Sequence[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs to learn from and inputs to measure on, in small batches."""
    total = sum(map(len, samples))
    if total < 2:
        raise WavpruneError("calibration: it has 1 input; allowed: 2 or more, to measure on others")
    wanted = max(1, min(MOST_HELD, round(HELD * total)))
    every = total / wanted
    held_at = {int(every * (i + 0.5)) for i in range(wanted)}
    fit, held = [], []
    at = 0
    for batch in samples:
        chosen = torch.tensor([at + i in held_at for i in range(len(batch))], device=batch.device)
        at += len(batch)
        held += [part for part in torch.split(batch[chosen], AT_ONCE) if len(part)]
        fit += [part for part in torch.split(batch[~chosen], AT_ONCE) if len(part)]
    return fit, held


class _Found(NamedTuple):
    """A network at one ``c``."""

    quantised: dict[str, Quantised]
    changed: dict[str, torch.Tensor]
    predicted: float


class _Tried(NamedTuple):
    """The same, measured on inputs that were held back."""

    c: float
    found: _Found
    measured: float


# What makes a network of a study and a number c.
_Way = Callable[[Study, float], _Found]


def _search(study: Study, target: Target, folder: Path) -> tuple[_Tried, Model]:
    way, tried = _better(study, study.step_for(target.kl or USUAL_KL))
    if target.bytes is not None:
        return _with_bytes(study, way, target.bytes, tried.c, folder)
    assert target.kl is not None
    # The divergence is quadratic in the errors, and these in the step.
    search = Search(*(math.log(target.kl), KL_AIM, tried.c, lambda _: 2.0), rounds=KL_ROUNDS)
    nearest, best = tried, None
    while True:
        # Of a small network the divergence jumps from step to step: the coarsest that will do.
        if tried.measured <= (1 + KL_TOLERANCE) * target.kl and (best is None or tried.c > best.c):
            best = tried
        nearest = min(nearest, tried, key=lambda one: one.measured)
        search.report(math.log(max(tried.measured, 1e-12)))
        if search.step is None:
            break
        tried = _measured_at(study, way, search.step)
    if best is None:
        raise WavpruneError(
            f"no step brings the divergence to target_kl={target.kl:g}; the nearest has "
            f"{nearest.measured:g}"
        )
    return best, _packed(study, folder, best.found)


def _with_bytes(
    study: Study, way: _Way, wanted: float, first: float, folder: Path
) -> tuple[_Tried, Model]:
    found: _Found

    def pack_at(way: _Way, c: float) -> Model:
        nonlocal found
        found = way(study, c)
        return _packed(study, folder, found)

    # Both ways come to about the same bytes, and the first is much faster.
    for one in dict.fromkeys((_by_themselves, way)):
        first, packed = reach_bytes(partial(pack_at, one), wanted, first, study.weights)
    return _measure(study, first, found), packed


def _better(study: Study, c: float) -> tuple[_Way, _Tried]:
    """The way whose outputs at ``c`` are nearest to the network's, and what it measured."""
    ways: list[_Way] = [_by_themselves]
    tried = [_measured_at(study, _by_themselves, c)]
    # Inputs of many shapes, and networks that mix the samples of a batch, have the first way only.
    if study.together is not None:
        with suppress(WavpruneError):
            tried.append(_measured_at(study, _in_sequence, c))
            ways.append(_in_sequence)
    best = min(range(len(tried)), key=lambda i: tried[i].measured)
    return ways[best], tried[best]


def _measured_at(study: Study, way: _Way, c: float) -> _Tried:
    return _measure(study, c, way(study, c))


def _measure(study: Study, c: float, found: _Found) -> _Tried:
    return _Tried(c, found, _measured(study, _stored(study, found)))


def _packed(study: Study, folder: Path, found: _Found) -> Model:
    return pack(study.source, found.quantised, folder, found.changed, study.norms)


def _stored(study: Study, found: _Found) -> dict[str, torch.Tensor]:
    """What the copy of the model gets: not the means that only unfolding needs."""
    means = {link.mean for link in study.norms.links}
    tensors = {name: one.tensor() for name, one in found.quantised.items() if name not in means}
    return tensors | found.changed


def _in_sequence(study: Study, c: float) -> _Found:
    """Every layer makes up for those before it."""
    with progress_bar("compress", study.weights, "weights", study.progress) as advance:
        quantised, changed = quantise_in_sequence(study, c, lambda item: advance(item.matrix.size))
    return _found(study, quantised, changed)


def _found(
    study: Study, quantised: dict[str, Quantised], changed: dict[str, torch.Tensor]
) -> _Found:
    total = math.fsum(one.divergence() for one in quantised.values())
    return _Found(quantised, changed, study.direction.predicted(total))


def _by_themselves(study: Study, c: float) -> _Found:
    """Every layer has the inputs that it always had."""
    items = {item.name: item for item in study.items}
    with progress_bar("compress", study.weights, "weights", study.progress) as advance:

        def done(item: Item) -> Quantised:
            found = item.quantised(c)
            advance(item.matrix.size)
            return found

        quantised = {name: done(item) for name, item in items.items() if name in study.shifts}
        changed: dict[str, torch.Tensor] = {}
        for name, (bias, mean, sign) in study.shifts.items():
            shift = sign * _shift(quantised[name], mean)
            if bias in items:
                moved = (items[bias].matrix - shift[:, None]).astype(np.float32)
                quantised[bias] = done(replace(items[bias], matrix=moved))
            else:
                before = study.plain[bias]
                changed[bias] = (before.double() - torch.from_numpy(shift)).to(before.dtype)
        for name, item in items.items():
            if name not in quantised:
                quantised[name] = done(item)
    return _found(study, quantised, changed)


def _shift(found: Quantised, mean: torch.Tensor) -> Doubles:
    """How the errors of a weight move the mean of each output."""
    item = found.item
    after = found.tensor().double().numpy()
    before = item.original.double().numpy()
    plain = replace(item.layout, coefficients=item.layout.kernel)
    error = plain.split((after - before).reshape(-1, item.layout.kernel))
    groups = len(mean)
    moved = error.reshape(groups, -1, error.shape[1]) @ mean.numpy()[:, :, None]
    return np.asarray(moved.reshape(-1))


def _measured(study: Study, tensors: Mapping[str, torch.Tensor]) -> float:
    """The divergence of the outputs with these tensors."""
    state = study.network.model.state_dict()
    own = {name: state[name].clone() for name in tensors}
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
    after = study.network.outputs(study.held)
    for name, tensor in own.items():
        state[name].copy_(tensor)
    return float(study.direction.divergence(study.dense, after).mean())
