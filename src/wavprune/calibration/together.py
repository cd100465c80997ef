"""The last refit: the kept coefficients of all layers together, onto the outputs of the network.

Least squares in one layer cannot tell which errors cancel further on. So what was solved layer by
layer is refined by descending the distance of the outputs, KL for logits and the relative error
otherwise, with gradients through the whole network: a few passes over the inputs, the masks as
they are, no labels. Gains and shifts of batch norms and the biases of layers follow as well.

Steps are those of Kingma and Ba, "Adam: a method for stochastic optimization" (2015), in variables
scaled by the root of the mean square of what each coefficient reads, so that steps of one length
change the outputs of all layers alike.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple

import torch

from ..engine.ambient import with_gradients
from ..engine.matching import RunningStatistics
from .calls import Call, Counting, NormCall
from .candidates import Candidate, stored
from .collected import Calibration
from .guard import Reference, distances
from .network import Network, Site, Substituted, Values, shifts_bias
from .problem import Problem
from .statistics import generator_of

# Multiplications of the network over all inputs that are looked at, and inputs that steps look at,
# which bound the time; but at least one pass over the inputs, and at most so many.
WORK, MOST_LOOKED, MOST_PASSES = 1.2e11, 6400, 20
# Inputs of a step are at least so many, and fewer than wanted where there would be fewer steps.
SMALLEST_BATCH, FEWEST_STEPS = 2, 40


class Steps(NamedTuple):
    """How long steps are, and what they look at.

    Attributes:
        rate: the length of the longest, relative to the coefficients of a layer, and for shifts and
            gains of channels to the spread of their outputs.
        batch: inputs of a step.
    """

    rate: float
    batch: int


# What is near already goes astray by long steps: what single inputs ask for is as large as what all
# have in common, so that more of them are looked at.
ATTEMPTS = (Steps(0.005, 16), Steps(0.002, 64))
# How much of the way is gone: what was learned of single inputs grows with it, too.
WAYS = {"together": 1.0, "half together": 0.5}
BETAS, EPS = (0.9, 0.99), 1e-8
WARM_STEPS = 5
# Over so many inputs, none seen before, losses this many times those of the start say that the
# steps are too long.
LOOK, ASTRAY = 320, 2.0


def refine(
    network: Network,
    calibration: Calibration,
    problems: Mapping[str, Problem],
    start: Candidate,
    inputs: Sequence[torch.Tensor],
    steps: Steps = ATTEMPTS[0],
) -> dict[str, Candidate] | None:
    """Candidates with their values refined; their masks stay.

    Args:
        network: the unpruned network.
        calibration: what is known of it.
        problems: each layer, by its name.
        start: the candidate.
        inputs: to refine on, in batches.
        steps: that are made.

    Returns:
        The refined candidates, by ``WAYS``; None where the steps lead astray, or where the outputs
        have no gradient, as those of a network that was made in inference mode.
    """
    if any(weight.is_inference() for weight in network.model.parameters()):
        return None
    with with_gradients():
        variables = _Variables(network, calibration, problems, start)
        if not _descend(network, calibration, variables, inputs, steps):
            return None
    with torch.no_grad():
        return variables.candidates()


class _Variables:
    """What is refined, in units in which it is about 1."""

    def __init__(
        self,
        network: Network,
        calibration: Calibration,
        problems: Mapping[str, Problem],
        start: Candidate,
    ) -> None:
        self._network, self.start = network, start
        self._problems = {n: problems[n] for n in calibration.layers if n in start.coefficients}
        self._units: dict[str, torch.Tensor] = {}
        self._coefficients: dict[str, torch.Tensor] = {}
        self._spreads: dict[str, torch.Tensor] = {}
        self._biases: dict[str, torch.Tensor] = {}
        for name, problem in self._problems.items():
            kept = start.masks[name].float()
            X, scale = start.coefficients[name].float(), problem.diagonal.float().sqrt()[:, None]
            size = ((X * scale).square().sum() / kept.sum().clamp_min(1)).sqrt().clamp_min(1e-12)
            self._units[name] = kept * size / scale
            self._coefficients[name] = _variable(X * scale / size)
            if shifts_bias(calibration.layers[name]):
                self._spreads[name] = _spread(problem, calibration.layers[name])
                self._biases[name] = _variable(torch.zeros_like(self._spreads[name]))
        self._gains, self._shifts = (
            {name: _variable(torch.zeros_like(norm.mean)) for name, norm in network.running.items()}
            for _ in range(2)
        )
        self._first = [variable.detach().clone() for variable in self.all()]

    def all(self) -> list[torch.Tensor]:
        """What an optimizer moves."""
        parts = self._coefficients, self._gains, self._shifts, self._biases
        return [variable for part in parts for variable in part.values()]

    def layer(self, name: str, call: Call) -> torch.Tensor | None:
        """The call with the variables as they are; None where there are none."""
        if name not in self._problems:
            return None
        return call.run(weight=self._weight(name), bias=self._bias(name))

    def norm(self, name: str, call: NormCall) -> torch.Tensor | None:
        """The call with the variables as they are; None where there are none."""
        if name not in self._gains or call.uses_batch:
            return None
        statistics = self.start.values.norms.get(name, self._network.running[name])
        values: torch.Tensor = call.arguments["input"]
        shape = (1, -1) + (1,) * (values.ndim - 2)
        # In words: gamma exp(gain) ((x - mean) / sqrt(var) + shift) + beta.
        slope = torch.exp(self._gains[name]) / (statistics.var + statistics.eps).sqrt().float()
        offset = torch.exp(self._gains[name]) * self._shifts[name] - slope * statistics.mean.float()
        gamma, beta = call.arguments.get("weight"), call.arguments.get("bias")
        if gamma is not None:
            slope, offset = slope * gamma, offset * gamma
        if beta is not None:
            offset = offset + beta
        return values * slope.to(values).view(shape) + offset.to(values).view(shape)

    def candidates(self) -> dict[str, Candidate]:
        """What they are, and what they were on the way."""
        reached, found = [variable.detach().clone() for variable in self.all()], {}
        for name, way in WAYS.items():
            for variable, first, last in zip(self.all(), self._first, reached, strict=True):
                variable.copy_(torch.lerp(first, last, way))
            found[name] = self._candidate()
        return found

    def _candidate(self) -> Candidate:
        start = self.start.values
        values = Values(dict(start.weights), dict(start.biases), dict(start.norms))
        coefficients = dict(self.start.coefficients)
        for name, problem in self._problems.items():
            coefficients[name] = self._value(name).to(problem.dtype)
            values.weights[name] = stored(problem, coefficients[name])
            bias = self._bias(name)
            if bias is not None and name in self._biases:
                values.biases[name] = bias.to(self._network.biases[name])
        for name, gain in self._gains.items():
            running = start.norms.get(name, self._network.running[name])
            before = running.var + running.eps
            # A running variance below 0 does not exist.
            after = (before * torch.exp(-2 * gain.double())).clamp_min(running.eps)
            mean = running.mean - self._shifts[name].double() * before.sqrt()
            values.norms[name] = RunningStatistics(mean, after - running.eps, running.eps)
        return Candidate(self.start.masks, values, coefficients)

    def _value(self, name: str) -> torch.Tensor:
        return self._coefficients[name] * self._units[name]

    def _weight(self, name: str) -> torch.Tensor:
        problem = self._problems[name]
        return problem.to_weight(self._value(name)).to(problem.layer.weight)

    def _bias(self, name: str) -> torch.Tensor | None:
        bias = self.start.values.biases.get(name)
        if name not in self._biases:
            return bias
        own = self._network.biases[name].detach() if bias is None else bias
        return own + (self._biases[name] * self._spreads[name]).to(own)


class _Varied(Substituted):
    """Runs the network with the variables."""

    def __init__(self, network: Network, variables: _Variables) -> None:
        super().__init__(network, variables.start.values)
        self._variables = variables

    def layer(self, name: str, call: Call) -> torch.Tensor:
        out = self._variables.layer(name, call)
        return super().layer(name, call) if out is None else out

    def norm(self, name: str, call: NormCall) -> torch.Tensor:
        out = self._variables.norm(name, call)
        return super().norm(name, call) if out is None else out


def _descend(
    network: Network,
    calibration: Calibration,
    variables: _Variables,
    inputs: Sequence[torch.Tensor],
    steps: Steps,
) -> bool:
    """Refine the variables; False where there is no gradient, or steps lead astray."""
    samples = [sample for batch in inputs for sample in torch.split(batch, 1)]
    with torch.no_grad():
        count = Counting()
        network.run(count, samples[0])
        dense = network.outputs(inputs)
    work = len(samples) * count.multiplications
    most = min(WORK / max(work, 1), MOST_LOOKED / len(samples), MOST_PASSES)
    passes = max(1, round(most))
    size = min(steps.batch, max(SMALLEST_BATCH, passes * len(samples) // FEWEST_STEPS))
    # What a step holds of each layer: its outputs and what lies between, for the way back.
    size = max(1, min(size, calibration.max_memory // max(16 * count.outputs, 1)))
    number = passes * -(-len(samples) // size)
    look = min(-(-LOOK // size), -(-number // 2))
    meant = [out for batch in dense for out in torch.split(batch, 1)]
    measure = Reference(dense).measure
    moved = variables.all()
    adam = _Adam(moved)
    seen = started = 0.0
    for step, batch in enumerate(_drawn(len(samples), size, passes, calibration.seed)):
        share = 0.5 * (1 + math.cos(math.pi * step / number)) * min(1, (step + 1) / WARM_STEPS)
        gradients: list[torch.Tensor | None] = [None] * len(moved)
        for part in _of_one_shape(batch, samples):
            x, y = (torch.cat([values[i] for i in part]) for values in (samples, meant))
            out = network.run(_Varied(network, variables), x)
            if not out.requires_grad:
                return False
            loss = distances(measure, out, y).sum() / len(batch)
            if step < look:
                seen += float(loss.detach())
                started += _loss(network, variables.start, x, y, measure) / len(batch)
            # The model's own parameters get no gradient.
            slopes = torch.autograd.grad(loss, moved, allow_unused=True)
            gradients = [
                old if new is None else new if old is None else old + new
                for old, new in zip(gradients, slopes, strict=True)
            ]
        adam.step(gradients, steps.rate * share)
        if step == look - 1 and not seen <= ASTRAY * started:
            return False
    return True


class _Adam:
    """Kingma and Ba's steps; ``torch.optim`` imports a compiler, which takes seconds."""

    def __init__(self, variables: Sequence[torch.Tensor]) -> None:
        self._variables = [variable.detach() for variable in variables]
        self._means, self._squares = ([torch.zeros_like(v) for v in variables] for _ in range(2))
        self._steps = 0

    def step(self, gradients: Sequence[torch.Tensor | None], rate: float) -> None:
        """Move what has a gradient."""
        self._steps += 1
        first, second = (1 - beta**self._steps for beta in BETAS)
        for variable, mean, square, slope in zip(
            self._variables, self._means, self._squares, gradients, strict=True
        ):
            if slope is None:
                continue
            mean.lerp_(slope, 1 - BETAS[0])
            square.mul_(BETAS[1]).addcmul_(slope, slope, value=1 - BETAS[1])
            variable.addcdiv_(mean, (square.sqrt() / second**0.5).add_(EPS), value=-rate / first)


