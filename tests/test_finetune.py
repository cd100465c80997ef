from __future__ import annotations

import copy
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wavprune
from wavprune import PruneConfig, Pruner
from wavprune.bases import basis_for
from wavprune.schedule import Constant, Cubic

EVERY_METHOD = [
    PruneConfig(sparsity=0.7),
    PruneConfig(wavelet="haar", sparsity=0.7, scope="global"),
    PruneConfig(wavelet="db2", level=1, force_level=True, sparsity=0.7),
    PruneConfig(wavelet="dct", percentile=70),
    PruneConfig(wavelet="klt", sparsity=0.7),
    PruneConfig(wavelet="auto", sparsity=0.7),
    PruneConfig(method="min_weight", sparsity=0.7, scope="global"),
    PruneConfig(method="random", sparsity=0.7, seed=3),
    PruneConfig(sparsity=0.7, backend="eager"),
]


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 24, 3, padding=1)
        self.point = nn.Conv2d(24, 8, 1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.first(x)).relu()
        x = self.point(self.second(x).relu())
        result: torch.Tensor = self.last(x.mean((2, 3)))
        return result


@pytest.fixture
def net() -> Net:
    torch.manual_seed(0)
    return Net()


def batches(count: int, seed: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(8, 3, 8, 8, generator=generator)
        yield x, torch.randint(0, 4, (8,), generator=generator)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    for x, y in batches(steps, seed):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(net(x), y))
        optimizer.step()


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def coefficients(weight: torch.Tensor, config: PruneConfig) -> np.ndarray[Any, Any]:
    """In the basis, by PyWavelets' matrices in float64."""
    basis = basis_for(config, weight)
    kernels = weight.detach().double().flatten(0, 1).flatten(1).numpy()
    return np.asarray(kernels @ basis.analysis.T)


@pytest.mark.filterwarnings("ignore:'db2' on 3x3 kernels")
@pytest.mark.parametrize("config", EVERY_METHOD, ids=lambda c: f"{c.method}-{c.wavelet}-{c.scope}")
def test_a_pruned_network_stays_pruned_while_it_learns(net: Net, config: PruneConfig) -> None:
    free = copy.deepcopy(net)
    pruner = Pruner(net, config)
    optimizer = sgd(net)
    pruner.attach(optimizer)
    pruned = copy.deepcopy(net.state_dict())
    train(net, optimizer, 5)
    report = pruner.finish()
    train(free, sgd(free), 5)
    masked = {name: int(np.unpackbits(mask.numpy()).sum()) for name, mask in pruner.masks.items()}
    assert {layer.name: layer.kept for layer in report} == masked
    assert report.sparsity == pytest.approx(0.7, abs=0.02 if config.percentile is None else 0.2)
    for layer in report:
        weight = net.get_submodule(layer.name).weight
        assert isinstance(weight, torch.Tensor)
        assert layer.weight_zeros == int((weight == 0).sum())
        # It learned, and the projection of what it learned is what it is.
        assert not torch.equal(weight, pruned[f"{layer.name}.weight"])
        if layer.coefficients > layer.numel:
            continue  # an expansive basis leaks
        once = weight.detach().clone()
        pruner._project()
        assert torch.allclose(weight, once, rtol=0, atol=2e-6 * float(once.abs().max()))


def test_pruned_coefficients_are_those_of_pywavelets(net: Net) -> None:
    config = PruneConfig(sparsity=0.8)
    pruner = Pruner(net, config)
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    pruner.attach(optimizer)
    train(net, optimizer, 4)
    for layer in pruner.finish():
        weight = net.get_submodule(layer.name).weight
        assert isinstance(weight, torch.Tensor)
        sizes = np.abs(coefficients(weight, config))
        assert np.count_nonzero(sizes > 1e-6 * sizes.max()) == layer.kept


@pytest.mark.parametrize(
    "kind", ["SGD", "Adam", "AdamW", "RMSprop", "Adagrad", "NAdam", "Adadelta"]
)
def test_every_optimizer_is_followed(net: Net, kind: str) -> None:
    optimizer = getattr(torch.optim, kind)(net.parameters(), lr=0.01)
    pruner = Pruner(net, PruneConfig(method="min_weight", sparsity=0.75), project_state=True)
    pruner.attach(optimizer)
    train(net, optimizer, 3)
    assert pruner.steps == 3
    for layer in pruner.finish():
        assert layer.weight_zeros >= layer.numel - layer.kept


