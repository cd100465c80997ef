"""Weights, models and checks that several tests share."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wavprune import (
    LayerRef,
    LayerStats,
    PruneConfig,
    PruneReport,
    backends,
    basis_for,
    prune_layers,
)
from wavprune.backends import Layer
from wavprune.bases import Operator

Array = npt.NDArray[Any]
Weights = dict[str, torch.Tensor]

# On kernels of tests, a second thread only waits, and long where the machine is busy.
torch.set_num_threads(1)

try:
    import hypothesis
except ImportError:
    # On a machine that has only what the tests on a GPU need; see conftest.py.
    pass
else:
    # The same examples in every run, and no directory of old ones.
    quick = hypothesis.settings(max_examples=25, derandomize=True, deadline=None)

# name -> settings of every kind of basis: orthonormal, biorthogonal, expansive, the library's own.
BASES: dict[str, dict[str, Any]] = {
    "haar": {"wavelet": "haar"},
    "haar-zero": {"wavelet": "haar", "mode": "zero"},
    "db2-symmetric": {"wavelet": "db2", "mode": "symmetric", "level": 1, "force_level": True},
    "bior2.2-periodic": {"wavelet": "bior2.2", "mode": "periodic", "level": 1, "force_level": True},
    "sym4": {"wavelet": "sym4", "level": 1, "force_level": True},
    "coif1-constant": {"wavelet": "coif1", "mode": "constant", "level": 1, "force_level": True},
    "uhaar": {"wavelet": "uhaar"},
    "uhaar-level1": {"wavelet": "uhaar", "level": 1},
    "dct": {"wavelet": "dct"},
    "klt": {"wavelet": "klt"},
    "identity": {"wavelet": "identity"},
    "min_weight": {"method": "min_weight"},
}


# Those that run here and have every basis; ptwt has some of them, and the rest from eager.
BACKENDS = [name for name in backends.names() if name not in {"ptwt", *backends.unavailable()}]


def normal(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    """The same normal numbers for the same seed, drawn without the global generator."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def layer_weights(dtype: torch.dtype = torch.float32) -> Weights:
    """One weight of every kind of layer and memory layout."""
    return {
        "depthwise": normal(32, 1, 5, 5, dtype=dtype, seed=1),
        "grouped": normal(12, 4, 3, 3, dtype=dtype, seed=2),
        "pointwise": normal(16, 8, 1, 1, dtype=dtype, seed=3),
        "oblong": normal(8, 4, 3, 5, dtype=dtype, seed=4),
        "row": normal(8, 4, 1, 7, dtype=dtype, seed=5),
        "even": normal(8, 4, 4, 4, dtype=dtype, seed=11),
        "seven": normal(4, 3, 7, 7, dtype=dtype, seed=6),
        "nine": normal(4, 2, 9, 9, dtype=dtype, seed=7),
        "channels_last": normal(8, 8, 3, 3, dtype=dtype, seed=8).to(
            memory_format=torch.channels_last
        ),
        "strided": normal(8, 4, 3, 6, dtype=dtype, seed=9)[..., ::2],
        "single": normal(1, 1, 1, 1, dtype=dtype, seed=10),
    }


def layer_of(weight: torch.Tensor, config: PruneConfig) -> Layer:
    """What a backend gets of one layer."""
    return Layer(
        "conv",
        weight,
        basis_for(config, weight),
        by_importance=config.percentile is None,
        compute_dtype=torch.float64 if weight.dtype == torch.float64 else torch.float32,
    )


def model_of(**weights: torch.Tensor) -> nn.ModuleDict:
    """A model with one convolution for each weight; it holds these very tensors."""
    model = nn.ModuleDict()
    for name, weight in weights.items():
        conv = nn.Conv2d(1, 1, 1, bias=False)
        conv.weight = nn.Parameter(weight, requires_grad=weight.is_floating_point())
        model[name] = conv
    return model


def weight_of(model: nn.Module, layer: str = "conv") -> nn.Parameter:
    """A layer's weight."""
    return model.get_parameter(f"{layer}.weight")


def bits(tensor: torch.Tensor) -> bytes:
    """What a tensor holds, bit by bit: NaN equals NaN, and -0.0 is not 0.0."""
    return tensor.detach().contiguous().view(torch.uint8).numpy().tobytes()


