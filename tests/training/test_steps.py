"""Steps that fail, weights that change behind a pruner's back, and copies of it."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from wavprune import PruneConfig, Pruner, backends
from wavprune.errors import WavpruneError
from wavprune.training.schedules import Constant, Cubic

from ..support.training import Net, seeded, sgd, train

MIN_WEIGHT = PruneConfig(method="min_weight", sparsity=0.9)
EVERY_STEP = Cubic(0.5, 0.9, start=0, end=4, every=1)


def snapshot(pruner: Pruner, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """All that a step may change."""
    state = copy.deepcopy(pruner.state_dict())
    return {
        "pruner": str(state),
        "masks": {name: mask.clone() for name, mask in pruner.masks.items()},
        "weights": copy.deepcopy(pruner.model.state_dict()),
        "optimizer": copy.deepcopy(optimizer.state_dict()),
    }


def equal(left: Any, right: Any) -> bool:
    if isinstance(left, dict):
        return left.keys() == right.keys() and all(equal(left[k], right[k]) for k in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(map(equal, left, right))
    if isinstance(left, torch.Tensor):
        return torch.equal(left.nan_to_num(7), right.nan_to_num(7))
    return bool(left == right)


class Interruption:
    """Raises at the given call of a backend's methods, before or after it did its work."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, backend: str, error: type) -> None:
        self.calls, self.at, self.after = 0, -1, False
        self.error = error
        kind = type(backends.resolve(backend, []))
        for name in ("threshold", "masks", "apply_", "project_"):
            monkeypatch.setattr(kind, name, self._wrapped(getattr(kind, name)))

    def _wrapped(self, real: Any) -> Any:
        def call(backend: Any, *args: Any) -> Any:
            number, self.calls = self.calls, self.calls + 1
            if number == self.at and not self.after:
                raise self.error("interrupted")
            result = real(backend, *args)
            if number == self.at:
                raise self.error("interrupted")
            return result

        return call


