"""The networks of a sweep, from where its file says. Nothing is ever unpickled."""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from .sources import BuiltinModel, DirectoryModel, FactoryModel, Model


def load_model(source: Model) -> nn.Module:
    """The network of a source, in evaluation mode, on the CPU, the same each time.

    Raises:
        ValueError: it cannot be had from there; the message says why.
        TypeError: a factory is none, or returns no module.
        ImportError: what it needs is not installed.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(source.seed)
        if isinstance(source, BuiltinModel):
            model = _builtin(source)
        elif isinstance(source, DirectoryModel):
            model = _directory(source.directory)
        else:
            model = _made(source)
    return model.eval()


def model_identity(model: nn.Module) -> str:
    """A hash of a network's structure and of every tensor in it.

    Example:
        >>> model_identity(nn.Linear(2, 2)) == model_identity(nn.Linear(2, 2))
        False
    """
    digest = hashlib.sha256(repr(model).encode())
    for key, value in sorted(model.state_dict().items()):
        if isinstance(value, torch.Tensor):
            digest.update(f"{key} {value.dtype} {tuple(value.shape)}".encode())
            raw = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
            digest.update(raw.numpy().tobytes())
    return digest.hexdigest()


def imported(factory: str, root: Path) -> Callable[..., Any]:
    """The function that ``package.module:function`` names.

    Args:
        factory: the name.
        root: a folder to look in too, after all that Python looks in.

    Raises:
        ValueError: there is no such module, or nothing of that name in it.
        TypeError: what it names cannot be called.
    """
    module, _, name = factory.partition(":")
    if str(root) not in sys.path:
        sys.path.append(str(root))
    try:
        found: Any = importlib.import_module(module)
        for part in name.split("."):
            found = getattr(found, part)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"factory {factory!r} cannot be imported: {error}") from error
    if not callable(found):
        raise TypeError(f"factory {factory!r} is a {type(found).__name__}, not a function")
    made: Callable[..., Any] = found
    return made


def _builtin(source: BuiltinModel) -> nn.Module:
    from .. import demo

    return {"demo": demo.resnet, "demo-mlp": demo.mlp}[source.builtin](source.seed)


def _directory(path: Path) -> nn.Module:
    try:
        from transformers import AutoConfig, AutoModelForImageClassification
    except ImportError as error:
        raise ImportError(
            "a Hugging Face directory needs transformers; pip install 'wavprune[huggingface]'"
        ) from error
    if not (path / "config.json").is_file():
        raise ValueError(f"{path} holds no config.json; allowed: a Hugging Face model directory")
    weights = sorted(path.glob("*.safetensors"))
    pickled = [*path.glob("*.bin"), *path.glob("*.pt"), *path.glob("*.pth")]
    if pickled and not weights:
        raise ValueError(
            f"{path} holds {pickled[0].name} and no safetensors file; allowed: safetensors weights "
            "(nothing is unpickled), or the config alone"
        )
    try:
        if weights:
            model = AutoModelForImageClassification.from_pretrained(
                path, local_files_only=True, use_safetensors=True
            )
        else:
            config = AutoConfig.from_pretrained(path, local_files_only=True)
            model = AutoModelForImageClassification.from_config(config)  # type: ignore[no-untyped-call]  # its own
    except (OSError, KeyError, json.JSONDecodeError, SafetensorError) as error:
        raise ValueError(f"{path} cannot be loaded: {error}") from error
    assert isinstance(model, nn.Module)
    return model


def _made(source: FactoryModel) -> nn.Module:
    model = imported(source.factory, source.root)(**source.arguments)
    if not isinstance(model, nn.Module):
        raise TypeError(
            f"factory {source.factory!r} returned a {type(model).__name__}, not a torch.nn.Module"
        )
    if source.weights is not None:
        try:
            model.load_state_dict(load_file(source.weights))
        except (OSError, SafetensorError, RuntimeError) as error:
            raise ValueError(f"weights {source.weights} cannot be loaded: {error}") from error
    return model
