"""A cache that is bounded by bytes and safe to use from several threads."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from threading import RLock
from typing import Generic, TypeVar

V = TypeVar("V")


class ByteCache(Generic[V]):
    """Values by key; the least recently used go first once they take too many bytes.

    Keys are compared by value: what is equal is computed once.

    Args:
        limit: how many bytes the values may take together. One that takes more is not kept.
        size: how many bytes a value takes.

    Example:
        >>> cache = ByteCache[bytes](10, len)
        >>> cache.get("a", lambda: b"12345")
        b'12345'
        >>> cache.bytes
        5
    """

    def __init__(self, limit: int, size: Callable[[V], int]) -> None:
        self._limit = limit
        self._size = size
        self._values: OrderedDict[Hashable, tuple[V, int]] = OrderedDict()
        self._lock = RLock()
        self.bytes = 0

    def get(self, key: Hashable, make: Callable[[], V]) -> V:
        """The value of a key, made if it is not there."""
        with self._lock:
            known = self._values.get(key)
            if known is not None:
                self._values.move_to_end(key)
                return known[0]
        # Without the lock: what takes long to make holds nobody up. Two threads may both make it.
        value = make()
        size = self._size(value)
        with self._lock:
            if key not in self._values and size <= self._limit:
                self._values[key] = (value, size)
                self.bytes += size
                while self.bytes > self._limit:
                    self.bytes -= self._values.popitem(last=False)[1][1]
        return value

    def peek(self, key: Hashable) -> V | None:
        """The value of a key, or None."""
        with self._lock:
            known = self._values.get(key)
            return None if known is None else known[0]

    def clear(self) -> None:
        """Forget everything."""
        with self._lock:
            self._values.clear()
            self.bytes = 0

    def __len__(self) -> int:
        return len(self._values)
