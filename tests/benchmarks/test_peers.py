"""The published methods that benchmarks compare with do what their papers say."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from benchmarks.peers import PEERS, Prune, obc, prune_layers, sparsegpt, wanda
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import wavprune

METHODS = pytest.mark.parametrize("method", PEERS.values(), ids=list(PEERS))


def problem(rows: int, columns: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs = torch.randn(columns, 4 * columns, generator=generator, dtype=torch.float64)
    # Neighbors are alike, as in photographs.
    inputs[1:] += 2 * inputs[:-1]
    weight = torch.randn(rows, columns, generator=generator, dtype=torch.float64)
    return weight, inputs @ inputs.T / inputs.shape[1]


def loss(rows: torch.Tensor, pruned: torch.Tensor, moment: torch.Tensor) -> float:
    error = pruned - rows
    return float(((error @ moment) * error).sum())


@METHODS
@settings(max_examples=25, deadline=None)
@given(rows=st.integers(1, 6), columns=st.integers(1, 20), share=st.floats(0, 1))
def test_exactly_so_many_values_are_kept(
    method: Prune, rows: int, columns: int, share: float
) -> None:
    weight, moment = problem(rows, columns)
    keep = math.ceil(share * weight.numel())
    pruned = method(weight, moment, keep)
    assert int((pruned != 0).sum()) == keep
    if keep == weight.numel():
        torch.testing.assert_close(pruned, weight)


def test_wanda_on_independent_inputs_of_equal_size_is_magnitude_in_each_row() -> None:
    weight, _ = problem(3, 8)
    pruned = wanda(weight, 4 * torch.eye(8, dtype=torch.float64), 12)
    for row, kept in zip(weight, pruned, strict=True):
        assert set(kept.nonzero()[:, 0].tolist()) == set(row.abs().topk(4).indices.tolist())
    assert torch.equal(pruned[pruned != 0], weight[pruned != 0])


@pytest.mark.parametrize("method", [sparsegpt, obc])
def test_what_is_lost_is_made_up_for(method: Prune) -> None:
    weight, moment = problem(8, 24)
    kept = wanda(weight, moment, 96)
    assert loss(weight, method(weight, moment, 96), moment) < 0.7 * loss(weight, kept, moment)


def test_blocks_of_sparsegpt_go_on_where_the_last_one_ended() -> None:
    weight, moment = problem(4, 24)
    parts = sparsegpt(weight, moment, 48, block=5)
    cut = loss(weight, weight * (parts != 0), moment)
    assert loss(weight, parts, moment) < 0.8 * cut


def test_obc_removes_the_one_value_that_costs_least() -> None:
    weight, moment = problem(1, 7)
    pruned = obc(weight, moment, 6, damping=0)
    losses = []
    for gone in range(7):
        stays = [i for i in range(7) if i != gone]
        solved = torch.zeros_like(weight)
        wanted = (moment @ weight[0])[stays]
        solved[0, stays] = torch.linalg.solve(moment[stays][:, stays], wanted)
        losses.append(loss(weight, solved, moment))
    assert loss(weight, pruned, moment) == pytest.approx(min(losses))


def test_obc_takes_the_cheapest_step_each_time() -> None:
    weight, moment = problem(1, 9, seed=3)
    stays = list(range(9))
    while len(stays) > 4:
        tried = []
        for gone in stays:
            chosen = [i for i in stays if i != gone]
            solved = torch.zeros_like(weight)
            wanted = (moment @ weight[0])[chosen]
            solved[0, chosen] = torch.linalg.solve(moment[chosen][:, chosen], wanted)
            tried.append((loss(weight, solved, moment), chosen, solved))
        _, stays, solved = min(tried, key=lambda step: step[0])
    torch.testing.assert_close(obc(weight, moment, 4, damping=0), solved)


@pytest.mark.parametrize("method", list(PEERS))
def test_each_layer_keeps_as_much_as_the_report_says(method: str) -> None:
    model = nn.Sequential(
        nn.Conv2d(3, 6, 3, bias=False),
        nn.Conv2d(6, 6, 3, groups=3, bias=False),
        nn.Conv2d(6, 5, 1, bias=False),
    ).eval()
    inputs = torch.randn(16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    calibration = wavprune.calibrate(model, [inputs])
    report = wavprune.fast.prune(
        copy.deepcopy(model), wavelet="identity", sparsity=0.63, scope="global"
    )
    prune_layers(method, model, calibration, report)
    weights = [model.get_parameter(f"{layer.name}.weight") for layer in report]
    counts = [int(weight.count_nonzero()) for weight in weights]
    assert counts == [layer.kept for layer in report]
