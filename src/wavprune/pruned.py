"""What was pruned in an ordinary safetensors file or ONNX model: an entry of its metadata.

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
from collections.abc import Collection, Mapping
from dataclasses import astuple, dataclass, fields
from typing import Any

from .common.checks import is_count
from .config import MODES
from .errors import WavpruneError
from .report import PruneReport

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
        result[stats.name or "weight"] = PrunedLayer(
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


def pruned_in(metadata: Mapping[str, str]) -> dict[str, PrunedLayer]:
    """The layers that metadata say were pruned.

    Raises:
        WavpruneError: the entry is not what this version writes.
    """
    text = metadata.get(KEY)
    return {} if text is None else parse(text)


def record_of(
    report: PruneReport, names: Collection[str], before: Mapping[str, str]
) -> dict[str, str]:
    """The entry of a model whose layers a report pruned, beside those that were pruned before.

    Args:
        report: what was pruned.
        names: the layers of the model.
        before: its metadata.

    Raises:
        WavpruneError: the metadata have an entry that is not what this version writes.
    """
    layers = pruned_in(before) | layers_of(report)
    return {KEY: to_text({name: layer for name, layer in layers.items() if name in names})}


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
