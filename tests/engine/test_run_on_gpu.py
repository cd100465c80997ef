from __future__ import annotations

import pytest
import torch

import wavprune
from tests.support.cases import assert_pruned, model_of, normal, outcomes, weight_of
from wavprune import PruneConfig

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


@pytest.mark.parametrize("home", ["cpu", "cuda"])
def test_a_weight_stays_on_its_device(home: str) -> None:
    before = {"conv": normal(32, 16, 3, 3)}
    model = model_of(conv=normal(32, 16, 3, 3).to(home))
    report = wavprune.fast.prune(model, device="cuda")
    assert weight_of(model).device.type == home
    assert report["conv"].device.startswith("cuda")
    after = outcomes({"conv": weight_of(model).cpu()}, report)
    assert_pruned(before, after, PruneConfig())
