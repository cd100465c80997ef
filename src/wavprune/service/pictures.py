"""Kernels of a layer before and after, and the coefficients between them."""

from __future__ import annotations

import html
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch

from ..bases import basis_for, kernel_shape
from ..config import AUTO, PruneConfig
from .analysis import ModelCurves
from .curves import Floats
from .preview import preview, thresholds

CELL, GAP, TITLE = 8, 12, 18
# Of a coefficient, relative to its kernel.
ROUNDING = 8 * float(np.finfo(np.float32).eps)


class Kernels(NamedTuple):
    """Some kernels of a layer.

    Attributes:
        layer: its name.
        basis: its basis.
        kernel: rows and columns of a kernel.
        grid: rows and columns of its coefficients.
        before: ``(n, K)``.
        coefficients: ``(n, M)``, scaled to what each changes in the kernel.
        kept: ``(n, M)``.
        after: ``(n, K)``.
    """

    layer: str
    basis: str
    kernel: tuple[int, int]
    grid: tuple[int, int]
    before: Floats
    coefficients: Floats
    kept: Floats
    after: Floats


def kernels(model: ModelCurves, layer: int, basis: str, sparsity: float, scope: str) -> Kernels:
    """The strongest kernels of a layer, or a corner of a layer of 1x1 kernels.

    Args:
        model: its curves.
        layer: index of the layer.
        basis: one of ``model.bases``, or ``"auto"``.
        sparsity: in [0, 1).
        scope: ``"layer"`` or ``"global"``.
    """
    facts = model.layers[layer]
    if basis == AUTO:
        basis = preview(model, basis, sparsity, scope).layers[layer].basis
    threshold = thresholds(model, basis, sparsity, scope)[layer]
    before = model.samples[layer]
    kernel = kernel_shape(facts.shape).kernel
    if kernel == (1, 1):
        # Every value is a kernel of its own; they are shown side by side.
        kept = np.abs(before) >= max(threshold, np.finfo(np.float32).tiny)
        grid = before.shape[0], before.shape[1]
        flat = before.reshape(1, -1)
        mask = kept.reshape(1, -1)
        return Kernels(facts.name, basis, grid, grid, flat, flat, mask, flat * mask)
    if not len(before):
        mask = np.zeros(before.shape, dtype=np.bool_)
        return Kernels(facts.name, basis, kernel, kernel, before, before, mask, before)
    analysis, synthesis, grid, rows = _matrices(model, layer, basis)
    inner = before @ analysis.T.astype(np.float32)
    # The threshold is one of the coefficients, summed in another order when it was found.
    rounding = ROUNDING * np.linalg.norm(before, axis=1, keepdims=True)
    inner_kept = np.abs(inner) >= np.maximum(threshold - rounding, np.finfo(np.float32).tiny)
    after = (inner * inner_kept) @ synthesis.T
    count = grid[0] * grid[1]
    coefficients = np.zeros((len(before), count), dtype=np.float32)
    mask = np.zeros((len(before), count), dtype=np.bool_)
    coefficients[:, rows], mask[:, rows] = inner, inner_kept
    return Kernels(facts.name, basis, kernel, grid, before, coefficients, mask, after)


def _matrices(
    model: ModelCurves, layer: int, basis: str
) -> tuple[Floats, Floats, tuple[int, int], Floats]:
    own = model.matrices.get((layer, basis))
    if own is not None:
        # They have no places; in the order of their variance they fill the kernel.
        return own, own.T, kernel_shape(model.layers[layer].shape).kernel, np.arange(len(own))
    weight = torch.zeros(1, 1, *model.layers[layer].kernel)
    found = basis_for(PruneConfig(wavelet=basis), weight)
    operator = found.importance_operator
    return operator.analysis, operator.synthesis, found.grid, operator.rows


def as_svg(picture: Kernels) -> str:
    """The picture as an SVG file that shows itself in light and dark."""
    count = len(picture.before)
    largest = float(np.abs(picture.before).max()) if picture.before.size else 0.0
    peak = float(np.abs(picture.coefficients).max()) if picture.coefficients.size else 0.0
    columns = (
        ("before", picture.kernel, picture.before, None, largest),
        (f"coefficients ({picture.basis})", picture.grid, picture.coefficients, picture.kept, peak),
        ("after", picture.kernel, picture.after, None, largest),
    )
    parts: list[str] = []
    step = max(rows for _, (rows, _), *_ in columns) * CELL + GAP
    x, height = 0, TITLE + count * step
    for title, (_, cols), values, kept, scale in columns:
        parts.append(f'<text x="{x}" y="12">{html.escape(title)}</text>')
        for i in range(count):
            mask = None if kept is None else kept[i]
            parts += _cells(x, TITLE + i * step, cols, values[i], mask, scale)
        x += max(cols * CELL, 7 * len(title)) + 2 * GAP
    style = "text{font:12px sans-serif;fill:#333}@media(prefers-color-scheme:dark){text{fill:#ddd}}"
    name = html.escape(picture.layer)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {x} {height}" width="{x}" '
        f'height="{height}" shape-rendering="crispEdges" role="img" '
        f'aria-label="Kernels of {name} before and after">'
        f"<title>{name}</title><style>{style}</style>{''.join(parts)}</svg>"
    )


def _cells(
    x: int, y: int, columns: int, values: Floats, kept: Floats | None, scale: float
) -> Iterable[str]:
    for i, value in enumerate(values.tolist()):
        left, top = x + i % columns * CELL, y + i // columns * CELL
        if kept is not None and not kept[i]:
            yield f'<circle cx="{left + CELL / 2}" cy="{top + CELL / 2}" r="1" fill="#888"/>'
            continue
        place = f'x="{left}" y="{top}" width="{CELL}" height="{CELL}"'
        yield f'<rect {place} fill="{_color(value, scale)}"/>'


def _color(value: float, scale: float) -> str:
    """Blue below 0, red above it."""
    share = max(-1.0, min(1.0, value / scale)) if scale else 0.0
    end = (178, 24, 43) if share > 0 else (33, 102, 172)
    mixed = (round(247 + (part - 247) * abs(share) ** 0.7) for part in end)
    return "#" + "".join(f"{part:02x}" for part in mixed)
