from __future__ import annotations

import torch
from torch import nn

from wavprune.common.tensors import memory_key


def test_one_memory_has_one_key() -> None:
    weight = nn.Parameter(torch.zeros(2, 1, 3, 3))
    state = nn.ParameterDict({"a": weight}).state_dict()
    keys = {memory_key(tensor) for tensor in (weight, weight.detach(), state["a"], weight.data)}
    assert len(keys) == 1
    assert memory_key(weight.view(2, 1, 3, 3)) in keys


def test_views_that_see_other_values_have_other_keys() -> None:
    weight = torch.zeros(4, 4)
    others = (weight.T, weight[:2], weight.view(16), weight.view(torch.int32), weight.clone())
    assert len({memory_key(tensor) for tensor in (weight, *others)}) == 6


def test_tensors_without_memory_are_equal_to_themselves_alone() -> None:
    empty = [torch.empty(0, 3) for _ in range(2)]
    meta = [torch.empty(2, 3, device="meta") for _ in range(2)]
    sparse = [torch.Tensor.to_sparse(torch.eye(3)) for _ in range(2)]
    for first, second in (empty, meta, sparse):
        assert memory_key(first) == memory_key(first)
        assert memory_key(first) != memory_key(second)
