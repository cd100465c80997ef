"""Models that can be run: their networks and their inputs."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..checkpoint import load as load_tensors
from ..checkpoint.formats import ONNX
from ..checkpoint.huggingface import CONFIG
from ..errors import WavpruneError
from ..graph import obstacle as graph_obstacle
from ..graph import read_model
from ..onnx import decompress
from ..sweep.inputs import load_inputs as load_files
from ..sweep.models import check_complete, load_model
from ..sweep.sources import DirectoryModel, OnnxModel

if TYPE_CHECKING:
    from torch import nn

    from ..sweep.data import Loader

# What the names of the networks have that transformers loads for the service.
CLASSIFIER = "ForImageClassification"
# Inputs that say how far two networks agree, and from which one is calibrated.
MOST_INPUTS = 2048


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


def obstacle(source: Path) -> str | None:
    """Why the network of a model cannot be run, as far as that is seen without loading it.

    Args:
        source: a checkpoint, a directory, or an ``.onnx`` file; it has been read before.
    """
    if source.suffix in ONNX:
        return graph_obstacle(read_model(source))
    if not source.is_dir():
        return "it has only its weights"
    return _obstacle_in(source / CONFIG)


def _obstacle_in(config: Path) -> str | None:
    if not config.is_file():
        return f"it holds no {CONFIG}"
    try:
        names = json.loads(config.read_text(encoding="utf-8")).get("architectures")
    except (ValueError, AttributeError, RecursionError):
        return f"its {CONFIG} is no JSON object"
    # A configuration need not name any.
    if isinstance(names, list) and names and not any(CLASSIFIER in str(name) for name in names):
        return f"it is a {', '.join(map(str, names))}; networks {CLASSIFIER} run"
    return None


def load_stored(source: Path, stored: Path, scratch: Path) -> nn.Module:
    """The network of a model with the weights of a compressed file of it.

    Args:
        source: the directory, or an ``.onnx`` file.
        stored: of a directory a ``.safetensors`` file, of a graph the one without weights.
        scratch: a directory in which a graph is put together.

    Raises:
        WavpruneError: the file is not that of this model, or holds not all of its tensors.
    """
    if source.suffix in ONNX:
        with tempfile.TemporaryDirectory(dir=scratch) as folder:
            decompressed = Path(folder) / stored.name
            decompress(stored, decompressed)
            return load_network(decompressed)
    network = load_network(source)
    own = network.state_dict(keep_vars=True)
    try:
        found = network.load_state_dict(load_tensors(stored), strict=False)
    except RuntimeError as error:
        raise WavpruneError(f"{stored.name} has not the weights of the model: {error}") from error
    # Files hold tied tensors once.
    read = {id(tensor) for name, tensor in own.items() if name not in found.missing_keys}
    missing = [name for name in found.missing_keys if id(own[name]) not in read]
    check_complete(stored, missing, found.unexpected_keys)
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
