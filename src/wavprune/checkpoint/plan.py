"""Which layers are compressed, in which basis, and what of them is kept."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from ..backends import masks
from ..bases import Basis, basis_for
from ..common.cache import ByteCache
from ..config import AUTO, PruneConfig
from ..engine.auto import bases_for
from ..engine.layers import LayerRef, non_finite
from ..engine.run import prune_layers
from ..errors import WavpruneError
from ..report import PruneReport
from .formats.names import Weight, describe_skipped, layer_name, select
from .formats.safetensors import DTYPE_NAMES
from .layer import Layer, transform
from .pruned import PrunedLayer
from .quantisers import TRELLIS, exponent_for
from .recorded import ChangedLayerWarning, kept_by_record, still_pruned
from .records import CHUNK, DTYPES
from .selection import Kept, axis_functions, kept_by_report, prune_with_masks
from .sources import Source, Tensor
from .stored_basis import Floats, StoredBasis, store

LARGEST_KERNEL = 1024
CACHE_BYTES = 1 << 24
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
        quantised: prune nothing; the basis, targets and ignore of these settings count.
        recorded: with ``quantised``: layers that a file says were pruned, which keep their zeros.
    """

    config: PruneConfig | None = None
    report: PruneReport | None = None
    quantised: PruneConfig | None = None
    recorded: Mapping[str, PrunedLayer] = field(default_factory=dict)

    def layer(self, tensor: Tensor) -> Layer:
        """A weight, ready to be stored.

        Raises:
            WavpruneError: it is not finite, or its basis cannot be stored.
        """
        name = layer_name(tensor.name)
        ref = LayerRef(name, tensor.read())
        size = _size_of(ref)
        if self.config is not None:
            kept = prune_with_masks(ref, self.config)
            # It was pruned in place. What is stored comes from the weight as it is, read again when
            # the pruned one is gone.
            del ref
            return _layer(LayerRef(name, tensor.read()), kept, size)
        if self.report is not None:
            stats = self.report[_reported_name(name, self.report)]
            return _layer(ref, kept_by_report(ref, stats, self.report), size)
        assert self.quantised is not None
        _check_kernel(ref)
        if name in self.recorded:
            return _layer(ref, kept_by_record(ref, self.recorded[name]), size)
        return _layer(ref, Kept(_cheapest_basis(ref.weight, self.quantised)), size)


def pruned_together(plan: Plan, source: Source) -> Plan:
    """The plan, where layers that are ranked together have been: those are in memory for that.

    Raises:
        WavpruneError: a layer cannot be pruned.
    """
    if plan.config is None or plan.config.scope != "global":
        return plan
    tensors = choose_tensors(source, plan)
    refs = [LayerRef(layer_name(tensor.name), tensor.read()) for tensor in tensors]
    return Plan(report=prune_layers(refs, plan.config, masks=True))


def with_record(plan: Plan, source: Source) -> Plan:
    """The plan, with what the file says was pruned where that counts."""
    if plan.quantised is None or plan.quantised.wavelet != AUTO:
        return plan
    return replace(plan, recorded=source.pruned)


def verified(plan: Plan, tensors: Sequence[Tensor], whole_matrices: bool) -> Plan:
    """The plan, without the records of layers that have changed since; a warning names these.

    Args:
        plan: with what the file says.
        tensors: that are compressed.
        whole_matrices: True where a matrix can be stored in a basis other than the identity.
    """
    recorded: dict[str, PrunedLayer] = {}
    lost: dict[str, str] = {}
    for tensor in tensors:
        name = layer_name(tensor.name)
        if name not in plan.recorded:
            continue
        if len(tensor.shape) == 2 and plan.recorded[name].level_used and not whole_matrices:
            lost[name] = f"the coder {TRELLIS!r} stores matrices as they are"
            continue
        try:
            if still_pruned(plan.layer(tensor)):
                recorded[name] = plan.recorded[name]
            else:
                lost[name] = "its weight has changed since"
        except WavpruneError as error:
            lost[name] = str(error)
    if lost:
        warnings.warn(
            f"what was pruned is not known of {describe_skipped(lost)}; stored as they are now",
            ChangedLayerWarning,
            stacklevel=3,
        )
    return replace(plan, recorded=recorded)


