"""What a backend is given, and what it must offer.

A backend runs the numbers: it finds thresholds, writes masks, and applies either. What depends on
shapes and settings alone was decided before, and travels in ``Layer``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch

from ..bases import Basis, Operator
from .masks import mask_bytes

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

# Why a backend does not take a sharded weight.
SHARDED = "it is sharded, which only 'eager' takes"
# One threshold per layer, or one mask per layer.
Selection = torch.Tensor | Sequence[torch.Tensor]


class Budget(NamedTuple):
    """How much to keep of some layers taken together: one of the two.

    Attributes:
        keep: how many coefficients to keep.
        percentile: the percentile of ``|C|``, structural zeros included, to cut at (one layer).
    """

    keep: int | None = None
    percentile: float | None = None


# Not frozen, which takes seven times as long at every call; nothing changes one.
@dataclass(slots=True, eq=False)
class Layer:
    """One prunable weight with all that was decided about it; it goes through every stage.

    Attributes:
        name: the layer's name in its model.
        weight: ``(Cout, Cin/groups, kh, kw)``, on the device that computes; of a layer that is
            still to be copied there, on the meta device. Of a sharded weight, this rank's part.
        basis: the basis of its kernels.
        by_importance: True ranks by ``|c_m| * ||S[:, m]||``, False by ``|c_m|``.
        compute_dtype: float32 or float64, the same for all layers that share a threshold.
        budget: how much to keep of this layer; None where layers share a budget.
        seed: 64 bits where random numbers rank the weights, else None.
        first_channel: index in the whole weight of this part's first output channel.
        group: the ranks that hold the other parts of a sharded weight, else None.
        numel: weights of the layer, on all ranks; None means those of ``weight``.
        home: the weight where it lives, if it is copied to another device; else None.
        destination: where a layer that is still to be copied will be computed; else None.
    """

    name: str
    weight: torch.Tensor
    basis: Basis
    by_importance: bool = True
    compute_dtype: torch.dtype = torch.float32
    budget: Budget | None = None
    seed: int | None = None
    first_channel: int = 0
    group: ProcessGroup | None = None
    numel: int | None = None
    home: torch.Tensor | None = None
    destination: torch.device | None = None

    @property
    def device(self) -> torch.device:
        """Where it is computed."""
        return self.destination or self.weight.device

    @property
    def ranking_dtype(self) -> torch.dtype:
        """The dtype that ranks: random numbers rounded to float32 would tie."""
        return torch.float64 if self.seed is not None else self.compute_dtype

    @property
    def total_weights(self) -> int:
        """Weights of the layer, on all ranks."""
        return self.weight.numel() if self.numel is None else self.numel

    @property
    def num_kernels(self) -> int:
        """Kernels of ``weight``."""
        return int(self.weight.shape[0] * self.weight.shape[1])

    @property
    def operator(self) -> Operator:
        """The matrices whose coefficients are ranked.

        Raises:
            WavpruneError: the kernels are so large that their basis has only factors.
        """
        basis = self.basis
        return basis.importance_operator if self.by_importance else basis.coefficient_operator

    @property
    def num_coefficients(self) -> int:
        """Ranked coefficients of a kernel; of a basis in factors, structural zeros too."""
        basis = self.basis
        return self.operator.num_coefficients if basis.is_dense else math.prod(basis.grid)

    @property
    def num_dropped(self) -> int:
        """Coefficients of a kernel that are 0 and not ranked."""
        return self.operator.dropped if self.basis.is_dense else 0

    @property
    def is_flat(self) -> bool:
        """True where the bits of a mask are in the order of the coefficients; see ``masks``."""
        return not self.basis.is_dense or self.operator.identity

    @property
    def mask_bytes(self) -> int:
        """Bytes of the layer's mask."""
        return mask_bytes(self.num_kernels, self.num_coefficients, flat=self.is_flat)


class Job(NamedTuple):
    """Layers that share a threshold.

    Attributes:
        layers: all of them; their weights are on the meta device where ``stream`` is given.
        budget: how much to keep of them together.
        stream: goes through the layers once, each on its device while it is looked at; for
            layers that do not fit there together.
    """

    layers: Sequence[Layer]
    budget: Budget
    stream: Callable[[], Iterator[Layer]] | None = None

    def visit(self) -> Iterator[Layer]:
        """One pass over the layers, with their values."""
        return iter(self.layers) if self.stream is None else self.stream()


class Measured(NamedTuple):
    """What thresholds would prune.

    Attributes:
        thresholds: ``(jobs,)``, float64; see ``Backend.threshold``.
        rows: ``(layers, 3)``, float64, in the order of the jobs' layers: coefficients kept, and the
            squared norms of the coefficients dropped and of all; NaN where it cannot tell.
    """

    thresholds: torch.Tensor
    rows: torch.Tensor


class Backend(Protocol):
    """What every backend offers.

    Attributes:
        name: the name it is registered by.
        call_limit: how many weights it wants in one call, at most.
        can_stream: True where it looks at the layers of a job one after the other, so that they
            may live on several devices, or come and go.
        is_atomic: True where nothing can interrupt a call that changes weights of one compute
            dtype on one device.
        has_masks: True where ``masks`` and ``project_`` work and ``apply_`` takes masks.
        can_capture: True where it never waits for a device, so that a CUDA graph can hold its
            calls.
    """

    name: str
    call_limit: int
    can_stream: bool
    is_atomic: bool
    has_masks: bool
    can_capture: bool

    def unsupported(self, layer: Layer) -> str | None:
        """Why this backend cannot prune this layer, or None."""
        ...

    def threshold(self, jobs: Sequence[Job]) -> torch.Tensor:
        """One exact threshold per job.

        Returns:
            ``(jobs,)``, float64, on the device that computed; NaN where a weight is not finite,
            infinity where nothing is to be kept.
        """
        ...

    def measure(self, jobs: Sequence[Job]) -> Measured | None:
        """The thresholds of jobs, and what each would prune; no weight changes.

        Args:
            jobs: each with ``budget.keep``; no layer is ranked at random.

        Returns:
            What a threshold and a pruned copy of every weight would tell, or None where the
            backend has no quicker way to it.
        """
        ...

    def masks(self, layers: Sequence[Layer], thresholds: torch.Tensor) -> list[torch.Tensor]:
        """Which coefficients ``apply_`` keeps at these thresholds; no weight changes.

        Args:
            layers: whose coefficients.
            thresholds: ``(layers,)``, float64.

        Returns:
            One mask per layer, packed as ``wavprune.backends.masks`` says, on the weight's device.
        """
        ...

    def apply_(self, layers: Sequence[Layer], selection: Selection) -> torch.Tensor:
        """Prune each layer's weight in place.

        Args:
            layers: what to prune.
            selection: thresholds ``(layers,)``, float64, or one mask per layer. Where a threshold
                is NaN every weight stays as it is, and the result means nothing.

        Returns:
            ``(layers, 4)``, float64, on the device that computed: coefficients kept (never a 0),
            exact zeros in the weight afterwards, squared Frobenius norm of the change as stored,
            and of the weight before.
        """
        ...

    def project_(self, layers: Sequence[Layer], masks: Sequence[torch.Tensor]) -> None:
        """Set the coefficients that a mask does not keep to 0, in place."""
        ...


def mark_changed(layers: Sequence[Layer]) -> None:
    """Let autograd see that weights have changed, as it sees it of any operator of torch."""
    weights = [layer.weight for layer in layers if not layer.weight.is_inference()]
    torch.autograd.graph.increment_version(weights)
