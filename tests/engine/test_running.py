from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

import wavprune
from tests.support.interrupts import interrupted
from wavprune import batchnorm_statistics, compare, evaluate, match_batchnorm, predict, run_trial
from wavprune.engine.running import private_buffers, running, write_all

Action = Callable[[nn.Module], object]


def network() -> nn.Sequential:
    """In training, but for one part of it."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4, momentum=0.3),
        nn.InstanceNorm2d(4, track_running_stats=True),
        nn.Conv2d(4, 4, 3),
        nn.BatchNorm2d(4),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model[4].eval()
    return model


DENSE = network()
PRUNED = copy.deepcopy(DENSE)
wavprune.fast.prune(PRUNED, sparsity=0.8)
DATA = [(torch.randn(16, 1, 6, 6), torch.arange(16) % 4) for _ in range(2)]
STATISTICS = batchnorm_statistics(DENSE, DATA)

ACTIONS: dict[str, Action] = {
    "predict": lambda model: predict(model, DATA),
    "evaluate": lambda model: evaluate(model, DATA, DENSE, timing=False),
    "statistics": lambda model: batchnorm_statistics(model, DATA),
    "match, model": lambda model: match_batchnorm(model, DENSE, DATA),
    "match, statistics": lambda model: match_batchnorm(model, STATISTICS, DATA),
    "update": lambda model: wavprune.update_batchnorm(model, DATA),
    "trial": lambda model: run_trial(model, DATA, wavprune.PruneConfig(), timing=False),
    "compare": lambda model: compare(
        model, DATA, sparsities=[0.5], wavelets=["uhaar"], methods=["dwt"]
    ),
}


class State:
    """Everything about a model that running it could change."""

    def __init__(self, model: nn.Module) -> None:
        modules = list(model.modules())
        self.tensors = [*model.parameters(), *model.buffers()]
        self.values = [tensor.detach().clone() for tensor in self.tensors]
        self.others = [
            (m.training, len(m._forward_pre_hooks), getattr(m, "momentum", None)) for m in modules
        ]

    def holds_for(self, model: nn.Module) -> bool:
        now = State(model)
        return (
            all(old is new for old, new in zip(self.tensors, now.tensors, strict=True))
            and all(map(torch.equal, self.values, now.values))
            and self.others == now.others
        )


@pytest.mark.parametrize("name", ACTIONS)
def test_an_interrupt_anywhere_leaves_the_model_as_it_was(name: str) -> None:
    action = ACTIONS[name]
    model = copy.deepcopy(PRUNED)
    action(model)
    points = interrupted(lambda: action(model), at=0)
    assert points is not None
    dense = State(DENSE)
    for at in range(1, points, points // 13 + 1):
        model = copy.deepcopy(PRUNED)
        before = State(model)
        if interrupted(lambda model=model: action(model), at) is None:  # type: ignore[misc]  # bound now
            assert before.holds_for(model), at
            assert dense.holds_for(DENSE), at
            assert torch.is_grad_enabled(), at


def test_an_interrupt_while_results_are_written_undoes_it() -> None:
    def write(model: nn.Module) -> None:
        write_all([(buffer, torch.ones(())) for buffer in model.buffers()])

    points = interrupted(lambda: write(nn.BatchNorm2d(2)), at=0)
    assert points is not None
    for at in range(1, points - 1):
        model = nn.BatchNorm2d(2)
        before = State(model)
        if interrupted(lambda model=model: write(model), at) is None:  # type: ignore[misc]
            assert before.holds_for(model), at


@pytest.mark.parametrize("name", ACTIONS)
def test_an_error_in_the_model_leaves_it_as_it_was(name: str) -> None:
    class Failing(nn.Module):
        def __init__(self, calls: int) -> None:
            super().__init__()
            self.calls = calls

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            self.calls -= 1
            if self.calls < 0:
                raise RuntimeError("no memory")
            return inputs

    # Matched, it runs on all batches at once.
    for calls in range(1 if name.startswith("match") else 2):
        model = nn.Sequential(*copy.deepcopy(PRUNED), Failing(calls))
        if name == "match, model":
            # It has no failing part, and runs in vain.
            model[4].eval()
        before = State(model)
        with pytest.raises(RuntimeError, match="no memory"):
            ACTIONS[name](model)
        assert before.holds_for(model)


def test_an_error_of_the_loader_leaves_the_model_as_it_was() -> None:
    class Failing:
        def __iter__(self) -> Iterator[Any]:
            yield DATA[0]
            raise OSError("disk")

    for action in (
        lambda model: predict(model, Failing()),
        lambda model: evaluate(model, Failing(), DENSE, timing=False),
        lambda model: match_batchnorm(model, DENSE, Failing()),
        lambda model: wavprune.update_batchnorm(model, Failing()),
    ):
        model = copy.deepcopy(PRUNED)
        before = State(model)
        with pytest.raises(OSError, match="disk"):
            action(model)
        assert before.holds_for(model)


def test_only_batch_norms_change_when_their_statistics_are_estimated_again() -> None:
    model = copy.deepcopy(PRUNED)
    tensors = State(model).tensors
    instance_norm = copy.deepcopy(model[2].state_dict())
    wavprune.update_batchnorm(model, DATA)
    assert all(old is new for old, new in zip(tensors, State(model).tensors, strict=True))
    assert all(map(torch.equal, instance_norm.values(), model[2].state_dict().values()))
    assert int(model[1].get_buffer("num_batches_tracked")) == 2


class Elsewhere(nn.Sequential):
    """Moves as a model on another device would: other tensors in the same parameters."""

    def to(self, device: Any) -> Elsewhere:  # type: ignore[override]  # what is called here
        del device
        for parameter in self.parameters():
            parameter.data = parameter.data.clone()
            if parameter.grad is not None:
                parameter.grad = parameter.grad.clone()
        for module in self.modules():
            for name, buffer in module._buffers.items():
                module._buffers[name] = None if buffer is None else buffer.clone()
        return self


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> str:
    """A device that takes any model away from home, and computes on the CPU."""
    monkeypatch.setattr(
        "wavprune.engine.running.compute_device",
        lambda device: None if device is None else torch.device("cpu", 1),
    )
    return "cpu:1"


def test_a_model_that_ran_on_another_device_has_its_own_tensors_back(elsewhere: str) -> None:
    model = Elsewhere(*copy.deepcopy(PRUNED))
    model(DATA[0][0]).sum().backward()
    before = State(model)
    grads = [(p.grad, p.grad.data_ptr()) for p in model.parameters() if p.grad is not None]
    addresses = [tensor.data_ptr() for tensor in before.tensors]
    with running(model, elsewhere):
        assert [tensor.data_ptr() for tensor in model.parameters()] != addresses
    assert before.holds_for(model)
    assert [tensor.data_ptr() for tensor in before.tensors] == addresses
    now = [(p.grad, p.grad.data_ptr()) for p in model.parameters() if p.grad is not None]
    assert all(a is b and x == y for (a, x), (b, y) in zip(grads, now, strict=True))


def test_a_move_that_fails_leaves_the_model_as_it_was(elsewhere: str) -> None:
    class Stuck(Elsewhere):
        def to(self, device: Any) -> Elsewhere:  # type: ignore[override]  # as above
            super().to(device)
            raise RuntimeError("no memory")

    model = Stuck(*copy.deepcopy(PRUNED))
    before = State(model)
    with pytest.raises(RuntimeError, match="no memory"):
        predict(model, DATA, device=elsewhere)
    assert before.holds_for(model)


@pytest.mark.parametrize("name", ["match", "update"])
def test_statistics_from_another_device_are_those_of_home(name: str, elsewhere: str) -> None:
    results = []
    for device in (None, elsewhere):
        model = Elsewhere(*copy.deepcopy(PRUNED))
        tensors = State(model).tensors
        if name == "match":
            match_batchnorm(model, Elsewhere(*copy.deepcopy(DENSE)), DATA, device)
        else:
            wavprune.update_batchnorm(model, DATA, device)
        assert all(old is new for old, new in zip(tensors, State(model).tensors, strict=True))
        results.append(State(model).values)
    assert all(map(torch.equal, *results))


def test_private_buffers_share_what_the_modules_share() -> None:
    first, second = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
    second.running_mean = first.running_mean
    own = first.running_mean
    with private_buffers([first, second]):
        assert first.running_mean is second.running_mean is not own
        assert first.running_mean is not None
        first.running_mean.fill_(7)
    assert first.running_mean is second.running_mean is own
    assert own is not None
    assert own.tolist() == [0, 0, 0]


def test_all_values_are_written_or_none() -> None:
    tensors = [torch.zeros(2), torch.ones(3)]
    with pytest.raises(RuntimeError):
        write_all([(tensors[0], torch.ones(2)), (tensors[1], torch.ones(2))])
    assert [tensor.tolist() for tensor in tensors] == [[0, 0], [1, 1, 1]]
    write_all([(tensors[0], torch.ones(2)), (tensors[1], torch.zeros(3))])
    assert [tensor.tolist() for tensor in tensors] == [[1, 1], [0, 0, 0]]


@pytest.mark.parametrize(
    "call",
    [
        lambda: wavprune.update_batchnorm("resnet", DATA),  # type: ignore[arg-type]  # what is tested
        lambda: match_batchnorm("resnet", STATISTICS, DATA),  # type: ignore[arg-type]
        lambda: predict("resnet", DATA),  # type: ignore[arg-type]
    ],
)
def test_what_is_no_model_is_refused(call: Callable[[], object]) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not str"):
        call()