@pytest.mark.parametrize("error", [KeyboardInterrupt, MemoryError])
@pytest.mark.parametrize("regrow", [True, False])
@pytest.mark.parametrize("backend", ["eager", "native"])
def test_a_step_that_is_interrupted_changes_nothing(
    backend: str, regrow: bool, error: type[BaseException], monkeypatch: pytest.MonkeyPatch
) -> None:
    net = seeded()
    optimizer = torch.optim.Adam(net.parameters(), lr=0.01)
    config = PruneConfig(sparsity=0.8, backend=backend)
    pruner = Pruner(net, config, EVERY_STEP, regrow=regrow, project_state=True)
    pruner.attach(optimizer)
    train(net, optimizer, 2)
    with torch.no_grad():
        net.second.weight.add_(0.01)
    before = snapshot(pruner, optimizer)
    interruption = Interruption(monkeypatch, backend, error)
    number = 0
    while True:
        interruption.calls, interruption.at = 0, number // 2
        interruption.after = bool(number % 2)
        try:
            pruner.step()
        except error:
            assert equal(snapshot(pruner, optimizer), before)
        else:
            break
        number += 1
    assert number >= 6
    assert pruner.steps == 3


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_an_interrupted_projection_is_undone_or_said(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = seeded()
    optimizer = sgd(net)
    pruner = Pruner(net, PruneConfig(sparsity=0.8, backend=backend))
    pruner.attach(optimizer)
    train(net, optimizer, 1)
    with torch.no_grad():
        net.second.weight.add_(0.01)
    before = snapshot(pruner, optimizer)
    interruption = Interruption(monkeypatch, backend, KeyboardInterrupt)
    interruption.at, interruption.after = 0, True
    with pytest.raises(KeyboardInterrupt) as caught:
        pruner.step()
    assert pruner.steps == 1
    if backend == "eager":
        assert equal(snapshot(pruner, optimizer), before)
    else:
        assert "all weights were projected before this" in caught.value.__notes__[0]
    pruner.step()
    assert pruner.steps == 2
    pruner.finish()


@pytest.mark.parametrize("regrow", [True, False])
def test_what_failed_is_made_up_for(regrow: bool) -> None:
    net = seeded()
    pruner = Pruner(net, MIN_WEIGHT, Cubic(0.0, 0.9, start=0, end=4, every=2), regrow=regrow)
    for _ in range(3):
        pruner.step()
    good = net.second.weight.detach().clone()
    net.second.weight.data[0] = torch.nan
    for _ in range(2):
        with pytest.raises(WavpruneError, match="layer 'second': 144 of 3456 weights are NaN"):
            pruner.step()
        assert pruner.steps == 3
    net.second.weight.data.copy_(good)
    pruner.step()
    assert pruner.finish().sparsity == pytest.approx(0.9, abs=0.01)


def test_attach_that_failed_can_be_tried_again() -> None:
    net = seeded()
    good = net.first.weight.detach().clone()
    net.first.weight.data[0] = torch.inf
    optimizer = sgd(net)
    pruner = Pruner(net, MIN_WEIGHT)
    with pytest.raises(WavpruneError, match="layer 'first'"):
        pruner.attach(optimizer)
    net.first.weight.data.copy_(good)
    train(net, optimizer, 1)
    assert pruner.steps == 0
    pruner.attach(optimizer)
    train(net, optimizer, 1)
    assert pruner.steps == 1
    assert pruner.finish().weight_sparsity >= 0.89


@pytest.mark.parametrize("backend", ["eager", "native"])
def test_a_projecting_step_names_what_is_not_finite(backend: str) -> None:
    net = seeded()
    optimizer = sgd(net)
    pruner = Pruner(net, PruneConfig(sparsity=0.5, backend=backend), project_state=True)
    pruner.attach(optimizer)
    train(net, optimizer, 1)
    weight = net.second.weight
    good = weight.detach().clone()
    weight.data[0, 0, 0, 0] = torch.nan
    before = snapshot(pruner, optimizer)
    with pytest.raises(WavpruneError, match="layer 'second': 1 of 3456 weights are NaN"):
        pruner.step()
    assert equal(snapshot(pruner, optimizer), before)
    with pytest.warns(UserWarning, match="layer 'second': 1 of 3456 .* cannot be told"):
        report = pruner.finish()
    assert str(report["second"].relative_error) == "nan"
    with pytest.raises(WavpruneError, match="layer 'second': 1 of 3456"):
        pruner.finish(enforce=True)
    weight.data.copy_(good)
    pruner.attach(optimizer)
    optimizer.state[weight]["momentum_buffer"][0, 0, 0, 0] = torch.inf
    with pytest.raises(WavpruneError, match=r"layer 'second \(momentum_buffer of SGD\)': 1 of"):
        pruner.step()


@pytest.mark.parametrize("backend", ["eager", "native"])
@pytest.mark.parametrize("wavelet", ["dct", "identity", "haar"])
@pytest.mark.parametrize("sparsity", [0.5, 0.0])
def test_weights_near_the_largest_number_are_kept_or_refused_whole(
    backend: str, wavelet: str, sparsity: float
) -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 4))
    config = PruneConfig(wavelet=wavelet, backend=backend)
    pruner = Pruner(net, config, Cubic(sparsity, 0.6, 0, 2, 1), regrow=False)
    pruner.step()
    weight = net[0].weight
    assert isinstance(weight, torch.Tensor)
    for _ in range(3):
        with torch.no_grad():
            weight.copy_(torch.rand(weight.shape) * 0.1e38 + 2e38)
        before, masks = weight.detach().clone(), copy.deepcopy(pruner.masks)
        if wavelet == "identity":
            pruner.step()
            assert bool(weight.isfinite().all())
            continue
        with pytest.raises(WavpruneError, match="overflow although every weight is finite"):
            pruner.step()
        assert torch.equal(weight, before)
        assert equal(pruner.masks, masks)


@pytest.mark.parametrize("targets", [("first", "second"), ("last",)])
@pytest.mark.parametrize("regrow", [True, False])
def test_no_bit_of_a_step_depends_on_what_is_switched_on(
    targets: tuple[str, ...], regrow: bool
) -> None:
    def trained(around: Any) -> dict[str, torch.Tensor]:
        net = seeded()
        optimizer = sgd(net)
        config = PruneConfig(wavelet="dct", targets=targets)
        schedule = Cubic(0.2, 0.8, start=0, end=2, every=2)
        pruner = Pruner(net, config, schedule, regrow=regrow, project_state=True)
        with around():
            pruner.attach(optimizer)
        for _ in range(4):
            generator = torch.Generator().manual_seed(1)
            for parameter in net.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=generator)
            with around():
                optimizer.step()
        with around():
            report = pruner.finish()
        momentum = optimizer.state[net.get_parameter(f"{targets[0]}.weight")]["momentum_buffer"]
        return {**net.state_dict(), "momentum": momentum, "kept": torch.tensor(report.kept)}

    expected = trained(torch.enable_grad)
    for around in (
        lambda: torch.autocast("cpu", torch.bfloat16),
        lambda: torch.autocast("cpu", torch.float16),
        torch.inference_mode,
        torch.no_grad,
        lambda: torch.autograd.set_detect_anomaly(True),
    ):
        assert equal(trained(around), expected)


# What changes weights behind a pruner's back.


