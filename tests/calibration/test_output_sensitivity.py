from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from wavprune.calibration.network import Network
from wavprune.calibration.output_sensitivity import (
    FLOOR,
    Direction,
    Sensitivity,
    output_sensitivity,
)
from wavprune.engine.layers import LayerRef
from wavprune.errors import WavpruneError


def sensitivities(
    net: nn.Module, inputs: torch.Tensor, draws: int = 1
) -> tuple[Direction, dict[str, Sensitivity]]:
    refs = [
        LayerRef(name, module.weight)
        for name, module in net.named_modules()
        if isinstance(module, nn.Conv2d | nn.Linear)
    ]
    network = Network(net.eval(), refs)
    direction = Direction(network.outputs([inputs]))
    batches = list(torch.split(inputs, 16)) * draws
    return direction, output_sensitivity(network, network.sites(inputs[:1]), batches, direction)


def test_a_linear_layer_has_its_closed_form() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 4, bias=False))
    inputs = torch.randn(4096, 6) + 1
    _, known = sensitivities(net, inputs, draws=4)
    p = net(inputs).detach().double().softmax(1)
    # Without a bias nothing takes up the mean.
    second = inputs.double().T @ inputs.double() / len(inputs)
    weight = float((p - p * p).sum(1).mean()) / 4
    expected = weight * (second + FLOOR * second.diagonal().mean() * torch.eye(6))
    assert torch.allclose(known["0"].hessian[0], expected, rtol=0.1, atol=0.03 * float(weight))


@pytest.mark.parametrize("groups", [1, 8])
def test_it_predicts_the_divergence_of_small_errors(groups: int) -> None:
    torch.manual_seed(1)
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(inplace=True),
        nn.Conv2d(8, 8, 3, groups=groups),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
    )
    for parameter in net.parameters():
        parameter.data.mul_(2)
    inputs = torch.randn(256, 3, 10, 10)
    direction, known = sensitivities(net, inputs, draws=2)
    assert direction.temperature == 1
    generator = torch.Generator().manual_seed(0)
    ratios = []
    for _ in range(8):
        noisy = copy.deepcopy(net)
        with torch.no_grad():
            layer = noisy[2]
            assert isinstance(layer, nn.Conv2d)
            error = 0.03 * torch.randn(layer.weight.shape, generator=generator)
            layer.weight += error
            H = known["2"].hessian
            E = error.double().reshape(groups, -1, H.shape[1])
            predicted = float((E @ H * E).sum()) / 2
            # The bias takes up what the mean inputs give.
            noisy.get_parameter("2.bias").sub_(
                (E @ known["2"].mean[:, :, None]).reshape(-1).float()
            )
            after = [noisy(inputs)]
            measured = float(direction.divergence([net(inputs)], after).mean())
        ratios.append(predicted / measured)
    ratios.sort()
    assert 0.5 < ratios[4] < 2


def test_outputs_that_are_no_logits_are_compared_in_units_of_their_variance() -> None:
    before = 7 * torch.randn(4, 3, 8, 8)
    direction = Direction([before])
    assert not direction.logits
    change = 0.1 * before.std() * torch.ones_like(before)
    divergence = direction.divergence([before], [before + change])
    assert divergence.tolist() == pytest.approx([0.005] * 4, rel=1e-4)


def test_saturated_logits_are_softened() -> None:
    sure = 40 * torch.eye(5)
    assert Direction([sure]).temperature > 1
    assert Direction([torch.eye(5)]).temperature == 1
    direction = Direction([sure])
    assert direction.predicted(direction.quadratic(0.01)) == pytest.approx(0.01, rel=0.01)


def test_a_model_without_gradients_is_an_error() -> None:
    class Fixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            out: torch.Tensor = self.layer(x).detach()
            return out

    with pytest.raises(WavpruneError, match="the model's outputs have no gradient"):
        sensitivities(Fixed(), torch.randn(4, 3))


class InHalves(nn.Module):
    """Each sample is two rows of its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.layer(x.reshape(-1, 6)).reshape(len(x), 2, 4).sum(1)
        return out


def test_a_layer_that_has_several_rows_of_a_sample() -> None:
    torch.manual_seed(0)
    net, inputs = InHalves(), torch.randn(4096, 12) + 1
    _, known = sensitivities(net, inputs, draws=4)
    p = net(inputs).detach().double().softmax(1)
    rows = inputs.double().reshape(-1, 6)
    assert torch.allclose(known["layer"].mean[0], rows.mean(0), atol=1e-5)
    weight = float((p - p * p).sum(1).mean()) / 4
    expected = 2 * weight * (rows.T.cov() + FLOOR * torch.eye(6))
    assert torch.allclose(known["layer"].hessian[0], expected, rtol=0.1, atol=0.1 * float(weight))