@torch.no_grad()
def _loss(
    network: Network, candidate: Candidate, x: torch.Tensor, y: torch.Tensor, measure: str
) -> float:
    out = network.run(Substituted(network, candidate.values), x)
    return float(distances(measure, out, y).sum())


def _drawn(samples: int, size: int, passes: int, seed: int) -> Iterator[list[int]]:
    """The samples of each step: all in each pass, in random order."""
    generator = generator_of(seed, "together")
    for _ in range(passes):
        order = torch.randperm(samples, generator=generator, device="cpu")
        for chosen in torch.split(order, size):
            yield chosen.tolist()


def _of_one_shape(batch: Sequence[int], samples: Sequence[torch.Tensor]) -> list[list[int]]:
    """Those that can run at once."""
    parts: dict[torch.Size, list[int]] = {}
    for index in batch:
        parts.setdefault(samples[index].shape, []).append(index)
    return list(parts.values())


def _variable(values: torch.Tensor) -> torch.Tensor:
    return values.detach().float().clone().requires_grad_()


def _spread(problem: Problem, site: Site) -> torch.Tensor:
    """The root of the second moment of each output channel."""
    energy = ((problem.C @ problem.moment) * problem.C).sum(-1)
    groups = energy.reshape(site.rows.groups, problem.blocks, -1).sum(1)
    return groups.clamp_min(0).sqrt().flatten().float()
