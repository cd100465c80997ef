"""A small network, its data and sweeps over them, for the tests of experiments."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils.data import TensorDataset

from wavprune.sweep.settings import Sweep, parse_sweep

# What the workers import from the folder of a sweep file.
ROOT = str(Path(__file__).parents[2])
MODULE = f"import sys\nsys.path.append({ROOT!r})\nfrom tests.support.sweeps import *\n"
BROKEN = "SWEEPS_BROKEN"


class Net(nn.Module):
    """Two convolutions on 8x8 images."""

    def __init__(self, channels: int = 8) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, channels, 3, padding=1)
        self.bn1 = nn.BatchNorm2d(channels)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.fc = nn.Linear(channels, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.relu(self.conv2(torch.relu(self.bn1(self.conv1(x)))))
        logits: torch.Tensor = self.fc(x.mean((2, 3)))
        return logits


class Slow(Net):
    """Takes a while, so that a sweep can be ended in its middle."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return super().forward(x)


def hollow(net: Net) -> bool:
    """Whether nearly all weights are 0."""
    weight = net.conv2.weight
    return int(weight.count_nonzero()) < 0.2 * weight.numel()


class Deadly(Net):
    """Kills its process where nearly all of it was pruned."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hollow(self):
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


class Breakable(Net):
    """Raises where nearly all of it was pruned, as long as an environment variable says so."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if os.environ.get(BROKEN) and hollow(self):
            raise RuntimeError("this network is broken")
        return super().forward(x)


class Quitting(Net):
    """Calls ``sys.exit`` where nearly all of it was pruned."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if hollow(self):
            sys.exit(0)
        return super().forward(x)


class Unfinished(Net):
    """Has weights that are not numbers, in a layer that has no part in its predictions."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Conv2d(8, 8, 3)
        nn.init.constant_(self.spare.weight[0, 0], float("nan"))


def loader(samples: int = 32) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """One batch, the same each time."""
    generator = torch.Generator().manual_seed(0)
    images = torch.rand(samples, 1, 8, 8, generator=generator)
    return [(images, torch.arange(samples) % 4)]


def dataset(samples: int = 32) -> TensorDataset:
    return TensorDataset(*loader(samples)[0])


def folder(root: Path) -> Path:
    """A folder that a sweep file could lie in: ``module.py`` and ``data.npz``."""
    (root / "module.py").write_text(MODULE)
    images, labels = loader(64)[0]
    np.savez(root / "data.npz", images=images.numpy(), labels=labels.numpy())
    return root


def content(net: str = "Net", **settings: Any) -> dict[str, Any]:
    """What a sweep file says: five settings of one network, unless told otherwise."""
    grid = {"method": ["dwt", "min_weight"], "wavelet": "haar", "sparsity": [0.5, 0.9]}
    return {
        "model": {"factory": f"module:{net}", "name": net},
        "data": {"npz": "data.npz"},
        "batchnorm": "off",
        "grid": grid,
        **settings,
    }


def sweep(root: Path, told: Mapping[str, Any] | None = None) -> Sweep:
    return parse_sweep(content() if told is None else told, root)
