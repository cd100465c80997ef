from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import nn

import wavprune
from wavprune import Calibration, PruneConfig
from wavprune.calibration.candidates import Candidate, Trials
from wavprune.calibration.guard import Reference
from wavprune.calibration.network import Network, Values
from wavprune.calibration.problem import Problem, problem_of
from wavprune.calibration.together import Steps, refine
from wavprune.engine.layers import select_layers
from wavprune.engine.plan import plan_layers

from .test_prune import Net, data, net


class Case(NamedTuple):
    network: Network
    calibration: Calibration
    problems: dict[str, Problem]
    start: Candidate


def case(model: nn.Module, batches: list[torch.Tensor], quantile: float = 0.7) -> Case:
    refs = select_layers(model, PruneConfig())
    plan = plan_layers(refs, PruneConfig(wavelet="dct"))
    calibration = wavprune.calibrate(model, batches)
    problems = {o[0].name: problem_of(o[0], calibration) for o in plan.bind(refs)}
    network = Network(model, refs)
    masks = {n: p.C.abs() >= p.C.abs().flatten().quantile(quantile) for n, p in problems.items()}
    with torch.no_grad():
        start = Trials(network, calibration, problems).assemble(masks, refitted=True)
    return Case(network, calibration, problems, start)


@torch.no_grad()
def loss(network: Network, batches: list[torch.Tensor], values: Values) -> float:
    reference = Reference(network.outputs(batches))
    return float(reference.losses(network.outputs(batches, values)).mean())


@pytest.mark.parametrize("mixed", [False, True])
def test_outputs_come_nearer_and_masks_stay(mixed: bool) -> None:
    sizes = (8, 7, 6) if mixed else (8, 8, 8)
    batches = [x[..., :size, :size] for x, size in zip(data(), sizes, strict=True)]
    network, calibration, problems, start = case(net(), batches)
    found = refine(network, calibration, problems, start, batches)
    assert found is not None
    before, half, whole = (
        loss(network, batches, candidate.values)
        for candidate in (start, found["half together"], found["together"])
    )
    assert whole < 0.7 * before
    assert half < before
    refined = found["together"]
    assert refined.masks is start.masks
    for name, mask in start.masks.items():
        X = refined.coefficients[name]
        assert not bool(X[~mask].any())
        expected = problems[name].to_weight(X).float()
        torch.testing.assert_close(refined.values.weights[name], expected)
    assert refined.values.biases.keys() == {"depthwise"}
    assert refined.values.norms.keys() == {"norm", "norm2"}


def test_norms_without_scales_and_channels_that_are_dead_stay_finite() -> None:
    class Plain(Net):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm2d(8, affine=False)
            with torch.no_grad():
                self.pointwise.weight[0] = 0

    network, calibration, problems, start = case(net(Plain), data())
    found = refine(network, calibration, problems, start, data())
    assert found is not None
    refined = found["together"]
    assert loss(network, data(), refined.values) < loss(network, data(), start.values)
    for statistics in refined.values.norms.values():
        assert bool((statistics.var >= 0).all())


def test_the_model_gets_no_gradients() -> None:
    model = net()
    refine(*case(model, data()), data())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_outputs_without_gradients_are_not_refined() -> None:
    class Detached(Net):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return super().forward(x).detach()

    assert refine(*case(net(Detached), data()), data()) is None


def test_steps_that_are_too_long_are_given_up() -> None:
    assert refine(*case(net(), data()), data(), Steps(3.0, 2)) is None
