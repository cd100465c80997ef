"""Train the demo's networks: ``python -m wavprune.demo.train``.

Each network is trained on the 1197 training digits, shifted by up to a pixel, and never sees the
test digits. The same versions of torch and scikit-learn on the same kind of processor give the same
weights; training takes a few minutes on one core.
"""

from __future__ import annotations

from pathlib import Path

import click
import torch
from safetensors.torch import save
from torch import nn
from torch.nn import functional

from ..common.atomic import replaced
from ..common.progress import progress_bar
from . import MLP, SEEDS, ResNet, digits, weights_path

NETWORKS: dict[str, type[nn.Module]] = {"resnet": ResNet, "mlp": MLP}
EPOCHS = 60
BATCH = 64
RATE = 0.1
DECAY = 5e-4


@click.command()
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    default=weights_path("resnet", 0).parent,
    help="Folder for the weights. [default: the package]",
)
@click.option("--epochs", type=click.IntRange(min=1), default=EPOCHS, show_default=True)
def main(out: Path, epochs: int) -> None:
    """Train every network with every seed and write its weights."""
    torch.set_num_threads(1)
    out.mkdir(parents=True, exist_ok=True)
    for name, network_type in NETWORKS.items():
        for seed in SEEDS:
            path = out / weights_path(name, seed).name
            network = stored(train(network_type, seed, epochs, label=path.stem), path)
            click.echo(f"{path.stem}: {accuracy(network):.2%} of the test digits, {path}")


def train(
    network_type: type[nn.Module], seed: int, epochs: int = EPOCHS, label: str | None = None
) -> nn.Module:
    """A network trained on the digits by SGD with one cycle of the learning rate.

    Args:
        network_type: called without arguments, gives the network.
        seed: of the initial weights, the order of the images and their shifts. The global random
            state stays as it is.
        epochs: passes over the images, 1 or more.
        label: of a progress bar on standard error; None shows no bar.

    Returns:
        The network, in evaluation mode.
    """
    images, labels = next(iter(digits("train", batch_size=10**6)))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = network_type()
        steps = -(-len(images) // BATCH)
        optimizer = torch.optim.SGD(
            network.parameters(), lr=RATE, momentum=0.9, weight_decay=DECAY, nesterov=True
        )
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * steps)
        with progress_bar(label or "", epochs, "epochs", label is not None) as advance:
            for _ in range(epochs):
                for batch in torch.split(torch.randperm(len(images)), BATCH):
                    logits = network(shifted(images[batch]))
                    loss = functional.cross_entropy(logits, labels[batch])
                    optimizer.zero_grad()
                    torch.autograd.backward(loss)
                    optimizer.step()
                    schedule.step()
                advance(1)
    return network.eval()


def shifted(images: torch.Tensor) -> torch.Tensor:
    """Images ``(N, C, H, W)``, each shifted at random by -1, 0 or 1 pixel along each axis."""
    height, width = images.shape[-2:]
    windows = functional.pad(images, (1, 1, 1, 1)).unfold(2, height, 1).unfold(3, width, 1)
    down, right = torch.randint(3, (2, len(images)))
    return windows[torch.arange(len(images)), :, down, right]


def stored(network: nn.Module, path: Path) -> nn.Module:
    """Write a network in half precision, and return it with the weights that loading will give.

    Vectors (batch norms and biases) stay in single precision: they are few.
    """
    state = {
        name: value.half() if value.ndim > 1 else value
        for name, value in network.state_dict().items()
    }
    with replaced(path) as unfinished:
        unfinished.write_bytes(save(state, {"format": "pt"}))
    network.load_state_dict(state)
    return network


@torch.no_grad()
def accuracy(network: nn.Module) -> float:
    """The accuracy on the test digits, from 0 to 1."""
    correct = [(network(images).argmax(1) == labels) for images, labels in digits("test")]
    return float(torch.cat(correct).double().mean())


if __name__ == "__main__":
    main()
