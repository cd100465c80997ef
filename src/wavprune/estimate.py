"""How large a pruned layer is in a compressed file: an estimate from counts alone.

Coefficients are taken to follow a Laplace distribution, as those of trained convolutions about do.
Of ``N`` coefficients, those that magnitude keeps are then ``ln(N / kept) + x``, in units of the
distribution's scale, with ``x`` exponential. The largest of a channel's ``n`` is ``ln n`` and
Euler's constant on average (Gumbel 1935, "Les valeurs extremes des distributions statistiques"). It
sets the step, so that the entropy of the indices follows from counts. No weight is read.
"""

from __future__ import annotations

import itertools
import math

# Bits of a value that ``compress`` offers.
BITS = (8, 6, 4)
EULER = 0.5772156649
# What Huffman codes of zstd's blocks take above the entropy.
CODER_LOSS = 1.05
# A layer's basis and code tables, a tensor's entries in a file's header, and the header itself.
PER_LAYER, PER_TENSOR, PER_FILE = 150, 140, 60
# A float32 for each output channel.
SCALE = 4


def layer_bytes(coefficients: int, kept: int, channels: int, bits: int, by_size: bool) -> float:
    """About the bytes of a layer.

    Args:
        coefficients: how many it has.
        kept: of these.
        channels: that have a scale each.
        bits: of a value.
        by_size: True where the largest were kept, False where chance chose.

    Example:
        >>> round(layer_bytes(36_864, 3_686, 64, 8, True))
        5873
    """
    if not kept or not channels:
        return PER_LAYER
    levels = 2 ** (bits - 1) - 1
    of_channel = max(coefficients / channels if by_size else kept / channels, 1.0)
    step = (math.log(of_channel) + EULER) / levels
    least = math.log(coefficients / kept) if by_size else 0.0

    def above(index: float) -> float:
        """The share of what is kept that is larger than this many steps."""
        return math.exp(min(0.0, least - index * step))

    edges = [1.0, *(above(index + 0.5) for index in range(levels)), 0.0]
    shares = [left - right for left, right in itertools.pairwise(edges)]
    stored = 1.0 - shares[0]
    # With a bit for the sign.
    value_bits = sum(share * (1 - math.log2(share / stored)) for share in shares[1:] if share > 0)
    density = kept * stored / coefficients
    bits_of_all = kept * value_bits + coefficients * _entropy(density)
    return PER_LAYER + SCALE * channels + CODER_LOSS * bits_of_all / 8


def _entropy(share: float) -> float:
    if not 0 < share < 1:
        return 0.0
    return -share * math.log2(share) - (1 - share) * math.log2(1 - share)
