"""Names that a setting may have, and what each stands for."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from typing import Generic, TypeVar

from .checks import choice

T = TypeVar("T")


class Registry(Generic[T]):
    """Entries by name, in the order of registration.

    Args:
        parameter: the setting that holds such a name, for messages.
        home: the package whose import registers this library's own entries; imported when the
            registry is first read, so that settings can be checked before anything else is loaded.

    Example:
        >>> shapes = Registry[int]("shape")
        >>> shapes.register("square", 4)
        >>> shapes["square"], list(shapes)
        (4, ['square'])
    """

    def __init__(self, parameter: str, home: str | None = None) -> None:
        self._parameter = parameter
        self._home = home
        self._entries: dict[str, T] = {}
        self.changes = 0

    def register(self, name: str, entry: T) -> None:
        """Add an entry, or replace the one of that name."""
        self._entries[name] = entry
        self.changes += 1

    def unregister(self, name: str) -> None:
        """Remove an entry."""
        del self._entries[name]
        self.changes += 1

    def check(self, name: object, described: Callable[[], str] | None = None) -> str:
        """The name, if it is registered.

        Args:
            name: what the caller gave.
            described: says how a message lists the names where they are many; None lists them all.

        Raises:
            TypeError: it is no string.
            WavpruneError: it is not registered; the message says which are.
        """
        if isinstance(name, str) and name in self:
            return name
        return choice(self._parameter, name, tuple(self), described and described())

    def __getitem__(self, name: str) -> T:
        self._fill()
        return self._entries[self.check(name)]

    def __contains__(self, name: object) -> bool:
        self._fill()
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        self._fill()
        return iter(tuple(self._entries))

    def __len__(self) -> int:
        self._fill()
        return len(self._entries)

    def _fill(self) -> None:
        if self._home is not None:
            home, self._home = self._home, None
            importlib.import_module(home)
