"""What classifiers return: logits, or probabilities already, as many do that end in a softmax."""

from __future__ import annotations

from collections.abc import Sequence

import torch

# A class that is never answered has a divergence all the same.
LEAST = 1e-30
# How far the sums of a softmax are from 1, at most: in float32, and in roundings of half precision.
SUMS, ROUNDINGS = 1e-5, 2
ROWS = 4096


def are_probabilities(outputs: torch.Tensor) -> bool:
    """Whether outputs are ``(N, C)``, C at least 2, without negatives, each sample's sum being 1.

    Ask once for all that are compared with each other: what is no softmax may come close to it in
    some samples.

    Args:
        outputs: of any shape and dtype.

    Example:
        >>> logits = torch.tensor([[2.0, 0.0, -1.0]])
        >>> are_probabilities(logits), are_probabilities(logits.softmax(1))
        (False, True)
    """
    if not (are_of_classes(outputs) and outputs.is_floating_point() and len(outputs)):
        return False
    if outputs.min() < 0:
        return False
    tolerance = max(SUMS, ROUNDINGS * torch.finfo(outputs.dtype).eps)
    # A sum in half precision would be rounded once more.
    wide = torch.float64 if outputs.dtype == torch.float64 else torch.float32
    sums = [part.sum(dim=1, dtype=wide) for part in torch.split(outputs, ROWS)]
    return bool((torch.cat(sums) - 1).abs().max() <= tolerance)


def log_of(probabilities: torch.Tensor) -> torch.Tensor:
    """Logits of these probabilities; gradients pass."""
    # In half precision the least one is 0.
    wide = probabilities if probabilities.dtype == torch.float64 else probabilities.float()
    return wide.clamp_min(LEAST).log()


def are_logits(outputs: Sequence[torch.Tensor]) -> bool:
    """Whether outputs are logits of exclusive classes.

    They are ``(N, C)``, C at least 2. Where all values lie in 0 to 1, they are answers of their own
    each, as those of a sigmoid.

    Args:
        outputs: of each batch; ``log_of`` them, where they are probabilities.
    """
    if not all(map(are_of_classes, outputs)):
        return False
    return any(bool((out.min() < 0) | (out.max() > 1)) for out in outputs if len(out))


def are_of_classes(outputs: torch.Tensor) -> bool:
    """Whether outputs are ``(N, C)``, C at least 2."""
    return outputs.ndim == 2 and outputs.shape[1] >= 2
