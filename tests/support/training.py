"""A small network, and how tests train it."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn


class Net(nn.Module):
    """Two convolutions with kernels of 3x3, one of 1x1, a batch norm and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.second = nn.Conv2d(16, 24, 3, padding=1)
        self.point = nn.Conv2d(24, 8, 1)
        self.last = nn.Linear(8, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Logits ``(B, 4)``."""
        x = self.norm(self.first(x)).relu()
        x = self.point(self.second(x).relu())
        result: torch.Tensor = self.last(x.mean((2, 3)))
        return result


def batches(count: int, seed: int = 0) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Noise with labels."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        x = torch.randn(8, 3, 8, 8, generator=generator)
        yield x, torch.randint(0, 4, (8,), generator=generator)


def train(net: nn.Module, optimizer: torch.optim.Optimizer, steps: int, seed: int = 0) -> None:
    """Some optimizer steps on noise."""
    for x, y in batches(steps, seed):
        optimizer.zero_grad()
        torch.autograd.backward(nn.functional.cross_entropy(net(x), y))
        optimizer.step()


def sgd(net: nn.Module) -> torch.optim.Optimizer:
    """With momentum."""
    return torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)


def seeded() -> Net:
    """The same network every time."""
    torch.manual_seed(0)
    return Net()
