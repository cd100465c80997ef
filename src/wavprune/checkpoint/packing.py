"""Writing of packed files: of quantised tensors, and what every way of writing them shares."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..common.atomic import replaced
from .compressor import bytes_of
from .formats.names import layer_name
from .items import Quantised
from .norms import NormLink, from_grid, unfold
from .packed import Packed, Packer, header_of
from .packed_layout import crc_of
from .report import SavedLayer, SaveReport
from .search import search_bytes
from .sources import Source

# How far from its target a file may be.
TOLERANCE = 0.008


class Model(NamedTuple):
    """A model, packed.

    Attributes:
        packed: its bytes.
        layers: says what was done to each.
    """

    packed: Packed
    layers: Callable[[], list[SavedLayer]]


class Norms(NamedTuple):
    """Batch norms that are folded in a source, and come back when a file is read.

    Attributes:
        original: the tensors of the model that was not folded.
        links: the batch norms.
    """

    original: Source
    links: Sequence[NormLink]


def pack(
    source: Source,
    quantised: Mapping[str, Quantised],
    folder: Path,
    changed: Mapping[str, torch.Tensor] | None = None,
    norms: Norms | None = None,
) -> Model:
    """Pack a model.

    Args:
        source: its tensors.
        quantised: by name, those that are stored as indices.
        folder: where large streams wait on disk.
        changed: by name, tensors that are stored as they are, but not as the source has them.
        norms: batch norms that can be fine-tuned.
    """
    links = [] if norms is None else norms.links
    on_grid = {name for link in links for name in (link.gamma, link.var)}
    packer = Packer(source.metadata)
    stored: list[tuple[Quantised, torch.Tensor, int]] = []

    def put(name: str) -> bool:
        entry = source.tensors[name]
        if name in quantised:
            tensor = quantised[name].tensor()
            crc = crc_of(tensor)
            quantised[name].pack(packer, crc)
            stored.append((quantised[name], tensor, crc))
        elif norms is not None and name in on_grid:
            packer.logs(name, entry.dtype, norms.original.tensors[name].read())
        elif changed is not None and name in changed:
            values = changed[name].contiguous().reshape(-1).view(torch.uint8).numpy()
            packer.raw(name, entry.dtype, entry.shape, lambda: [bytes_of(values)])
        else:
            return False
        return True

    put_all(source, packer, put)
    for link in links:
        packer.link(link)
    packed = packer.finish(folder)

    def layers() -> list[SavedLayer]:
        unfolded = _unfolded(stored, norms)
        result = []
        for (found, tensor, crc), size in zip(stored, packed.sizes, strict=True):
            item = found.item
            if item.name in unfolded:
                original, tensor = unfolded[item.name]
                result.append(_saved(found, original, tensor, size, crc_of(tensor)))
            else:
                result.append(_saved(found, item.original, tensor, size, crc))
        return result

    return Model(packed, layers)


def put_all(source: Source, packer: Packer, put: Callable[[str], bool]) -> None:
    """Put all tensors of a model into a file: ``put`` those that it takes, the others as they are.

    Args:
        source: the tensors.
        packer: of the file.
        put: takes a name; False where it leaves the tensor.
    """
    for name in source.names:
        if name in source.aliases:
            packer.alias(name, source.aliases[name])
        elif not put(name):
            entry = source.tensors[name]
            packer.raw(name, entry.dtype, entry.shape, entry.pieces)


def _unfolded(
    stored: Sequence[tuple[Quantised, torch.Tensor, int]], norms: Norms | None
) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """What weights and biases of batch norms are in the model, and what they come back as."""
    if norms is None:
        return {}
    tensors = {found.item.name: tensor for found, tensor, _ in stored}
    result: dict[str, tuple[torch.Tensor, torch.Tensor]] = {}
    for link in norms.links:
        read = {name: norms.original.tensors[name].read() for name in link.names}
        held = {name: tensors.get(name, read[name]) for name in link.names}
        held |= {name: from_grid(read[name]) for name in (link.gamma, link.var)}
        unfolded = unfold(link, held)
        result |= {name: (read[name], unfolded[name]) for name in (link.weight, link.bias)}
    return result


def _saved(
    found: Quantised, original: torch.Tensor, tensor: torch.Tensor, size: int, crc: int
) -> SavedLayer:
    item = found.item
    error, norm = _norm(tensor, original), _norm(original)
    return SavedLayer(
        name=layer_name(item.name) if item.name.endswith("weight") else item.name,
        shape=item.layout.shape,
        wavelet="identity" if item.basis is None else item.basis.name,
        values="trellis",
        coder="trellis",
        coefficients=found.indices.size,
        kept=int(np.count_nonzero(found.indices)),
        bytes=size,
        error=error,
        norm=norm,
        relative_error=error / norm if norm else 0.0,
        checksum=crc,
    )


def _norm(values: torch.Tensor, other: torch.Tensor | None = None) -> float:
    """The Frobenius norm of values, or of their difference from others."""
    if values.dtype in (torch.float16, torch.bfloat16):
        values, other = values.float(), None if other is None else other.float()
    change = values if other is None else values - other
    norm = float(torch.linalg.vector_norm(change, dtype=torch.float64))
    if change.numel() and (not norm * norm or not math.isfinite(norm)):
        # Squares of these have no room.
        peak = float(change.abs().max())
        norm = peak * float((change.double() / peak).norm()) if peak else 0.0
    return norm


def reach_bytes(
    pack_at: Callable[[float], Model], target: float, first: float, weights: int
) -> tuple[float, Model]:
    """The number ``c`` at which a file has some bytes, and the model's.

    Args:
        pack_at: packs the model.
        target: bytes of the file.
        first: the first ``c`` to try.
        weights: how many follow ``c``.

    Raises:
        WavpruneError: no ``c`` reaches the target.
    """
    done: Model

    def size_of(c: float) -> int:
        nonlocal done
        done = pack_at(c)
        size = done.packed.size
        return len(header_of(size)) + size

    # A bit less of each weight for twice the step, at fine steps.
    slope = -weights / (8 * math.log(2))
    c = search_bytes(size_of, target, TOLERANCE, first, lambda _: slope)
    return c, done


def finish(
    source: Source,
    done: Model,
    path: Path,
    begin: float,
    *,
    step: float | None,
    predicted_kl: float | None = None,
    measured_kl: float | None = None,
) -> SaveReport:
    """Write a model's bytes, and say what was done."""
    with replaced(path) as new:
        with new.open("wb") as file:
            done.packed.write(file)
        size = new.stat().st_size
    return SaveReport(
        path=path,
        bytes=size,
        uncompressed=source.size,
        elements=source.elements,
        layers=tuple(done.layers()),
        step=step,
        seconds=time.perf_counter() - begin,
        skipped=source.skipped,
        left_out=source.left_out,
        predicted_kl=predicted_kl,
        measured_kl=measured_kl,
    )
