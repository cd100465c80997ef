from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import wavprune
from wavprune import batchnorm_statistics, match_batchnorm
from wavprune.engine.moments import batch_norms
from wavprune.evaluation import joining

Batches = list[torch.Tensor]


class Counting(nn.Sequential):
    """Says how many samples it got each time."""

    def __init__(self, *modules: nn.Module) -> None:
        super().__init__(*modules)
        self.sizes: list[int] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(inputs))
        result: torch.Tensor = super().forward(inputs)  # type: ignore[no-untyped-call]  # torch's lack
        return result


class Twice(nn.Module):
    """One batch norm that runs twice."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6)

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.norm(self.conv(torch.relu(self.norm(inputs))))
        return result


class Registered(nn.Module):
    """One batch norm under two names."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)
        self.alias = self.norm

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        result: torch.Tensor = self.alias(self.conv(inputs))
        return result


def network(*middle: nn.Module, norm: Callable[[int], nn.Module] = nn.BatchNorm2d) -> Counting:
    torch.manual_seed(0)
    model = Counting(
        nn.Conv2d(3, 6, 3, padding=1),
        norm(6),
        nn.ReLU(),
        *middle,
        nn.Conv2d(6, 8, 3, groups=2, bias=False),
        norm(8),
        nn.ReLU(),
        nn.Conv2d(8, 8, 1),
        norm(8),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(8, 5),
        nn.BatchNorm1d(5),
    )
    for batch in batches(5):
        model(0.8 * batch + 0.3)
    model.sizes = []
    return model.eval()


def batches(count: int = 4, size: int = 24, side: int = 8) -> Batches:
    draw = torch.Generator().manual_seed(1)
    full = [torch.randn(size, 3, side, side, generator=draw).cumsum(2) for _ in range(count)]
    return [*full[:-1], full[-1][: size - 7]]


def pruned_copy(model: nn.Module) -> Any:
    copied: Any = copy.deepcopy(model)
    copied.sizes = []
    wavprune.fast.prune(copied, sparsity=0.7, scope="global")
    return copied


def frozen(channels: int) -> nn.Module:
    norm = nn.BatchNorm2d(channels)
    norm.weight.requires_grad_(False)
    norm.bias.requires_grad_(False)
    return norm


NETWORKS: dict[str, Callable[[], Counting]] = {
    "plain": network,
    "no affine": lambda: network(norm=lambda channels: nn.BatchNorm2d(channels, affine=False)),
    "no momentum": lambda: network(norm=lambda channels: nn.BatchNorm2d(channels, momentum=None)),
    "frozen": lambda: network(norm=frozen),
    "grouped": lambda: network(nn.Conv2d(6, 6, 3, padding=1, groups=6), nn.BatchNorm2d(6)),
    "registered twice": lambda: network(Registered()),
}


