"""What was pruned in an ordinary safetensors file: an entry of its metadata.

Pruning in a wavelet basis leaves few weights that are 0, so that weights alone do not tell what was
kept. ``__metadata__["wavprune.pruned"]`` is JSON::

    {"version": 1, "bases": [[method, wavelet, mode, level_requested, level_used, force_level,
     by_importance]], "layers": {name: [number of its basis, kept]}}

A layer whose basis was computed from its weight has a third entry, the analysis matrix in float32
and base64. Whoever reads this checks that the coefficients that it calls pruned are still 0.
"""

from __future__ import annotations

import base64
import binascii
import json
from collections.abc import Mapping, Sequence
from dataclasses import astuple, dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..config import AUTO, BASES, MODES, PruneConfig
from ..engine.auto import BASES as SHORT
from ..engine.auto import WAVELETS as LONG
from ..errors import WavpruneError
from ..report import PruneReport
from .formats.names import WEIGHT, Weight
from .formats.onnxfile import OnnxFile
from .formats.safetensors import SafetensorsFile
from .stored_basis import is_count

KEY = "wavprune.pruned"
VERSION = 1
COMPACT: dict[str, Any] = {"separators": (",", ":"), "ensure_ascii": False}
# Values of a kernel up to which a matrix of its own is recorded.
LARGEST_MATRIX = 64
LONGEST_NAME = 200
DEEPEST = 64


@dataclass(frozen=True)
class PrunedLayer:
    """How a layer was pruned; see ``LayerStats`` and ``PruneConfig``.

    Attributes:
        method: what chose the coefficients.
        wavelet: the basis that ran.
        mode: PyWavelets' boundary mode; None where the basis has no boundary.
        level_requested: None means the deepest that exists.
        level_used: the level that ran.
        force_level: True where levels that PyWavelets calls too deep were allowed.
        by_importance: True where the coefficients were ranked by importance.
        kept: how many were kept.
        matrix: ``K x K`` float32 of a basis that was computed from the weight.
    """

    method: str
    wavelet: str
    mode: str | None
    level_requested: int | None
    level_used: int
    force_level: bool
    by_importance: bool
    kept: int
    matrix: bytes = b""

    @property
    def described(self) -> str:
        """The basis in words."""
        return f"{self.method} {self.wavelet}"


# Those whose metadata can say how they were pruned.
File = SafetensorsFile | OnnxFile
SHARED = tuple(field.name for field in fields(PrunedLayer))[:-2]


def pruned_metadata(report: PruneReport) -> dict[str, str]:
    """What a report says of its layers, as metadata of a safetensors file.

    ``wavprune compress`` and ``save`` read it from the file, and store what was kept. ``wavprune
    prune`` writes it by itself.

    Args:
        report: what pruning the model that is saved reported.

    Returns:
        One entry, for the argument ``metadata`` of safetensors' ``save_file`` and ``save_model``.

    Example:
        >>> import torch, wavprune
        >>> from wavprune.checkpoint import pruned_metadata
        >>> report = wavprune.fast.prune(torch.nn.Conv2d(2, 2, 3))
        >>> list(pruned_metadata(report))
        ['wavprune.pruned']
    """
    if not isinstance(report, PruneReport):
        raise TypeError(f"report must be a PruneReport, not {type(report).__name__}")
    return {KEY: to_text(layers_of(report))}


def layers_of(report: PruneReport) -> dict[str, PrunedLayer]:
    """How each layer of a report was pruned, by its name in a file."""
    result = {}
    for stats in report:
        basis = report.bases.get(stats.name)
        matrix = b""
        if basis is not None and basis.data_driven and basis.num_values <= LARGEST_MATRIX:
            matrix = basis.analysis.astype("<f4").tobytes()
        # A bare layer is its own model, and has no name.
        result[stats.name or WEIGHT] = PrunedLayer(
            method=stats.method,
            wavelet=stats.wavelet,
            mode=stats.mode,
            level_requested=stats.level_requested,
            level_used=stats.level_used,
            force_level=report.settings.force_level,
            by_importance=report.settings.percentile is None,
            kept=stats.kept,
            matrix=matrix,
        )
    return result


