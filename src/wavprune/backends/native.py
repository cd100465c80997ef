"""The compiled kernels of ``wavprune._C``: each weight is read twice and written once."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch

from .. import ops
from .eager import EagerBackend
from .masks import mask_bytes
from .protocol import Backend, Batch, Target

MAX_VALUES = 31 * 31
# Shared memory that a kernel and its coefficients may take on CUDA; csrc/cuda/table.h.
TILE_BYTES = 31 * 1024


class NativeBackend:
    """The five steps in C++, many layers in one call."""

    name = "native"
    # A network in one call; a call bounds its own memory.
    unit = 1 << 28
    one_at_a_time = False

    def unsupported(self, batch: Batch) -> str | None:
        """Why this backend cannot prune this batch, or None."""
        device = batch.weight.device
        if device.type not in ("cpu", "cuda"):
            return f"the compiled kernels run on the CPU and on CUDA, not on {device}"
        if batch.basis.kernel[0] * batch.basis.kernel[1] > MAX_VALUES:
            size = "x".join(map(str, batch.basis.kernel))
            return f"the compiled kernels go up to 31x31 kernels, not {size}"
        return None if device.type == "cpu" else _device_obstacle(device) or _too_wide(batch)

    def threshold(self, jobs: Sequence[tuple[Sequence[Batch], Target]]) -> torch.Tensor:
        """One exact threshold for each job; see ``Backend``."""
        groups = _by_width([batches[0] for batches, _ in jobs])
        parts = [_thresholds([jobs[i] for i in chosen], wide) for wide, chosen in groups]
        return _in_order(parts, groups)

    def apply_(self, batches: Sequence[Batch], thresholds: torch.Tensor) -> torch.Tensor:
        """Prune each batch's weight in place; see ``Backend``."""
        groups = _by_width(batches)
        if len(groups) > 1:
            # One that is NaN must stop both calls; minimum and maximum change nothing else.
            thresholds = torch.maximum(thresholds, thresholds.amin())
        parts = []
        for wide, chosen in groups:
            members = [batches[i] for i in chosen]
            weights = [batch.weight for batch in members]
            draws = [batch.draw for batch in members if batch.draw is not None]
            # One by one: a list as an index would be copied to a GPU, and waited for.
            cuts = torch.stack([thresholds[i] for i in chosen]) if len(groups) > 1 else thresholds
            plans = [_plan(batch) for batch in members]
            parts.append(torch.ops.wavprune.prune_(weights, plans, draws, cuts, wide))
            # Autograd must see the change, as it sees one by any operator of torch.
            torch.autograd.graph.increment_version(weights)
        return _in_order(parts, groups)

    def masks(self, batches: Sequence[Batch], thresholds: torch.Tensor) -> list[torch.Tensor]:
        """Which coefficients are kept; see ``Backend``."""
        if any(batch.weight.device.type != "cpu" for batch in batches):
            return EagerBackend().masks(batches, thresholds)
        result = [
            torch.empty(mask_bytes(batch.kernels, batch.ranked, flat=batch.flat), dtype=torch.uint8)
            for batch in batches
        ]
        for wide, chosen in _by_width(batches):
            members = [batches[i] for i in chosen]
            draws = [batch.draw for batch in members if batch.draw is not None]
            torch.ops.wavprune.mark_(
                [batch.weight for batch in members],
                [_plan(batch) for batch in members],
                draws,
                thresholds[chosen],
                [result[i] for i in chosen],
                wide,
            )
        return result

    def project_(self, batches: Sequence[Batch], masks: Sequence[torch.Tensor]) -> None:
        """Set the coefficients that are not kept to 0, in place; see ``Backend``."""
        if any(batch.weight.device.type != "cpu" for batch in batches):
            EagerBackend().project_(batches, masks)
            return
        for wide, chosen in _by_width(batches):
            weights = [batches[i].weight for i in chosen]
            plans = [_plan(batches[i]) for i in chosen]
            torch.ops.wavprune.project_(weights, plans, [masks[i] for i in chosen], wide)
            torch.autograd.graph.increment_version(weights)


def _thresholds(jobs: Sequence[tuple[Sequence[Batch], Target]], wide: bool) -> torch.Tensor:
    batches = [batch for members, _ in jobs for batch in members]
    weights = [batch.weight for batch in batches]
    plans = [_plan(batch) for batch in batches]
    percentile = jobs[0][1].percentile
    thresholds: torch.Tensor
    if percentile is not None:
        dropped = [batch.kernels * batch.operator.dropped for batch in batches]
        thresholds = torch.ops.wavprune.percentile_threshold(
            weights, plans, dropped, percentile, wide
        )
    else:
        draws = [batch.draw for batch in batches if batch.draw is not None]
        membership = [i for i, (members, _) in enumerate(jobs) for _ in members]
        keep = [target.keep for _, target in jobs]
        thresholds = torch.ops.wavprune.topk_threshold(
            weights, plans, draws, membership, keep, wide
        )
    return thresholds


def _in_order(
    parts: Sequence[torch.Tensor], groups: Sequence[tuple[bool, list[int]]]
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


def _plan(batch: Batch) -> torch.Tensor:
    return ops.plan_for(batch.operator, batch.basis.kernel)


def _by_width(batches: Sequence[Batch]) -> list[tuple[bool, list[int]]]:
    """Which batches compute in float32 and which in float64: one call takes one of the two."""
    groups: dict[bool, list[int]] = {}
    for i, batch in enumerate(batches):
        wide = batch.draw is not None or batch.compute_dtype == torch.float64
        groups.setdefault(wide, []).append(i)
    return list(groups.items())


@cache
def _device_obstacle(device: torch.device) -> str | None:
    capabilities = torch.ops.wavprune.cuda_capabilities()
    if not capabilities:
        return "the compiled kernels have no CUDA part: there was no nvcc when they were built"
    if torch.version.cuda is None:
        return "the compiled kernels run on the GPUs of a torch with CUDA, which this one is not"
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < min(capabilities):
        least = ".".join(str(min(capabilities)))
        return f"the compiled kernels need compute capability {least}; {device} has {major}.{minor}"
    return None


def _too_wide(batch: Batch) -> str | None:
    if batch.operator.identity:
        return None
    inputs, outputs = batch.basis.kernel[0] * batch.basis.kernel[1], batch.ranked
    wide = batch.compute_dtype == torch.float64
    size = (inputs + 2 * max(inputs, outputs)) * (8 if wide else 4)
    if size <= TILE_BYTES:
        return None
    kernel = "x".join(map(str, batch.basis.kernel))
    return (
        f"a {kernel} kernel with its {outputs} coefficients takes {size} bytes, and the compiled "
        f"kernels have {TILE_BYTES} for it on CUDA; eager has no such limit"
    )


def make() -> Backend:
    """The backend, for the registry."""
    return NativeBackend()
