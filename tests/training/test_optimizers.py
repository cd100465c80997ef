from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from wavprune import PruneConfig, Pruner
from wavprune.errors import WavpruneError

from ..support.training import Net, seeded, sgd, train

CONFIG = PruneConfig(wavelet="identity", sparsity=0.9)


class Wrapper:
    """A training library's own wrapper, which is no optimizer."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


class Prepared(torch.optim.Optimizer):
    """An optimizer by its type alone, as accelerate's."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self.optimizer.step(closure)


@pytest.mark.parametrize(
    ("foreign", "message"),
    [
        (lambda optimizer: None, "must be a torch.optim.Optimizer, not NoneType"),
        (lambda optimizer: [optimizer], "must be a torch.optim.Optimizer, not list"),
        (Wrapper, "not Wrapper; .* such as the SGD in its attribute 'optimizer'"),
        (lambda optimizer: Prepared(None), "not Prepared"),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_optimizer_is_refused_before_anything_changes(
    foreign: Any, message: str
) -> None:
    net = seeded()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    pruner = Pruner(net, CONFIG)
    with pytest.raises(TypeError, match=message):
        pruner.attach(foreign(sgd(net)))
    assert not pruner.masks
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    pruner.attach(sgd(net))
    assert pruner.finish().sparsity == pytest.approx(0.9, abs=0.01)


def test_an_optimizer_of_another_network_is_refused() -> None:
    net, other = seeded(), seeded()
    pruner = Pruner(net, CONFIG)
    with pytest.raises(WavpruneError, match="this SGD trains none of the 3 layers"):
        pruner.attach(sgd(other))
    assert not pruner.masks
    net.requires_grad_(False)
    pruner.attach(sgd(net.last))
    assert pruner.masks


def test_a_prepared_optimizer_is_unwrapped() -> None:
    net = seeded()
    optimizer = sgd(net)
    pruner = Pruner(net, CONFIG)
    pruner.attach(Prepared(Prepared(optimizer)))
    train(net, optimizer, 2)
    assert pruner.steps == 2
    assert pruner.finish().weight_sparsity >= 0.89


@pytest.mark.filterwarnings("ignore::Warning:accelerate")
def test_accelerate_prepares_and_the_pruner_follows() -> None:
    accelerate = pytest.importorskip("accelerate")
    net = seeded()
    accelerator = accelerate.Accelerator(cpu=True)
    model, optimizer = accelerator.prepare(net, sgd(net))
    pruner = Pruner(model, CONFIG)
    pruner.attach(optimizer)
    train(model, optimizer, 2)
    assert pruner.steps == 2
    assert pruner.finish().weight_sparsity >= 0.89


class Pair(nn.Module):
    """Two networks that two optimizers train in turn."""

    def __init__(self) -> None:
        super().__init__()
        self.generator, self.critic = seeded(), seeded()


def take_turns(pair: Pair, optimizers: dict[str, torch.optim.Optimizer], steps: int) -> None:
    for step in range(steps):
        for name, optimizer in optimizers.items():
            part = pair.get_submodule(name)
            assert isinstance(part, Net)
            train(part, optimizer, 1, seed=step)


@pytest.mark.parametrize("project_state", [False, True])
def test_every_attached_optimizer_keeps_its_layers_pruned(project_state: bool) -> None:
    pair = Pair()
    optimizers = {"generator": sgd(pair.generator), "critic": sgd(pair.critic)}
    pruner = Pruner(pair, CONFIG, project_state=project_state)
    pruner.attach(optimizers["generator"])
    pruner.attach(optimizers["critic"])
    for optimizer in optimizers.values():
        with pytest.raises(RuntimeError, match="follows an optimizer already"):
            pruner.attach(optimizer)
    take_turns(pair, optimizers, 3)
    assert pruner.steps == 3
    report = pruner.finish()
    for layer in report:
        assert layer.weight_zeros >= layer.numel - layer.kept
    take_turns(pair, optimizers, 1)
    assert int((pair.critic.second.weight == 0).sum()) < report["critic.second"].weight_zeros - 100


def test_an_optimizer_that_is_not_attached_is_named() -> None:
    pair = Pair()
    optimizers = {"generator": sgd(pair.generator), "critic": sgd(pair.critic)}
    pruner = Pruner(pair, CONFIG)
    pruner.attach(optimizers["generator"])
    take_turns(pair, optimizers, 2)
    message = (
        "3 of 6 layers of the model are not pruned .*'critic.first' .*no attached optimizer trains "
        "'critic.first', 'critic.second', 'critic.point'"
    )
    with pytest.raises(WavpruneError, match=message):
        pruner.finish()
    with pytest.warns(UserWarning, match=f"{message}; they were projected onto their masks"):
        report = pruner.finish(enforce=True)
    for layer in report:
        assert layer.weight_zeros >= layer.numel - layer.kept
