"""From masks to a network: values of the kept coefficients, batch norms, biases."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch

from ..engine.moments import Moments, merged
from .collected import Calibration
from .guard import Reference
from .network import Measuring, Network, Repairing, Values, matched
from .problem import Problem
from .refit import refit

# Passes over batches of different shapes, which cannot run as one.
PASSES = 3


@dataclass(slots=True)
class Candidate:
    """One way to prune the network.

    Attributes:
        masks: of each layer, ``(G, r, m)``.
        values: weights, biases and batch norms.
        coefficients: of each layer that has a weight in ``values``, ``(G, r, m)``.
    """

    masks: dict[str, torch.Tensor]
    values: Values
    coefficients: dict[str, torch.Tensor] = field(default_factory=dict)


class Trials:
    """Tries candidates on a network.

    Args:
        network: the unpruned network.
        calibration: what is known of it.
        problems: each layer, by its name.
    """

    def __init__(
        self, network: Network, calibration: Calibration, problems: Mapping[str, Problem]
    ) -> None:
        self.network, self.calibration, self.problems = network, calibration, problems
        self._batch = calibration.batch

    def assemble(self, masks: dict[str, torch.Tensor], refitted: bool) -> Candidate:
        """The network with these masks, solved for what the unpruned network reads."""
        weights, coefficients = {}, {}
        for name, mask in masks.items():
            problem = self.problems[name]
            solved = refitted and name in self.calibration.layers
            coefficients[name] = refit(problem, mask) if solved else problem.C * mask
            weights[name] = stored(problem, coefficients[name])
        return Candidate(masks, self.repaired(Values(weights)), coefficients)

    def start(self, masks: dict[str, torch.Tensor]) -> Candidate:
        """Masks to solve in sequence: layers that are never called keep their values."""
        start = Candidate(masks, Values())
        for name, mask in masks.items():
            if name not in self.calibration.layers:
                problem = self.problems[name]
                start.coefficients[name] = problem.C * mask
                start.values.weights[name] = stored(problem, start.coefficients[name])
        return start

    def repaired(self, values: Values) -> Values:
        """Batch norms and biases follow: they are set so that moments are those of before."""
        if self._batch is not None:
            sites = self.calibration.layers
            tap = Repairing(self.network, values, self.calibration.moments, sites)
            self.network.run(tap, self._batch)
            return values
        target = self._moments(Values())
        for _ in range(PASSES):
            self._follow(values, target, self._moments(values))
        return values

    def losses(self, candidate: Candidate, reference: Reference) -> torch.Tensor:
        """How far it is from the unpruned network, on inputs that nothing else looks at."""
        return reference.losses(self.network.outputs(self.calibration.guard, candidate.values))

    def _moments(self, values: Values) -> dict[str, Moments]:
        calls: dict[str, list[Moments]] = {}
        for batch in self.calibration.statistics:
            tap = Measuring(self.network, self.calibration.layers, values)
            self.network.run(tap, batch)
            for name, moments in tap.moments.items():
                calls.setdefault(name, []).append(moments)
        return {name: merged(of_batches) for name, of_batches in calls.items()}

    def _follow(
        self, values: Values, target: Mapping[str, Moments], actual: Mapping[str, Moments]
    ) -> None:
        for name, moments in actual.items():
            running = self.network.running.get(name)
            if running is not None:
                values.norms[name] = matched(running, target[name], moments)
            elif name in values.weights:
                bias = values.biases.get(name, self.network.biases.get(name))
                assert bias is not None
                values.biases[name] = bias + (target[name].mean - moments.mean).to(bias)


def stored(problem: Problem, X: torch.Tensor) -> torch.Tensor:
    """The weight of coefficients, as the network stores it."""
    return problem.to_weight(X).to(problem.layer.weight)
