"""The sequential pass: each layer is solved for what the pruned network feeds it.

Both networks run in one batch, whose first half is the unpruned one's: when a layer is called, its
inputs in both networks are there at the same time. Its new weights are the least-squares solution
for the pruned network's inputs onto the unpruned one's outputs, so that they make up for what the
layers before have lost; then batch norms and biases follow, from both halves.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch

from ..engine.moments import moments_of
from ..engine.patterns import Pattern
from ..errors import WavpruneError
from .admm import select
from .calls import Call, NormCall, Tap
from .candidates import Candidate, stored
from .collect import LEAST_POSITIONS, PER_COLUMN
from .collected import Calibration
from .network import Network, Values, channel_moments, matched, run_norm, shifts_bias
from .patches import num_positions, patches
from .problem import Problem
from .refit import refit
from .rows import join_columns, split_columns
from .statistics import (
    Statistics,
    generator_of,
    in_blocks,
    positions_per_sample,
    sampled_positions,
)

ITERATIONS = 20
# Positions of every sample at least, where there are enough samples to learn more from them: values
# are solved for here for the last time.
POSITIONS = 96
# Of the mean input energy, so that what neither network reads stays as it is.
LEAST_RIDGE = 1e-9


def solve_in_sequence(
    network: Network,
    calibration: Calibration,
    problems: Mapping[str, Problem],
    start: Candidate,
    row_weights: Mapping[str, torch.Tensor],
    reselect: bool,
    batch: torch.Tensor,
    pattern: Pattern | None = None,
) -> Candidate:
    """Solve all layers of a candidate again, in one pass.

    Args:
        network: the unpruned network.
        calibration: what is known of it.
        problems: each layer, with its basis and ridge.
        start: the masks, whose counts are kept; layers that have weights in it are not solved.
        row_weights: for the masks that are selected again.
        reselect: True selects each layer's mask again, at its count.
        batch: the inputs.
        pattern: what masks that are selected again must be in.

    Returns:
        The solved candidate.

    Raises:
        WavpruneError: the network mixes the samples of a batch.
    """
    tap = _Solving(network, calibration, problems, start, row_weights, reselect, pattern)
    network.run(tap, torch.cat([batch, batch]))
    return Candidate(tap.masks, tap.values, tap.coefficients)


class _Solving(Tap):
    def __init__(
        self,
        network: Network,
        calibration: Calibration,
        problems: Mapping[str, Problem],
        start: Candidate,
        row_weights: Mapping[str, torch.Tensor],
        reselect: bool,
        pattern: Pattern | None,
    ) -> None:
        super().__init__(network.watched)
        self._network, self._calibration, self._problems = network, calibration, problems
        self._row_weights, self._reselect, self._pattern = row_weights, reselect, pattern
        self._numbers = {name: number for number, name in enumerate(calibration.layers)}
        self.masks = dict(start.masks)
        self.values = Values(dict(start.values.weights))
        self.coefficients = dict(start.coefficients)

    def layer(self, name: str, call: Call) -> torch.Tensor:
        if name not in self.masks:
            return call.run()
        dense, pruned = apart(call)
        if name not in self.values.weights:
            self._solve(name, dense, pruned)
        before = dense.run()
        weight = self.values.weights[name]
        after = pruned.run(weight=weight, bias=self.values.biases.get(name))
        if shifts_bias(self._calibration.layers[name]) and name not in self.values.biases:
            assert call.bias is not None
            shift = channel_moments(name, dense, before).mean
            shift = shift - channel_moments(name, pruned, after).mean
            self.values.biases[name] = call.bias + shift.to(call.bias)
            after = pruned.run(weight=weight, bias=self.values.biases[name])
        return torch.cat([before, after])

    def norm(self, name: str, call: NormCall) -> torch.Tensor:
        dense, pruned = halves(call.input)
        if name and not call.uses_batch and name not in self.values.norms:
            self.values.norms[name] = matched(
                self._network.running[name], moments_of(name, dense), moments_of(name, pruned)
            )
        before = call.run(input=dense)
        replaced = dataclasses.replace(call, arguments={**call.arguments, "input": pruned})
        return torch.cat([before, run_norm(replaced, self.values.norms.get(name))])

    def _solve(self, name: str, dense: Call, pruned: Call) -> None:
        problem, site = self._problems[name], self._calibration.layers[name]
        samples = len(pruned.batched)
        least = LEAST_POSITIONS if self._calibration.few else POSITIONS
        wanted = positions_per_sample(site.rows, samples, PER_COLUMN, least)
        positions = sampled_positions(
            num_positions(pruned),
            wanted,
            generator_of(self._calibration.seed, "sequential", str(self._numbers[name])),
            pruned.input.device,
        )
        read, meant = (
            in_blocks(patches(call, positions), problem.blocks) for call in (pruned, dense)
        )
        count = read.shape[-1]
        mean, mean_meant = read.mean(-1, keepdim=True), meant.mean(-1, keepdim=True)
        read -= mean
        meant -= mean_meant
        covariance = (read @ read.mT).double() / count
        cross = (meant @ read.mT).double() / count
        statistics = Statistics(count, mean[..., 0].double(), covariance)
        if not site.centered:
            cross = cross + mean_meant.double() * mean.double().mT
        weight = _onto_dense(problem, statistics.second_moment(site.centered), cross)
        solved = Problem(
            problem.layer,
            problem.rows,
            statistics,
            problem.blocks,
            site.centered,
            problem.ridge,
            weight,
        )
        mask = self.masks[name]
        if self._reselect and not bool(mask.all()):
            keep = int(mask.sum())
            mask = select([solved], keep, self._row_weights, ITERATIONS, self._pattern)[name]
        self.masks[name] = mask
        self.coefficients[name] = refit(solved, mask)
        self.values.weights[name] = stored(problem, self.coefficients[name])


def _onto_dense(problem: Problem, moment: torch.Tensor, cross: torch.Tensor) -> torch.Tensor:
    """``W (cross + ridge) (moment + ridge)^-1``: the dense solution for the pruned inputs.

    Returns:
        ``(groups, r, d)``.
    """
    weight = split_columns(problem.rows.of_weight(problem.layer.weight), problem.blocks)
    energy = torch.diagonal(moment, dim1=1, dim2=2).mean(1)
    ridge = torch.diag_embed(
        (problem.ridge * energy + LEAST_RIDGE)[:, None].expand(-1, moment.shape[-1])
    )
    right = (weight @ (cross + ridge)).mT
    solution = torch.linalg.solve(moment + ridge, right).mT
    return join_columns(solution, problem.blocks)


def apart(call: Call) -> tuple[Call, Call]:
    """The call of each of two networks that run in one batch.

    Raises:
        WavpruneError: its input cannot be a batch of two.
    """
    first, last = halves(call.input)
    return dataclasses.replace(call, input=first), dataclasses.replace(call, input=last)


def halves(values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A batch of two networks, apart.

    Raises:
        WavpruneError: it cannot be one.
    """
    if len(values) % 2:
        raise WavpruneError(
            f"calibration: a layer reads {len(values)} rows of a batch of two networks; allowed in "
            "a sequential pass: models that keep the samples of a batch apart"
        )
    half = len(values) // 2
    return values[:half], values[half:]