def plan_of(
    report: PruneReport | None,
    config: PruneConfig | None,
    wavelet: str | None,
    targets: Sequence[str] | str | None,
    ignore: Sequence[str] | str | None,
) -> Plan:
    """The plan of the arguments of ``save``.

    Raises:
        TypeError: an argument is of the wrong type.
        WavpruneError: arguments do not go together.
    """
    if report is not None and not isinstance(report, PruneReport):
        raise TypeError(f"report must be a PruneReport, not {type(report).__name__}")
    if config is not None and not isinstance(config, PruneConfig):
        raise TypeError(f"config must be a PruneConfig, not {type(config).__name__}")
    own = {"wavelet": wavelet, "targets": targets, "ignore": ignore}
    own = {name: value for name, value in own.items() if value is not None}
    if report is None and config is None:
        settings = {"wavelet": AUTO} | own
        return Plan(quantised=PruneConfig(**settings))  # type: ignore[arg-type]  # it checks them
    if own or (report is not None and config is not None):
        names = [*(["report"] if report else []), *(["config"] if config else []), *own]
        raise WavpruneError(
            f"{', '.join(names)} were given; give one of report, config, or wavelet, targets and "
            "ignore: a report and a config say themselves which layers and which basis"
        )
    return Plan(config=config, report=report)


def choose_tensors(source: Source, plan: Plan) -> list[Tensor]:
    """The tensors that are compressed; of tied weights, the one that is stored.

    Raises:
        WavpruneError: none is, a pattern or a layer of the report is not there, or a tensor is of a
            dtype that cannot be.
    """
    if plan.report is not None:
        chosen = _reported(source.weights, plan.report)
    else:
        config = plan.config or plan.quantised
        assert config is not None
        chosen = select(source.weights, config, source.prefix, also=plan.recorded)
        if not chosen:
            two_axes = [weight.layer for weight in source.weights]
            hint = f"; targets can name its 2-D ones: {', '.join(two_axes[:8])}" if two_axes else ""
            raise WavpruneError(
                f"the model has no '*.weight' tensor of 3 to 5 axes, so nothing is compressed{hint}"
            )
    keys = dict.fromkeys(source.aliases.get(weight.key, weight.key) for weight in chosen)
    tensors = [source.tensors[key] for key in keys]
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise WavpruneError(
                f"layer {layer_name(tensor.name)!r}: its weight has dtype {tensor.dtype}; "
                f"allowed: {', '.join(DTYPES)}; ignore that layer"
            )
    return tensors


def _reported(weights: Iterable[Weight], report: PruneReport) -> list[Weight]:
    by_layer = {weight.layer: weight for weight in weights}
    chosen = []
    for stats in report:
        # A bare layer is its own model, and has no name.
        weight = by_layer.get(stats.name or "weight")
        if weight is None or weight.shape != tuple(stats.shape):
            there = "no such weight" if weight is None else f"one of {weight.shape}"
            raise WavpruneError(
                f"report: layer {stats.name!r} is {tuple(stats.shape)}; the model has {there}"
            )
        chosen.append(weight)
    return chosen


def _reported_name(name: str, report: PruneReport) -> str:
    return "" if name == "weight" and all(stats.name != name for stats in report) else name


@dataclass(frozen=True, slots=True)
class _Size:
    peak: float
    exponent: int
    norm: float


def _size_of(ref: LayerRef) -> _Size:
    """How large the values of a contiguous weight are.

    Raises:
        WavpruneError: a value is NaN or infinite.
    """
    weight = ref.weight
    least, most = torch.aminmax(weight.view(-1))
    peak = max(abs(float(least)), abs(float(most)))
    if not math.isfinite(peak):
        count = non_finite(weight)
        raise WavpruneError(
            f"layer {ref.name!r}: {count} of {weight.numel()} weights are NaN or infinite; "
            "allowed: finite weights"
        )
    exponent = exponent_for(peak)
    compute_dtype = torch.float64 if weight.dtype == torch.float64 else torch.float32
    total = 0.0
    flat = weight.view(-1)
    for start in range(0, len(flat), CHUNK):
        part = flat[start : start + CHUNK]
        if exponent:
            values = np.ldexp(part.to(torch.float64).numpy(), -exponent)
        else:
            values = part.to(compute_dtype).numpy()
        total += float(np.vdot(values, values))
    return _Size(peak, exponent, math.sqrt(total))


def _cheapest_basis(weight: torch.Tensor, config: PruneConfig) -> Basis:
    """The basis of a weight of which nothing is pruned."""
    if weight.ndim == 2:
        # A transform of a whole matrix takes longer than everything else.
        return basis_for(replace(config, wavelet="identity"), weight)
    bases = bases_for(config, weight)
    return bases[0] if len(bases) == 1 else min(bases, key=_rate(weight))


