from __future__ import annotations

import pytest
import torch
from torch import nn

import wavprune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]


def test_torch_takes_the_weights_as_semi_structured() -> None:
    layer = nn.Linear(256, 128).cuda().half()
    wavprune.fast.prune(layer, method="min_weight", pattern="2:4", targets=["*"])
    sparse = torch.sparse.to_sparse_semi_structured(layer.weight.detach())
    dense: torch.Tensor = sparse.to_dense()  # type: ignore[no-untyped-call]
    assert torch.equal(dense, layer.weight)