def test_the_network_is_an_ordinary_one(net: Net) -> None:
    names = list(net.state_dict())
    parameters = {name: id(value) for name, value in net.named_parameters()}
    pruner = Pruner(net)
    optimizer = sgd(net)
    pruner.attach(optimizer)
    train(net, optimizer, 2)
    assert list(net.state_dict()) == names
    assert {name: id(value) for name, value in net.named_parameters()} == parameters
    assert not net._forward_hooks
    twin = copy.deepcopy(net)
    loaded = pickle.loads(pickle.dumps(net))
    for other in (twin, loaded):
        assert all(
            torch.equal(a, b) for a, b in zip(other.parameters(), net.parameters(), strict=True)
        )
    train(net, optimizer, 1)
    assert not torch.equal(twin.first.weight, net.first.weight)


def test_a_compiled_network_is_pruned_too(net: Net) -> None:
    compiled = torch.compile(net, backend="aot_eager")
    assert isinstance(compiled, nn.Module)
    twin = copy.deepcopy(net)
    for model, module in ((net, compiled), (twin, twin)):
        pruner = Pruner(model, PruneConfig(sparsity=0.6))
        optimizer = sgd(model)
        pruner.attach(optimizer)
        train(module, optimizer, 3)
    for left, right in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.allclose(left, right, atol=1e-4)


def test_by_hand_is_the_same_as_attached(net: Net) -> None:
    twin = copy.deepcopy(net)
    schedule = Cubic(0.0, 0.8, start=2, end=6, every=2)
    attached, by_hand = Pruner(net, schedule=schedule), Pruner(twin, schedule=schedule)
    optimizer, other = sgd(net), sgd(twin)
    attached.attach(optimizer)
    train(net, optimizer, 8)
    for x, y in batches(8):
        other.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(twin(x), y))
        other.step()
        by_hand.step()
    for left, right in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(left, right)


def test_gradual_pruning_reaches_its_sparsities_in_time(net: Net) -> None:
    schedule = Cubic(0.2, 0.9, start=2, end=8, every=3)
    pruner = Pruner(net, PruneConfig(scope="global"), schedule)
    optimizer = sgd(net)
    pruner.attach(optimizer)
    seen = []
    for step in range(1, 11):
        train(net, optimizer, 1, seed=step)
        bits = sum(int(np.unpackbits(mask.numpy()).sum()) for mask in pruner.masks.values())
        seen.append(bits)
    total = pruner.finish().numel
    expected = [
        1 - schedule.sparsity(step) if step >= 2 else 0 for step in (1, 2, 2, 2, 5, 5, 5, 8, 8, 8)
    ]
    assert seen == pytest.approx([share * total for share in expected], abs=1)


@pytest.mark.parametrize("regrow", [True, False])
def test_masks_regrow_only_where_they_may(net: Net, regrow: bool) -> None:
    pruner = Pruner(net, schedule=Cubic(0.8, 0.6, start=0, end=9, every=3), regrow=regrow)
    optimizer = sgd(net)
    pruner.attach(optimizer)
    before = {name: mask.clone() for name, mask in pruner.masks.items()}
    train(net, optimizer, 9)
    grown = sum(int((mask & ~before[name]).count_nonzero()) for name, mask in pruner.masks.items())
    assert (grown > 0) == regrow
    train(net, optimizer, 1)
    second = np.abs(coefficients(net.second.weight, PruneConfig()))
    share = np.count_nonzero(second > 1e-6 * second.max()) / second.size
    assert share == pytest.approx(0.4 if regrow else 0.2, abs=0.001)


