"""The compiled code of ``wavprune._C``: each weight is read twice and written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import torch

from .. import ops  # noqa: F401  # registers the operators
from .masks import pack, unpack
from .protocol import SHARDED, Backend, Job, Layer, Measured, Selection, mark_changed
from .random import uniform

T = TypeVar("T")
K = TypeVar("K")

MAX_VALUES = 31 * 31
# Shared memory that a kernel and its coefficients may take on CUDA; csrc/cuda/table.h.
TILE_BYTES = 31 * 1024


class NativeBackend:
    """The steps in C++, many layers in one call."""

    name = "native"
    # A network in one call; a call bounds its own memory.
    call_limit = 1 << 28
    can_stream = False
    is_atomic = True
    has_masks = True
    can_capture = True

    def unsupported(self, layer: Layer) -> str | None:
        """Why this backend cannot prune this layer, or None."""
        device = layer.device
        if layer.group is not None:
            return SHARDED
        if device.type not in ("cpu", "cuda"):
            return f"the compiled code runs on the CPU and on CUDA, not on {device}"
        if layer.basis.num_values > MAX_VALUES:
            size = "x".join(map(str, layer.basis.kernel))
            return f"the compiled code goes up to 31x31 kernels, not {size}"
        if not layer.basis.is_dense:
            size = "x".join(map(str, layer.basis.kernel))
            return (
                f"the matrices of a {size} kernel to level {layer.basis.level_used} are too large"
            )
        return None if device.type == "cpu" else _device_obstacle(device) or _too_large(layer)

    def threshold(self, jobs: Sequence[Job]) -> torch.Tensor:
        """One exact threshold per job; see ``Backend``."""
        groups = _groups(jobs, _job_key)
        parts = [_thresholds([jobs[i] for i in chosen], key) for key, chosen in groups]
        return _in_order(parts, groups)

    def measure(self, jobs: Sequence[Job]) -> Measured | None:
        """One pass gives thresholds and what they prune, on the CPU; see ``Backend``."""
        layers = [layer for job in jobs for layer in job.layers]
        if any(layer.device.type != "cpu" for layer in layers) or any(job.stream for job in jobs):
            return None
        thresholds = torch.empty(len(jobs), dtype=torch.float64, device="cpu")
        rows = torch.empty(len(layers), 3, dtype=torch.float64, device="cpu")
        owner = [i for i, job in enumerate(jobs) for _ in job.layers]
        for in_float64, chosen in _groups(jobs, lambda job: _in_float64(job.layers[0])):
            place = {job: i for i, job in enumerate(chosen)}
            members = [i for i, job in enumerate(owner) if job in place]
            group = [layers[i] for i in members]
            result = torch.ops.wavprune.topk_measure(
                _weights(group),
                _plans(group),
                [place[owner[i]] for i in members],
                [jobs[job].budget.keep for job in chosen],
                in_float64,
            )
            thresholds[chosen] = result[: len(chosen)]
            rows[members] = result[len(chosen) :].view(-1, 3)
        return Measured(thresholds, rows)

    def masks(self, layers: Sequence[Layer], thresholds: torch.Tensor) -> list[torch.Tensor]:
        """Which coefficients are kept; see ``Backend``."""
        if layers and layers[0].weight.device.type != "cpu":
            return [_device_mask(*pair) for pair in zip(layers, thresholds.unbind(), strict=True)]
        masks = [torch.empty(layer.mask_bytes, dtype=torch.uint8, device="cpu") for layer in layers]
        for in_float64, chosen in _groups(layers, _in_float64):
            members = [layers[i] for i in chosen]
            cuts = torch.stack([thresholds[i] for i in chosen])
            torch.ops.wavprune.mark_(
                _weights(members),
                _plans(members),
                _seeds(members),
                cuts,
                [masks[i] for i in chosen],
                in_float64,
            )
        return masks

    def apply_(self, layers: Sequence[Layer], selection: Selection) -> torch.Tensor:
        """Prune each layer's weight in place; see ``Backend``."""
        if isinstance(selection, torch.Tensor):
            return _apply_thresholds(layers, selection)
        return _apply_masks(layers, selection)

    def project_(self, layers: Sequence[Layer], masks: Sequence[torch.Tensor]) -> None:
        """Set the coefficients that are not kept to 0, in place; see ``Backend``."""
        if layers and layers[0].weight.device.type != "cpu":
            _apply_masks(layers, masks)
            return
        for in_float64, chosen in _groups(layers, _in_float64):
            members = [layers[i] for i in chosen]
            weights = _weights(members)
            torch.ops.wavprune.project_(
                weights, _plans(members), [masks[i] for i in chosen], in_float64
            )
            mark_changed(members)


