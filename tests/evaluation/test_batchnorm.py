from __future__ import annotations

import copy
import sys
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import wavprune
from tests.support.cases import quick
from wavprune import batchnorm_statistics, demo, match_batchnorm, update_batchnorm

Batches = list[torch.Tensor]


class Residual(nn.Module):
    """Batch norms behind each other, beside each other and behind an addition."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12), nn.ReLU())
        self.left = nn.Sequential(nn.Conv2d(12, 12, 3, padding=1), nn.BatchNorm2d(12))
        self.right = nn.Sequential(nn.Conv2d(12, 12, 1), nn.BatchNorm2d(12))
        self.last = nn.Sequential(nn.Conv2d(12, 6, 3), nn.BatchNorm2d(6, eps=1e-3))
        self.head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = self.stem(images)
        hidden = torch.relu(self.left(hidden) + self.right(hidden))
        result: torch.Tensor = self.head(self.last(hidden).mean((2, 3)))
        return result


def images(batches: int = 4, size: int = 32) -> Batches:
    torch.manual_seed(1)
    return [torch.randn(size, 3, 8, 8).cumsum(2) for _ in range(batches)]


@pytest.fixture
def trained() -> Residual:
    """A network whose running statistics belong to other inputs than it gets here."""
    torch.manual_seed(0)
    model = Residual()
    for batch in images(6):
        model(0.8 * batch + 0.3)
    return model.eval()


def pruned_copy(model: nn.Module, sparsity: float = 0.8) -> nn.Module:
    copied = copy.deepcopy(model)
    wavprune.fast.prune(copied, sparsity=sparsity, scope="global")
    return copied


def norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    kinds = (nn.BatchNorm1d, nn.BatchNorm2d)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}  # type: ignore[misc]  # two kinds with the same attributes


def normalised(model: nn.Module, data: Batches) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """Mean and deviation of what each batch norm gives before weight and bias, all batches."""
    given: dict[str, Batches] = {name: [] for name in norms(model)}
    hooks = [
        norm.register_forward_pre_hook(lambda _, args, name=name: given[name].append(args[0]))
        for name, norm in norms(model).items()
    ]
    with torch.no_grad():
        for batch in data:
            model(batch)
    for hook in hooks:
        hook.remove()
    result = {}
    for name, norm in norms(model).items():
        values = torch.cat(given[name]).double().transpose(0, 1).flatten(1)
        assert norm.running_mean is not None
        assert norm.running_var is not None
        scale = (norm.running_var.double() + norm.eps).sqrt()
        mean = (values.mean(1) - norm.running_mean) / scale
        result[name] = mean, values.std(1, correction=0) / scale
    return result


def apart(model: nn.Module, other: nn.Module, data: Batches) -> float:
    """The largest difference of any batch norm's output statistics."""
    pairs = zip(normalised(model, data).values(), normalised(other, data).values(), strict=True)
    return max(
        float((one - two).abs().max())
        for mine, theirs in pairs
        for one, two in zip(mine, theirs, strict=True)
    )


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.mark.parametrize("batches", [1, 4])
@pytest.mark.parametrize("measured", [False, True])
def test_an_unpruned_network_stays_as_it_is_to_the_last_bit(
    trained: Residual, batches: int, measured: bool
) -> None:
    data = images(batches)
    model = copy.deepcopy(trained)
    before = state(model)
    match_batchnorm(model, batchnorm_statistics(trained, data) if measured else trained, data)
    assert same(before, state(model))


def test_with_one_batch_the_statistics_are_the_unpruned_ones(trained: Residual) -> None:
    data = images(1, 128)
    model = pruned_copy(trained)
    assert apart(model, trained, data) > 0.1
    match_batchnorm(model, trained, data)
    assert apart(model, trained, data) < 1e-5


@pytest.mark.parametrize("measured", [False, True])
def test_with_several_batches_they_are_so_over_all_of_them(
    trained: Residual, measured: bool
) -> None:
    data = [*images(4), images(1)[0][:7]]
    model = pruned_copy(trained)
    match_batchnorm(model, batchnorm_statistics(trained, data) if measured else trained, data)
    assert apart(model, trained, data) < 1e-3


