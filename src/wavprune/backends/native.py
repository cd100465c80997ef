"""The compiled code of ``wavprune._C``: each weight is read twice and written once."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import TypeVar

import torch

from .. import ops  # noqa: F401  # registers the operators
from .protocol import SHARDED, Backend, Job, Layer, Measured, Selection, mark_changed

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
        return None if device.type == "cpu" else device_obstacle(device) or _too_large(layer)

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
        masks = [
            torch.empty(layer.mask_bytes, dtype=torch.uint8, device=layer.weight.device)
            for layer in layers
        ]
        groups = _groups(layers, _in_float64)
        for in_float64, chosen in groups:
            members = [layers[i] for i in chosen]
            torch.ops.wavprune.mark_(
                _weights(members),
                _plans(members),
                _seeds(members),
                _chosen(thresholds, chosen, groups),
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
        for (_, in_float64), chosen in _groups(layers, _place):
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
        members = [layers[i] for i in chosen]
        cuts = _chosen(thresholds, chosen, groups)
        weights = _weights(members)
        plans, seeds = _plans(members), _seeds(members)
        parts.append(torch.ops.wavprune.prune_(weights, plans, seeds, cuts, in_float64))
        mark_changed(members)
    return _in_order(parts, groups)


def _apply_masks(layers: Sequence[Layer], masks: Sequence[torch.Tensor]) -> torch.Tensor:
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


def _weights(layers: Sequence[Layer]) -> list[torch.Tensor]:
    return [layer.weight for layer in layers]


def _plans(layers: Sequence[Layer]) -> list[torch.Tensor]:
    return [layer.operator.plan for layer in layers]


def _seeds(layers: Sequence[Layer]) -> list[int]:
    return [layer.seed for layer in layers if layer.seed is not None]


def _in_float64(layer: Layer) -> bool:
    # On the CPU random numbers rank as integers.
    dtype = layer.compute_dtype if layer.weight.is_cpu else layer.ranking_dtype
    return dtype == torch.float64


def _place(layer: Layer) -> tuple[torch.device, bool]:
    """What one call of the compiled code has in common: the device, and its precision."""
    return layer.weight.device, _in_float64(layer)


def _job_key(job: Job) -> tuple[bool, float | None]:
    """What one call of the compiled code has in common: its precision, and its percentile."""
    return _in_float64(job.layers[0]), job.budget.percentile


def _groups(items: Sequence[T], key: Callable[[T], K]) -> list[tuple[K, list[int]]]:
    keys = list(map(key, items))
    # Nearly always one group.
    if keys and keys.count(keys[0]) == len(keys):
        return [(keys[0], list(range(len(keys))))]
    groups: dict[K, list[int]] = {}
    for i, group in enumerate(keys):
        groups.setdefault(group, []).append(i)
    return list(groups.items())


def _chosen(
    thresholds: torch.Tensor, chosen: list[int], groups: Sequence[tuple[object, list[int]]]
) -> torch.Tensor:
    """The thresholds of one group."""
    if len(groups) == 1:
        return thresholds
    # One by one: a list as an index would be copied to a GPU, and waited for.
    return torch.stack([thresholds[i] for i in chosen])


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
def device_obstacle(device: torch.device) -> str | None:
    """Why the compiled code cannot run on a CUDA device, or None."""
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