def test_momentum_of_pruned_coefficients_is_projected_where_asked(net: Net) -> None:
    config = PruneConfig(wavelet="dct", sparsity=0.8)
    for project_state in (False, True):
        model = copy.deepcopy(net)
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        pruner = Pruner(model, config, project_state=project_state)
        pruner.attach(optimizer)
        train(model, optimizer, 2)
        moments = optimizer.state[model.second.weight]
        sizes = np.abs(coefficients(moments["exp_avg"], config))
        kept = np.count_nonzero(sizes > 1e-6 * sizes.max())
        assert (kept <= pruner.finish()["second"].kept) == project_state
        assert bool((moments["exp_avg_sq"] >= 0).all())


@pytest.mark.parametrize(
    "config",
    [PruneConfig(), PruneConfig(wavelet="klt"), PruneConfig(wavelet="auto", scope="global")],
    ids=lambda c: c.wavelet,
)
@pytest.mark.parametrize("cut", [1, 4, 5, 7])
def test_a_resumed_run_ends_with_the_same_bits(
    net: Net, config: PruneConfig, cut: int, tmp_path: Any
) -> None:
    schedule = Cubic(0.1, 0.8, start=1, end=9, every=4)

    def started(model: Net) -> tuple[Pruner, torch.optim.Optimizer]:
        optimizer = torch.optim.Adam(model.parameters(), lr=0.01)
        return Pruner(model, config, schedule), optimizer

    whole, resumed = copy.deepcopy(net), copy.deepcopy(net)
    pruner, optimizer = started(whole)
    pruner.attach(optimizer)
    for step in range(12):
        train(whole, optimizer, 1, seed=step)
    first, early = started(resumed)
    first.attach(early)
    for step in range(cut):
        train(resumed, early, 1, seed=step)
    states = {
        "net": resumed.state_dict(),
        "optimizer": early.state_dict(),
        "pruner": first.state_dict(),
    }
    torch.save(states, tmp_path / "run.pt")
    stored = torch.load(tmp_path / "run.pt", weights_only=True)
    fresh = Net()
    second, late = started(fresh)
    fresh.load_state_dict(stored["net"])
    late.load_state_dict(stored["optimizer"])
    second.load_state_dict(stored["pruner"])
    second.attach(late)
    for step in range(cut, 12):
        train(fresh, late, 1, seed=step)
    for (name, left), right in zip(whole.named_parameters(), fresh.parameters(), strict=True):
        assert torch.equal(left, right), name
    assert second.finish().kept == pruner.finish().kept


def test_a_state_of_another_network_is_refused(net: Net) -> None:
    pruner = Pruner(net)
    pruner.attach(sgd(net))
    state = pruner.state_dict()
    with pytest.raises(ValueError, match="of layers first, second, point; this model's are 0"):
        Pruner(nn.Sequential(nn.Conv2d(3, 4, 3))).load_state_dict(state)
    with pytest.raises(ValueError, match="format 7; allowed: 1"):
        Pruner(net).load_state_dict({**state, "format": 7})
    state["layers"]["second"]["mask"] = state["layers"]["second"]["mask"][:-2]
    with pytest.raises(ValueError, match=r"layer 'second': its mask has .* bytes are due"):
        Pruner(net).load_state_dict(state)


def test_what_does_not_go_together_is_said(net: Net) -> None:
    with pytest.raises(ValueError, match=r"percentile=50\.0 does not go with a schedule"):
        Pruner(net, PruneConfig(percentile=50.0), Constant(0.5))
    with pytest.raises(ValueError, match="device='cpu': weights in training"):
        Pruner(net, PruneConfig(device="cpu"))
    with pytest.raises(RuntimeError, match="nothing is pruned after 0 steps"):
        Pruner(net, schedule=Constant(0.5, start=5)).finish()
    pruner = Pruner(net)
    pruner.attach(sgd(net))
    with pytest.raises(RuntimeError, match="follows an optimizer already"):
        pruner.attach(sgd(net))


def test_after_finish_the_weights_are_free(net: Net) -> None:
    pruner = Pruner(net, PruneConfig(method="min_weight", sparsity=0.9))
    optimizer = sgd(net)
    pruner.attach(optimizer)
    train(net, optimizer, 1)
    report = pruner.finish()
    assert report.weight_sparsity >= 0.9 - 0.01
    train(net, optimizer, 1)
    assert float((net.second.weight == 0).float().mean()) < 0.5
    assert wavprune.fast.prune(net, sparsity=0.0).kept > report.kept
