"""Which layers are compressed, in which basis, and what of them is kept."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..backends import masks
from ..backends.protocol import Batch, Target, resolve
from ..bases.basis import Basis, basis_for
from ..config import AUTO, PruneConfig
from ..engine.auto import bases_for
from ..engine.layers import LayerRef, non_finite, select_names
from ..engine.run import prune_layers
from ..report import LayerStats, PruneReport
from .encode import Layer, transform
from .record import CHUNK, DTYPES, LARGEST_KERNEL, BasisName, matrix_of
from .sources import NAMES, Tensor

SUFFIX = ".weight"
# Kernels that are looked at to choose a basis.
SAMPLE = 1 << 12
# What is below this share of the root mean square costs no bits at the steps that are in use.
FLOOR = 0.25


@dataclass(frozen=True)
class Plan:
    """What to do with each layer: exactly one of the three is not None.

    Attributes:
        config: prune, and store what is kept.
        report: store what was pruned.
        wavelet: prune nothing.
    """

    config: PruneConfig | None
    report: PruneReport | None
    wavelet: PruneConfig | None

    def layer(self, tensor: Tensor) -> Layer:
        """A weight, ready to be stored.

        Raises:
            ValueError: it is not finite, or its basis cannot be stored.
        """
        name = tensor.name.removesuffix(SUFFIX)
        ref = LayerRef(name, tensor.read())
        if not math.isfinite(_norm(ref.weight)):
            count = non_finite(ref.weight)
            raise ValueError(
                f"layer {name!r}: {count} of {ref.weight.numel()} weights are NaN or infinite, or "
                "the sum of their squares is; allowed: finite weights"
            )
        if self.config is not None:
            found = _prune(ref, self.config)
            # It was pruned in place. What is stored comes from the weight as it is, read again when
            # the pruned one is gone.
            del ref
            return _layer(LayerRef(name, tensor.read()), found, self.config)
        if self.report is not None:
            return _pruned_before(ref, self.report[name], self.report)
        assert self.wavelet is not None
        return _whole(ref, self.wavelet)


def choose_tensors(tensors: Sequence[Tensor], plan: Plan) -> list[Tensor]:
    """The tensors that are compressed.

    Raises:
        ValueError: none is, a pattern or a layer of the report is not there, or a tensor is of a
            dtype that cannot be.
    """
    weights = {t.name.removesuffix(SUFFIX): t for t in tensors if _is_weight(t)}
    if plan.report is not None:
        for stats in plan.report:
            found = weights.get(stats.name)
            if found is None or found.shape != tuple(stats.shape):
                there = "no such weight" if found is None else f"one of {found.shape}"
                raise ValueError(
                    f"report: layer {stats.name!r} is {tuple(stats.shape)}; the model has {there}"
                )
        names = [stats.name for stats in plan.report]
    else:
        config = plan.config or plan.wavelet
        assert config is not None
        every = [name for name, t in weights.items() if config.targets or len(t.shape) == 4]
        if not every:
            raise ValueError("the model has no 4-D '*.weight' tensor, so nothing is compressed")
        names = select_names(every, config)
    chosen = [weights[name] for name in names]
    for tensor in chosen:
        if tensor.dtype not in DTYPES:
            raise ValueError(
                f"layer {tensor.name.removesuffix(SUFFIX)!r}: its weight has dtype {tensor.dtype}; "
                f"allowed: {', '.join(DTYPES)}; ignore that layer"
            )
    return chosen


def _norm(weight: torch.Tensor) -> float:
    """The Frobenius norm of a contiguous weight, summed in parts."""
    wide = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = 0.0
    for part in torch.split(weight.view(-1), CHUNK):
        values = part.to(wide).numpy()
        total += float(np.vdot(values, values))
    return math.sqrt(total)


def _is_weight(tensor: Tensor) -> bool:
    return (
        (tensor.name.endswith(SUFFIX) or tensor.name == "weight")
        and len(tensor.shape) in (2, 4)
        and 0 not in tensor.shape
    )


def _whole(ref: LayerRef, config: PruneConfig) -> Layer:
    weight = ref.weight
    if weight.ndim == 2:
        # A transform of a whole matrix takes longer than everything else.
        return _layer(ref, _Kept(basis_for(replace(config, wavelet="identity"), weight)), config)
    bases = bases_for(config, weight)
    basis = bases[0] if len(bases) == 1 else min(bases, key=_rate(weight))
    return _layer(ref, _Kept(basis), config)


def _rate(weight: torch.Tensor) -> Callable[[Basis], float]:
    """The bits that each basis takes, but for a constant: Laplace variables' at one step."""
    kernels = weight.flatten(0, 1).flatten(1)
    kernels = kernels[:: max(1, len(kernels) // SAMPLE)].to(torch.float32)
    sample = kernels.numpy()
    floor = FLOOR * math.sqrt(float(np.vdot(sample, sample)) / sample.size) or 1.0

    def rate(basis: Basis) -> float:
        analysis = basis.importance_operator.analysis.astype(np.float32)
        means = np.abs(transform(analysis, sample.T)).mean(axis=1)
        return float(np.log2(means + floor).sum())

    return rate


class _Kept(NamedTuple):
    basis: Basis
    by_importance: bool = True
    mask: torch.Tensor | None = None


def _prune(ref: LayerRef, config: PruneConfig) -> _Kept:
    found: list[_Kept] = []

    def record(batches: Sequence[Batch], kept: Sequence[torch.Tensor]) -> None:
        found.extend(
            _Kept(batch.basis, batch.by_importance, mask)
            for batch, mask in zip(batches, kept, strict=True)
        )

    prune_layers([ref], config, record=record)
    return found[0]


def _pruned_before(ref: LayerRef, stats: LayerStats, report: PruneReport) -> Layer:
    config = PruneConfig(
        method="min_weight" if stats.wavelet == "identity" else "dwt",
        wavelet=stats.wavelet,
        level=stats.level_requested,
        mode=stats.mode or "periodization",
        force_level=bool(report.settings.get("force_level")),
    )
    basis = basis_for(config, ref.weight) if stats.wavelet != "klt" else None
    if basis is None or basis.expansive:
        raise ValueError(
            f"layer {ref.name!r}: what was kept cannot be told from weights that were pruned in "
            f"{stats.wavelet!r}; give the weights before that, and config"
        )
    dtype = torch.float64 if ref.weight.dtype == torch.float64 else torch.float32
    batch = Batch(
        ref.kernels(basis.kernel), basis, report.settings.get("percentile") is None, dtype
    )
    backend = resolve("auto", [batch], masks=True)
    threshold = backend.threshold([([batch], Target(keep=stats.kept))])
    (mask,) = backend.masks([batch], threshold)  # type: ignore[attr-defined]  # resolved with masks
    return _layer(ref, _Kept(basis, batch.by_importance, mask), config)


def _layer(ref: LayerRef, kept: _Kept, config: PruneConfig) -> Layer:
    basis, by_importance, mask = kept
    weight = ref.weight
    if basis.factors is not None or math.prod(basis.kernel) > LARGEST_KERNEL:
        size = "x".join(map(str, basis.kernel))
        raise ValueError(
            f"layer {ref.name!r}: {size} kernels are too large to be stored in {basis.name!r}; "
            f"allowed: kernels of at most {LARGEST_KERNEL} values, or method='min_weight'"
        )
    operator = basis.importance_operator if by_importance else basis.coefficient_operator
    analysis = synthesis = None
    name = BasisName("identity", (1, 1))
    if not operator.identity:
        analysis = operator.analysis.astype(np.float32)
        synthesis = matrix_of(operator)
        name = BasisName(
            basis.name,
            basis.kernel,
            basis.mode,
            basis.level_requested,
            config.force_level,
            by_importance,
        )
    K = 1 if synthesis is None else len(synthesis)
    kernels = weight.reshape(-1, K)
    keep = None
    if mask is not None:
        coefficients = 1 if analysis is None else len(analysis)
        keep = _keeper(mask, coefficients, flat=operator.identity)
    return Layer(
        NAMES[weight.dtype],
        tuple(ref.weight.shape),
        kernels,
        _norm(weight),
        name,
        analysis,
        synthesis,
        keep,
    )


def _keeper(
    mask: torch.Tensor, M: int, *, flat: bool
) -> Callable[[int, int], npt.NDArray[np.bool_]]:
    """The mask ``(M, count)`` of some kernels; the first stands at the beginning of a block."""

    def keep(first: int, count: int) -> npt.NDArray[np.bool_]:
        start = first // masks.BLOCK * M * 2
        part = mask[start : start + masks.mask_bytes(count, M, flat=flat)]
        return masks.unpack(part, count, M, flat=flat).numpy().T

    return keep


def quantising(wavelet: str, targets: object, ignore: object) -> PruneConfig:
    """The settings that say in which basis weights are stored of which nothing is pruned."""
    return PruneConfig(wavelet=wavelet or AUTO, targets=targets, ignore=ignore)  # type: ignore[arg-type]  # it checks them