def test_as_many_passes_as_batch_norms_are_exact(
    trained: Residual, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = sys.modules["wavprune.evaluation.batchnorm"]
    monkeypatch.setattr(module, "SETTLED", 0.0)
    monkeypatch.setattr("wavprune.evaluation.joining.JOINED_BYTES", 0)
    data = [*images(4), images(1)[0][:7]]
    distances = []
    for passes in (0, 1, 5):
        monkeypatch.setattr(module, "MAX_PASSES", passes)
        model = pruned_copy(trained)
        match_batchnorm(model, trained, data)
        distances.append(apart(model, trained, data))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 1e-6


def test_only_the_running_mean_and_variance_change(trained: Residual) -> None:
    model = pruned_copy(trained)
    before = state(model)
    match_batchnorm(model, trained, images())
    changed = {name for name, value in state(model).items() if not torch.equal(value, before[name])}
    assert {name.rpartition(".")[2] for name in changed} == {"running_mean", "running_var"}
    assert len(changed) == 10


def test_matching_twice_changes_no_more(trained: Residual) -> None:
    data = images(1)
    model = pruned_copy(trained)
    match_batchnorm(model, trained, data)
    before = state(model)
    match_batchnorm(model, trained, data)
    for name, value in state(model).items():
        torch.testing.assert_close(value, before[name], rtol=1e-5, atol=1e-6)


def test_a_shuffled_loader_will_do_where_the_unpruned_model_runs_beside_it(
    trained: Residual,
) -> None:
    data = images(1, 120)
    shuffled = DataLoader(TensorDataset(data[0]), batch_size=30, shuffle=True)
    before = state(trained)
    match_batchnorm(trained, copy.deepcopy(trained), shuffled)
    assert same(before, state(trained))
    model = pruned_copy(trained)
    match_batchnorm(model, trained, shuffled)
    assert apart(model, trained, data) < 0.05


@quick
@given(
    scale=st.floats(1e-3, 1e3),
    shift=st.floats(-100, 100),
    mean=st.floats(-5, 5),
    var=st.floats(1e-3, 10),
    eps=st.sampled_from([1e-5, 1e-3]),
)
def test_any_change_of_scale_and_mean_is_undone(
    scale: float, shift: float, mean: float, var: float, eps: float
) -> None:
    torch.manual_seed(0)
    data = [torch.randn(64, 2, 1, 1, dtype=torch.float64)]
    model = nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2, eps=eps)).double().eval()
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    norm.running_mean = torch.full((2,), mean, dtype=torch.float64)
    norm.running_var = torch.full((2,), var, dtype=torch.float64)
    changed = copy.deepcopy(model)
    with torch.no_grad():
        changed.get_parameter("0.weight").mul_(scale)
        changed.get_parameter("0.bias").mul_(scale).add_(shift)
    match_batchnorm(changed, model, data)
    # Only a channel that shrank below eps is not amplified all the way.
    amplified = float(changed.get_buffer("1.running_var").min()) > 0
    with torch.no_grad():
        if amplified:
            torch.testing.assert_close(changed(data[0]), model(data[0]), rtol=1e-6, atol=1e-6)
        means = changed(data[0]).mean((0, 2, 3)), model(data[0]).mean((0, 2, 3))
    torch.testing.assert_close(*means, rtol=1e-6, atol=1e-6)


def test_a_channel_that_pruning_made_constant_gets_the_unpruned_mean(trained: Residual) -> None:
    data = images(1)
    model = copy.deepcopy(trained)
    with torch.no_grad():
        model.get_parameter("stem.0.weight")[3] = 0
        # And one that was constant in the unpruned network comes alive.
        trained.get_parameter("left.0.weight")[5] = 0
    match_batchnorm(model, trained, data)
    found, wanted = normalised(model, data), normalised(trained, data)
    for name in found:
        torch.testing.assert_close(found[name][0], wanted[name][0], rtol=1e-4, atol=1e-4)
    assert float(found["stem.1"][1][3]) == 0
    assert float(found["left.1"][1][5]) < 1e-3
    assert all(bool(torch.isfinite(value).all()) for value in state(model).values())


def test_accuracy_recovers_on_digits() -> None:
    unpruned = demo.resnet()
    train, test = list(demo.digits("train", batch_size=300))[:2], demo.digits("test")

    def accuracy(model: nn.Module) -> float:
        return wavprune.evaluate(model, test, timing=False).value

    model = pruned_copy(unpruned, 0.9)
    lost = accuracy(model)
    match_batchnorm(model, unpruned, train)
    assert accuracy(unpruned) > 0.97
    assert lost < 0.8
    assert accuracy(model) > 0.95


@pytest.mark.parametrize("repair", ["match", "update"])
def test_every_module_gets_its_own_mode_back(trained: Residual, repair: str) -> None:
    model = pruned_copy(trained).train()
    model.get_submodule("left").eval()
    modes = {name: module.training for name, module in model.named_modules()}
    if repair == "match":
        match_batchnorm(model, trained, images())
    else:
        update_batchnorm(model, images())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert not any(module.training for module in trained.modules())


def test_re_estimation_is_torchs(trained: Residual) -> None:
    data = images()
    model, other = pruned_copy(trained), pruned_copy(trained)
    norms(model)["stem.1"].momentum = 0.3
    update_batchnorm(model, [(batch, torch.zeros(len(batch))) for batch in data])
    torch.optim.swa_utils.update_bn(data, other)
    assert same(state(other), state(model))
    assert [norm.momentum for norm in norms(model).values()] == [0.3, 0.1, 0.1, 0.1, 0.1]
    assert state(model)["left.1.num_batches_tracked"] == 4