def _rate(weight: torch.Tensor) -> Callable[[Basis], float]:
    """The bits that each basis takes, but for a constant: Laplace variables' at one step."""
    kernels = weight.flatten(0, 1).flatten(1)
    kernels = kernels[:: max(1, len(kernels) // SAMPLE)]
    exponent = exponent_for(float(kernels.abs().max()))
    if exponent:
        sample = np.ldexp(kernels.to(torch.float64).numpy(), -exponent).astype(np.float32)
    else:
        sample = kernels.to(torch.float32).numpy()
    floor = FLOOR * math.sqrt(float(np.vdot(sample, sample)) / sample.size) or 1.0

    def rate(basis: Basis) -> float:
        analysis = basis.importance_operator.analysis.astype(np.float32)
        means = np.abs(transform(analysis, sample.T)).mean(axis=1)
        return float(np.log2(means + floor).sum())

    return rate


def _check_kernel(ref: LayerRef) -> None:
    """Raise WavpruneError, before a basis of it is computed, where a kernel is too large."""
    kernel = ref.weight.shape[2:]
    if math.prod(kernel) > LARGEST_KERNEL:
        raise _too_large(ref, kernel)


def _too_large(ref: LayerRef, kernel: Sequence[int], where: str = "") -> WavpruneError:
    return WavpruneError(
        f"layer {ref.name!r}: {'x'.join(map(str, kernel))} kernels are too large to be stored"
        f"{where}; allowed: kernels of at most {LARGEST_KERNEL} values, or method='min_weight'"
    )


def _layer(ref: LayerRef, kept: Kept, size: _Size) -> Layer:
    basis = kept.basis
    if not basis.is_dense or basis.num_values > LARGEST_KERNEL:
        raise _too_large(ref, basis.kernel, f" in {basis.name!r}")
    matrices = _matrices_of(basis, kept.by_importance)
    analysis, synthesis = matrices.analysis, matrices.synthesis
    keep = None
    if kept.mask is not None:
        coefficients = 1 if analysis is None else len(analysis)
        keep = _keeper(kept.mask, coefficients, flat=analysis is None)
    return Layer(
        dtype=DTYPE_NAMES[ref.weight.dtype],
        shape=tuple(ref.weight.shape),
        kernels=ref.weight.reshape(-1, 1 if synthesis is None else len(synthesis)),
        peak=size.peak,
        exponent=size.exponent,
        norm=size.norm,
        basis=matrices.basis,
        basis_bytes=matrices.basis_bytes,
        analysis=analysis,
        synthesis=synthesis,
        keep=keep,
    )


class _Matrices(NamedTuple):
    """A basis as it is stored, and what computes with it; all empty for the identity."""

    basis: StoredBasis | None = None
    basis_bytes: bytes = b""
    analysis: Floats | None = None
    synthesis: Floats | None = None

    @property
    def nbytes(self) -> int:
        matrices = (self.analysis, self.synthesis)
        return sum(matrix.nbytes for matrix in matrices if matrix is not None)


_CACHE = ByteCache[_Matrices](CACHE_BYTES, lambda matrices: matrices.nbytes)


def _matrices_of(basis: Basis, by_importance: bool) -> _Matrices:
    def make() -> _Matrices:
        operator = basis.importance_operator if by_importance else basis.coefficient_operator
        if operator.identity:
            return _Matrices()
        axes = axis_functions(basis)
        stored, payload = store(basis.name, basis.kernel, operator, axes, by_importance)
        analysis = operator.analysis.astype(np.float32)
        return _Matrices(stored, payload, analysis, stored.matrix(payload))

    if basis.data_driven:
        return make()
    return _CACHE.get((basis, by_importance), make)


def _keeper(
    mask: torch.Tensor, M: int, *, flat: bool
) -> Callable[[int, int], npt.NDArray[np.bool_]]:
    """Gives the mask ``(M, count)`` of some kernels."""

    def keep(start: int, count: int) -> npt.NDArray[np.bool_]:
        block, skipped = divmod(start, masks.BLOCK)
        offset, count = block * M * 2, skipped + count
        part = mask[offset : offset + masks.mask_bytes(count, M, flat=flat)]
        return masks.unpack(part, count, M, flat=flat).numpy().T[:, skipped:]

    return keep
