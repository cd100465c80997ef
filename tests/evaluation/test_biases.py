from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import wavprune

DATA = [torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.ReLU(),
        nn.Conv2d(8, 8, 3, bias=False),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.ConvTranspose2d(8, 4, 3),
        nn.Flatten(),
        nn.Linear(144, 5),
    ).eval()


def test_every_layer_with_a_bias_has_the_mean_of_the_unpruned_one() -> None:
    dense = network()
    pruned = copy.deepcopy(dense)
    wavprune.fast.prune(pruned, sparsity=0.8)
    norm = copy.deepcopy(pruned[3].state_dict())
    assert wavprune.match_biases(pruned, dense, DATA) == ("0", "5", "7")
    x = torch.cat(DATA)
    for depth in (1, 6, 8):
        found, expected = (net[:depth](x) for net in (pruned, dense))
        axes = [axis for axis in range(found.ndim) if axis != 1]
        torch.testing.assert_close(found.mean(axes), expected.mean(axes), atol=1e-5, rtol=1e-4)
    assert all(torch.equal(value, norm[name]) for name, value in pruned[3].state_dict().items())
    assert not pruned.training


def test_an_unpruned_model_stays_as_it_is_but_for_rounding() -> None:
    dense = network()
    same = copy.deepcopy(dense)
    wavprune.match_biases(same, dense, DATA)
    for name, value in same.state_dict().items():
        torch.testing.assert_close(value, dense.state_dict()[name], atol=1e-6, rtol=0)


def test_other_models_and_inputs_are_refused_and_nothing_changes() -> None:
    dense, other = network(), network()
    other[7] = nn.Linear(144, 6)
    before = copy.deepcopy(other.state_dict())
    with pytest.raises(ValueError, match=r"layer '7' is \(5, 144\); the pruned model's is \(6, 1"):
        wavprune.match_biases(other, dense, DATA)
    with pytest.raises(ValueError, match="its inputs differ in shape"):
        wavprune.match_biases(other, dense, [DATA[0], torch.zeros(2, 3, 9, 9)])
    assert all(torch.equal(value, before[name]) for name, value in other.state_dict().items())
