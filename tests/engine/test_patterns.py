from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_from_dense_cutlass as compressed,
)
from torch.sparse._semi_structured_conversions import (
    sparse_semi_structured_to_dense_cutlass as expanded,
)

import wavprune
from wavprune.engine.patterns import Pattern
from wavprune.errors import WavpruneError
from wavprune.report import PruneReport


def net() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(
            nn.Conv2d(4, 8, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(8, 16, 3, groups=2),
            nn.Flatten(),
            nn.Linear(256, 32),
            nn.ReLU(),
            nn.Linear(32, 8),
        )


TARGETS = ["*"]


def groups_of(weight: torch.Tensor, size: int) -> torch.Tensor:
    """``(..., size)``: weights that follow each other along the input channels."""
    rows = weight.detach().movedim(1, -1)
    return rows.reshape(*rows.shape[:-1], -1, size)


def prune(model: nn.Module, pattern: str = "2:4", calibrated: bool = False) -> PruneReport:
    x = torch.randn(80, 4, 6, 6, generator=torch.Generator().manual_seed(1))
    return wavprune.fast.prune(
        model,
        method="min_weight",
        pattern=pattern,
        targets=TARGETS,
        calibration=[x] if calibrated else None,
    )


@pytest.mark.parametrize("calibrated", [False, True])
@pytest.mark.parametrize(("pattern", "keep", "size"), [("2:4", 2, 4), ("1:4", 1, 4), ("3:4", 3, 4)])
def test_every_group_keeps_exactly_as_many(
    pattern: str, keep: int, size: int, calibrated: bool
) -> None:
    model = net()
    report = prune(model, pattern, calibrated)
    assert len(report) == 4
    for layer in report:
        weight = model.get_parameter(f"{layer.name}.weight")
        kept = (groups_of(weight, size) != 0).sum(-1)
        assert bool((kept == keep).all())
        assert layer.kept == weight.numel() * keep // size
        assert layer.method == pattern


def test_the_largest_of_each_group_are_kept() -> None:
    model, dense = net(), net()
    prune(model)
    for name in ("0", "2", "4", "6"):
        before, after = (m.get_parameter(f"{name}.weight") for m in (dense, model))
        kept = after != 0
        assert torch.equal(after[kept], before[kept])
        magnitudes = groups_of(before, 4).abs()
        least = torch.where(groups_of(after, 4) != 0, magnitudes, torch.inf).amin(-1)
        most = torch.where(groups_of(after, 4) == 0, magnitudes, 0).amax(-1)
        assert bool((least >= most).all())


def test_data_makes_the_outputs_closer_at_the_same_pattern() -> None:
    x = torch.randn(200, 4, 6, 6, generator=torch.Generator().manual_seed(2))
    dense, plain, calibrated = net(), net(), net()
    prune(plain)
    report = prune(calibrated, calibrated=True)
    assert report.decision is not None
    with torch.no_grad():
        errors = [(m(x) - dense(x)).square().mean() for m in (plain, calibrated)]
    assert errors[1] < 0.8 * errors[0]


def test_two_of_four_is_what_semi_structured_sparse_tensors_store() -> None:
    model = net()
    prune(model)
    weight = model.get_parameter("4.weight").detach()
    # The tensor itself needs a GPU; what it stores is made by these two, anywhere.
    half = weight.half()
    values, places = compressed(half)  # type: ignore[no-untyped-call]
    assert values.numel() == half.numel() // 2
    again = expanded(values, places)  # type: ignore[no-untyped-call]
    assert torch.equal(again, half)


@given(
    size=st.integers(2, 8),
    groups=st.integers(1, 4),
    values=st.integers(1, 3),
    seed=st.integers(0, 99),
)
def test_top_keeps_n_of_m(size: int, groups: int, values: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    scores = torch.randint(0, 3, (2, size * groups, values), generator=generator).float()
    kept = Pattern(size - 1, size).top(scores)
    assert bool((kept.view(2, groups, size, values).sum(2) == size - 1).all())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"wavelet": "dct"}, "wavelet='dct' does not go with it"),
        ({"method": "random"}, "method='random' does not go with it"),
        ({"method": "min_weight", "sparsity": 0.5}, "given together with sparsity=0.5"),
        ({"method": "min_weight", "pattern": "4:2"}, "'N:M' with 0 < N < M"),
        ({"method": "min_weight", "pattern": "two of four"}, "not 'two of four'"),
        ({"method": "min_weight", "pattern": "2:3"}, "layer '0': 2:3 needs groups of 3"),
    ],
)
def test_bad_input(settings: dict[str, object], message: str) -> None:
    model = net()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(WavpruneError, match=message):
        wavprune.fast.prune(model, **{"pattern": "2:4", **settings})  # type: ignore[arg-type]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
