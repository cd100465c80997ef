"""Numbers and texts as a few bytes each, and a strict reading of them."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import WavpruneError


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
        while True:
            byte = self.raw(1)[0]
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                break
            if shift > 63:
                raise WavpruneError("a number of its records has no end")
        if value > high:
            raise WavpruneError(f"its records say {value} where at most {high} is allowed")
        return value

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
            raise WavpruneError("its records end early")
        self.position += count
        return part

    def end(self) -> None:
        """Raise WavpruneError where bytes are left."""
        if self.position != len(self._data):
            raise WavpruneError("its records go on after their end")
