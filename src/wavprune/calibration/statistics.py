"""Second moments of what a layer reads: the mean and covariance of its patches.

Products are computed in float32 a batch at a time (in float64 for float64 models) and added up in
float64. Where a layer's matrix would be too large it is kept block-diagonal: blocks of whole input
channels, whose covariances with each other are taken to be 0.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..errors import WavpruneError
from .rows import Rows

# Columns of a matrix: time grows with their third power, and what so many inputs have to do with
# each other is not known from a few images.
LARGEST = 1536


class Statistics(NamedTuple):
    """Of the patches of one layer, float64.

    Attributes:
        patches: how many.
        mean: ``(groups * blocks, d / blocks)``.
        covariance: ``(groups * blocks, d / blocks, d / blocks)``.
    """

    patches: int
    mean: torch.Tensor
    covariance: torch.Tensor

    def to(self, device: torch.device) -> Statistics:
        """The same on a device."""
        return self._replace(mean=self.mean.to(device), covariance=self.covariance.to(device))

    def second_moment(self, centered: bool) -> torch.Tensor:
        """The covariance, or where it is not centered, the mean of the products."""
        if centered:
            return self.covariance
        return self.covariance + self.mean[:, :, None] * self.mean[:, None, :]


class Accumulator:
    """Adds up the patches of one layer.

    Args:
        blocks: of whole channels in each group.

    Example:
        >>> sums = Accumulator()
        >>> sums.add(torch.tensor([[[1.0, 3.0]]]))
        >>> sums.statistics().covariance
        tensor([[[1.]]], dtype=torch.float64)
    """

    def __init__(self, blocks: int = 1) -> None:
        self._blocks = blocks
        self._count = 0
        self._sums: tuple[torch.Tensor, torch.Tensor] | None = None

    def add(self, patches: torch.Tensor) -> None:
        """Add patches ``(groups, d, n)``."""
        blocks = in_blocks(patches, self._blocks)
        total, products = blocks.sum(-1).double(), (blocks @ blocks.mT).double()
        if self._sums is None:
            self._sums = total, products
        else:
            self._sums[0].add_(total)
            self._sums[1].add_(products)
        self._count += blocks.shape[-1]

    def statistics(self) -> Statistics:
        """Of all that was added."""
        assert self._sums is not None
        mean, second = (part / self._count for part in self._sums)
        return Statistics(self._count, mean, second - mean[:, :, None] * mean[:, None, :])


def in_blocks(values: torch.Tensor, blocks: int) -> torch.Tensor:
    """``(groups, d, n)`` as ``(groups * blocks, d / blocks, n)``."""
    groups, columns, samples = values.shape
    return values.reshape(groups * blocks, columns // blocks, samples)


def choose_blocks(rows: Mapping[str, Rows], max_memory: int, matrices: int) -> dict[str, int]:
    """Into how many blocks each layer is cut so that all matrices fit.

    None is larger than ``LARGEST``. Then the layer with the largest matrices is cut first.

    Args:
        rows: of every layer.
        max_memory: bytes for the matrices of all layers.
        matrices: how many float64 matrices a layer needs.

    Returns:
        The number of blocks of each group, 1 where the whole matrix fits.

    Raises:
        WavpruneError: not even single channels fit.
    """
    blocks = {
        name: _more_blocks(layer, -(-layer.num_columns // LARGEST) - 1)
        for name, layer in rows.items()
    }

    def size(name: str) -> int:
        layer = rows[name]
        return 8 * matrices * layer.groups * layer.num_columns**2 // blocks[name]

    while sum(map(size, rows)) > max_memory:
        divisible = {name: _more_blocks(rows[name], blocks[name]) for name in rows}
        candidates = [name for name in rows if divisible[name] > blocks[name]]
        if not candidates:
            raise WavpruneError(
                f"max_memory={max_memory!r}: the second moments of {len(rows)} layers take at "
                f"least {sum(map(size, rows))} bytes, a block for each input channel"
            )
        largest = max(candidates, key=size)
        blocks[largest] = divisible[largest]
    return blocks


def _more_blocks(rows: Rows, blocks: int) -> int:
    """The next larger number of blocks that divides the channels."""
    channels = rows.num_columns // rows.kernel_values
    larger = range(blocks + 1, channels + 1)
    return next((number for number in larger if channels % number == 0), channels)


def sampled_positions(
    count: int, wanted: int, generator: torch.Generator, device: torch.device
) -> torch.Tensor | None:
    """Which of ``count`` output positions are looked at, ascending; None where all are."""
    if wanted >= count:
        return None
    chosen = torch.randperm(count, generator=generator, device="cpu")[:wanted]
    return chosen.sort().values.to(device)


def generator_of(seed: int, *names: str) -> torch.Generator:
    """Random numbers that depend on a seed and names alone."""
    digest = hashlib.blake2b(repr((seed, names)).encode(), digest_size=7).digest()
    return torch.Generator("cpu").manual_seed(int.from_bytes(digest, "little"))


def positions_per_sample(rows: Rows, samples: int, per_column: int, least: int) -> int:
    """How many positions of each sample are enough.

    Args:
        rows: of the layer.
        samples: how many samples there are.
        per_column: patches that are wanted for each column of the layer's matrix.
        least: positions of every sample at least: what neighbors see is alike.
    """
    return max(least, -(-per_column * rows.num_columns // max(samples, 1)))


def merged(parts: Sequence[Statistics]) -> Statistics:
    """The statistics of several sets of patches together."""
    count = sum(part.patches for part in parts)
    shares = [part.patches / count for part in parts]
    mean = torch.stack([s * part.mean for s, part in zip(shares, parts, strict=True)]).sum(0)
    covariance = torch.zeros_like(parts[0].covariance)
    for share, part in zip(shares, parts, strict=True):
        shift = part.mean - mean
        covariance += share * (part.covariance + shift[:, :, None] * shift[:, None, :])
    return Statistics(count, mean, covariance)
