"""Memory that a forward pass frees stays with the process, for the next one to use.

glibc takes every block of more than 32 MiB from the system and gives it back when it is freed: the
activations of a network then cost a page fault for every 4 KiB of every layer, which takes longer
than many layers compute.
"""

from __future__ import annotations

import ctypes
import os
import platform
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

# Of mallopt; see its manual page.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4
_NEVER = (1 << 31) - 1
# What glibc has: the first as it is once large blocks were freed.
_DEFAULTS = {_TRIM_THRESHOLD: 1 << 26, _MMAP_MAX: 1 << 16}

_lock = threading.Lock()
_depth = 0


@contextmanager
def kept_memory() -> Iterator[None]:
    """Within the block freed memory stays with this process; afterwards it is given back.

    It changes how long things take and nothing else. Without glibc, or where the environment
    configures its allocator, it does nothing.

    Example:
        >>> with kept_memory():
        ...     sum(range(3))
        3
    """
    global _depth
    library = _glibc()
    if library is None:
        yield
        return
    with _lock:
        _depth += 1
        library.mallopt(_MMAP_MAX, 0)
        library.mallopt(_TRIM_THRESHOLD, _NEVER)
    try:
        yield
    finally:
        with _lock:
            _depth -= 1
            if _depth == 0:
                for parameter, value in _DEFAULTS.items():
                    library.mallopt(parameter, value)
                library.malloc_trim(0)


@cache
def _glibc() -> Any:
    configured = any(name.startswith("MALLOC_") for name in os.environ)
    if configured or "GLIBC_TUNABLES" in os.environ or "LD_PRELOAD" in os.environ:
        return None
    if platform.system() != "Linux" or platform.libc_ver()[0] != "glibc":
        return None
    return ctypes.CDLL(None)
