"""What the sweeps of ``bench_sweep.py`` load by name, from a folder with data."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional

Batches = list[tuple[torch.Tensor, torch.Tensor]]

_MEAN, _STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut without weights."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.bn1(self.conv1(images)))
        hidden = self.bn2(self.conv2(hidden))
        if hidden.shape != images.shape:
            extra = (hidden.shape[1] - images.shape[1]) // 2
            images = functional.pad(images[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))
        return torch.relu(hidden + images)


class CifarResNet(nn.Module):
    """The ResNets of He et al. (2016), section 4.2, for 32x32 images."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        blocks = (depth - 2) // 6
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(*(Block(16, 16, 1) for _ in range(blocks)))
        self.layer2 = self._stage(16, blocks)
        self.layer3 = self._stage(32, blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.bn1(self.conv1(images)))
        hidden = self.layer3(self.layer2(self.layer1(hidden)))
        logits: torch.Tensor = self.linear(hidden.mean((2, 3)))
        return logits

    @staticmethod
    def _stage(inputs: int, blocks: int) -> nn.Sequential:
        outputs = 2 * inputs
        later = (Block(outputs, outputs, 1) for _ in range(blocks - 1))
        return nn.Sequential(Block(inputs, outputs, 2), *later)


def cifar_resnet(depth: int) -> nn.Module:
    """A network without its weights, which the sweep loads."""
    return CifarResNet(depth)


def cifar(folder: str, part: str, samples: int, batch_size: int) -> Batches:
    """Images of CIFAR-10, evenly spread over all of a part."""
    with np.load(Path(folder, f"cifar10_{part}.npz")) as file:
        step = len(file["labels"]) // samples
        images, labels = file["images"][::step][:samples], file["labels"][::step][:samples]
    values = torch.from_numpy(images).permute(0, 3, 1, 2).float().contiguous() / 255
    mean, std = (torch.tensor(channel)[:, None, None] for channel in (_MEAN, _STD))
    return _batches((values - mean) / std, torch.from_numpy(labels).long(), batch_size)


def photographs(folder: str, part: str, samples: int, batch_size: int) -> Batches:
    """256x256 photographs, named by their class, cropped to 224x224."""
    paths = sorted(Path(folder, "imagenet_sample", part).glob("*.jpg"))
    paths = paths[:: len(paths) // samples][:samples]
    images = [
        np.asarray(Image.open(path).convert("RGB").crop((16, 16, 240, 240))) for path in paths
    ]
    values = (torch.from_numpy(np.stack(images)).float() - 127) / 128
    labels = torch.tensor([int(path.stem) for path in paths])
    return _batches(values.permute(0, 3, 1, 2).contiguous(), labels, batch_size)


def _batches(images: torch.Tensor, labels: torch.Tensor, size: int) -> Batches:
    return list(zip(torch.split(images, size), torch.split(labels, size), strict=True))
