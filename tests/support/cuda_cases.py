"""Weights for the compiled operators on CUDA, and what calls of them must agree on."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch

from tests.support.cases import any_level, bits, layer_weights, normal
from wavprune.backends.masks import mask_bytes, unpack
from wavprune.bases import named_basis
from wavprune.bases.basis import IDENTITY

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]
LAYOUTS = ("contiguous", "channels_last", "tensorflow", "input channels first", "every second")


class Case(NamedTuple):
    """What the operators get of one weight.

    Attributes:
        weight: the weight.
        plan: its basis.
        dropped: structural zeros that are not ranked.
        coefficients: ranked coefficients of a kernel.
    """

    weight: torch.Tensor
    plan: torch.Tensor
    dropped: int
    coefficients: int

    @property
    def keep(self) -> int:
        """A third of the weights."""
        return self.weight.numel() // 3

    @property
    def is_flat(self) -> bool:
        """Whether the mask has its bits in the order of the values."""
        return int(self.plan[0]) == IDENTITY

    @property
    def kernels(self) -> int:
        """How many kernels the weight has."""
        return self.weight.shape[0] * self.weight.shape[1]

    def empty_mask(self) -> torch.Tensor:
        """Memory for a mask, with something in it."""
        size = mask_bytes(self.kernels, self.coefficients, flat=self.is_flat)
        return torch.full((size,), 0xA5, dtype=torch.uint8, device=self.weight.device)

    def kept(self, mask: torch.Tensor) -> torch.Tensor:
        """The bits of a mask that mean something."""
        return unpack(mask.cpu(), self.kernels, self.coefficients, flat=self.is_flat)


def case(
    weight: torch.Tensor, wavelet: str = "haar", mode: str = "periodization", level: int | None = 1
) -> Case:
    """A weight with a basis."""
    kernel = (int(weight.shape[2]), int(weight.shape[3]))
    with any_level():
        basis = named_basis(wavelet, kernel, mode, level, True)
    operator = basis.importance_operator
    kernels = weight.shape[0] * weight.shape[1]
    return Case(weight, operator.plan, kernels * operator.dropped, operator.num_coefficients)


def laid_out(dense: torch.Tensor, layout: str) -> torch.Tensor:
    """The same values in another order in memory; gaps are NaN."""
    if layout == "channels_last":
        # Also where an axis has one element, which ``contiguous`` would leave as it is.
        return dense.permute(0, 2, 3, 1).contiguous().permute(0, 3, 1, 2)
    if layout == "tensorflow":
        return dense.permute(2, 3, 1, 0).contiguous().permute(3, 2, 0, 1)
    if layout == "input channels first":
        return dense.transpose(0, 1).contiguous().transpose(0, 1)
    if layout == "every second":
        stored = torch.full([2 * n for n in dense.shape], torch.nan, dtype=dense.dtype)
        return stored[::2, ::2, ::2, ::2].copy_(dense)
    return dense.clone()


def twin(weight: torch.Tensor) -> torch.Tensor:
    """A copy with the same strides."""
    pairs = zip(weight.shape, weight.stride(), strict=True)
    extent = sum((size - 1) * stride for size, stride in pairs) + 1 if weight.numel() else 0
    memory = torch.full((extent,), torch.nan, dtype=weight.dtype, device=weight.device)
    return memory.as_strided(weight.shape, weight.stride()).copy_(weight)


def mixed(dtype: torch.dtype) -> list[Case]:
    """Every kind of plan, shape and memory layout, for one call."""
    cases = [case(weight, level=None) for weight in layer_weights(dtype).values()]
    three, seven = normal(23, 29, 3, 3, dtype=dtype), normal(9, 5, 7, 7, dtype=dtype)
    last = laid_out(normal(40, 33, 3, 3, dtype=dtype), "channels_last")
    flipped = normal(3, 3, 61, 5, dtype=dtype, seed=3).permute(2, 3, 0, 1)
    cases += [
        case(three, "haar", "symmetric"),
        case(three, "uhaar"),
        case(three, "dct"),
        case(three, "db2", "symmetric"),
        case(three, "identity"),
        case(last, "uhaar"),
        case(last, "identity"),
        case(flipped, "haar"),
        case(seven, "haar", level=None),
        case(seven, "bior2.2", "symmetric"),
        case(normal(3, 2, 31, 31, dtype=dtype), "sym4", level=None),
        case(normal(70, 300, 1, 1, dtype=dtype)),
        case(torch.zeros(5, 5, 3, 3, dtype=dtype)),
        case(torch.empty(0, 5, 3, 3, dtype=dtype)),
    ]
    return cases


def every_layout(dtype: torch.dtype, layout: str) -> list[Case]:
    """Sizes around those of tiles, bricks and words of masks, in one layout."""
    shapes_of_basis = {
        "uhaar": [(20, 17, 3, 3), (5, 3, 3, 3), (17, 32, 3, 3), (270, 1, 3, 3), (1, 40, 3, 3)],
        "dct": [(18, 9, 5, 5), (4, 32, 4, 3), (2, 2, 11, 11)],
        "db2": [(17, 16, 3, 3)],
        "identity": [
            (20, 17, 3, 3),
            (150, 16, 1, 1),
            (150, 18, 1, 1),
            (9, 3, 7, 7),
            (3, 2, 31, 31),
        ],
    }
    return [
        case(laid_out(normal(*shape, dtype=dtype, seed=i), layout), wavelet, "symmetric")
        for wavelet, shapes in shapes_of_basis.items()
        for i, shape in enumerate(shapes)
    ]


class Pruned(NamedTuple):
    """What a call did."""

    thresholds: torch.Tensor
    weights: list[torch.Tensor]
    rows: torch.Tensor


def prune(
    operators: Any,
    cases: Sequence[Case],
    jobs: Sequence[int],
    keep: Sequence[int],
    compute_float64: bool,
    seeds: Sequence[int] = (),
) -> Pruned:
    """Copies of the weights, pruned."""
    weights, plans = [twin(entry.weight) for entry in cases], [entry.plan for entry in cases]
    thresholds = operators.topk_threshold(weights, plans, seeds, jobs, keep, compute_float64)
    own = thresholds[torch.tensor(jobs, device=thresholds.device)]
    rows = operators.prune_(weights, plans, seeds, own, compute_float64)
    return Pruned(thresholds, weights, rows)


class Masked(NamedTuple):
    """What was done by masks.

    Attributes:
        masks: of the thresholds.
        projected: the weights after ``project_``.
        pruned: the weights after ``prune_by_mask_``.
        rows: what that counted.
    """

    masks: list[torch.Tensor]
    projected: list[torch.Tensor]
    pruned: list[torch.Tensor]
    rows: torch.Tensor


def mask(
    operators: Any,
    cases: Sequence[Case],
    thresholds: torch.Tensor,
    compute_float64: bool,
    seeds: Sequence[int] = (),
) -> Masked:
    """Masks of these thresholds, and copies of the weights pruned by them in both ways."""
    plans = [entry.plan for entry in cases]
    masks = [entry.empty_mask() for entry in cases]
    weights = [entry.weight for entry in cases]
    operators.mark_(weights, plans, seeds, thresholds, masks, compute_float64)
    projected, pruned = ([twin(weight) for weight in weights] for _ in range(2))
    operators.project_(projected, plans, masks, compute_float64)
    rows = operators.prune_by_mask_(pruned, plans, masks, compute_float64)
    return Masked(masks, projected, pruned, rows)


def assert_same(found: Pruned, expected: Pruned) -> None:
    """The same thresholds, weights and counts, bit for bit; sums of squares but for rounding."""
    assert bits(found.thresholds.cpu()) == bits(expected.thresholds)
    assert_equal(found.weights, expected.weights)
    assert_same_rows(found.rows, expected.rows)


def assert_masked(cases: Sequence[Case], found: Masked, by_threshold: Pruned) -> None:
    """Masks say what thresholds keep, and prune as those do, bit for bit."""
    assert_equal(found.projected, by_threshold.weights)
    assert_equal(found.pruned, by_threshold.weights)
    assert_same_rows(found.rows, by_threshold.rows)
    kept = [int(entry.kept(own).sum()) for entry, own in zip(cases, found.masks, strict=True)]
    assert kept == found.rows[:, 0].tolist()


def assert_equal(found: Iterable[torch.Tensor], expected: Iterable[torch.Tensor]) -> None:
    """The same values; -0 is 0."""
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.cpu(), theirs.cpu())


def assert_same_rows(found: torch.Tensor, expected: torch.Tensor) -> None:
    """The same counts, and sums of squares that differ by rounding."""
    ours, theirs = found.cpu(), expected.cpu()
    assert torch.equal(ours[:, :2], theirs[:, :2])
    assert torch.allclose(ours[:, 2:], theirs[:, 2:], rtol=1e-5)


def to_gpu(weight: torch.Tensor) -> torch.Tensor:
    """The same values with the same strides on the current device."""
    there = torch.empty_strided(weight.shape, weight.stride(), dtype=weight.dtype, device="cuda")
    return there.copy_(weight)


def on_gpu(entry: Case) -> Case:
    """The same weight on the current device."""
    return entry._replace(weight=to_gpu(entry.weight))


def launched(profile: torch.profiler.profile) -> list[str]:
    """The names of the CUDA kernels that ran, without copies and fills by the runtime."""
    events: Any = profile.events()  # type: ignore[no-untyped-call]  # torch's lack
    return [
        event.name
        for event in events
        if event.device_type.name == "CUDA" and not event.name.startswith(("Memcpy", "Memset"))
    ]


def resnet_18(share: float = 1.0) -> list[tuple[int, int, int, int]]:
    """The shapes of its 20 Conv2d weights, with that share of the channels."""
    widths = [64, 128, 256, 512]
    shapes = [(64, 3, 7, 7)]
    for stage, width in enumerate(widths):
        narrow = widths[max(stage - 1, 0)]
        shapes += [(width, narrow, 3, 3)] + [(width, width, 3, 3)] * 3
        if stage:
            shapes.append((width, narrow, 1, 1))
    return [
        (int(outs * share), max(int(ins * share), min(ins, 3)), kh, kw)
        for outs, ins, kh, kw in shapes
    ]