def test_a_checkpoint_that_is_loaded_is_noticed() -> None:
    net = seeded()
    dense = copy.deepcopy(net.state_dict())
    optimizer = sgd(net)
    pruner = Pruner(net, PruneConfig(sparsity=0.8))
    pruner.attach(optimizer)
    train(net, optimizer, 2)
    net.load_state_dict(dense)
    with pytest.raises(WavpruneError, match=r"3 of 3 layers .*a checkpoint that was loaded"):
        pruner.finish()
    train(net, optimizer, 1)
    assert pruner.steps == 3
    net.load_state_dict(dense)
    with pytest.warns(UserWarning, match="3 of 3 layers of the model are not pruned .* once more"):
        report = pruner.finish(enforce=True)
    assert pruner.finish() == report
    masks, bases = report.masks, report.bases
    assert masks is not None
    assert masks.keys() == bases.keys() == {"first", "second", "point"}


@pytest.mark.filterwarnings("ignore:'db2' on .* kernels")
def test_weights_in_an_expansive_basis_are_compared_by_their_bits() -> None:
    net = seeded()
    optimizer = sgd(net)
    config = PruneConfig(wavelet="db2", level=1, force_level=True, sparsity=0.7)
    pruner = Pruner(net, config, project_state=True)
    pruner.attach(optimizer)
    pruner.finish()
    pruner.attach(optimizer)
    train(net, optimizer, 2)
    state = pruner.state_dict()
    again = Pruner(net, config)
    again.load_state_dict(state)
    assert again.finish() == pruner.finish()
    net.second.weight.data[0, 0, 0, 0] += 1e-6
    with pytest.raises(WavpruneError, match=r"1 of 3 layers of the model .*'second'"):
        pruner.finish()
    with pytest.warns(UserWarning, match="1 of 3 layers"):
        pruner.finish(enforce=True)
    pruner.finish()


def test_a_layer_that_was_replaced_is_named_and_a_wrapped_one_found() -> None:
    net = seeded()
    pruner = Pruner(net, MIN_WEIGHT)
    pruner.step()
    net.first = nn.Sequential(net.first)  # type: ignore[assignment]
    pruner.step()
    pruner.finish()
    net.second = nn.Conv2d(16, 24, 3)
    for call in (pruner.step, pruner.finish, lambda: pruner.finish(enforce=True)):
        with pytest.raises(RuntimeError, match="layer 'second': it is not the layer of the model"):
            call()


def test_weights_of_another_shape_are_refused() -> None:
    net = seeded()
    pruner = Pruner(net, MIN_WEIGHT)
    pruner.step()
    net.second.weight.data = torch.randn(24, 16, 5, 5)
    for call in (pruner.step, pruner.finish):
        with pytest.raises(RuntimeError, match=r"layer 'second': .* is \(24, 16, 5, 5\) now"):
            call()
    net.second.weight.data = torch.randn(24, 16, 1, 1).expand(24, 16, 3, 3)
    with pytest.raises(WavpruneError, match="layer 'second': its weight overlaps itself"):
        pruner.step()


def test_weights_of_another_dtype_and_layout_stay_pruned() -> None:
    net = seeded()
    pruner = Pruner(net, PruneConfig(sparsity=0.8))
    pruner.step()
    for change in (
        lambda: net.to(torch.bfloat16),
        lambda: net.double(),
        lambda: net.to(memory_format=torch.channels_last),  # type: ignore[call-overload]
        lambda: net.float(),
    ):
        change()
        pruner.step()
        pruner.finish()


# Copies.


def copies(kind: str, *objects: Any) -> Any:
    return copy.deepcopy(objects) if kind == "deepcopy" else pickle.loads(pickle.dumps(objects))


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
@pytest.mark.parametrize("attached", [True, False])
def test_copies_of_model_optimizer_and_pruner_go_on(kind: str, attached: bool) -> None:
    net = seeded()
    optimizer = sgd(net)
    pruner = Pruner(net, PruneConfig(sparsity=0.8), Constant(0.8), project_state=True)
    pruner.attach(optimizer)
    train(net, optimizer, 2)
    if not attached:
        pruner.detach()
    twin, other, second = copies(kind, net, optimizer, pruner)
    assert second.model is twin
    for model, its in ((net, optimizer), (twin, other)):
        assert isinstance(model, Net)
        train(model, its, 2, seed=5)
    assert equal(net.state_dict(), twin.state_dict())
    assert pruner.steps == second.steps == (4 if attached else 2)
    if attached:
        assert second.finish() == pruner.finish()


@pytest.mark.parametrize("kind", ["deepcopy", "pickle"])
def test_a_copy_alone_says_that_its_model_is_its_own(kind: str) -> None:
    net = seeded()
    optimizer = sgd(net)
    pruner = Pruner(net, MIN_WEIGHT)
    pruner.attach(optimizer)
    (alone,) = copies(kind, pruner)
    assert alone.model is not net
    alone.detach()
    with pytest.raises(WavpruneError, match=r"trains none of the 3 layers .*a copy"):
        alone.attach(optimizer)
    with pytest.raises(TypeError, match=r"use copy\.deepcopy or state_dict"):
        copy.copy(pruner)
