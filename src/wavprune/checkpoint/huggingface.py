"""Model directories as Hugging Face has them, with compressed weights.

Such a directory holds ``wavprune.safetensors`` in place of ``model.safetensors``, a name that no
other library takes for ordinary weights, beside ``config.json`` and all else that was there.
"""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.atomic import replaced
from ..common.optional import require
from ..errors import WavpruneError
from .container import KEY
from .formats import open_checkpoint
from .formats.directory import COMPRESSED_WEIGHTS, copy_others
from .formats.safetensors import read_header
from .loading import load
from .prune import check_target
from .report import SaveReport
from .saving import Model, save

if TYPE_CHECKING:
    from torch import nn

CONFIG = "config.json"


def save_directory(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    *,
    model: Model | None = None,
    force: bool = False,
    **how: Any,
) -> SaveReport:
    """Copy a model directory, with its weights compressed.

    Args:
        source: a directory with ``model.safetensors``, or its shards and their index.
        target: the directory to write, which appears when it is complete and not before.
        model: what has the weights; None takes those of ``source``.
        force: replace what is at ``target``, which is another directory than ``source``.
        how: as ``save`` takes it.

    Raises:
        WavpruneError: ``target`` cannot be written, or as for ``save``.
        OSError: reading or writing failed. Nothing is left behind in either case.
    """
    source, target = Path(source), Path(target)
    check_directories(source, target, force)
    with replaced(target, overwrite=force) as new:
        new.mkdir()
        weights = source if model is None else model
        saved = save(weights, new / COMPRESSED_WEIGHTS, **how)
        copy_others(source, new, [COMPRESSED_WEIGHTS], None, in_place=False)
    return replace(saved, path=target / COMPRESSED_WEIGHTS)


def check_directories(source: Path, target: Path, force: bool) -> None:
    """Raise WavpruneError where ``save_directory`` cannot write a target."""
    open_checkpoint(source)
    check_target(source, target, force)
    if target.exists() and target.samefile(source):
        raise WavpruneError(f"{target} holds the weights to compress; name another directory")


def compressed_weights(directory: Path) -> Path | None:
    """The compressed file of a directory, if it holds one."""
    path = directory / COMPRESSED_WEIGHTS
    return path if path.is_file() else None


def from_pretrained(
    directory: str | os.PathLike[str],
    *,
    model_class: Any = None,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | os.PathLike[str] | None = None,
    local_files_only: bool = False,
    **options: Any,
) -> nn.Module:
    """The network of a directory that ``wavprune compress`` wrote.

    Args:
        directory: where it is, or its name on the Hugging Face Hub, ``"user/network"``.
        model_class: a class of transformers, such as ``AutoModelForImageClassification``; None
            takes the one that ``config.json`` names.
        revision: on the Hub: a branch, tag or commit.
        token: on the Hub: see ``huggingface_hub``.
        cache_dir: where files of the Hub are kept.
        local_files_only: True takes nothing from the network.
        options: for the class's own ``from_pretrained``, such as ``dtype``.

    Returns:
        The network in evaluation mode, with the weights as ``load`` gives them.

    Raises:
        WavpruneError: there is no such directory, it is not complete, or its weights are those of
            another network.
        ImportError: the extra ``huggingface`` or ``checkpoint`` is not installed.

    Example:
        >>> import tempfile, transformers, wavprune
        >>> from wavprune.checkpoint.huggingface import save_directory
        >>> folder = tempfile.mkdtemp()
        >>> config = transformers.ResNetConfig(hidden_sizes=[8, 8], depths=[1, 1], embedding_size=8)
        >>> network = transformers.ResNetForImageClassification(config)
        >>> network.save_pretrained(f"{folder}/large")
        >>> saved = save_directory(f"{folder}/large", f"{folder}/small")
        >>> type(wavprune.from_pretrained(f"{folder}/small")).__name__
        'ResNetForImageClassification'
    """
    transformers = require("transformers", extra="huggingface", purpose="from_pretrained")
    path = Path(directory)
    if not path.is_dir():
        hub = {"revision": revision, "token": token, "cache_dir": cache_dir}
        path = _downloaded(str(directory), local_files_only=local_files_only, **hub)
    weights = checked_directory(path)
    config = transformers.AutoConfig.from_pretrained(
        path, local_files_only=True, trust_remote_code=False
    )
    kind = _class_of(path, config, model_class, transformers)
    try:
        model, loaded = kind.from_pretrained(
            None,
            config=config,
            state_dict=load(weights),
            output_loading_info=True,
            **options,
        )
    except RuntimeError as error:
        raise WavpruneError(f"{weights} has not the weights of its {CONFIG}: {error}") from error
    wrong = sorted([*loaded["missing_keys"], *loaded["unexpected_keys"]])
    if wrong:
        raise WavpruneError(
            f"{weights} has not the weights of its {CONFIG}: {wrong[0]!r} is missing or not of a "
            f"{type(model).__name__}"
        )
    # What transformers sets to the directory that it reads.
    model.config.name_or_path = str(directory)
    network: nn.Module = model.eval()
    return network


