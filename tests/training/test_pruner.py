from __future__ import annotations

import copy
import dataclasses
import pickle
import warnings
import weakref
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wavprune
from wavprune import PruneConfig, Pruner
from wavprune.bases import basis_for, named_basis
from wavprune.config import RunSettings
from wavprune.errors import WavpruneError
from wavprune.training.schedules import Constant, Cubic

from ..support.training import Net, batches, seeded, sgd, train

# Short runs on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:finished after step")

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


@pytest.fixture
def net() -> Net:
    return seeded()


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
        pruner.step()
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


def kept(pruner: Pruner) -> int:
    return sum(int(np.unpackbits(mask.numpy()).sum()) for mask in pruner.masks.values())


@pytest.mark.filterwarnings("ignore:'db2' on .* kernels")
@pytest.mark.parametrize("config", EVERY_METHOD, ids=lambda c: f"{c.method}-{c.wavelet}-{c.scope}")
@pytest.mark.parametrize("last", [0.8, 0.2])
def test_fixed_masks_keep_their_bases_and_are_what_is_reported(
    net: Net, config: PruneConfig, last: float
) -> None:
    if config.percentile is not None:
        config = dataclasses.replace(config, percentile=None, sparsity=0.5)
    pruner = Pruner(net, config, Cubic(0.5, last, start=0, end=4, every=2), regrow=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=1.0)
    pruner.attach(optimizer)
    for step in range(4):
        before = {name: mask.clone() for name, mask in pruner.masks.items()}
        train(net, optimizer, 1, seed=step)
        for name, mask in pruner.masks.items():
            assert not (mask & ~before[name]).any()
    report = pruner.finish()
    assert report.kept == kept(pruner)
    expansive = any(layer.coefficients > layer.numel for layer in report)
    if last == 0.8:
        # What an expansive basis leaks takes places that its masks do not have.
        assert report.sparsity == pytest.approx(0.8, abs=0.1 if expansive else 0.002)
    else:
        assert 0.5 - 1e-9 <= report.sparsity <= (0.8 if expansive else 0.51)


@pytest.mark.parametrize("name", ["auto", "klt"])
def test_fixed_masks_survive_a_layer_whose_best_basis_changes(name: str) -> None:
    net = nn.Sequential(nn.Conv2d(5, 5, 3))
    generator = torch.Generator().manual_seed(0)
    weight = net[0].weight
    assert isinstance(weight, torch.Tensor)

    def set_weight(basis: str) -> torch.Tensor:
        few = torch.randn(25, 9, generator=generator) * 0.01
        few[torch.rand(25, 9, generator=generator) < 0.3] *= 100
        values = few @ torch.tensor(named_basis(basis, (3, 3)).synthesis.T, dtype=few.dtype)
        with torch.no_grad():
            weight.copy_(values.view(5, 5, 3, 3))
        return weight.detach().clone()

    set_weight("uhaar")
    pruner = Pruner(net, PruneConfig(wavelet=name), Cubic(0.1, 0.8, 0, 3, 1), regrow=False)
    pruner.attach(torch.optim.SGD(net.parameters()))
    first = pruner.finish()
    set_weight("identity")
    pruner.step()
    report = pruner.finish()
    assert [layer.wavelet for layer in report] == [layer.wavelet for layer in first]
    assert report.kept == kept(pruner)
    # The weights are those of the masks: a projection changes nothing any more.
    once = weight.detach().clone()
    pruner.enforce()
    assert torch.equal(weight, once)


def test_the_error_of_fixed_masks_is_that_of_the_weights(net: Net) -> None:
    config = PruneConfig(method="min_weight", sparsity=0.5)
    pruner = Pruner(net, config, Cubic(0.5, 0.3, 0, 1, 1), regrow=False)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.0)
    pruner.attach(optimizer)
    train(net, optimizer, 1)
    # Nothing has moved, and nothing may come back.
    assert [layer.relative_error for layer in pruner.finish()] == [0.0, 0.0, 0.0]
    assert pruner.finish().sparsity == pytest.approx(0.5, abs=0.01)


def test_only_known_momentum_is_projected(net: Net) -> None:
    def state(kind: str, **settings: Any) -> dict[str, torch.Tensor]:
        model = copy.deepcopy(net)
        optimizer = getattr(torch.optim, kind)(model.parameters(), lr=1e-3, **settings)
        config = PruneConfig(method="min_weight", sparsity=0.8)
        Pruner(model, config, project_state=True).attach(optimizer)
        train(model, optimizer, 3)
        assert bool(model.second.weight.isfinite().all())
        found: dict[str, torch.Tensor] = optimizer.state[model.second.weight]
        return found

    def zeros(values: torch.Tensor) -> float:
        return float((values == 0).double().mean())

    centred = state("RMSprop", centered=True, momentum=0.9)
    assert zeros(centred["momentum_buffer"]) >= 0.79
    assert zeros(centred["grad_avg"]) < 0.3  # of channels that are not active
    assert float(state("Rprop")["step_size"].min()) >= 1e-6
    adam = state("Adamax")
    assert zeros(adam["exp_avg"]) >= 0.79
    assert zeros(adam["exp_inf"]) < 0.3