def in_passes(
    model: nn.Module, dense: nn.Module, data: Any, passes: int | None = None
) -> dict[str, torch.Tensor]:
    """The definition: batch by batch, in as many passes as the network has batch norms."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(joining, "JOINED_BYTES", 0)
        if passes is None:
            module = sys.modules["wavprune.evaluation.batchnorm"]
            patch.setattr(module, "SETTLED", 0.0)
            patch.setattr(module, "MAX_PASSES", len(batch_norms(model)) + 1)
        match_batchnorm(model, dense, data)
    return model.state_dict()


def assert_same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    for name, value in wanted.items():
        torch.testing.assert_close(found[name], value, rtol=2e-5, atol=2e-6, msg=name)


@pytest.mark.parametrize("measured", [False, True])
@pytest.mark.parametrize("name", NETWORKS)
def test_one_pass_gives_what_many_passes_come_to(name: str, measured: bool) -> None:
    dense, data = NETWORKS[name](), batches()
    model = pruned_copy(dense)
    expected = in_passes(copy.deepcopy(model), dense, data)
    reference = batchnorm_statistics(dense, data) if measured else dense
    match_batchnorm(model, reference, data)
    assert_same(model.state_dict(), expected)
    samples = sum(map(len, data))
    assert model.sizes == [samples]
    assert dense.sizes[-1] == samples


@pytest.mark.parametrize("name", NETWORKS)
def test_an_unpruned_network_stays_as_it_is_to_the_last_bit(name: str) -> None:
    dense, data = NETWORKS[name](), batches()
    model = copy.deepcopy(dense)
    match_batchnorm(model, batchnorm_statistics(dense, data), data)
    before = dense.state_dict()
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())


def test_a_shuffled_loader_is_matched_exactly_beside_the_unpruned_model() -> None:
    dense, data = network(), torch.cat(batches())
    loader = DataLoader(TensorDataset(data), batch_size=20, shuffle=True)
    model, other = pruned_copy(dense), pruned_copy(dense)
    match_batchnorm(model, dense, loader)
    match_batchnorm(other, dense, [data])
    assert_same(model.state_dict(), other.state_dict())


def test_what_does_not_fit_is_matched_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    dense, data = network(), batches(6)
    # The first batch norm gets the most: 6 x 8 x 8 values of a sample. Two batches fit.
    monkeypatch.setattr(joining, "JOINED_BYTES", 6 * 64 * 4 * 50)
    statistics = batchnorm_statistics(dense, data)
    assert [len(group.keys) for group in statistics.batches] == [2, 2, 2]
    model, other = pruned_copy(dense), pruned_copy(dense)
    monkeypatch.setattr(joining, "JOINED_BYTES", 1 << 30)
    match_batchnorm(model, statistics, data)
    # The limit is that of the statistics.
    assert set(model.sizes) == {48, 41}
    exact = in_passes(other, dense, data)
    for name, value in model.state_dict().items():
        torch.testing.assert_close(value, exact[name], rtol=1e-2, atol=1e-2, msg=name)
    for other_data, message in (
        (data[:5], "loader yields 5 batches; the statistics were measured on 6"),
        ([*data, data[0]], "more batches than the 6"),
        ([*data[:3], data[4], data[3], data[5]], "loader: batch 3, .* is not the one"),
    ):
        with pytest.raises(ValueError, match=message):
            match_batchnorm(pruned_copy(dense), statistics, other_data)


class FixedSize(Counting):
    """Takes batches of one size alone."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return super().forward(inputs.view(24, 3, 8, 8))


class Coupled(nn.Module):
    """Lets the samples of a batch influence each other."""

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return inputs - inputs.mean(0, keepdim=True)


@pytest.mark.parametrize(
    ("make", "data"),
    [
        (lambda: network(nn.BatchNorm2d(6, track_running_stats=False)), batches()),
        (lambda: network(Coupled()), batches()),
        (lambda: network(Twice()), batches()),
        (lambda: FixedSize(*network()), [batch for batch in batches() if len(batch) == 24]),
        (network, [batch[:1] for batch in batches()]),
        (network, [*batches(2)[:1], *batches(2, side=9)[:1]]),
    ],
    ids=["own statistics", "coupled", "twice", "fixed size", "single samples", "shapes"],
)
def test_batches_that_cannot_be_joined_run_one_by_one(
    make: Callable[[], Counting], data: Batches
) -> None:
    dense = make().eval()
    statistics = batchnorm_statistics(dense, data)
    assert [len(group.keys) for group in statistics.batches] == [1] * len(data)
    model, other = pruned_copy(dense), pruned_copy(dense)
    match_batchnorm(model, statistics, data)
    expected = in_passes(other, dense, data, passes=3)
    assert all(torch.equal(value, expected[key]) for key, value in model.state_dict().items())


def test_one_batch_takes_no_probe() -> None:
    dense = network()
    batchnorm_statistics(dense, batches()[:1])
    assert dense.sizes == [24]