@contextmanager
def any_level() -> Iterator[None]:
    """Without the warnings about levels, for tests that are about something else."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=r".*(is too long for|Level value)")
        yield


class Outcome(NamedTuple):
    """One weight after pruning, and what was said about it."""

    weight: torch.Tensor
    threshold: float
    kept: int


def prune_weight(weight: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, LayerStats]:
    """A pruned copy of one weight, and its row of the report."""
    copy = weight.clone()
    (stats,) = prune_layers([LayerRef("conv", copy)], PruneConfig(**settings))
    return copy, stats


def prune_weights(weights: Mapping[str, torch.Tensor], config: PruneConfig) -> dict[str, Outcome]:
    """Prune these tensors in place."""
    with any_level():
        report = prune_layers([LayerRef(*entry) for entry in weights.items()], config)
    return outcomes(weights, report)


def outcomes(weights: Mapping[str, torch.Tensor], report: PruneReport) -> dict[str, Outcome]:
    """The layers of a report, each with its weight."""
    return {
        layer.name: Outcome(weights[layer.name].detach(), layer.threshold, layer.kept)
        for layer in report
    }


class _Ranking(NamedTuple):
    operator: Operator
    coefficients: Array
    slack: Array


def assert_pruned(
    before: Mapping[str, torch.Tensor], after: Mapping[str, Outcome], config: PruneConfig
) -> None:
    """Assert that a run kept what the matrices of the bases, in float64, say it must keep.

    What ranks clearly above the exact threshold must be kept, what ranks clearly below must be
    pruned, and each weight must be the synthesis of just that. Only what is within 4 ulp of the
    threshold may go either way. A rounding error is relative to what a sum adds up, not to what is
    left of it; so the ulp, in the dtype that computes, is that of the largest sum of magnitudes
    ``sum_k |A[m, k] w[k]|`` of the kernel: the size of its coefficients where the kernel is small,
    and more than that for large kernels, as the errors are.
    """
    assert before.keys() == after.keys()
    groups = [list(before)] if config.scope == "global" else [[name] for name in before]
    for group in groups:
        rankings = {name: _ranking(before[name], config) for name in group}
        ranks = np.concatenate([np.abs(r.coefficients).ravel() for r in rankings.values()])
        slacks = np.concatenate([r.slack.ravel() for r in rankings.values()])
        exact = _exact_threshold(ranks, [before[name] for name in group], rankings, config)
        nearest = np.argsort(np.abs(ranks - exact))[:2]
        leeway = float(slacks[nearest].max())
        for name, ranking in rankings.items():
            assert abs(after[name].threshold - exact) <= leeway, name
            _assert_kept(name, before[name], after[name], ranking, exact, leeway)


def _ranking(weight: torch.Tensor, config: PruneConfig) -> _Ranking:
    basis = basis_for(config, weight)
    if not basis.is_dense:
        # Another instance: its matrices are for this check alone.
        basis = dataclasses.replace(basis)
        vars(basis)["is_dense"] = True
    by_value = config.percentile is not None
    operator = basis.coefficient_operator if by_value else basis.importance_operator
    kernels = weight.to(torch.float64).flatten(0, 1).flatten(1).numpy()
    sums = (np.abs(kernels) @ np.abs(operator.analysis).T).max(axis=1, keepdims=True)
    computed = np.float64 if weight.dtype == torch.float64 else np.float32
    slack = 4 * np.spacing(sums.astype(computed)).astype(np.float64)
    if basis.data_driven:
        # Two ways to the singular vectors differ by rounding, the more the closer two values are.
        values = np.linalg.svd(kernels, compute_uv=False)
        spread = values[0] / np.abs(np.diff(values)).min()
        slack += 4 * np.spacing(spread) * np.linalg.norm(kernels, axis=1, keepdims=True)
    coefficients = kernels @ operator.analysis.T
    return _Ranking(operator, coefficients, np.broadcast_to(slack, coefficients.shape))


def _exact_threshold(
    ranks: Array,
    weights: Sequence[torch.Tensor],
    rankings: Mapping[str, _Ranking],
    config: PruneConfig,
) -> float:
    if config.percentile is not None:
        (ranking,) = rankings.values()
        structural = len(ranking.coefficients) * ranking.operator.dropped
        return float(
            np.percentile(np.concatenate([ranks, np.zeros(structural)]), config.percentile)
        )
    fraction = 1 - Fraction(str(config.sparsity))
    sizes = [weight.numel() for weight in weights]
    keep = math.ceil(fraction * sum(sizes))
    return float(np.sort(ranks)[::-1][min(keep, len(ranks)) - 1])


def _assert_kept(
    name: str,
    before: torch.Tensor,
    after: Outcome,
    ranking: _Ranking,
    exact: float,
    leeway: float,
) -> None:
    C, S = ranking.coefficients, ranking.operator.synthesis
    either = np.abs(np.abs(C) - exact) <= np.maximum(ranking.slack, leeway)
    kept = (np.abs(C) > exact) & ~either
    # A kernel of zeros has no coefficient that rounding could make more than 0.
    either &= (before.flatten(0, 1).flatten(1) != 0).any(1, keepdim=True).numpy()
    least = np.count_nonzero(kept)
    assert least <= after.kept <= least + np.count_nonzero(either), name
    weight = after.weight.to(torch.float64).flatten(0, 1).flatten(1).numpy()
    unsure = np.where(either, np.abs(C), 0) + ranking.slack
    stored = torch.finfo(after.weight.dtype)
    allowed = unsure @ np.abs(S).T + stored.eps * (np.abs(weight) + stored.tiny)
    assert (np.abs(weight - np.where(kept, C, 0) @ S.T) <= allowed).all(), name