def test_quantised_momentum_stays_as_it_is(net: Net) -> None:
    optimizer = sgd(net)
    pruner = Pruner(net, PruneConfig(sparsity=0.8), project_state=True)
    pruner.attach(optimizer)
    quantised = torch.full_like(net.second.weight, 7, dtype=torch.uint8)
    optimizer.state[net.second.weight]["exp_avg"] = quantised
    optimizer.step()
    assert bool((quantised == 7).all())


@pytest.mark.filterwarnings("ignore:'db2' on 3x3 kernels")
def test_projecting_the_state_changes_no_weight_twice(net: Net) -> None:
    twin = copy.deepcopy(net)
    config = PruneConfig(wavelet="db2", level=1, force_level=True, sparsity=0.8)
    for model, project_state in ((net, False), (twin, True)):
        Pruner(model, config, project_state=project_state).attach(sgd(model))
    assert torch.equal(net.second.weight, twin.second.weight)


def test_the_state_is_not_projected_by_hand(net: Net) -> None:
    pruner = Pruner(net, project_state=True)
    with pytest.raises(RuntimeError, match=r"call attach\(optimizer\) in place of step"):
        pruner.step()
    assert pruner.steps == 0


def test_a_resumed_run_of_mixed_dtypes_ends_with_the_same_bits() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            torch.manual_seed(0)
            self.a = nn.Conv2d(3, 16, 3)
            self.b = nn.Conv2d(16, 4, 3).double()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.b(self.a(x).double()).mean((2, 3))
            return result

    whole, resumed = Mixed(), Mixed()
    config = PruneConfig(wavelet="dct", scope="global")
    first, second = Pruner(whole, config), Pruner(resumed, config)
    optimizer, other = sgd(whole), sgd(resumed)
    first.attach(optimizer)
    train(whole, optimizer, 1)
    resumed.load_state_dict(whole.state_dict())
    other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    second.load_state_dict(first.state_dict())
    second.attach(other)
    train(whole, optimizer, 3, seed=1)
    train(resumed, other, 3, seed=1)
    for left, right in zip(whole.parameters(), resumed.parameters(), strict=True):
        assert torch.equal(left, right)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda state: state.pop("steps"), "the state has no 'steps'"),
        (lambda state: state.pop("settings"), "the state has no 'settings'"),
        (lambda state: state["layers"]["second"].pop("mask"), "the state has no 'mask'"),
        (lambda state: state["report"].pop("layers"), "the state has no 'layers'"),
        (lambda state: state["report"]["layers"][0].pop("kept"), "not what state_dict"),
        (lambda state: state.update(report=None), "masks without a report"),
        (lambda state: state["settings"].update(mode="zero"), "mode='zero', this pruner of 'per"),
        (lambda state: state["layers"]["second"].update(basis="dct"), "allowed: uhaar"),
        (lambda state: state["layers"]["second"].update(channel=8), "channel=8, this pruner of 0"),
        (
            lambda state: state["layers"]["second"].update(shape=[24, 16, 5, 5]),
            r"layer 'second': the state is of shape=\[24, 16, 5, 5\], this",
        ),
        (lambda state: state.update(layers=7), "not what state_dict"),
    ],
)
def test_a_state_that_is_not_whole_changes_nothing(net: Net, change: Any, message: str) -> None:
    pruner = Pruner(net)
    pruner.attach(sgd(net))
    state = copy.deepcopy(pruner.state_dict())
    change(state)
    fresh = Pruner(net)
    before = fresh.state_dict()
    with pytest.raises(ValueError, match=message):
        fresh.load_state_dict(state)
    assert fresh.state_dict() == before


