"""Files that say how their layers were pruned (``wavprune.pruned``)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from ..config import AUTO, BASES, MODES, PruneConfig
from ..engine.auto import BASES as SHORT
from ..engine.auto import WAVELETS as LONG
from ..errors import WavpruneError
from ..pruned import (
    COMPACT,
    DEEPEST,
    KEY,
    LARGEST_MATRIX,
    VERSION,
    PrunedLayer,
    pruned_in,
    record_of,
    to_text,
)
from ..report import PruneReport
from .formats.names import Weight
from .formats.onnxfile import OnnxFile
from .formats.safetensors import SafetensorsFile

# Those whose metadata can say how they were pruned.
File = SafetensorsFile | OnnxFile


def pruned_of(file: File) -> dict[str, PrunedLayer]:
    """The layers that a file says were pruned.

    Raises:
        WavpruneError: its entry is not what this version writes.
    """
    with _named(file):
        return pruned_in(file.metadata)


@contextmanager
def _named(file: File) -> Iterator[None]:
    try:
        yield
    except WavpruneError as error:
        raise WavpruneError(f"{file.path}: {error}; remove that entry") from error


def entry_of(file: File, report: PruneReport) -> dict[str, str]:
    """The metadata of a file whose layers a report pruned, beside those pruned before."""
    with _named(file):
        return record_of(report, {weight.layer for weight in file.weights}, file.metadata)


def make_room(file: File, weights: Sequence[Weight], config: PruneConfig) -> None:
    """Let copies of a file have room for what will be known when its weights are pruned."""
    file.make_room({KEY: ""}, _room_for(weights, config, pruned_of(file)))


def note(file: File, copy: Path, report: PruneReport) -> None:
    """Write what was pruned into a copy that has room for it."""
    file.note(copy, entry_of(file, report))


def _room_for(
    weights: Sequence[Weight], config: PruneConfig, before: Mapping[str, PrunedLayer]
) -> int:
    """The most characters that the entry of a file takes, as JSON in JSON.

    Args:
        weights: that will be pruned.
        config: how.
        before: layers that were pruned before.
    """
    name = config.basis_name
    candidates = (*SHORT, *LONG) if name == AUTO else ("identity", name)
    # The levels of a matrix follow from its whole shape.
    count = len({weight.shape[2:] or weight.shape for weight in weights}) * len(candidates)
    longest = max(candidates, key=len), max(MODES, key=len)
    basis = [config.method, *longest, config.level or DEEPEST, DEEPEST, False, False]
    layers: dict[str, Any] = {}
    for weight in weights:
        values = int(np.prod(weight.shape[2:]))
        entry: list[Any] = [count + len(before), 64 * int(np.prod(weight.shape))]
        if name != AUTO and BASES[name].data_driven and values <= LARGEST_MATRIX:
            entry.append("=" * (4 * -(-4 * values**2 // 3)))
        layers[weight.layer] = entry
    content = {"version": VERSION, "bases": [basis] * count, "layers": layers}
    text = json.dumps(content, **COMPACT) + to_text(before)
    return len(json.dumps(text, ensure_ascii=False).encode())
