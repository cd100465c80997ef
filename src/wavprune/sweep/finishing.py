"""What a run does between pruning and evaluation: it trains the network, stores it, reads it."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader

from .. import checkpoint
from ..common.loaders import inputs_and_targets, inputs_of, on_device
from ..config import PruneConfig
from ..engine.layers import LayerRef, named_layers
from ..errors import WavpruneError
from ..evaluation.measure import default_output
from ..report import PruneReport
from ..training.masked import MaskedLayers
from .data import Loader
from .factories import bound_factory
from .grid import Storage
from .sources import Factory, Training

# What ``bits`` of 32 and 16 are for ``checkpoint.save``.
_FLOATS = {32: "float32", 16: "float16"}


def fine_tune(
    model: nn.Module,
    config: PruneConfig,
    report: PruneReport,
    training: Training,
    loader: Loader,
    epochs: int,
) -> None:
    """Train a pruned network; what was pruned stays pruned after every step.

    Args:
        model: the network, in evaluation mode before and after.
        config: how it was pruned.
        report: what was pruned in it, with masks.
        training: how to train.
        loader: the data of ``training``.
        epochs: passes over it.

    Raises:
        WavpruneError: no parameter can be trained, the loss is not finite, or its function fails to
            load.
    """
    assert report.masks is not None
    modules = named_layers(model)
    refs = [LayerRef(stats.name, _weight(modules[stats.name])) for stats in report]
    names = [ref.name for ref in refs]
    masked = MaskedLayers(
        config, [report.bases[name] for name in names], [report.masks[name] for name in names]
    )
    entries = list(enumerate(refs))
    device = next(model.parameters()).device
    loss_of = loss_function(training)
    steps = 0
    with torch.random.fork_rng(devices=[]), torch.enable_grad():
        torch.manual_seed(training.seed)
        optimizer = _optimizer(model, training)
        epoch_steps = sum(1 for _ in _shuffled(loader))
        model.train()
        try:
            for _ in range(epochs):
                for batch in _shuffled(loader):
                    inputs, targets = inputs_and_targets(batch)
                    for group in optimizer.param_groups:
                        done = steps / (epochs * epoch_steps)
                        group["lr"] = training.learning_rate * (1 + math.cos(math.pi * done)) / 2
                    outputs = default_output(model(on_device(inputs, device)))
                    loss = loss_of(outputs, on_device(targets, device))
                    if not math.isfinite(value := float(loss.detach())):
                        raise WavpruneError(
                            f"training: the loss is {value} at step {steps}; lower "
                            f"learning_rate={training.learning_rate:g}"
                        )
                    optimizer.zero_grad()
                    loss.backward()
                    optimizer.step()
                    with torch.no_grad():
                        masked.project("all", entries)
                    steps += 1
        finally:
            model.eval()
            optimizer.zero_grad()


def loss_function(training: Training) -> Callable[[Any, Any], Any]:
    """The loss that networks are trained by, of outputs and targets.

    Raises:
        WavpruneError: it cannot be imported.
    """
    if training.loss is None:
        return functional.cross_entropy
    loss: Callable[[Any, Any], Any] = bound_factory(
        Factory(factory=training.loss, root=training.root)
    )
    return loss


def store(model: nn.Module, report: PruneReport, storage: Storage, inputs: Loader) -> int:
    """Write a pruned network as a compressed file, read it again, and say how large the file was.

    Args:
        model: the network, whose tensors become those that the file holds.
        report: what was pruned in it.
        storage: how to store it.
        inputs: what the outputs are measured on where a target is given.

    Raises:
        WavpruneError: it cannot be stored like this.
        ImportError: the extra ``checkpoint`` is not installed.
    """
    arguments: dict[str, Any] = {
        name: value for name, value in storage._asdict().items() if value is not None
    }
    if storage.bits in _FLOATS:
        arguments = {"values": _FLOATS[storage.bits]}
    if storage.bits is None:
        arguments["calibration"] = [inputs_of(batch) for batch in inputs]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "model.safetensors")
        checkpoint.save(model, path, report=report, **arguments)
        model.load_state_dict(checkpoint.load(path))
        return path.stat().st_size


def _optimizer(model: nn.Module, training: Training) -> torch.optim.Optimizer:
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    if not parameters:
        raise WavpruneError(
            "training: no parameter of the model requires a gradient; allowed: at least one, or "
            "epochs: 0"
        )
    rate, decay = training.learning_rate, training.weight_decay
    if training.optimizer == "adamw":
        return torch.optim.AdamW(parameters, rate, weight_decay=decay)
    return torch.optim.SGD(parameters, rate, momentum=0.9, nesterov=True, weight_decay=decay)


def _shuffled(loader: Iterable[Any]) -> Iterator[Any]:
    """The batches in random order; of a map-style dataset, random batches.

    One sample left over has no batch of its own: batch norms have no statistics of one value.
    """
    if isinstance(loader, list):
        yield from (loader[i] for i in torch.randperm(len(loader)).tolist())
    elif (
        isinstance(loader, DataLoader) and loader.batch_size and hasattr(loader.dataset, "__len__")
    ):
        samples = len(loader.dataset)
        yield from DataLoader(
            loader.dataset,
            loader.batch_size,
            shuffle=True,
            collate_fn=loader.collate_fn,
            drop_last=samples > 1 and samples % loader.batch_size == 1,
        )
    else:
        yield from loader


def _weight(module: nn.Module) -> torch.Tensor:
    assert isinstance(module.weight, torch.Tensor)
    return module.weight
