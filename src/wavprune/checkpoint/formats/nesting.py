"""Tensors in nested dicts and lists, as training scripts save them, and the state dict in them.

A checkpoint may be a state dict, or hold one under ``"state_dict"``, ``"model"`` or any other
name, beside an optimizer's state and counters. Tensors get dotted names; what all weights' names
have in common is the prefix of the state dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch

from ...errors import WavpruneError
from .names import Weight, weights_of

DEEPEST = 64
# A dict may be in several places, and so may one that holds it: 2 ** 64 entries fit a small file.
MOST_ENTRIES = 1 << 20
# What a module adds to its state dict beside tensors; its layout is the module's own.
EXTRA_STATE = "_extra_state"


class Nested(NamedTuple):
    """The tensors of a nested checkpoint.

    Attributes:
        tensors: every tensor by its dotted name.
        weights: the layers' weights among them.
        skipped: layers that cannot be pruned, and why.
        others: the names of entries that are neither tensors nor hold any.
        prefix: what the names of all weights begin with, such as ``"state_dict."``.
    """

    tensors: dict[str, torch.Tensor]
    weights: list[Weight]
    skipped: dict[str, str]
    others: list[str]
    prefix: str


def flatten(content: Any) -> Nested:
    """Find the tensors in nested dicts, lists and tuples.

    Raises:
        WavpruneError: the content contains itself or nests too deep, or two tensors get one name.
    """
    search = _Search()
    search.visit(content, (), (), ())
    shapes = {name: tensor.shape for name, tensor in search.tensors.items()}
    weights, skipped = weights_of(shapes)
    prefix = _prefix([search.containers[weight.key] for weight in weights])
    return Nested(search.tensors, weights, skipped, search.others, prefix)


class _Search:
    """What was found so far.

    Attributes:
        tensors: by dotted name.
        containers: of each tensor, the names of the containers that it is in.
        others: dotted names of what holds no tensor.
    """

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.containers: dict[str, tuple[str, ...]] = {}
        self.others: list[str] = []
        self._entries = 0

    def visit(
        self, value: Any, names: tuple[str, ...], above: tuple[str, ...], ids: tuple[int, ...]
    ) -> None:
        """Add a value, and all that is in it.

        Args:
            value: a tensor, a container or anything else.
            names: the keys that lead to it.
            above: those that lead to its container.
            ids: of the containers that it is in.
        """
        self._entries += 1
        if self._entries > MOST_ENTRIES:
            raise WavpruneError(f"it has more than {MOST_ENTRIES:,} entries")
        path = ".".join(names)
        if isinstance(value, torch.Tensor):
            if path in self.tensors:
                raise WavpruneError(f"two of its tensors are called {path!r}")
            self.tensors[path] = value
            self.containers[path] = above
            return
        if not _holds_tensors(value) or path.endswith(EXTRA_STATE):
            self.others.append(path)
            return
        if id(value) in ids:
            raise WavpruneError(f"its entry {path!r} contains itself")
        if len(ids) == DEEPEST:
            shown = path if len(path) <= 60 else f"{path[:60]}..."
            raise WavpruneError(f"its entry {shown!r} nests more than {DEEPEST} deep")
        entries = value.items() if isinstance(value, Mapping) else enumerate(value)
        for key, entry in entries:
            self.visit(entry, (*names, str(key)), names, (*ids, id(value)))


def _holds_tensors(value: Any) -> bool:
    """True for a dict or list in which tensors may be; False where it has numbers and strings."""
    if not isinstance(value, Mapping | list | tuple):
        return False
    entries = value.values() if isinstance(value, Mapping) else value
    return any(isinstance(entry, torch.Tensor | Mapping | list | tuple) for entry in entries)


def _prefix(containers: list[tuple[str, ...]]) -> str:
    """What the names of all containers begin with, in whole names."""
    if not containers:
        return ""
    common = containers[0]
    for other in containers[1:]:
        length = next(
            (i for i, (a, b) in enumerate(zip(common, other, strict=False)) if a != b),
            min(len(common), len(other)),
        )
        common = common[:length]
    return "".join(f"{name}." for name in common)
