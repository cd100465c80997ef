"""Batch norms that can be fine-tuned in a file whose weights have them folded in.

A file holds the folded weight ``W' = s W`` and bias ``b' = beta - s mean``, with
``s = gamma / sqrt(var + eps)``, which say what inference gives; and ``gamma``, ``var`` and ``mean``
on coarse grids, which only say how these are split. So the grids cost no accuracy.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from ..errors import WavpruneError
from .binary import Reader, Writer

# Values of an octave.
GRID = 16
# float32 has exponents from -149 to 128.
LARGEST_CODE = 160 * GRID
# The means' distance over the root mean square of the deviations.
MEAN_STEP = 1 / 8


class NormLink(NamedTuple):
    """A batch norm and the layer that it is folded into.

    Attributes:
        weight: the name of the layer's weight.
        gamma: the name of each tensor of the batch norm, and so on.
        var: see above.
        mean: see above.
        bias: see above.
        eps: of the batch norm.
    """

    weight: str
    gamma: str
    var: str
    mean: str
    bias: str
    eps: float

    @property
    def names(self) -> tuple[str, ...]:
        """Of its tensors."""
        return self[:5]


def log_codes(values: torch.Tensor) -> list[int]:
    """The nearest of ``+-2 ** (n / 16)``, or 0, as whole numbers from 0 on."""
    magnitudes = values.double().abs().reshape(-1).numpy()
    with np.errstate(divide="ignore"):
        exponents = np.rint(np.log2(magnitudes) * GRID).clip(-LARGEST_CODE, LARGEST_CODE)
    codes = []
    for value, exponent in zip(values.reshape(-1).tolist(), exponents.astype(int), strict=True):
        zigzag = 2 * exponent if exponent >= 0 else -2 * exponent - 1
        codes.append(0 if value == 0 else 1 + 2 * int(zigzag) + (value < 0))
    return codes


def write_logs(writer: Writer, values: torch.Tensor) -> None:
    """The codes of values, each after the one before it."""
    writer.numbers(log_codes(values))


def read_logs(reader: Reader, count: int) -> np.ndarray[tuple[int], np.dtype[np.float32]]:
    """The values of ``write_logs``, ``(count,)``.

    Raises:
        WavpruneError: a code is too large.
    """
    codes = np.array([reader.number(4 * LARGEST_CODE + 2) for _ in range(count)], dtype=np.int64)
    zigzag = (codes - 1) // 2
    exponents = np.where(zigzag % 2 == 0, zigzag // 2, -(zigzag + 1) // 2)
    octaves, parts = np.divmod(exponents, GRID)
    with np.errstate(over="ignore", under="ignore"):
        magnitudes = np.ldexp(_roots()[parts], octaves)
    signs = np.where(codes == 0, 0.0, np.where(codes % 2 == 0, -1.0, 1.0))
    most = np.finfo(np.float32).max
    result: np.ndarray[tuple[int], np.dtype[np.float32]] = np.clip(
        signs * magnitudes, -most, most
    ).astype(np.float32)
    return result


def _roots() -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    """``2 ** (j / 16)``, by square roots and products, which are the same everywhere."""
    result = np.ones(GRID)
    root, bit = np.float64(2.0), GRID // 2
    while bit:
        root = np.sqrt(root)
        for j in range(GRID):
            if j & bit:
                result[j] *= root
        bit //= 2
    return result


def from_grid(values: torch.Tensor) -> torch.Tensor:
    """Values as a file gives them back."""
    writer = Writer()
    write_logs(writer, values)
    read = read_logs(Reader(bytes(writer.data)), values.numel())
    return torch.from_numpy(read).to(values.dtype).reshape(values.shape)


def unfold(link: NormLink, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The tensors of a layer and its batch norm, from those that a file holds.

    Args:
        link: their names.
        tensors: the weight on any device, the others on the CPU.

    Raises:
        WavpruneError: they do not fit one another.
    """
    weight, gamma, var, mean, bias = (tensors[name] for name in link.names)
    vectors = (gamma, var, mean, bias)
    fits = weight.ndim > 1 and all(vector.shape == weight.shape[:1] for vector in vectors)
    if not fits or not all(t.is_floating_point() for t in (weight, *vectors)):
        raise WavpruneError(f"the batch norm of {link.weight!r} does not fit it")
    scale = scale_of(link, gamma, var)
    divisor = divisor_of(scale).to(weight.device, non_blocking=True)
    return {
        link.weight: unfolded(weight, divisor),
        link.gamma: gamma,
        link.var: var,
        link.mean: mean,
        link.bias: (bias.double() + scale * mean.double()).to(bias.dtype),
    }


def scale_of(link: NormLink, gamma: torch.Tensor, var: torch.Tensor) -> torch.Tensor:
    """``s`` of a batch norm, float64, ``(outputs,)``; of vectors on the CPU."""
    # Not torch's root, which on some machines is not rounded to the nearest.
    with np.errstate(invalid="ignore"):
        deviation = np.sqrt((var.double() + link.eps).numpy())
    return gamma.double() / torch.from_numpy(deviation)


def divisor_of(scale: torch.Tensor) -> torch.Tensor:
    """What a folded weight is divided by, ``(outputs,)``: 1 where the scale is 0."""
    return torch.where(scale == 0, torch.ones_like(scale), scale)


def unfolded(weight: torch.Tensor, divisor: torch.Tensor) -> torch.Tensor:
    """A folded weight without its batch norm, by what is on its device."""
    axes = [-1] + [1] * (weight.ndim - 1)
    return (weight.double() / divisor.view(axes)).to(weight.dtype)
