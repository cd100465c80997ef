"""What a coder of symbols offers, and the registry of all coders."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple, Protocol

import numpy as np
import numpy.typing as npt

from ...common.registry import Registry

Symbols = npt.NDArray[np.int16]


class Coded(NamedTuple):
    """What is left to write when all symbols were added.

    Attributes:
        values: the end of the layer's ``values`` part.
        high: the layer's ``high`` part.
        parameter: a number of the coder's own, from 0 to ``2**62``, which the record holds.
    """

    values: bytes
    high: bytes = b""
    parameter: int = 0


class SymbolEncoder(Protocol):
    """Codes the symbols of one layer, chunk by chunk."""

    def add(self, rows: Symbols) -> bytes:
        """Add symbols ``(rows, n)``; returns what is ready of the ``values`` part."""
        ...

    def finish(self) -> Coded | None:
        """The rest, or None where the coder cannot code these symbols."""
        ...


class Coder(Protocol):
    """A coder of symbols.

    Attributes:
        most: the number of coefficients of a layer that it takes; None takes any, chunk by chunk.
        automatic: True where ``coder="auto"`` tries it.
    """

    most: int | None
    automatic: bool

    def encoder(self) -> SymbolEncoder:
        """A new encoder for one layer."""
        ...

    def decode(
        self,
        values: memoryview,
        high: memoryview,
        parameter: int,
        shapes: Sequence[tuple[int, int]],
    ) -> Iterator[npt.NDArray[np.int16] | npt.NDArray[np.int8]]:
        """The symbols of each chunk, flat.

        Args:
            values: the layer's ``values`` part.
            high: its ``high`` part.
            parameter: as ``finish`` gave it.
            shapes: rows and length of each chunk, as they were added.

        Raises:
            WavpruneError: the bytes are not those of such chunks.
        """
        ...


CODERS: Registry[Coder] = Registry("coder")
