from __future__ import annotations

import copy

import pytest
import torch

import wavprune
from tests.engine.test_running import DATA, DENSE, PRUNED, State
from wavprune import match_batchnorm, predict

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.mark.parametrize("name", ["predict", "match", "update"])
def test_a_gpu_is_only_borrowed(name: str) -> None:
    model = copy.deepcopy(PRUNED)
    before = State(model)
    addresses = [tensor.data_ptr() for tensor in before.tensors]
    if name == "predict":
        predict(model, DATA, "cuda")
        assert before.holds_for(model)
    elif name == "match":
        match_batchnorm(model, DENSE, DATA, "cuda")
    else:
        wavprune.update_batchnorm(model, DATA, "cuda")
    assert [tensor.data_ptr() for tensor in State(model).tensors] == addresses