def push_to_hub(
    directory: str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    commit_message: str = "Compressed weights, by wavprune",
) -> str:
    """Upload a directory that ``wavprune compress`` wrote to the Hugging Face Hub.

    Args:
        directory: where it is; it is checked first.
        repo_id: such as ``"user/network"``; made where it is not there.
        private: of a new repository: whether others see it.
        token: see ``huggingface_hub``.
        revision: the branch; None means the main one.
        commit_message: of the commit.

    Returns:
        The address of the commit.

    Raises:
        WavpruneError: it is no such directory, or ``repo_id`` is none.
        ImportError: the extra ``huggingface`` is not installed.

    Example:
        >>> push_to_hub("no-such-folder", "user/network")
        Traceback (most recent call last):
            ...
        wavprune.errors.WavpruneError: no-such-folder is no directory
    """
    hub = require("huggingface_hub", extra="huggingface", purpose="push_to_hub")
    folder = Path(directory)
    checked_directory(folder)
    try:
        hub.utils.validate_repo_id(repo_id)
    except hub.errors.HFValidationError as error:
        raise WavpruneError(f"repo_id: {error}") from error
    api = hub.HfApi(token=token)
    api.create_repo(repo_id, private=private, exist_ok=True)
    commit = api.upload_folder(
        repo_id=repo_id,
        folder_path=folder,
        revision=revision,
        commit_message=commit_message,
        ignore_patterns=[".*", "**/.*"],
    )
    return str(commit.commit_url)


def checked_directory(directory: Path) -> Path:
    """The compressed file of a directory that can be loaded.

    Raises:
        WavpruneError: the directory is not there, or not complete.
    """
    if not directory.is_dir():
        raise WavpruneError(f"{directory} is no directory")
    weights = compressed_weights(directory)
    if weights is None or KEY not in read_header(weights)[1]:
        raise WavpruneError(
            f"{directory} holds no {COMPRESSED_WEIGHTS}, which `wavprune compress` writes of a "
            "model directory"
        )
    try:
        content = json.loads((directory / CONFIG).read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise WavpruneError(f"{directory} holds no {CONFIG} that is JSON: {error}") from error
    if not isinstance(content, dict):
        raise WavpruneError(f"{directory / CONFIG} is no JSON object")
    return weights


def _downloaded(repo_id: str, **options: Any) -> Path:
    hub = require("huggingface_hub", extra="huggingface", purpose="from_pretrained")
    try:
        return Path(hub.snapshot_download(repo_id, **options))
    except (hub.errors.HFValidationError, hub.errors.LocalEntryNotFoundError) as error:
        raise WavpruneError(
            f"{repo_id} is neither a directory nor in the cache of the Hugging Face Hub: {error}"
        ) from error


def _class_of(path: Path, config: Any, asked: Any, transformers: Any) -> Any:
    """The class of the network: what was asked for, or what the configuration names."""
    # Classes such as AutoModel, which only read directories.
    choices = getattr(asked, "_model_mapping", None)
    if choices is not None:
        if type(config) not in choices:
            raise WavpruneError(f"model_class={asked.__name__} has no network of {path / CONFIG}")
        return choices[type(config)]
    if asked is not None:
        return asked
    names = getattr(config, "architectures", None) or []
    known = getattr(transformers, str(names[0]), None) if names else None
    if not (isinstance(known, type) and issubclass(known, transformers.PreTrainedModel)):
        raise WavpruneError(
            f"{path / CONFIG} has architectures={names!r}; allowed: a class of transformers, or "
            "give model_class"
        )
    return known
