"""Small networks with the structure of well-known ones, for what depends on structure alone."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import nn


class Residual(nn.Module):
    """A block and what goes past it."""

    def __init__(self, block: nn.Module, past: nn.Module, after: nn.Module) -> None:
        super().__init__()
        self.block, self.past, self.after = block, past, after

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The sum of both."""
        result: torch.Tensor = self.after(self.block(x) + self.past(x))
        return result


def normed(
    inputs: int, outputs: int, kernel: int, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution and its batch norm, which does something."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outputs)
    with torch.no_grad():
        norm.running_mean.normal_(0, 0.1)  # type: ignore[union-attr]  # it has one
        norm.running_var.uniform_(0.5, 1.5)  # type: ignore[union-attr]
    return [conv, norm]


def resnet18_like(width: int = 8) -> nn.Sequential:
    """ResNet-18's stem, three of its basic blocks and its head; ``(N, 3, 64, 64)``."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [*normed(3, width, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    inputs = width
    for stage in range(3):
        outputs, stride = width << stage, 1 if stage == 0 else 2
        main = [*normed(inputs, outputs, 3, stride), nn.ReLU(), *normed(outputs, outputs, 3)]
        past = nn.Sequential(*normed(inputs, outputs, 1, stride)) if stride > 1 else nn.Identity()
        layers.append(Residual(nn.Sequential(*main), past, nn.ReLU()))
        inputs = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(inputs, 10)]
    return nn.Sequential(*layers, *head).eval()


def lite0_like(width: int = 8) -> nn.Sequential:
    """EfficientNet-Lite0's stem, three of its blocks and its head; ``(N, 3, 64, 64)``."""
    torch.manual_seed(0)
    layers: list[nn.Module] = [*normed(3, width, 3, 2), nn.ReLU6()]
    inputs = width
    for kernel, stride in ((3, 1), (5, 2), (5, 1)):
        outputs, middle = inputs if stride == 1 else 2 * inputs, 6 * inputs
        main = nn.Sequential(
            *(*normed(inputs, middle, 1), nn.ReLU6()),
            *(*normed(middle, middle, kernel, stride, groups=middle), nn.ReLU6()),
            *normed(middle, outputs, 1),
        )
        layers.append(Residual(main, nn.Identity(), nn.Identity()) if stride == 1 else main)
        inputs = outputs
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.2), nn.Linear(inputs, 10)]
    return nn.Sequential(*layers, *head).eval()


LIKE: dict[str, Callable[[], nn.Module]] = {"ResNet-18": resnet18_like, "Lite0": lite0_like}
