"""What classifiers return: logits, or probabilities already."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# A class that is never answered has a divergence all the same.
LEAST = 1e-30
SUMS_TO_1 = 1e-3


def logits_of(outputs: torch.Tensor) -> torch.Tensor:
    """Logits of a classifier that ends in a softmax, as many do in ONNX; other outputs as they are.

    Outputs ``(N, C)``, C at least 2, are probabilities where none is negative and those of each
    sample sum to 1. Their logarithms are logits of the same probabilities, so that what follows
    need not know which of the two a network returns.

    Args:
        outputs: of any shape and dtype. Gradients pass.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> torch.allclose(logits_of(logits.softmax(1)).softmax(1), logits.softmax(1))
        True
        >>> logits_of(logits) is logits
        True
    """
    if not _are_probabilities(outputs.detach()):
        return outputs
    # In half precision the least one is 0.
    wide = outputs if outputs.dtype == torch.float64 else outputs.float()
    return wide.clamp_min(LEAST).log()


def are_logits(outputs: Sequence[torch.Tensor]) -> bool:
    """Whether outputs are those of a classifier of exclusive classes, by ``logits_of``.

    They are ``(N, C)``, C at least 2. Values that all lie in 0 to 1, and are not what ``logits_of``
    changes, are answers of their own each, as those of a sigmoid.

    Args:
        outputs: of each batch.
    """
    return all(_are_of_classes(out) and bool((out.min() < 0) | (out.max() > 1)) for out in outputs)


def _are_of_classes(outputs: torch.Tensor) -> bool:
    return outputs.ndim == 2 and outputs.shape[1] >= 2


def _are_probabilities(outputs: torch.Tensor) -> bool:
    if not (_are_of_classes(outputs) and outputs.is_floating_point() and len(outputs)):
        return False
    # Half precision rounds each probability.
    tolerance = max(SUMS_TO_1, torch.finfo(outputs.dtype).eps)
    off = (outputs.sum(dim=1, dtype=torch.float64) - 1).abs().max()
    return bool((outputs.min() >= 0) & (off <= tolerance))