def _apply_thresholds(layers: Sequence[Layer], thresholds: torch.Tensor) -> torch.Tensor:
    groups = _groups(layers, _in_float64)
    if len(groups) > 1:
        # One that is NaN must stop both calls; minimum and maximum change nothing else.
        thresholds = torch.maximum(thresholds, thresholds.amin())
    parts = []
    for in_float64, chosen in groups:
        members = layers if len(groups) == 1 else [layers[i] for i in chosen]
        # One by one: a list as an index would be copied to a GPU, and waited for.
        cuts = thresholds if len(groups) == 1 else torch.stack([thresholds[i] for i in chosen])
        weights = _weights(members)
        plans, seeds = _plans(members), _seeds(members)
        parts.append(torch.ops.wavprune.prune_(weights, plans, seeds, cuts, in_float64))
        mark_changed(members)
    return _in_order(parts, groups)


def _apply_masks(layers: Sequence[Layer], masks: Sequence[torch.Tensor]) -> torch.Tensor:
    if layers and layers[0].weight.device.type != "cpu":
        return torch.stack([_device_project(*pair) for pair in zip(layers, masks, strict=True)])
    parts = []
    groups = _groups(layers, _in_float64)
    for in_float64, chosen in groups:
        members = [layers[i] for i in chosen]
        weights = _weights(members)
        parts.append(
            torch.ops.wavprune.prune_by_mask_(
                weights, _plans(members), [masks[i] for i in chosen], in_float64
            )
        )
        mark_changed(members)
    return _in_order(parts, groups)


def _thresholds(jobs: Sequence[Job], key: tuple[bool, float | None]) -> torch.Tensor:
    in_float64, percentile = key
    layers = [layer for job in jobs for layer in job.layers]
    weights, plans = _weights(layers), _plans(layers)
    result: torch.Tensor
    if percentile is not None:
        dropped = [layer.num_kernels * layer.num_dropped for layer in layers]
        result = torch.ops.wavprune.percentile_threshold(
            weights, plans, dropped, percentile, in_float64
        )
    else:
        membership = [i for i, job in enumerate(jobs) for _ in job.layers]
        keep = [job.budget.keep for job in jobs]
        result = torch.ops.wavprune.topk_threshold(
            weights, plans, _seeds(layers), membership, keep, in_float64
        )
    return result


# On a device masks come from the coefficients of ``dwt2``, whose arithmetic is that of the pass
# that prunes: so they are what ``apply_`` keeps, bit for bit.


def _device_coefficients(layer: Layer) -> torch.Tensor:
    kernels = layer.weight.to(layer.ranking_dtype).flatten(0, 1).flatten(1).contiguous()
    if layer.operator.identity:
        return kernels
    result: torch.Tensor = torch.ops.wavprune.dwt2(
        kernels, layer.operator.plan, layer.num_coefficients
    )
    return result


def _device_mask(layer: Layer, threshold: torch.Tensor) -> torch.Tensor:
    coefficients = _device_coefficients(layer)
    ranks = coefficients.abs()
    if layer.seed is not None:
        indices = torch.arange(coefficients.numel(), device=coefficients.device)
        ranks = torch.where(
            coefficients == 0, 0, uniform(indices, layer.seed).view_as(coefficients)
        )
    cut = threshold.to(ranks.device, ranks.dtype)
    return pack((ranks >= cut) & (coefficients != 0), flat=layer.is_flat)