@pytest.mark.parametrize(
    "other",
    [
        PruneConfig(wavelet="dct"),
        PruneConfig(level=1),
        PruneConfig(scope="global"),
        PruneConfig(percentile=50),
        PruneConfig(method="min_weight"),
    ],
    ids=str,
)
def test_a_state_of_other_settings_is_refused(net: Net, other: PruneConfig) -> None:
    pruner = Pruner(net)
    pruner.attach(sgd(net))
    with pytest.raises(ValueError, match=r"the state is of .*, this pruner of"):
        Pruner(net, other).load_state_dict(pruner.state_dict())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"backend": "nonsense"}, "unknown backend 'nonsense'"),
        ({"backend": "reference"}, "backend 'reference' cannot do this: it has no masks"),
        ({"wavelet": "klt", "targets": ("last",)}, "layer 'last': 'klt' finds"),
    ],
)
def test_what_cannot_be_kept_pruned_is_said_before_training(
    net: Net, settings: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wavprune.backends.reference.ReferenceBackend.has_masks", False)
    with pytest.raises(ValueError, match=message):
        Pruner(net, PruneConfig(**settings), Constant(0.5, start=1000))


def test_a_replaced_parameter_is_noticed(net: Net) -> None:
    pruner = Pruner(net)
    net.load_state_dict(copy.deepcopy(net.state_dict()), assign=True)
    with pytest.raises(RuntimeError, match="layer 'first': its weight is not the Parameter"):
        pruner.attach(sgd(net))
    pruner = Pruner(net)
    pruner.attach(sgd(net))
    net.second.weight = nn.Parameter(net.second.weight.detach().clone())
    for call in (pruner.step, pruner.finish):
        with pytest.raises(RuntimeError, match="layer 'second': its weight is not the Parameter"):
            call()


def test_a_weight_of_another_dtype_is_projected_in_its_own(net: Net) -> None:
    pruner = Pruner(net, PruneConfig(method="min_weight", sparsity=0.5))
    pruner.attach(sgd(net))
    storage = weakref.ref(net.second.weight.untyped_storage())
    net.double()
    assert storage() is None
    with torch.no_grad():
        net.second.weight.copy_(torch.randn(24, 16, 3, 3, dtype=torch.float64))
    before = net.second.weight.detach().clone()
    pruner.step()
    left = net.second.weight != 0
    assert torch.equal(net.second.weight[left], before[left])
    assert int(left.sum()) == pruner.finish()["second"].kept


@pytest.mark.parametrize("regrow", [True, False])
def test_a_weight_that_is_not_finite_changes_nothing(net: Net, regrow: bool) -> None:
    pruner = Pruner(net, schedule=Cubic(0.2, 0.8, 0, 4, 1), regrow=regrow)
    pruner.attach(sgd(net))
    with torch.no_grad():
        net.first.weight.normal_()
        net.second.weight.normal_()[3, 2, 1, 0] = torch.nan
    before = copy.deepcopy(net.state_dict())
    masks = {name: mask.clone() for name, mask in pruner.masks.items()}
    with pytest.raises(ValueError, match="layer 'second': 1 of 3456 weights are NaN"):
        pruner.step()
    for name, value in net.state_dict().items():
        assert torch.equal(value.nan_to_num(7), before[name].nan_to_num(7)), name
    assert all(torch.equal(mask, masks[name]) for name, mask in pruner.masks.items())


def test_masks_wait_for_the_report(net: Net, monkeypatch: pytest.MonkeyPatch) -> None:
    # Of weights on a GPU a NaN shows when the report is read, and the masks are all 0 then.
    pruner = Pruner(net, schedule=Cubic(0.2, 0.8, 0, 4, 1))
    pruner.attach(sgd(net))
    before = {name: mask.clone() for name, mask in pruner.masks.items()}

    def unread() -> Any:
        raise WavpruneError("layer 'second': 1 of 3456 weights are NaN")

    def pruned(layers: Any, config: Any, *, masks: bool) -> wavprune.PruneReport:
        assert masks
        nothing = {ref.name: torch.zeros_like(before[ref.name]) for ref in layers}
        bases = {ref.name: basis_for(config, ref.weight) for ref in layers}
        return wavprune.PruneReport(unread, RunSettings(), bases, nothing)

    monkeypatch.setattr("wavprune.training.pruner.prune_layers", pruned)
    with pytest.raises(ValueError, match="are NaN"):
        pruner.step()
    assert all(torch.equal(mask, before[name]) for name, mask in pruner.masks.items())


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


def test_finishing_before_the_schedules_end_is_said() -> None:
    for steps, warns in ((2, True), (4, False)):
        net = Net()
        optimizer = sgd(net)
        pruner = Pruner(net, schedule=Cubic(0.2, 0.8, 0, 4, 2))
        pruner.attach(optimizer)
        train(net, optimizer, steps)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            pruner.finish()
        expected = "finished after step 2 at sparsity 72.5%; the schedule ends at step 4 with 80.0%"
        assert [str(entry.message) for entry in caught] == ([expected] if warns else [])
