"""``N:M`` sparsity: of every ``M`` weights that follow each other along the input channels, ``N``.

It is what ``torch.sparse.to_sparse_semi_structured`` takes of ``Linear`` weights at 2:4 (Mishra et
al., "Accelerating Sparse Deep Neural Networks", 2021).
"""

from __future__ import annotations

import re
from collections.abc import Callable

import torch

from ..backends import Job, Layer
from ..config import ALIASES, RULES
from ..errors import WavpruneError
from .layers import LayerRef
from .rules import Rule, register

COMMON = ("1:2", "2:4", "1:4", "4:8")


class Pattern(Rule):
    """The ``N`` weights of largest magnitude in every group of ``M``.

    Args:
        keep: ``N``.
        group: ``M``.
    """

    basis = "identity"

    def __init__(self, keep: int, group: int) -> None:
        self.keep, self.group = keep, group

    @property
    def sparsity(self) -> float:
        """What it prunes."""
        return 1 - self.keep / self.group

    def masks(self, job: Job, coefficients: Callable[[Layer], torch.Tensor]) -> list[torch.Tensor]:
        """See ``Rule``."""
        masks = []
        for layer in job.layers:
            values = coefficients(layer)
            outs, channels = layer.weight.shape[:2]
            kept = self.top(values.abs().reshape(outs, channels, -1))
            masks.append(kept.reshape(values.shape) & (values != 0))
        return masks

    def check(self, ref: LayerRef) -> None:
        """Raise WavpruneError where the input channels of a layer are no whole groups.

        Those of a transposed convolution are apart from each other, so it has none.
        """
        channels = ref.weight.shape[1]
        reason = f"channels, and it has {channels}" if channels % self.group else None
        if ref.transposed:
            reason = "channels that follow each other, and it is a transposed convolution"
        if reason is not None:
            raise WavpruneError(
                f"layer {ref.name!r}: {self.keep}:{self.group} needs groups of {self.group} input "
                f"{reason}; leave it out by ignore={[ref.name]!r}"
            )

    def top(self, scores: torch.Tensor) -> torch.Tensor:
        """The highest scores of each group.

        Args:
            scores: ``(..., channels, K)``, where ``channels`` is a multiple of ``M``.

        Returns:
            bool of the same shape.

        Example:
            >>> Pattern(1, 2).top(torch.tensor([[3.0], [1.0], [2.0], [5.0]]))[:, 0]
            tensor([ True, False, False,  True])
        """
        groups = scores.unflatten(-2, (-1, self.group))  # type: ignore[no-untyped-call]
        best = groups.topk(self.keep, dim=-2).indices
        kept = torch.zeros_like(groups, dtype=torch.bool).scatter_(-2, best, True)
        return kept.reshape(scores.shape)


def pattern_method(pattern: object, method: str, wavelet: str) -> str:
    """The ``method`` that prunes to a pattern; it is registered if it is not yet.

    Args:
        pattern: such as ``"2:4"``.
        method: what was asked for beside it.
        wavelet: the basis that was asked for.

    Raises:
        TypeError: it is no string.
        WavpruneError: it is no pattern, or the basis is not the identity.

    Example:
        >>> pattern_method("2:4", "min_weight", "uhaar")
        '2:4'
    """
    if not isinstance(pattern, str):
        raise TypeError(f"pattern must be a string such as '2:4', not {pattern!r}")
    match = re.fullmatch(r"([1-9]\d{0,3}):([1-9]\d{0,3})", pattern)
    if match is None or int(match[1]) >= int(match[2]):
        raise WavpruneError(f"pattern must be 'N:M' with 0 < N < M, such as '2:4', not {pattern!r}")
    is_magnitude = ALIASES.get(method, method) == "min_weight"
    if not is_magnitude and (method, wavelet) != ("dwt", "identity"):
        basis = f"wavelet={wavelet!r}" if method == "dwt" else f"method={method!r}"
        raise WavpruneError(
            f"pattern={pattern!r} is of zeros in the weights themselves, where hardware skips "
            f"them; zeros among coefficients are none in the weights, so {basis} does not go with "
            "it; allowed: method='min_weight', or wavelet='identity'"
        )
    if pattern not in RULES:
        register(pattern, Pattern(int(match[1]), int(match[2])))
    return pattern


for _name in COMMON:
    register(_name, Pattern(*map(int, _name.split(":"))))
