"""Ways to quantise a network at one ``c``, and which of them takes the fewest bytes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..common.progress import progress_bar
from ..errors import WavpruneError
from .feedback import Doubles
from .in_sequence import quantise_in_sequence
from .items import Item, Quantised
from .packing import Model, pack
from .study import Study


class QuantisedNetwork(NamedTuple):
    """A quantised network.

    Attributes:
        quantised: its weights and biases, by name.
        changed: other tensors that took up a shift, by name.
        predicted: the divergence that all errors add up to, as if no layer made up for others.
    """

    quantised: dict[str, Quantised]
    changed: dict[str, torch.Tensor]
    predicted: float


# Divergences that are none, and that are as large as can be.
LEAST, MOST = 1e-12, 1e12


class Tried(NamedTuple):
    """A quantised network, measured on inputs that were held back.

    Attributes:
        c: every step is a number of its weight's own times this.
        network: what was measured.
        divergence: of the outputs for each input.
        correction: of predictions, by what was measured of the network that was tried before.
    """

    c: float
    network: QuantisedNetwork
    divergence: torch.Tensor
    correction: float = 1.0

    @property
    def predicted(self) -> float:
        """What the mean divergence was expected to be."""
        return self.correction * self.network.predicted

    @property
    def measured(self) -> float:
        """The mean divergence; infinite where outputs are no numbers."""
        mean = float(self.divergence.mean())
        return math.inf if math.isnan(mean) else mean

    @property
    def level(self) -> float:
        """Its logarithm, within bounds."""
        return math.log(min(max(self.measured, LEAST), MOST))


# Inputs of which nothing is known of their spread.
FEW = 8

Quantise = Callable[[Study, float], QuantisedNetwork]


class Way(NamedTuple):
    """A way to quantise a network.

    Attributes:
        study: of the network.
        quantise: makes a network of the study and a number ``c``.
    """

    study: Study
    quantise: Quantise

    def at(self, c: float) -> QuantisedNetwork:
        """The network at one ``c``."""
        return self.quantise(self.study, c)

    def measured(self, c: float, network: QuantisedNetwork, before: Tried | None = None) -> Tried:
        """A network, with the divergence of its outputs.

        Args:
            c: see ``at``.
            network: what to measure.
            before: another one of this way, by which predictions are corrected.
        """
        study = self.study
        # Not the means that only unfolding needs.
        means = {link.mean for link in study.norms.links}
        tensors = {n: one.tensor() for n, one in network.quantised.items() if n not in means}
        tensors |= network.changed
        state = study.network.model.state_dict()
        own = {name: state[name].clone() for name in tensors}
        try:
            for name, tensor in tensors.items():
                state[name].copy_(tensor)
            after = study.network.outputs(study.held)
        finally:
            for name, tensor in own.items():
                state[name].copy_(tensor)
        correction = 1.0
        # Of nothing, or without bounds, no proportion follows.
        if before is not None and before.network.predicted > 0 and LEAST < before.measured < MOST:
            correction = before.measured / before.network.predicted
        return Tried(c, network, study.direction.divergence(study.dense, after), correction)

    def packed(self, network: QuantisedNetwork, folder: Path) -> Model:
        """The file of a network."""
        study = self.study
        return pack(study.source, network.quantised, folder, network.changed, study.norms)


def best_ways(study: Study, c: float, folder: Path) -> list[tuple[Way, Tried]]:
    """Ways, those first that take the fewest bytes for a divergence, as measured at ``c``.

    That a basis takes fewer bytes follows from what is predicted of all its errors; where many
    weights have one, it is measured too. So are errors that no weight makes up for: what making up
    gains follows from the inputs, and inputs that are measured on may be of another kind. Where
    the inputs cannot tell, the way comes first that makes up for more. Where one fails at other
    steps, the next may not.
    """
    # By how much is made up for: other layers' errors, those of a layer, none.
    kinds = [[], [Way(study, by_themselves)], [Way(study.without_feedback(), by_themselves)]]
    # Networks that mix the samples of a batch have the last two only.
    if study.together is not None:
        studies = [one for one in (study, study.without_bases()) if one is not None]
        kinds[0] = [Way(one, in_sequence) for one in studies]
    tries: list[_Try] = []
    for kind in kinds:
        of_kind: list[_Try] = []
        for way in kind:
            # Twice the inputs may be too many for the network, or for the memory.
            errors = () if way.quantise is by_themselves else (WavpruneError, RuntimeError)
            with suppress(*errors):
                tried = way.measured(c, way.at(c))
                of_kind.append(_Try(way, tried, way.packed(tried.network, folder).packed.size))
        if of_kind:
            tries.append(min(of_kind, key=_Try.cost))
    ways = []
    while tries:
        best = _preferred(tries)
        ways.append((best.way, best.tried))
        tries = [one for one in tries if one is not best]
    return ways


def _preferred(tries: Sequence[_Try]) -> _Try:
    """The first one that the inputs cannot tell from the cheapest."""
    least = min(tries, key=_Try.cost)
    return next(
        one for one in tries if one is least or one.cost() - least.cost() <= one.uncertainty(least)
    )


class _Try(NamedTuple):
    way: Way
    tried: Tried
    size: int

    @property
    def _slope(self) -> float:
        """Half the divergence takes half a bit more of every weight, at fine steps."""
        return self.way.study.weights / (16 * math.log(2))

    def cost(self) -> float:
        """The bytes of a file whose divergence is 1, but for a constant."""
        measured = self.tried.measured
        if not math.isfinite(measured):
            return math.inf
        return self.size + self._slope * math.log(max(measured, LEAST))

    def uncertainty(self, other: _Try) -> float:
        """The standard error of the difference of costs."""
        each = self.tried.divergence, other.tried.divergence
        if len(each[0]) < FEW:
            return 0.0
        ours, theirs = (one / one.mean().clamp_min(LEAST) for one in each)
        return self._slope * float((ours - theirs).std()) / math.sqrt(len(ours))


def in_sequence(study: Study, c: float) -> QuantisedNetwork:
    """Every layer makes up for those before it."""
    with progress_bar("compress", study.weights, "weights", study.progress) as advance:
        quantised, changed = quantise_in_sequence(study, c, lambda item: advance(item.matrix.size))
    return _network(study, quantised, changed)


def by_themselves(study: Study, c: float) -> QuantisedNetwork:
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
    return _network(study, quantised, changed)


def _network(
    study: Study, quantised: dict[str, Quantised], changed: dict[str, torch.Tensor]
) -> QuantisedNetwork:
    total = math.fsum(one.divergence() for one in quantised.values())
    return QuantisedNetwork(quantised, changed, study.direction.predicted(total))


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
