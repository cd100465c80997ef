"""Selection rules: how each method chooses which coefficients of a layer are kept.

A new rule is one file: a ``Rule`` and ``register(name, rule)``. It returns scores or masks; no
backend hears of it.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from ..backends import Budget, Job, Layer
from ..backends.masks import pack
from ..config import RULES, PruneConfig
from ..errors import WavpruneError
from .layers import LayerRef


class Rule:
    """How a method chooses.

    Attributes:
        basis: the basis that the method always prunes in; None means the setting ``wavelet``.
        uses_thresholds: True where a coefficient is kept by its magnitude or random number alone.
            Then backends find the threshold, and ``scores`` and ``masks`` are not called.
        uses_seed: True where the result depends on the setting ``seed``.
    """

    basis: str | None = None
    uses_thresholds = False
    uses_seed = False

    def check(self, ref: LayerRef) -> None:
        """Raise WavpruneError where the rule cannot prune a layer."""
        del ref

    def prepare(self, layer: Layer, config: PruneConfig) -> Layer:
        """The layer with what the rule adds to it, such as a seed."""
        del config
        return layer

    def scores(self, layer: Layer, coefficients: torch.Tensor) -> torch.Tensor:
        """How important each coefficient is: the highest are kept.

        Args:
            layer: whose they are; its weight may be looked at and must not be changed.
            coefficients: ``(N, M)``, scaled to importance, in the layer's compute dtype.

        Returns:
            ``(N, M)``, not negative; a score of 0 is never kept.
        """
        raise NotImplementedError

    def masks(self, job: Job, coefficients: Callable[[Layer], torch.Tensor]) -> list[torch.Tensor]:
        """Which coefficients are kept of layers that share a budget.

        Args:
            job: the layers, with their weights, and ``budget.keep``.
            coefficients: gives those of a layer, ``(N, M)``.

        Returns:
            One ``(N, M)`` per layer, bool.

        Raises:
            WavpruneError: the rule cannot choose among these layers.
        """
        scores = []
        for layer in job.layers:
            of_layer = coefficients(layer)
            scores.append(torch.where(of_layer == 0, 0, self.scores(layer, of_layer)))
        ranks = torch.cat([part.flatten().to(scores[0].device) for part in scores])
        keep = min(job.budget.keep or 0, ranks.numel())
        if not keep:
            return [torch.zeros_like(part, dtype=torch.bool) for part in scores]
        threshold = torch.kthvalue(ranks, ranks.numel() - keep + 1).values
        return [(part >= threshold.to(part.device)) & (part > 0) for part in scores]


class Magnitude(Rule):
    """The coefficients of the largest importance."""

    uses_thresholds = True

    def __init__(self, basis: str | None = None) -> None:
        self.basis = basis


class Random(Rule):
    """Weights drawn at random: the same for a seed whichever other layers are selected."""

    basis = "identity"
    uses_thresholds = True
    uses_seed = True

    def prepare(self, layer: Layer, config: PruneConfig) -> Layer:
        """The layer with 64 bits of its own."""
        digest = hashlib.blake2b(f"{config.seed}:{layer.name}".encode(), digest_size=8).digest()
        return replace(layer, seed=int.from_bytes(digest, "little", signed=True))


def register(name: str, rule: Rule) -> None:
    """Make a rule available as a ``method``."""
    RULES.register(name, rule)


def rule_for(config: PruneConfig) -> Rule:
    """The rule of a method.

    Raises:
        WavpruneError: a rule that does not use thresholds was asked for a percentile.
    """
    rule: Rule = RULES[config.method]
    if config.percentile is not None and not rule.uses_thresholds:
        raise WavpruneError(
            f"percentile={config.percentile!r} ranks magnitudes, which method={config.method!r} "
            "does not; give sparsity"
        )
    return rule


def packed_masks(
    rule: Rule, layers: Sequence[Layer], budget: Budget | None, coefficients: Coefficients
) -> list[torch.Tensor]:
    """The packed masks that a rule chooses.

    Args:
        rule: what chooses.
        layers: with their weights.
        budget: what all of them share; None where each has its own.
        coefficients: gives those of a layer, ``(N, M)``.

    Raises:
        WavpruneError: the rule gave masks of another shape or dtype.
    """
    jobs = [Job((layer,), layer.budget or Budget(keep=0)) for layer in layers]
    if budget is not None:
        jobs = [Job(layers, budget)]
    masks = []
    for job in jobs:
        for layer, mask in zip(job.layers, rule.masks(job, coefficients), strict=True):
            expected = (layer.num_kernels, layer.num_coefficients)
            if mask.dtype != torch.bool or mask.shape != expected:
                raise WavpruneError(
                    f"layer {layer.name!r}: the rule {type(rule).__name__} gave a mask of "
                    f"{tuple(mask.shape)}, {mask.dtype}; allowed: {expected}, torch.bool"
                )
            masks.append(pack(mask, flat=layer.is_flat).to(layer.weight.device))
    return masks


Coefficients = Callable[[Layer], torch.Tensor]

register("dwt", Magnitude())
register("min_weight", Magnitude("identity"))
register("random", Random())
