"""Weights brought back to the coefficients that their masks keep, and whether they are there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace

import numpy as np
import torch

from ..backends import Backend, Layer
from ..bases import Basis
from ..bases.axes import Axis, DenseMap
from ..config import PruneConfig
from .ambient import neutral
from .interrupts import cannot_be_interrupted
from .layers import LayerRef, check_finite, overflow
from .plan import Plan, is_uniform, plan_layers
from .sharding import group_of, local_part
from .undo import undone_on_error

# Of weights below this norm no coefficient overflows, whatever the basis.
SAFE_NORM = {torch.float32: 1e30, torch.float64: 1e290}


def projection_plan(refs: Sequence[LayerRef], config: PruneConfig, bases: Sequence[Basis]) -> Plan:
    """How weights are projected in these bases; it can be used as long as no shape changes."""
    plan = plan_layers(refs, config, bases=bases)
    # A random number ranked a weight once; what it kept is projected like anything else.
    layers = tuple((replace(layer, seed=None),) for (layer,) in plan.options)
    return replace(plan, options=layers, is_uniform=is_uniform(layers), backends={}, calls={})


def project_layers(
    plan: Plan, refs: Sequence[LayerRef], masks: Sequence[torch.Tensor], guarded: bool = False
) -> None:
    """Set the coefficients that the masks do not keep to 0, in place.

    After any other error the weights are as before, or a note of the error says what they are.

    Args:
        plan: of these weights, from ``projection_plan``.
        refs: the weights.
        masks: one per layer, in the bases of the plan.
        guarded: True where the caller undoes what an error leaves; see ``undone_on_error``.

    Raises:
        WavpruneError: a weight is not finite, or its coefficients are not; none has changed then.
    """
    weights = [ref.weight for ref in refs]
    with neutral(weights):
        layers = [options[0] for options in plan.bind(refs)]
        backend = plan.backend(scattered=False, masks=True)
        if not _is_safe(layers):
            for ref in refs:
                check_finite(ref)
            _project_copies(backend, layers, masks)
        elif guarded:
            backend.project_(layers, masks)
        elif cannot_be_interrupted(backend, plan):
            _project_wholly(backend, layers, masks)
        else:
            with undone_on_error(weights):
                backend.project_(layers, masks)


def _is_safe(layers: Sequence[Layer]) -> bool:
    """True where every weight is finite, and far from the largest number; the same on all ranks."""
    alike: dict[tuple[torch.dtype, bool], list[torch.Tensor]] = {}
    for layer in layers:
        kind = (layer.compute_dtype, layer.weight.dtype == torch.float64)
        alike.setdefault(kind, []).append(layer.weight)
    safe = all(
        _norm(tensors, torch.float64 if double else torch.float32) < SAFE_NORM[dtype]
        for (dtype, double), tensors in alike.items()
    )
    group = layers[0].group if layers else None
    if group is None:
        return safe
    unsafe = torch.tensor(not safe, dtype=torch.int64, device=layers[0].weight.device)
    torch.distributed.all_reduce(unsafe, torch.distributed.ReduceOp.MAX, group=group)
    return not unsafe


def _norm(tensors: list[torch.Tensor], dtype: torch.dtype) -> float:
    """A norm of them together, or more: one pass over the weights, and one wait for the device."""
    if all(tensor.is_cpu for tensor in tensors):
        # Half the time of the norms: as fast as memory is read. Squares that overflow are infinite.
        flat = [_flat(tensor) for tensor in tensors if tensor.numel()]
        exact = [torch.dot(values, values) for values in flat if values.dtype == dtype]
        bounds = [_most(values) for values in flat if values.dtype != dtype]
        squares = (torch.stack(part).sum(dtype=torch.float64) for part in (exact, bounds) if part)
        return math.sqrt(sum(map(float, squares)))
    norms = torch._foreach_norm(tensors, 2, dtype)
    home = norms[0].device
    return float(torch.stack([n if n.device == home else n.to(home) for n in norms]).sum())


def _most(values: torch.Tensor) -> torch.Tensor:
    """No less than the squared norm, float64: torch is slow at the products of half floats."""
    if values.dtype == torch.bfloat16:
        # Summed in float32; only the result is rounded, to eight bits.
        norm: torch.Tensor = torch.linalg.vector_norm(values)
        return (norm.double() * 1.01).square()
    low, high = torch.aminmax(values)
    return torch.maximum(-low, high).double().square() * values.numel()


def _flat(weight: torch.Tensor) -> torch.Tensor:
    """All values, in the order in memory where that is without gaps."""
    if not weight.is_contiguous() and weight.is_contiguous(memory_format=torch.channels_last):
        weight = weight.permute(0, 2, 3, 1)
    return weight.reshape(-1)


def _project_wholly(
    backend: Backend, layers: Sequence[Layer], masks: Sequence[torch.Tensor]
) -> None:
    """Project without copies: after an interrupt, by projecting again, which changes no more."""
    try:
        backend.project_(layers, masks)
    except BaseException as error:
        done = "all weights were projected"
        try:
            backend.project_(layers, masks)
        except Exception:
            done = "some weights may have been projected, and others not"
        error.add_note(f"wavprune: {done} before this was raised; nothing else has changed")
        raise


def _project_copies(
    backend: Backend, layers: Sequence[Layer], masks: Sequence[torch.Tensor]
) -> None:
    """Project copies, and take those that are finite, all or none."""
    copies = [replace(layer, weight=layer.weight.clone()) for layer in layers]
    backend.project_(copies, masks)
    finite = torch.stack([copy.weight.isfinite().all().cpu() for copy in copies])
    overflows = (~finite).to(torch.int64)
    if layers and (group := layers[0].group) is not None:
        overflows = overflows.to(layers[0].weight.device)
        torch.distributed.all_reduce(overflows, torch.distributed.ReduceOp.MAX, group=group)
    for layer, has_overflown in zip(layers, overflows.tolist(), strict=True):
        if has_overflown:
            raise overflow(layer.name)
    with undone_on_error([layer.weight for layer in layers]) if copies else nullcontext():
        for layer, copy in zip(layers, copies, strict=True):
            layer.weight.copy_(copy.weight)


# Whether weights are what masks say.


def distances(plan: Plan, refs: Sequence[LayerRef], masks: Sequence[torch.Tensor]) -> list[float]:
    """How much of each weight its mask does not keep: the norm of that over the weight's.

    Args:
        plan: of these weights, from ``projection_plan``.
        refs: the weights; they are not changed.
        masks: one per layer.

    Returns:
        One number per layer, the same on all ranks: 0 or a rounding error where it was projected;
        NaN where it is not finite.
    """
    sums = []
    with neutral(ref.weight for ref in refs):
        backend = plan.backend(scattered=False, masks=True)
        for (layer,), mask in zip(plan.bind(refs), masks, strict=True):
            copy = replace(layer, weight=layer.weight.clone())
            backend.project_([copy], [mask])
            before, after = layer.weight.double(), copy.weight.double()
            sums.append(torch.stack([(before - after).square().sum(), before.square().sum()]).cpu())
        total = torch.stack(sums)
        if (group := group_of(refs[0].weight)) is not None:
            total = total.to(local_part(refs[0].weight).device)
            torch.distributed.all_reduce(total, group=group)
    return [
        0.0 if change <= _denormals(ref.weight) else math.sqrt(change / norm)
        for ref, (change, norm) in zip(refs, total.tolist(), strict=True)
    ]


def _denormals(weight: torch.Tensor) -> float:
    """The squared norm of what rounding may leave where all values are denormal."""
    limits = torch.finfo(weight.dtype)
    return weight.numel() * (16 * limits.smallest_normal * limits.eps) ** 2


def rounding(layer: Layer) -> float:
    """The most that rounding makes of a distance, after a projection in a basis not expansive."""
    basis = layer.basis
    if basis.is_dense and layer.operator.identity:
        return 0.0
    defect = 0.0
    if basis.factors is not None:
        # Some of PyWavelets' filters reconstruct to a few digits only.
        for axis in (axis for level in basis.factors.levels for axis in level):
            defect += _defect(axis)
    stored = torch.finfo(layer.weight.dtype).eps
    computed = torch.finfo(layer.compute_dtype).eps * math.sqrt(max(basis.kernel))
    return 2 * stored + 4 * computed + 4 * defect


def _defect(axis: Axis) -> float:
    """How far analysis and synthesis are from the identity, relatively."""
    if isinstance(axis.analysis, DenseMap):
        product = axis.synthesis.matrix() @ axis.analysis.matrix()
        return float(np.linalg.norm(product - np.eye(len(product))))
    # A probe of a few vectors, where a matrix would not fit.
    generator = torch.Generator().manual_seed(0)
    analysis, synthesis = (
        axis_map.bind(torch.float64, torch.device("cpu"))
        for axis_map in (axis.analysis, axis.synthesis)
    )
    probe = torch.randn(axis.analysis.shape[1], 4, generator=generator, dtype=torch.float64)
    return float((synthesis(analysis(probe, -2), -2) - probe).norm())


_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


def checksum(weight: torch.Tensor) -> torch.Tensor:
    """A number, int64, that all bits of a weight go into, those of this rank's part."""
    with neutral([weight]):
        part = local_part(weight)
        rows = part.reshape(len(part), -1) if part.numel() else part.reshape(0, 1)
        sums = rows.contiguous().view(_SAME_SIZE[part.element_size()]).sum(1, dtype=torch.int64)
        odd = 2 * torch.arange(len(sums), device=sums.device) + 1
        return (sums * odd).sum()
