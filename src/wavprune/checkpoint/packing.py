"""Writing of packed files: from the weights alone, and what every way of writing them shares."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from ..common.atomic import replaced
from ..errors import WavpruneError
from .container import KEY, tensor_writer
from .formats.names import layer_name
from .items import Item, Quantised, item_of
from .norms import NormLink, from_grid, unfold
from .packed import Packer
from .packed_layout import METADATA, TENSOR, crc_of
from .plan import Plan
from .report import SavedLayer, SaveReport
from .sources import Source, Tensor

# How far from its target a file may be, and how many steps are tried.
TOLERANCE = 0.008
ROUNDS = 9
# Bits of a weight for twice the step, at fine steps.
FALLS = 1.0


class Packed(NamedTuple):
    """A model's bytes.

    Attributes:
        data: of the file's tensor.
        layers: says what was done to each.
    """

    data: bytes
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
    changed: Mapping[str, torch.Tensor] | None = None,
    norms: Norms | None = None,
) -> Packed:
    """The bytes of a model.

    Args:
        source: its tensors.
        quantised: by name, those that are stored as indices.
        changed: by name, tensors that are stored as they are, but not as the source has them.
        norms: batch norms that can be fine-tuned.
    """
    links = [] if norms is None else norms.links
    on_grid = {name for link in links for name in (link.gamma, link.var)}
    packer = Packer(source.metadata)
    stored: list[tuple[Quantised, torch.Tensor, int]] = []
    for name in source.names:
        if name in source.aliases:
            packer.alias(name, source.aliases[name])
            continue
        found = quantised.get(name)
        if found is not None:
            tensor = found.tensor()
            crc = crc_of(tensor)
            found.pack(packer, crc)
            stored.append((found, tensor, crc))
            continue
        entry = source.tensors[name]
        if norms is not None and name in on_grid:
            packer.logs(name, entry.dtype, norms.original.tensors[name].read())
            continue
        values = (changed or {}).get(name)
        values = entry.read() if values is None else values
        flat = values.contiguous().reshape(-1).view(torch.uint8).numpy()
        packer.raw(name, entry.dtype, entry.shape, flat)
    for link in links:
        packer.link(link)
    data, sizes = packer.finish()

    def layers() -> list[SavedLayer]:
        unfolded = _unfolded(stored, norms)
        result = []
        for (found, tensor, crc), size in zip(stored, sizes, strict=True):
            item = found.item
            if item.name in unfolded:
                original, tensor = unfolded[item.name]
                result.append(_saved(found, original, tensor, size, crc_of(tensor)))
            else:
                result.append(_saved(found, item.original, tensor, size, crc))
        return result

    return Packed(data, layers)


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
    peak = float(change.abs().max()) if change.numel() else 0.0
    if peak and (not norm * norm or not math.isfinite(norm)):
        # Squares of these have no room.
        norm = peak * float((change.double() / peak).norm())
    return norm


def file_size(data: bytes) -> int:
    """Bytes of the file that ``write`` writes."""
    entry = {"dtype": "U8", "shape": [len(data)], "data_offsets": [0, len(data)]}
    header = json.dumps({"__metadata__": {KEY: METADATA}, TENSOR: entry}, separators=(",", ":"))
    return 8 + -(-len(header) // 8) * 8 + len(data)


def write(data: bytes, new: Path) -> None:
    """Write a file of these bytes."""
    with tensor_writer(new) as writer, new.open("wb") as file:
        writer.write(data)
        writer.close(TENSOR, "U8")
        writer.finish(file, {KEY: METADATA})


class Search:
    """Finds the number ``c`` at which a file has some bytes.

    Args:
        target: bytes.
        weights: how many follow ``c``.
        start: the first to try.

    Attributes:
        c: the next to try; None when the last one was close enough.
    """

    def __init__(self, target: float, weights: int, start: float) -> None:
        self.target, self._weights = target, weights
        self.c: float | None = start
        self._tried: list[tuple[float, float]] = []

    def report(self, size: int) -> None:
        """Say how many bytes the file of ``c`` has.

        Raises:
            WavpruneError: no ``c`` reaches the target.
        """
        assert self.c is not None
        if abs(size - self.target) <= TOLERANCE * self.target:
            self.c = None
            return
        at = math.log2(self.c)
        self._tried.append((at, float(size)))
        if len(self._tried) == ROUNDS:
            nearest = min(self._tried, key=lambda tried: abs(tried[1] - self.target))[1]
            raise WavpruneError(
                f"no step brings the file to {self.target:,.0f} bytes; the nearest has "
                f"{nearest:,.0f}, of which the tensors that stay as they are may be most"
            )
        larger = max((t for t in self._tried if t[1] > self.target), default=None)
        smaller = min((t for t in self._tried if t[1] < self.target), default=None)
        if larger is None or smaller is None:
            move = 8 * (size - self.target) / (FALLS * self._weights)
            self.c = 2.0 ** (at + min(max(1.1 * move, -3.0), 3.0))
            return
        share = (larger[1] - self.target) / (larger[1] - smaller[1])
        self.c = 2.0 ** (larger[0] + min(max(share, 0.05), 0.95) * (smaller[0] - larger[0]))


def save_from_weights(
    source: Source,
    chosen: Sequence[Tensor],
    plan: Plan,
    step: float | None,
    goal: float | None,
    path: Path,
) -> SaveReport:
    """Write a file whose steps follow from the weights alone: one number times each norm.

    Args:
        source: all tensors.
        chosen: those to compress.
        plan: in which basis, and what is pruned.
        step: that number.
        goal: bytes, which choose it.
        path: the file.

    Raises:
        WavpruneError: a weight is not finite, or the goal is out of reach.
    """
    begin = time.perf_counter()
    items = list(map(_item(plan), chosen))
    weights = sum(item.matrix.size for item in items)

    def at(c: float) -> Packed:
        return pack(source, {item.name: item.quantised(c / 2) for item in items})

    c = 0.0 if step is None else step
    if goal is None:
        done = at(c)
    else:
        search = Search(goal, weights, 0.01)
        while search.c is not None:
            c = search.c
            done = at(c)
            search.report(file_size(done.data))
    return finish(source, done, path, begin, step=c)


def finish(
    source: Source,
    done: Packed,
    path: Path,
    begin: float,
    *,
    step: float | None,
    predicted_kl: float | None = None,
    measured_kl: float | None = None,
) -> SaveReport:
    """Write a model's bytes, and say what was done."""
    with replaced(path) as new:
        write(done.data, new)
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


def _item(plan: Plan) -> Callable[[Tensor], Item]:
    def item(tensor: Tensor) -> Item:
        layer = plan.layer(tensor)
        try:
            return item_of(tensor.name, layer, tensor.read(), unit=layer.norm or 1.0)
        except WavpruneError as error:
            raise WavpruneError(f"layer {layer_name(tensor.name)!r}: {error}") from error

    return item
