"""Networks for packed files, and what decoding them on a device is compared by."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from tests.support.cases import bits

WAVELETS = ("identity", "uhaar", "haar", "klt")
DTYPES = (torch.float32, torch.float64, torch.float16, torch.bfloat16)


def network(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    """Every way in which a weight is a matrix, and tensors beside them."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(3, 8, 3),
            nn.BatchNorm2d(8),
            nn.Conv2d(8, 12, 1),
            nn.ConvTranspose2d(12, 6, 3, groups=2),
            nn.Conv2d(6, 6, 5, groups=6),
            nn.Linear(40, 33),
            nn.Conv1d(5, 7, 3),
            nn.Conv3d(2, 3, (2, 3, 3)),
        )
    return net.to(dtype).eval()


def heavy_tailed(*shape: int, seed: int = 0) -> torch.Tensor:
    """Rows and columns of all magnitudes, with a few weights far beyond: classes and escapes."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(shape, generator=generator) ** 5
    rows = torch.randn(shape[0], generator=generator).mul(2).exp()
    columns = torch.randn(shape[1], generator=generator).exp()
    scale = rows[:, None] * columns
    return weight * scale.reshape(*scale.shape, *(1 for _ in shape[2:])) * 1e-2


def assert_same_bits(found: Mapping[str, torch.Tensor], expected: Mapping[str, Any]) -> None:
    """The same names in the same order, dtypes, shapes and bits."""
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert bits(found[name].cpu().reshape(-1)) == bits(tensor.cpu().reshape(-1)), name
