"""Models that can be run: their networks, their inputs, and how far two networks agree."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ..calibration.network import tensor_of
from ..checkpoint import load as load_tensors
from ..checkpoint.formats import ONNX
from ..common.loaders import batches, inputs_of
from ..engine.running import running
from ..errors import WavpruneError
from ..evaluation.measures import divergence
from ..onnx import decompress
from ..sweep.inputs import load_inputs as load_files
from ..sweep.models import load_model
from ..sweep.sources import DirectoryModel, OnnxModel

if TYPE_CHECKING:
    from torch import nn

    from ..sweep.data import Loader

# Inputs that say how far two networks agree, and from which one is calibrated.
MOST_INPUTS = 2048
# A class that is never answered has a divergence all the same.
LEAST = 1e-30


def load_network(source: Path) -> nn.Module:
    """The network of a Hugging Face directory, whose code is that of transformers, or of a graph.

    Args:
        source: the directory, or an ``.onnx`` file.

    Raises:
        WavpruneError: it cannot be loaded, or not completely.
    """
    if source.suffix in ONNX:
        return load_model(OnnxModel(onnx=source))
    return load_model(DirectoryModel.model_validate({"directory": source}))


def load_stored(source: Path, stored: Path, scratch: Path) -> nn.Module:
    """The network of a model with the weights of a compressed file of it.

    Args:
        source: the directory, or an ``.onnx`` file.
        stored: of a directory a ``.safetensors`` file, of a graph the one without weights.
        scratch: a directory in which a graph is put together.

    Raises:
        WavpruneError: the file is not that of this model.
    """
    if source.suffix in ONNX:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            decompressed = Path(folder) / stored.name
            decompress(stored, decompressed)
            return load_network(decompressed)
    network = load_network(source)
    found = network.load_state_dict(load_tensors(stored), strict=False)
    if found.unexpected_keys:
        raise WavpruneError(f"the network has no tensor {min(found.unexpected_keys)!r}")
    return network


def load_inputs(source: Path, folder: Path, settings: dict[str, Any]) -> Loader:
    """The inputs that were uploaded for a model.

    Args:
        source: the directory, or an ``.onnx`` file; it says how images are prepared.
        folder: where they lie.
        settings: of the job: ``image_size``, ``mean`` and ``std``.

    Raises:
        WavpruneError: there are none, or they cannot be read.
    """
    arrays = sorted(folder.glob("*.npz"))
    size = settings.get("image_size")
    return load_files(
        str(arrays[-1] if arrays else folder),
        model=source,
        size=None if size is None else (size,),
        mean=settings.get("mean", (0.0,)),
        std=settings.get("std", (1.0,)),
        limit=MOST_INPUTS,
    )


def agreement(network: nn.Module, dense: nn.Module, inputs: Loader) -> dict[str, Any]:
    """How far a network agrees with the one that it was made of.

    Returns:
        ``inputs``, how many there were; ``output_error``, the relative change of the outputs; and
        of classifiers, whose outputs are ``(N, C)``: ``agreement``, the share of equal first
        classes, and ``kl``, the mean divergence.

    Raises:
        WavpruneError: an output is not finite, or the inputs are not those of the networks.
        TypeError: a network returns no tensor.
    """
    count = 0
    change = norm = alike = kl = 0.0
    are_classes = True
    with running(network, None), running(dense, None):
        for batch in batches(inputs, description="compare"):
            x = inputs_of(batch)
            ours, theirs = (_finite(tensor_of(model(x))) for model in (network, dense))
            change += float((ours - theirs).square().sum())
            norm += float(theirs.square().sum())
            are_classes = are_classes and theirs.ndim == 2 and theirs.shape[1] > 1
            if are_classes:
                measures = divergence(_logits(ours), _logits(theirs))
                alike += len(x) * measures["agreement"]
                kl += len(x) * measures["kl"]
            count += len(x)
    result: dict[str, Any] = {"inputs": count, "output_error": (change / (norm or 1.0)) ** 0.5}
    if are_classes:
        result |= {"agreement": alike / count, "kl": kl / count}
    return result


def _finite(outputs: torch.Tensor) -> torch.Tensor:
    wrong = outputs.numel() - int(torch.isfinite(outputs).sum())
    if wrong:
        raise WavpruneError(f"{wrong} of {outputs.numel()} outputs are NaN or infinite")
    return outputs.double()


def _logits(outputs: torch.Tensor) -> torch.Tensor:
    """Logits ``(N, C)``: the outputs, or the logarithms of what are probabilities already."""
    sums = outputs.sum(dim=1)
    if outputs.min() >= 0 and torch.allclose(sums, torch.ones_like(sums), atol=1e-3):
        return outputs.clamp_min(LEAST).log()
    return outputs
