"""What settings would do to a model, from its curves."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from ..config import AUTO, SCOPES
from ..engine.auto import BASES as CHOSEN_AMONG
from ..engine.auto import WAVELETS
from ..errors import WavpruneError
from .analysis import ModelCurves
from .curves import GRID, IDENTITY, SIZE_GRID, STEPS, Floats

BISECTIONS = 30


class LayerPreview(NamedTuple):
    """What becomes of one layer.

    Attributes:
        name: of the layer.
        basis: its basis; with ``"auto"`` the best.
        best: the basis with the least error at what is kept.
        sparsity: the fraction of it that is pruned.
        kept: coefficients.
        error: relative change of its weight.
        bytes: in a compressed file, values of 8 bits.
    """

    name: str
    basis: str
    best: str
    sparsity: float
    kept: int
    error: float
    bytes: int


class Preview(NamedTuple):
    """What becomes of a model.

    Attributes:
        basis: what was asked for.
        sparsity: of all its layers together.
        kept: coefficients.
        error: relative change of the weights of all layers.
        bytes: of a compressed file, values of 8 bits.
        errors: the same error in every basis, and with ``"auto"``.
        layers: one entry a layer.
    """

    basis: str
    sparsity: float
    kept: int
    error: float
    bytes: int
    errors: dict[str, float]
    layers: list[LayerPreview]


class _Row(NamedTuple):
    """Every layer in one choice of bases.

    Attributes:
        chosen: ``(L,)``, the basis of each.
        sparsity: ``(L,)``.
        kept: ``(L, B)``, in every basis.
        errors: ``(L, B)``, squared.
    """

    chosen: Floats
    sparsity: Floats
    kept: Floats
    errors: Floats

    def of(self, values: Floats) -> Floats:
        """Values ``(L, B)`` in the chosen bases, ``(L,)``."""
        return np.asarray(values[np.arange(len(self.chosen)), self.chosen])


def preview(model: ModelCurves, basis: str, sparsity: float, scope: str = "layer") -> Preview:
    """What pruning would do, without pruning.

    At the sparsities of ``curves.GRID`` errors and counts are those of ``prune``; between them, and
    with scope ``"global"``, they are interpolated.

    Args:
        model: its curves.
        basis: one of ``model.bases``, or ``"auto"``.
        sparsity: in [0, 1).
        scope: ``"layer"`` or ``"global"``.

    Raises:
        WavpruneError: the basis was not measured, or the sparsity or the scope is not allowed.
    """
    check(model, basis)
    if not 0 <= sparsity < 1:
        raise WavpruneError(f"sparsity={sparsity!r}; allowed: numbers in [0, 1)")
    if scope not in SCOPES:
        raise WavpruneError(f"scope={scope!r}; allowed: {', '.join(SCOPES)}")
    rows = _rows(model, sparsity, scope)
    row = rows[basis]
    kept, errors, best = row.of(row.kept), row.of(row.errors), row.errors.argmin(axis=1)
    sizes = _sizes(model, row)
    total = float(model.norms.sum())
    layers = [
        LayerPreview(
            fact.name,
            IDENTITY if fact.is_pointwise else model.bases[row.chosen[i]],
            model.bases[best[i]],
            max(0.0, 1 - float(kept[i]) / fact.numel),
            int(kept[i]),
            _relative(errors[i], model.norms[i]),
            round(sizes[i]),
        )
        for i, fact in enumerate(model.layers)
    ]
    all_kept = int(kept.sum())
    return Preview(
        basis,
        max(0.0, 1 - all_kept / model.numel),
        all_kept,
        _relative(errors.sum(), total),
        round(float(sizes.sum()) + model.other_bytes),
        {name: _relative(one.of(one.errors).sum(), total) for name, one in rows.items()},
        layers,
    )


def check(model: ModelCurves, basis: str) -> None:
    """Raise WavpruneError where a basis was not measured."""
    if basis != AUTO and basis not in model.bases:
        raise WavpruneError(f"basis={basis!r}; allowed here: {', '.join((*model.bases, AUTO))}")


def curves(model: ModelCurves, layer: int | None) -> dict[str, Any]:
    """The curves of one layer, or of all together, ready for JSON.

    Returns:
        ``sparsity`` ``(G,)``; and by basis, and for ``"auto"``, ``errors`` there, relative, and
        ``sizes``: pairs of bytes and relative errors at falling steps.
    """
    which = slice(None) if layer is None else slice(layer, layer + 1)
    errors = model.curves.errors[which]
    step_sizes, step_errors = model.curves.step_sizes[which], model.curves.step_errors[which]
    norm = float(model.norms[which].sum())
    other = model.other_bytes if layer is None else 0
    # At a step every basis has about the same error, so the best takes the fewest bytes.
    among = _among(model)
    best = among[step_sizes[:, among].argmin(axis=1)]
    by_name: dict[str, dict[str, Any]] = {}
    for i, name in enumerate(model.bases):
        by_name[name] = _series(errors[:, i], step_sizes[:, i], step_errors[:, i], norm, other)
    pick = best[:, None]
    by_name[AUTO] = _series(
        errors[:, among].min(axis=1),
        np.take_along_axis(step_sizes, pick, 1)[:, 0],
        np.take_along_axis(step_errors, pick, 1)[:, 0],
        norm,
        other,
    )
    return {"sparsity": GRID.tolist(), "steps": STEPS.tolist(), "bases": by_name}


def thresholds(model: ModelCurves, basis: str, sparsity: float, scope: str) -> Floats:
    """The least importance that each layer keeps in a basis, ``(L,)``."""
    check(model, basis)
    row = _rows(model, sparsity, scope)[basis]
    return row.of(_interpolated(model.curves.thresholds, row.sparsity))


def _series(
    errors: Floats, step_sizes: Floats, step_errors: Floats, norm: float, other: int
) -> dict[str, Any]:
    scale = norm or 1.0
    return {
        "errors": np.sqrt(errors.sum(axis=0) / scale).round(6).tolist(),
        "sizes": (step_sizes.sum(axis=0) + other).round().astype(int).tolist(),
        "size_errors": np.sqrt(step_errors.sum(axis=0) / scale).round(6).tolist(),
    }


def _rows(model: ModelCurves, sparsity: float, scope: str) -> dict[str, _Row]:
    """Every basis for all layers, and ``"auto"``."""
    count = len(model.layers)
    fixed = np.repeat(np.arange(len(model.bases))[:, None], count, axis=1)
    if scope == "layer":
        row = _at(model, np.full(count, sparsity))
        rows = {name: row._replace(chosen=fixed[i]) for i, name in enumerate(model.bases)}
        rows[AUTO] = row._replace(chosen=_best(model, row.errors))
        return rows
    shared = _shared(model, fixed, sparsity)
    rows = {
        name: _at(model, shared[i])._replace(chosen=fixed[i]) for i, name in enumerate(model.bases)
    }
    # As the choice is made: at the counts of the identity's threshold, then once more.
    chosen = _best(model, rows[IDENTITY].errors)
    at = _shared(model, chosen[None], sparsity)[0]
    chosen = _best(model, _at(model, at).errors)
    at = _shared(model, chosen[None], sparsity)[0]
    rows[AUTO] = _at(model, at)._replace(chosen=chosen)
    return rows


def _at(model: ModelCurves, sparsity: Floats) -> _Row:
    """All bases at one sparsity a layer."""
    errors = _interpolated(model.curves.errors, sparsity)
    kept = _interpolated(model.curves.kept, sparsity)
    return _Row(np.zeros(len(sparsity), dtype=np.int64), sparsity, kept, errors)


def _among(model: ModelCurves) -> Floats:
    """The bases that ``"auto"`` chooses among, by index."""
    allowed = (*CHOSEN_AMONG, *WAVELETS)
    return np.array([i for i, name in enumerate(model.bases) if name in allowed])


def _best(model: ModelCurves, errors: Floats) -> Floats:
    among = _among(model)
    return np.asarray(among[errors[:, among].argmin(axis=1)])


def _shared(model: ModelCurves, chosen: Floats, sparsity: float) -> Floats:
    """The sparsity of each layer where all have one threshold, by bisection.

    Args:
        model: its curves.
        chosen: ``(n, L)``: the bases of the layers, in n ways.
        sparsity: of all layers together.

    Returns:
        ``(n, L)``.
    """
    thresholds = model.curves.thresholds[np.arange(chosen.shape[1]), chosen]
    share = np.array([layer.numel for layer in model.layers]) / model.numel
    low, high = np.zeros(len(chosen)), thresholds.max(axis=(1, 2)).astype(np.float64)
    at = np.zeros(chosen.shape)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2
        at = _sparsity_at(thresholds, middle[:, None])
        is_low = at @ share < sparsity
        low, high = np.where(is_low, middle, low), np.where(is_low, high, middle)
    return at


def _sparsity_at(thresholds: Floats, value: Floats) -> Floats:
    """Where rising thresholds ``(n, L, G)`` reach values ``(n, 1)``, ``(n, L)``."""
    right = np.clip((thresholds < value[..., None]).sum(axis=-1), 1, len(GRID) - 1)[..., None]
    low = np.take_along_axis(thresholds, right - 1, -1)[..., 0]
    high = np.take_along_axis(thresholds, right, -1)[..., 0]
    right = right[..., 0]
    share = np.clip((value - low) / np.where(high > low, high - low, 1), 0, 1)
    return np.asarray(GRID[right - 1] + share * (GRID[right] - GRID[right - 1]))


def _interpolated(values: Floats, at: Floats) -> Floats:
    """Curves ``(L, B, G)`` at one sparsity a layer, ``(L, B)``."""
    position = np.clip(at * (len(GRID) - 1), 0, len(GRID) - 1)
    left = np.minimum(position.astype(np.int64), len(GRID) - 2)
    # A sparsity of the grid is on it, whatever its last bit.
    share = (position - left).round(9)
    rows = np.arange(len(values))
    first, second = values[rows, :, left], values[rows, :, left + 1]
    return np.asarray(first + (second - first) * share[:, None])


def _sizes(model: ModelCurves, row: _Row) -> Floats:
    sizes = model.curves.sizes[np.arange(len(row.chosen)), row.chosen]
    pairs = zip(row.sparsity, sizes, strict=True)
    return np.array([np.interp(at, SIZE_GRID, size) for at, size in pairs])


def _relative(error: Any, norm: Any) -> float:
    return float(np.sqrt(error / norm)) if norm else 0.0
