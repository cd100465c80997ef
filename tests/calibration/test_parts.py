"""The parts of a run one by one: the guard, sensitivities, probes' inputs, the sequential pass."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import wavprune
from tests.calibration.test_prune import data, net
from wavprune import PruneConfig
from wavprune.calibration.candidates import Candidate, Trials
from wavprune.calibration.guard import MAGNITUDE, Reference, decide
from wavprune.calibration.network import Network, Values, tensor_of
from wavprune.calibration.problem import problem_of
from wavprune.calibration.sensitivity import by_norm, gauss_newton
from wavprune.calibration.sequential import solve_in_sequence
from wavprune.engine.layers import select_layers
from wavprune.engine.plan import plan_layers


@pytest.mark.parametrize(
    ("other", "chosen", "reason"),
    [
        ([0.5, 0.6, 0.4, 0.5], "other", "smallest loss"),
        ([1.5, 1.6, 1.4, 1.5], MAGNITUDE, "no candidate has a smaller loss"),
        ([0.0, 1.9, 0.1, 1.9], MAGNITUDE, "is within its standard error"),
        ([0.1, math.nan, 0.1, 0.1], MAGNITUDE, "no candidate has a smaller loss"),
    ],
)
def test_magnitude_gives_way_to_what_is_surely_better(
    other: list[float], chosen: str, reason: str
) -> None:
    losses = {MAGNITUDE: torch.tensor([1.0, 1.1, 0.9, 1.0]), "other": torch.tensor(other)}
    verdict = decide(losses)
    assert verdict.chosen == chosen
    assert reason in verdict.reason
    assert verdict.losses[MAGNITUDE] == pytest.approx(1.0)


def test_logits_are_compared_by_kl_and_other_outputs_by_their_error() -> None:
    logits = torch.randn(5, 4)
    reference = Reference([logits])
    assert reference.measure == "kl"
    # A constant that is added to all logits changes nothing.
    assert float(reference.losses([logits + 3]).abs().max()) < 1e-5
    p, q = logits.double().softmax(1), (2 * logits).double().softmax(1)
    expected = (p * (p / q).log()).sum(1)
    torch.testing.assert_close(reference.losses([2 * logits]), expected, rtol=1e-5, atol=1e-7)
    for outputs in (logits.softmax(1), torch.randn(3, 2, 4, 4), torch.randn(4, 1)):
        reference = Reference([outputs])
        assert reference.measure == "relative error"
        losses = reference.losses([1.1 * outputs])
        torch.testing.assert_close(losses, torch.full_like(losses, 0.01), rtol=1e-4, atol=0)


def test_gn_is_the_squared_jacobian_of_the_outputs() -> None:
    model = nn.Sequential(nn.Linear(6, 5), nn.Linear(5, 40)).eval()
    refs = select_layers(model, PruneConfig(targets=("0", "1")))
    network = Network(model, refs)
    batches = list(torch.split(torch.randn(4000, 6), 500))
    found = gauss_newton(network, network.sites(batches[0]), batches, seed=1)
    assert found is not None
    columns = model.get_parameter("1.weight").detach().square().sum(0).double()
    torch.testing.assert_close(found["0"][0], columns, rtol=0.1, atol=0.0)
    torch.testing.assert_close(
        found["1"][0], torch.ones(40, dtype=torch.float64), rtol=0.15, atol=0.0
    )
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_has_no_gradient_has_no_gn() -> None:
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)

        @torch.no_grad()
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.conv(x)
            return out

    report = wavprune.fast.prune(Frozen(), wavelet="dct", scope="global", calibration=data())
    assert report.decision is not None
    assert any("no gradient" in note for note in report.decision.notes)
    assert not any(name.endswith(" gn") for name in report.decision.losses)


def test_bn_is_the_squared_gain_of_the_batch_norm() -> None:
    model = net()
    network = Network(model, select_layers(model, PruneConfig()))
    sites = network.sites(data()[0])
    assert [site.norm for site in sites.values()] == ["norm", None, "norm2", None]
    assert [site.centered for site in sites.values()] == [True, True, True, False]
    norm = model.get_submodule("norm")
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_var is not None
    gain = (norm.weight**2 / (norm.running_var + norm.eps)).detach().double()
    torch.testing.assert_close(by_norm(network, sites)["stem"][0], gain, rtol=1e-5, atol=1e-9)


@pytest.mark.parametrize("wavelet", ["identity", "dct", "haar"])
def test_in_sequence_a_network_that_keeps_everything_stays_as_it_is(wavelet: str) -> None:
    model = net()
    calibration = wavprune.calibrate(model, data())
    refs = select_layers(model, PruneConfig())
    plan = plan_layers(refs, PruneConfig(wavelet=wavelet))
    problems = {o[0].name: problem_of(o[0], calibration) for o in plan.bind(refs)}
    network = Network(model, refs)
    masks = {name: torch.ones_like(p.C, dtype=torch.bool) for name, p in problems.items()}
    batch = calibration.everything
    assert batch is not None
    with torch.no_grad():
        solved = solve_in_sequence(
            network,
            calibration,
            problems,
            Candidate(masks, Values()),
            calibration.gains,
            True,
            batch,
        )
        before, after = network.outputs([batch])[0], network.outputs([batch], solved.values)[0]
    torch.testing.assert_close(after, before, rtol=1e-3, atol=1e-3)
    for name, weight in solved.values.weights.items():
        torch.testing.assert_close(
            weight, model.get_parameter(f"{name}.weight").detach(), rtol=1e-3, atol=1e-4
        )


def test_in_sequence_the_last_layer_makes_up_for_the_first() -> None:
    # Without anything between them, the last layer's own error is that of the outputs.
    model = nn.Sequential(nn.Conv2d(3, 8, 3, bias=False), nn.Conv2d(8, 4, 3, bias=False)).eval()
    calibration = wavprune.calibrate(model, data())
    refs = select_layers(model, PruneConfig())
    plan = plan_layers(refs, PruneConfig(wavelet="dct"))
    problems = {o[0].name: problem_of(o[0], calibration) for o in plan.bind(refs)}
    network = Network(model, refs)
    masks = {n: p.C.abs() >= p.C.abs().flatten().quantile(0.7) for n, p in problems.items()}
    batch = calibration.batch
    assert batch is not None
    with torch.no_grad():
        trials = Trials(network, calibration, problems)
        apart = trials.assemble(dict(masks), refitted=True)
        together = solve_in_sequence(
            network, calibration, problems, trials.start(masks), calibration.gains, False, batch
        )
        dense, *others = (
            network.outputs([batch], values)[0] for values in (None, apart.values, together.values)
        )
    assert all(torch.equal(together.masks[name], masks[name]) for name in masks)
    errors = [float((out - dense).square().mean()) for out in others]
    assert errors[1] < 0.95 * errors[0]


def test_a_model_that_mixes_its_samples_is_not_solved_in_sequence() -> None:
    class Mixing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            pooled = self.second(self.first(x)[:1])
            logits: torch.Tensor = pooled.mean((2, 3)).expand(len(x), -1) + x.mean()
            return logits

    report = wavprune.fast.prune(Mixing(), wavelet="dct", scope="global", calibration=data())
    assert report.decision is not None
    assert any("keep the samples of a batch apart" in note for note in report.decision.notes)


@pytest.mark.parametrize("output", [(torch.ones(2),), [torch.ones(2)], {"a": torch.ones(2)}])
def test_the_first_tensor_of_an_output_counts(output: object) -> None:
    assert torch.equal(tensor_of(output), torch.ones(2))


def test_an_output_without_a_tensor_is_refused() -> None:
    with pytest.raises(TypeError, match="the model returned a str"):
        tensor_of("logits")