def test_batches_come_as_loaders_give_them(trained: Residual) -> None:
    data = images(2)
    results = []
    for wrap in (
        lambda x: x,
        lambda x: (x, torch.zeros(len(x))),
        lambda x: [x],
        lambda x: {"pixel_values": x, "labels": torch.zeros(len(x))},
    ):
        model = pruned_copy(trained)
        match_batchnorm(model, trained, [wrap(batch) for batch in data])
        results.append(state(model))
    assert all(same(results[0], other) for other in results[1:])


def test_a_batch_norm_that_reads_its_own_batch_is_left_alone() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, track_running_stats=False))
    assert batchnorm_statistics(model, images()).norms == {}
    before = state(model)
    match_batchnorm(model, copy.deepcopy(model), images())
    assert same(before, state(model))


class Shared(nn.Module):
    """One batch norm that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.conv(torch.relu(self.norm(self.conv(images)))))
        return result


def test_a_batch_norm_may_run_twice() -> None:
    torch.manual_seed(0)
    model, data = Shared().eval(), images(3)
    before = state(model)
    match_batchnorm(model, copy.deepcopy(model), data)
    assert same(before, state(model))
    pruned = pruned_copy(model, 0.5)
    match_batchnorm(pruned, model, data)
    assert apart(pruned, model, data) < 1e-2


def test_a_batch_norm_that_never_runs_is_left_alone(trained: Residual) -> None:
    trained.spare = nn.BatchNorm2d(5)
    model = pruned_copy(trained)
    match_batchnorm(model, trained, images(2))
    spare = model.get_submodule("spare").state_dict()
    assert same(spare, nn.BatchNorm2d(5).state_dict())


def test_a_batch_norm_must_run_in_both_models(trained: Residual) -> None:
    class Skipping(Residual):
        def forward(self, images: torch.Tensor) -> torch.Tensor:
            return images.mean((2, 3))

    model = Skipping().eval()
    before = state(model)
    with pytest.raises(ValueError, match=r"only one of the two models runs .* head\.1, last\.1"):
        match_batchnorm(model, trained, images(2))
    assert same(before, state(model))


def stream() -> Iterator[torch.Tensor]:
    yield from images(1)


Repair = Callable[[nn.Module, nn.Module, Any], None]
REPAIRS: list[Repair] = [
    match_batchnorm,
    lambda model, unpruned, data: match_batchnorm(
        model, batchnorm_statistics(unpruned, images(2)), data
    ),
    lambda model, unpruned, data: update_batchnorm(model, data),
]


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize(
    ("data", "error", "message"),
    [
        ([], ValueError, "loader is empty"),
        (stream(), TypeError, "read only once"),
        (7, TypeError, "loader must yield batches"),
        (["text"], TypeError, "has no input tensor"),
        ([torch.zeros(0, 3, 8, 8)], ValueError, r"\(0, 3, 8, 8\) holds no sample"),
        ([images(1)[0], "text"], TypeError, "has no input tensor"),
    ],
)
def test_after_an_error_nothing_has_changed(
    trained: Residual, repair: Repair, data: Any, error: type[Exception], message: str
) -> None:
    model = pruned_copy(trained)
    before = state(model)
    with pytest.raises(error, match=message):
        repair(model, trained, data)
    assert same(before, state(model))
    assert [norm.momentum for norm in norms(model).values()] == [0.1] * 5
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_other_batches_than_those_measured_are_refused(trained: Residual) -> None:
    data = images(3)
    statistics = batchnorm_statistics(trained, data)
    for other, message in (
        ([data[1], data[0], data[2]], "batch 0, .* is not the one"),
        ([*data, data[0]], "more batches than the 3"),
        (data[:2], "loader yields 2 batches"),
        ([data[0], data[1][:5], data[2]], r"batch 1, of shape \(5, 3, 8, 8\)"),
    ):
        model = pruned_copy(trained)
        before = state(model)
        with pytest.raises(ValueError, match=message):
            match_batchnorm(model, statistics, other)
        assert same(before, state(model))


def test_another_models_batch_norms_are_refused(trained: Residual) -> None:
    other = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    with pytest.raises(ValueError, match=r"not those of the model; different: 1, head\.1, last\.1"):
        match_batchnorm(trained, other, images())
    narrow = copy.deepcopy(other)
    narrow[1] = nn.BatchNorm2d(4, eps=0.1)
    with pytest.raises(ValueError, match=r"'1' has 4 channels and eps=0.1, .* 4 and 1e-05"):
        match_batchnorm(narrow, other, images())
    with pytest.raises(TypeError, match="not dict"):
        match_batchnorm(trained, {}, images())  # type: ignore[arg-type]  # what is tested


def test_inputs_that_are_not_finite_are_named(trained: Residual) -> None:
    data = images(1)
    data[0][0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"batch norm 'stem.1': its inputs are not finite"):
        batchnorm_statistics(trained, data)


def test_progress_is_shown_where_asked_for(
    trained: Residual, capsys: pytest.CaptureFixture[str]
) -> None:
    match_batchnorm(pruned_copy(trained), trained, images(2), progress=True)
    assert "match batch norm" in capsys.readouterr().err
    match_batchnorm(pruned_copy(trained), trained, images(2))
    assert capsys.readouterr().err == ""
