"""Loads the networks of a sweep. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from ..common.optional import require
from ..common.skipped import first_of
from ..errors import WavpruneError
from ..onnx import to_torch
from .factories import call_factory, factory_digest
from .sources import BuiltinModel, DirectoryModel, FactoryModel, Model, OnnxModel


def load_model(source: Model) -> nn.Module:
    """The network of a source, in evaluation mode, on the CPU, the same each time.

    Raises:
        WavpruneError: it cannot be loaded, or not completely; the message says why.
        TypeError: a factory is not a function, or does not return a module.
        ImportError: an extra is not installed.
    """
    if isinstance(source, OnnxModel):
        return to_torch(source.onnx).eval()
    with torch.random.fork_rng(devices=[]):
        if isinstance(source, FactoryModel):
            # Importing its module may draw random numbers, but only the first time.
            factory_digest(source)
        torch.manual_seed(source.seed)
        if isinstance(source, BuiltinModel):
            model = _builtin(source)
        elif isinstance(source, DirectoryModel):
            model = _directory(source.directory)
        else:
            model = _from_factory(source)
    return model.eval()


def identify(source: Model, model: nn.Module) -> str:
    """A hash of everything that a network's predictions depend on.

    Args:
        source: where it was loaded from.
        model: the network.
    """
    identity = model_identity(model)
    if not isinstance(source, FactoryModel):
        return identity
    # Two networks of equal structure and weights may still differ in their code.
    return hashlib.sha256(f"{identity} {factory_digest(source)}".encode()).hexdigest()


def model_identity(model: nn.Module) -> str:
    """A hash of a network's structure and of every tensor in it.

    Example:
        >>> model_identity(nn.Linear(2, 2)) == model_identity(nn.Linear(2, 2))
        False
    """
    structure = re.sub(r" at 0x[0-9a-fA-F]+", "", repr(model))
    digest = hashlib.sha256(structure.encode())
    for key, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(data.numpy().tobytes())
    return digest.hexdigest()


def _builtin(source: BuiltinModel) -> nn.Module:
    from .. import demo

    return {"demo": demo.resnet, "demo-mlp": demo.mlp}[source.builtin](source.seed)


def _directory(path: Path) -> nn.Module:
    transformers = require(
        "transformers", extra="huggingface", purpose="a Hugging Face model directory"
    )
    if not (path / "config.json").is_file():
        raise WavpruneError(f"{path} holds no config.json; allowed: a Hugging Face model directory")
    weights = sorted(path.glob("*.safetensors"))
    pickled = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    if pickled and not weights:
        raise WavpruneError(
            f"{path} holds {pickled[0].name} and no safetensors file; allowed: safetensors weights "
            "(nothing is unpickled), or the config alone"
        )
    classifier = transformers.AutoModelForImageClassification
    try:
        if weights:
            model, loaded = classifier.from_pretrained(
                path,
                local_files_only=True,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
            )
        else:
            config = transformers.AutoConfig.from_pretrained(
                path, local_files_only=True, trust_remote_code=False
            )
            model, loaded = classifier.from_config(config), {}
    except (OSError, KeyError, ValueError, RuntimeError, SafetensorError) as error:
        raise WavpruneError(f"{path} cannot be loaded: {error}") from error
    missing, unexpected = (loaded.get(f"{kind}_keys", ()) for kind in ("missing", "unexpected"))
    check_complete(path, missing, unexpected, ", or its config alone for random weights")
    assert isinstance(model, nn.Module)
    return model


def check_complete(
    path: Path, missing: Iterable[str], unexpected: Iterable[str], otherwise: str = ""
) -> None:
    """Raise WavpruneError unless files hold the network's own tensors, all of them.

    Args:
        path: where they are.
        missing: tensors of the network that are not in them.
        unexpected: tensors in them that are not the network's.
        otherwise: what else is allowed.
    """
    # num_batches_tracked is a counter that only training reads; older files lack it.
    missing = [name for name in missing if not name.endswith("num_batches_tracked")]
    missing, unexpected = (list(map(repr, sorted(names))) for names in (missing, unexpected))
    problems = []
    if missing:
        problems.append(
            f"{len(missing)} of the network's tensors are not in it: {first_of(missing)}"
        )
    if unexpected:
        problems.append(
            f"{len(unexpected)} tensors in it are not the network's: {first_of(unexpected)}"
        )
    if problems:
        raise WavpruneError(
            f"{path} is not a complete model: {'; '.join(problems)}; allowed: exactly the tensors "
            f"of the network{otherwise}"
        )


def _from_factory(source: FactoryModel) -> nn.Module:
    model = call_factory(source)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"factory {source.factory!r} returned a {type(model).__name__}, not a torch.nn.Module"
        )
    if source.weights is not None:
        try:
            model.load_state_dict(load_file(source.weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise WavpruneError(f"weights {source.weights} cannot be loaded: {error}") from error
    return model