def to_text(layers: Mapping[str, PrunedLayer]) -> str:
    """The entry, as ``parse`` takes it."""
    numbers: dict[tuple[Any, ...], int] = {}
    entries = {}
    for name, layer in layers.items():
        number = numbers.setdefault(astuple(layer)[: len(SHARED)], len(numbers))
        entries[name] = [number, layer.kept]
        if layer.matrix:
            entries[name].append(base64.b64encode(layer.matrix).decode())  # type: ignore[arg-type]
    content = {"version": VERSION, "bases": [list(key) for key in numbers], "layers": entries}
    return json.dumps(content, **COMPACT)


def parse(text: str) -> dict[str, PrunedLayer]:
    """The layers of an entry.

    Raises:
        WavpruneError: it is not what this version writes.
    """
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise WavpruneError(f"its metadata {KEY!r} is no JSON: {error}") from error
    version = content.get("version") if isinstance(content, dict) else None
    if version != VERSION or type(version) is not int:
        raise WavpruneError(
            f"its metadata {KEY!r} is of version {str(version)[:40]!r}; this wavprune reads "
            f"version {VERSION}"
        )
    bases, layers = content.get("bases"), content.get("layers")
    if (
        not isinstance(bases, list)
        or not all(map(_is_basis, bases))
        or not isinstance(layers, dict)
    ):
        raise WavpruneError(f"its metadata {KEY!r} does not say which bases its layers have")
    result = {}
    for name, entry in layers.items():
        known = isinstance(entry, list) and len(entry) in (2, 3)
        if not known or not is_count(entry[0], high=len(bases) - 1) or not is_count(entry[1]):
            raise WavpruneError(f"its metadata {KEY!r} says {str(entry)[:100]} of layer {name!r}")
        matrix = _matrix(name, entry[2]) if len(entry) == 3 else b""
        shared: dict[str, Any] = dict(zip(SHARED, bases[entry[0]], strict=True))
        result[name] = PrunedLayer(**shared, kept=entry[1], matrix=matrix)
    return result


def pruned_of(file: File) -> dict[str, PrunedLayer]:
    """The layers that a file says were pruned.

    Raises:
        WavpruneError: its entry is not what this version writes.
    """
    try:
        return pruned_in(file.metadata)
    except WavpruneError as error:
        raise WavpruneError(f"{file.path}: {error}; remove that entry") from error


def pruned_in(metadata: Mapping[str, str]) -> dict[str, PrunedLayer]:
    """The layers that metadata say were pruned.

    Raises:
        WavpruneError: the entry is not what this version writes.
    """
    text = metadata.get(KEY)
    return {} if text is None else parse(text)


def _is_basis(entry: Any) -> bool:
    if not isinstance(entry, list) or len(entry) != len(SHARED):
        return False
    method, wavelet, mode, requested, used, *flags = entry
    names = all(isinstance(name, str) and len(name) <= LONGEST_NAME for name in (method, wavelet))
    levels = is_count(used, high=DEEPEST) and (requested is None or is_count(requested, 1))
    is_mode = mode is None or (isinstance(mode, str) and mode in MODES)
    return names and levels and is_mode and all(type(flag) is bool for flag in flags)


def _matrix(name: str, text: Any) -> bytes:
    try:
        matrix = base64.b64decode(text, validate=True)
    except (TypeError, ValueError, binascii.Error):
        matrix = b""
    if not matrix or len(matrix) > 4 * LARGEST_MATRIX**2 or len(matrix) % 4:
        raise WavpruneError(f"its metadata {KEY!r} has no matrix for layer {name!r}")
    return matrix


def entry_of(file: File, report: PruneReport) -> dict[str, str]:
    """The metadata of a file whose layers a report pruned, beside those pruned before."""
    own = {weight.layer for weight in file.weights}
    known = {name: layer for name, layer in pruned_of(file).items() if name in own}
    known |= {name: layer for name, layer in layers_of(report).items() if name in own}
    return {KEY: to_text(known)}


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
