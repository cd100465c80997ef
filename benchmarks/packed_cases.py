"""The networks that ``packed.py`` compresses, in which settings, and what they are measured on.

They are those of ``calibrated_networks.py``, with its data. Nothing is measured on an input that
was calibrated with.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from wavprune import PruneConfig, demo

from .calibrated_networks import NETWORKS, Score, cifar_network, joined, top1
from .networks import efficientnet_lite0
from .pitch import frames
from .restoration import paths_of_photographs
from .sweep_networks import cifar, photographs


@dataclass(frozen=True)
class Setting:
    """How files are made.

    Attributes:
        name: in the results.
        targets: divergences on inputs that are held back.
        options: of ``save``.
        feedback: False chooses steps alone.
        inputs: which of a case's calibration inputs.
        baseline: ``"nncodec"`` or ``"cerwu"`` in place of wavprune; targets are then its qp, or its
            grids and multipliers.
    """

    name: str
    targets: Sequence[Any]
    options: dict[str, Any] = field(default_factory=dict)
    feedback: bool = True
    inputs: str = "usual"
    baseline: str | None = None


@dataclass(frozen=True)
class Case:
    """A network, and inputs to calibrate with and to measure on.

    Attributes:
        network: in evaluation mode.
        inputs: to calibrate with, by name.
        tests: to measure on, in batches.
        score: of the outputs, one for each input.
        measure: what a score is.
        loss: of the mean score that is allowed, at most.
        divergences: at which files are compared with others.
        held_out: to measure on while files are made; None holds back some of the former.
    """

    network: nn.Module
    inputs: dict[str, list[torch.Tensor]]
    tests: list[torch.Tensor]
    score: Score
    measure: str
    loss: Callable[[float], float]
    divergences: Sequence[float] = ()
    held_out: list[torch.Tensor] | None = None


QPS = (-38, -36, -34, -32, -30, -28, -26, -24)


def nncodec(qps: Sequence[int]) -> Setting:
    return Setting("NNCodec", qps, baseline="nncodec")


def cerwu() -> Setting:
    pairs = [(bins, exponent) for bins in (16, 32, 64) for exponent in (-6, -5, -4, -3)]
    return Setting("CERWU", pairs, baseline="cerwu")


def default(*targets: float) -> Setting:
    return Setting("default", targets)


def identity(*targets: float) -> Setting:
    return Setting("identity basis", targets, {"wavelet": "identity"})


def keep(*targets: float) -> Setting:
    return Setting("batch norms kept", targets, {"batchnorm": "keep"})


def steps_alone(*targets: float) -> Setting:
    return Setting("steps alone", targets, feedback=False)


def pruned(sparsity: float, *targets: float) -> Setting:
    config = PruneConfig(method="min_weight", sparsity=sparsity, targets=("*",))
    return Setting(f"{sparsity:.0%} pruned", targets, {"config": config})


def _demo(folder: Path) -> Case:
    del folder
    train = [images for images, _ in demo.digits("train")]
    x, y = joined(list(demo.digits("test")))
    return Case(
        demo.resnet(seed=0),
        {"usual": train},
        list(torch.split(x, 200)),
        top1(y),
        "top-1 %",
        lambda dense: dense / 100,
        (0.0025,),
    )


def _cifar(depth: int) -> Callable[[Path], Case]:
    def case(folder: Path) -> Case:
        inputs = [images for images, _ in cifar(str(folder), "calibration", 500, 50)]
        x, y = joined(cifar(str(folder), "test", 5000, 5000))
        return Case(
            cifar_network(folder, depth),
            {"usual": inputs},
            list(torch.split(x, 100)),
            top1(y),
            "top-1 %",
            lambda dense: dense / 100,
            (0.01, 0.03, 0.1),
        )

    return case


def _lite0(folder: Path) -> Case:
    inputs = [images for images, _ in photographs(str(folder), "calibration", 200, 25)]
    x, y = joined(photographs(str(folder), "test", 400, 400))
    return Case(
        efficientnet_lite0(),
        {"usual": inputs, "nine photographs": list(torch.split(nine_photographs(), 16))},
        list(torch.split(x, 25)),
        top1(y),
        "top-1 %",
        lambda dense: dense / 100,
        (0.031, 0.042, 0.085),
    )


def nine_photographs(count: int = 96) -> torch.Tensor:
    """Random squares of nine photographs that come with scikit-image and scikit-learn."""
    images = [Image.open(path).convert("RGB") for path in paths_of_photographs()]
    random = np.random.default_rng(0)
    squares = []
    for i in range(count):
        image = images[i % len(images)]
        side = int(min(image.size) * random.uniform(0.4, 1.0))
        left, top = (int(random.integers(0, edge - side + 1)) for edge in image.size)
        square = image.crop((left, top, left + side, top + side)).resize((224, 224))
        values = np.asarray(square, dtype=np.float32)
        squares.append(values[:, ::-1] if random.random() < 0.5 else values)
    return (torch.from_numpy(np.stack(squares)).permute(0, 3, 1, 2).contiguous() - 127) / 128


def _restoring(name: str) -> Callable[[Path], Case]:
    def case(folder: Path) -> Case:
        task = next(iter(NETWORKS[name](folder)))
        return Case(
            task.model,
            {"usual": list(torch.split(task.calibration, 16))},
            list(torch.split(task.test, task.batch)),
            task.score,
            task.measure,
            lambda dense: 0.1 if task.measure == "PSNR dB" else 0.5,
        )

    return case


def _crepe(folder: Path) -> Case:
    """What is held back are recordings of other instruments, as windows of one are alike."""
    case = _restoring("crepe")(folder)
    x = torch.cat(case.inputs["usual"])
    _, _, programs = frames()
    own = programs[programs % 2 == 1]
    held = torch.isin(own, torch.tensor(sorted(set(own.tolist()))[::4]))
    fit, held_out = (list(torch.split(x[chosen], 16)) for chosen in (~held, held))
    return replace(case, inputs={"usual": fit}, held_out=held_out)


CASES: dict[str, Callable[[Path], Case]] = {
    "demo": _demo,
    "resnet20": _cifar(20),
    "resnet56": _cifar(56),
    "lite0": _lite0,
    "demosaicking": _restoring("demosaicking"),
    "FFDNet": _restoring("FFDNet"),
    "crepe": _crepe,
}

_SMALL = (0.0002, 0.0005, 0.001, 0.0025)
_RESTORING = (0.00002, 0.0001, 0.0005)

SETTINGS: dict[str, list[Setting]] = {
    "demo": [
        default(*_SMALL),
        identity(*_SMALL),
        keep(0.0005, 0.001),
        steps_alone(0.0005, 0.001),
        pruned(0.2, 0.0005, 0.001),
        pruned(0.5, 0.001, 0.0025),
        nncodec((-32, -28, -24, -22, -20, -18, -16)),
    ],
    "resnet20": [
        default(0.01, 0.03, 0.06, 0.1),
        nncodec((-30, -28, -26, -24, -22, -20, -18)),
        cerwu(),
        identity(0.03, 0.06, 0.1),
        steps_alone(0.03, 0.06),
        pruned(0.2, 0.03, 0.06),
        pruned(0.5, 0.06, 0.1),
        keep(0.03, 0.06),
    ],
    "resnet56": [
        default(0.01, 0.03, 0.06, 0.1),
        nncodec((-30, -28, -26, -24, -22, -20, -18)),
        cerwu(),
        identity(0.03, 0.06),
    ],
    "lite0": [
        default(0.02, 0.03, 0.042, 0.06, 0.085),
        nncodec(QPS),
        keep(0.024, 0.036),
        steps_alone(0.024, 0.036, 0.045),
        Setting("nine photographs", (0.012, 0.018, 0.024, 0.036), inputs="nine photographs"),
    ],
    "demosaicking": [default(*_RESTORING), identity(*_RESTORING), nncodec(range(-46, -34, 2))],
    "FFDNet": [default(*_RESTORING), identity(*_RESTORING), nncodec(range(-56, -36, 3))],
    "crepe": [
        default(*_RESTORING),
        identity(*_RESTORING),
        steps_alone(*_RESTORING),
        nncodec(range(-26, 0, 3)),
    ],
}
