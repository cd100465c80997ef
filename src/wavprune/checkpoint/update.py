"""Write a model directory again with other values in some of its tensors."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import nn

from ..common.atomic import recover, replaced
from ..errors import WavpruneError
from ..report import PruneReport
from .formats import open_checkpoint
from .formats.directory import copy_others
from .formats.safetensors import SafetensorsFile
from .prune import check_target
from .pruned import entry_of


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    """Copies of all tensors of a network, for ``changed_since``."""
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def changed_since(model: nn.Module, before: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors that are not what they were.

    Example:
        >>> network = nn.Linear(2, 1)
        >>> before = snapshot(network)
        >>> with torch.no_grad():
        ...     _ = network.bias.add_(1)
        >>> list(changed_since(network, before))
        ['bias']
    """
    after = model.state_dict()
    return {name: after[name] for name in after if not after[name].equal(before[name])}


def update_directory(
    source: str | os.PathLike[str],
    target: str | os.PathLike[str],
    tensors: Mapping[str, torch.Tensor],
    *,
    report: PruneReport | None = None,
    force: bool = False,
) -> None:
    """Copy a model directory, with new values in some tensors of its safetensors files.

    Args:
        source: a directory with ``model.safetensors``, or its shards and their index.
        target: the directory to write, which appears when it is complete and not before; it may be
            ``source`` itself, with ``force``.
        tensors: by name, each of the shape in the file; stored in the file's dtype.
        report: what was pruned, which the files' metadata then say.
        force: replace what is at ``target``.

    Raises:
        WavpruneError: a tensor is not there or of another shape, or ``target`` cannot be written.
        OSError: reading or writing failed. Nothing is left behind in either case.
    """
    source, target = Path(source), Path(target)
    if target.parent.is_dir():
        recover(target)
    checkpoint = open_checkpoint(source)
    files = [file for file in checkpoint.files if isinstance(file, SafetensorsFile)]
    shapes = {name: entry.shape for file in files for name, entry in file.tensors.items()}
    for name, tensor in tensors.items():
        if shapes.get(name) != tuple(tensor.shape):
            there = f"one of {shapes[name]}" if name in shapes else "no such tensor"
            raise WavpruneError(f"tensor {name!r} is {tuple(tensor.shape)}; {source} has {there}")
    check_target(source, target, force)
    with replaced(target, overwrite=force) as new:
        new.mkdir()
        names = [file.path.name for file in files]
        for file in files:
            metadata = {} if report is None else entry_of(file, report)
            file.rewrite(new / file.path.name, tensors, metadata)
        in_place = target.exists() and target.samefile(source)
        copy_others(source, new, names, checkpoint.index, in_place=in_place)
