"""Numbers and texts as a few bytes each, and a strict reading of them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import numpy as np
import numpy.typing as npt

from ..errors import WavpruneError

# Bytes of a number, and of those that int64 has room for whatever they are.
LONGEST, SHORT = 10, 8
EARLY, ENDLESS = "its records end early", "a number of its records has no end"


class Writer:
    """Collects bytes.

    Attributes:
        data: what was written.

    Example:
        >>> writer = Writer()
        >>> writer.numbers([5, 300])
        >>> writer.text("conv1")
        >>> reader = Reader(bytes(writer.data))
        >>> reader.number(), reader.number(), reader.text()
        (5, 300, 'conv1')
    """

    def __init__(self) -> None:
        self.data = bytearray()

    def number(self, value: int) -> None:
        """A whole number from 0 on, in groups of 7 bits, the lowest first (LEB128)."""
        while value > 127:
            self.data.append(value & 127 | 128)
            value >>= 7
        self.data.append(value)

    def numbers(self, values: Iterable[int]) -> None:
        """Some of them."""
        for value in values:
            self.number(value)

    def signed(self, value: int) -> None:
        """A whole number: 0, -1, 1, -2, ..."""
        self.number(2 * value if value >= 0 else -2 * value - 1)

    def several_signed(self, values: npt.NDArray[np.integer[Any]]) -> None:
        """Some of them."""
        wide = values.astype(np.int64)
        wide = np.where(wide >= 0, 2 * wide, -2 * wide - 1)
        shifts = np.arange(0, 7 * LONGEST, 7)
        groups = wide[:, None] >> shifts
        last = np.maximum((groups > 0).sum(axis=1), 1) - 1
        more = np.arange(LONGEST) < last[:, None]
        data = (groups & 127 | 128 * more).astype(np.uint8)
        self.data += data[np.arange(LONGEST) <= last[:, None]].tobytes()

    def text(self, value: str) -> None:
        """A text, after its length in UTF-8."""
        self.blob(value.encode())

    def blob(self, value: bytes) -> None:
        """Bytes, after their number."""
        self.number(len(value))
        self.data += value

    def raw(self, value: bytes) -> None:
        """Bytes."""
        self.data += value


class Reader:
    """Reads what a ``Writer`` wrote; every error is a WavpruneError.

    Attributes:
        position: of the next byte.
    """

    def __init__(self, data: bytes | memoryview) -> None:
        self._data = bytes(data)
        self.position = 0

    def number(self, high: int = (1 << 62) - 1) -> int:
        """The next number, at most ``high``."""
        value = shift = 0
        for byte in self._data[self.position : self.position + LONGEST]:
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
        else:
            ended = self.position + LONGEST > len(self._data)
            raise WavpruneError(EARLY if ended else ENDLESS)
        if value > high:
            raise WavpruneError(f"its records say {value} where at most {high} is allowed")
        self.position += shift // 7
        return value

    def several(self, count: int, high: int) -> npt.NDArray[np.int64]:
        """The next numbers, each at most ``high``."""
        part = np.frombuffer(self._data, np.uint8)[self.position :][: count * LONGEST]
        stops = np.flatnonzero(part < 128)[:count] + 1
        lengths = np.diff(stops, prepend=0)
        if len(stops) < count or lengths.max(initial=0) > SHORT:
            return np.array([self.number(high) for _ in range(count)], dtype=np.int64)
        starts = stops - lengths
        place = np.arange(lengths.sum()) - np.repeat(starts, lengths)
        groups = (part[: len(place)] & 127).astype(np.int64) << 7 * place
        values = np.add.reduceat(groups, starts) if count else groups
        most = int(values.max(initial=0))
        if most > high:
            raise WavpruneError(f"its records say {most} where at most {high} is allowed")
        self.position += len(place)
        return values

    def several_signed(self, count: int, high: int) -> npt.NDArray[np.int64]:
        """The next signed numbers, each of a magnitude up to ``high``."""
        values = self.several(count, 2 * high)
        return np.where(values % 2 == 0, values // 2, -(values + 1) // 2)

    def signed(self, high: int = 1 << 31) -> int:
        """The next signed number, of a magnitude up to ``high``."""
        value = self.number(2 * high)
        return value // 2 if value % 2 == 0 else -(value + 1) // 2

    def text(self) -> str:
        """The next text."""
        try:
            return self.blob().decode()
        except UnicodeDecodeError as error:
            raise WavpruneError("its records are no text") from error

    def blob(self) -> bytes:
        """The next bytes that come after their number."""
        return self.raw(self.number())

    def raw(self, count: int) -> bytes:
        """The next bytes."""
        part = self._data[self.position : self.position + count]
        if len(part) != count:
            raise WavpruneError(EARLY)
        self.position += count
        return part

    def end(self) -> None:
        """Raise WavpruneError where bytes are left."""
        if self.position != len(self._data):
            raise WavpruneError("its records go on after their end")
