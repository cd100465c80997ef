"""A small ResNet and an MLP trained on real handwritten digits, ready to prune.

The images are scikit-learn's ``load_digits``: 1797 of 8x8 pixels, by 43 writers. The weights of
three trainings of each network come with the package; ``python -m wavprune.demo.train`` made them.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import torch
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import BatchSampler, DataLoader, SequentialSampler, TensorDataset

from ..common.checks import choice
from ..common.optional import require
from ..errors import WavpruneError

SPLITS = ("train", "test")
SEEDS = (0, 1, 2)

Network = TypeVar("Network", bound=nn.Module)

_TEST_IMAGES = 600
_MAX_VALUE = 16


class Block(nn.Module):
    """Two 3x3 convolutions beside a shortcut, as in ResNet-18.

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
        stride: of the first convolution and, if it is not 1 or the number of channels changes, of
            a 1x1 convolution in the shortcut.
    """

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.downsample = nn.Sequential()
        if stride != 1 or inputs != outputs:
            self.downsample.append(nn.Conv2d(inputs, outputs, 1, stride, bias=False))
            self.downsample.append(nn.BatchNorm2d(outputs))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, inputs, H, W)`` -> ``(N, outputs, H/stride, W/stride)``."""
        y = torch.relu(self.bn1(self.conv1(x)))
        return torch.relu(self.bn2(self.conv2(y)) + self.downsample(x))


class ResNet(nn.Module):
    """A ResNet for 8x8 images: one convolution and three blocks of 16, 32 and 64 channels.

    Example:
        >>> ResNet()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = Block(16, 16, 1)
        self.layer2 = Block(16, 32, 2)
        self.layer3 = Block(32, 64, 2)
        self.fc = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, 1, 8, 8)`` images -> ``(N, 10)`` logits."""
        x = torch.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


class MLP(nn.Module):
    """Three linear layers, 64 to 256 to 128 to 10: matrices long enough for five levels of Haar.

    Example:
        >>> MLP()(torch.zeros(2, 1, 8, 8)).shape
        torch.Size([2, 10])
    """

    def __init__(self) -> None:
        super().__init__()
        self.fc1 = nn.Linear(64, 256)
        self.fc2 = nn.Linear(256, 128)
        self.fc3 = nn.Linear(128, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, 1, 8, 8)`` images -> ``(N, 10)`` logits."""
        x = torch.relu(self.fc1(x.flatten(1)))
        logits: torch.Tensor = self.fc3(torch.relu(self.fc2(x)))
        return logits


def digits(split: str = "test", batch_size: int = 200) -> DataLoader[tuple[torch.Tensor, ...]]:
    """Handwritten digits, always in the same order.

    Args:
        split: ``"train"``, 1197 images, or ``"test"``, 600, with the same share of every digit.
        batch_size: images per batch.

    Returns:
        Batches of images ``(N, 1, 8, 8)``, float32 from 0 (paper) to 1 (ink), and of labels
        ``(N,)``, int64 from 0 to 9.

    Raises:
        WavpruneError: an argument is not allowed.
        ImportError: scikit-learn is not installed.

    Example:
        >>> images, labels = next(iter(digits("test", batch_size=32)))
        >>> images.shape, labels.shape
        (torch.Size([32, 1, 8, 8]), torch.Size([32]))
    """
    choice("split", split, SPLITS)
    datasets = require("sklearn.datasets", extra="demo", purpose="the digits")
    selection = require("sklearn.model_selection", extra="demo", purpose="the digits")
    images, labels = datasets.load_digits(return_X_y=True)
    train, test = selection.train_test_split(
        range(len(labels)), test_size=_TEST_IMAGES, random_state=0, stratify=labels
    )
    indices = train if split == "train" else test
    dataset = TensorDataset(
        torch.from_numpy(images[indices] / _MAX_VALUE).float().reshape(-1, 1, 8, 8),
        torch.from_numpy(labels[indices]).long(),
    )
    # The sampler yields the indices of whole batches, so the tensors are indexed once per batch.
    batches = BatchSampler(SequentialSampler(dataset), batch_size, drop_last=False)
    # Without a generator of its own, a loader advances the global random state.
    generator = torch.Generator()
    return DataLoader(dataset, batch_size=None, sampler=batches, generator=generator)


def resnet(seed: int = 0) -> ResNet:
    """A ResNet trained on the digits, in evaluation mode.

    Args:
        seed: which of the trainings: 0, 1 or 2.

    Raises:
        WavpruneError: there is no training with this seed.

    Example:
        >>> sum(m.weight.numel() for m in resnet().modules() if isinstance(m, nn.Conv2d))
        76432
    """
    return _trained(ResNet(), "resnet", seed)


def mlp(seed: int = 0) -> MLP:
    """An MLP trained on the digits, in evaluation mode.

    Args:
        seed: which of the trainings: 0, 1 or 2.

    Raises:
        WavpruneError: there is no training with this seed.

    Example:
        >>> [tuple(m.weight.shape) for m in mlp().modules() if isinstance(m, nn.Linear)]
        [(256, 64), (128, 256), (10, 128)]
    """
    return _trained(MLP(), "mlp", seed)


def weights_path(name: str, seed: int) -> Path:
    """The file with the weights of a training."""
    return Path(__file__).with_name(f"{name}-{seed}.safetensors")


def _trained(network: Network, name: str, seed: int) -> Network:
    if seed not in SEEDS:
        raise WavpruneError(f"unknown seed {seed!r}; allowed: {', '.join(map(str, SEEDS))}")
    # Half precision in the file; load_state_dict converts to the network's float32.
    network.load_state_dict(load_file(weights_path(name, seed)))
    return network.eval()
