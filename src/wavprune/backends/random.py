"""Random ranks, read at any index: the same on every device, in every backend and in any order.

The high 32 bits of a rank are a permutation of the low 32 bits of the index: three multiplications
and xorshifts with the constants of triple32 (C. Wellons and T. Ettrich, "Hash Prospector",
https://nullprogram.com/blog/2018/07/31/), with keys added before the first and the second. The keys
are the first two outputs of SplitMix64 (Steele, Lea and Flood 2014, "Fast splittable pseudorandom
number generators") for the seed. So no two of ``2**32`` weights tie, and 20 low bits order those of
different layers. ``csrc/random.h`` is the same for the compiled code.
"""

from __future__ import annotations

import torch

_GAMMA, _HIGH_STEP = 0x9E3779B97F4A7C15, 0x9E3779B9
_MIX = (0xED5AD4BB, 0xAC4C1B51, 0x31848BAB)
LOW_BITS = 20


def random_keys(seed: int) -> tuple[int, int, int, int]:
    """The keys of a seed, 32 bits each.

    Args:
        seed: 64 bits, signed or not.

    Returns:
        What is added before the first multiplication and before the second, what changes the low
        bits, and its step from one high word of the index to the next.

    Example:
        >>> random_keys(0)[0] == 0xE220A8397B1DCDAF & 0xFFFFFFFF
        True
    """
    first, second = (_splitmix64(seed + i * _GAMMA) for i in (1, 2))
    return first & 0xFFFFFFFF, first >> 32, second & 0xFFFFFFFF, second >> 32 | 1


def uniform(indices: torch.Tensor, seed: int) -> torch.Tensor:
    """A random float64 in (0, 1) for each index.

    Args:
        indices: int64, not negative.
        seed: 64 bits, taken as a signed integer.

    Returns:
        Of the shape of ``indices``, on their device.

    Example:
        >>> uniform(torch.arange(4), 7).argsort()
        tensor([1, 3, 2, 0])
    """
    before, between, low_key, low_step = map(_signed, random_keys(seed))
    # Integers of 32 bits wrap as the generator wants it.
    index_high = (indices >> 32).to(torch.int32)
    x = indices.to(torch.int32) + before
    x = _mixed(x, 17, _MIX[0]).add_(index_high * _signed(_HIGH_STEP)).add_(between)
    x = _mixed(_mixed(x, 11, _MIX[1]), 15, _MIX[2])
    high = x ^ _shifted(x, 14)
    x = (high ^ (index_high * low_step).add_(low_key)).mul_(_signed(_MIX[0]))
    low = _shifted(_mixed(x, 15, _MIX[2]), 32 - LOW_BITS)
    bits = ((high.to(torch.int64) & 0xFFFFFFFF) << LOW_BITS) | low
    return (bits.to(torch.float64) + 0.5) * 2.0**-52


def _splitmix64(x: int) -> int:
    mask = (1 << 64) - 1
    x &= mask
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 & mask
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB & mask
    return x ^ (x >> 31)


def _mixed(x: torch.Tensor, shift: int, factor: int) -> torch.Tensor:
    return (x ^ _shifted(x, shift)).mul_(_signed(factor))


def _shifted(x: torch.Tensor, shift: int) -> torch.Tensor:
    # Without the sign, which the shift spreads.
    return (x >> shift) & ((1 << (32 - shift)) - 1)


def _signed(word: int) -> int:
    return word - (1 << 32) if word >> 31 else word