def _device_project(layer: Layer, mask: torch.Tensor) -> torch.Tensor:
    coefficients = _device_coefficients(layer)
    size = (layer.num_kernels, layer.num_coefficients)
    kept = unpack(mask, *size, flat=layer.is_flat) & (coefficients != 0)
    # Adding 0 makes 0 of the -0 that a negative coefficient leaves.
    pruned = (coefficients * kept).add_(0)
    if not layer.operator.identity:
        plan = layer.operator.plan
        pruned = torch.ops.wavprune.idwt2(pruned, plan, layer.basis.num_values)
    before = layer.weight.double()
    limit = torch.finfo(layer.weight.dtype).max
    layer.weight.copy_(pruned.clamp_(-limit, limit).view(layer.weight.shape))
    return torch.stack(
        [
            kept.sum(dtype=torch.float64),
            (layer.weight == 0).sum(dtype=torch.float64),
            (before - layer.weight.double()).square().sum(),
            before.square().sum(),
        ]
    )


def _weights(layers: Sequence[Layer]) -> list[torch.Tensor]:
    return [layer.weight for layer in layers]


def _plans(layers: Sequence[Layer]) -> list[torch.Tensor]:
    return [layer.operator.plan for layer in layers]


def _seeds(layers: Sequence[Layer]) -> list[int]:
    return [layer.seed for layer in layers if layer.seed is not None]


def _in_float64(layer: Layer) -> bool:
    # On the CPU random numbers rank as integers.
    on_cpu = layer.weight.device.type == "cpu"
    return (layer.compute_dtype if on_cpu else layer.ranking_dtype) == torch.float64


def _job_key(job: Job) -> tuple[bool, float | None]:
    """What one call of the compiled code has in common: its precision, and its percentile."""
    return _in_float64(job.layers[0]), job.budget.percentile


def _groups(items: Sequence[T], key: Callable[[T], K]) -> list[tuple[K, list[int]]]:
    groups: dict[K, list[int]] = {}
    for i, group in enumerate(map(key, items)):
        groups.setdefault(group, []).append(i)
    return list(groups.items())


def _in_order(
    parts: Sequence[torch.Tensor], groups: Sequence[tuple[object, list[int]]]
) -> torch.Tensor:
    """The groups' rows in the order of what was grouped."""
    if len(parts) == 1:
        return parts[0]
    rows = {
        i: row
        for part, (_, chosen) in zip(parts, groups, strict=True)
        for i, row in zip(chosen, part.unbind(), strict=True)
    }
    return torch.stack([rows[i] for i in range(len(rows))])


@cache
def _device_obstacle(device: torch.device) -> str | None:
    capabilities = torch.ops.wavprune.cuda_capabilities()
    if not capabilities:
        return "the compiled code has no CUDA part: there was no nvcc when it was built"
    if torch.version.cuda is None:
        return "the compiled code runs on the GPUs of a torch with CUDA, which this one is not"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < min(capabilities):
        least = ".".join(str(min(capabilities)))
        return f"the compiled code needs compute capability {least}; {device} has {major}.{minor}"
    return None


def _too_large(layer: Layer) -> str | None:
    if layer.operator.identity:
        return None
    inputs, outputs = layer.basis.num_values, layer.num_coefficients
    size = (inputs + 2 * max(inputs, outputs)) * layer.ranking_dtype.itemsize
    if size <= TILE_BYTES:
        return None
    kernel = "x".join(map(str, layer.basis.kernel))
    return (
        f"a {kernel} kernel with its {outputs} coefficients takes {size} bytes, and the compiled "
        f"code has {TILE_BYTES} for it on CUDA; eager has no such limit"
    )


def make() -> Backend:
    """The backend, for the registry."""
    return NativeBackend()
