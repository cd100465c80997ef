"""Signals, the order of tests, and what ``pytest -m gpu`` collects: ``*_on_gpu.py`` alone.

A machine with a GPU often reaches no package index, and lacks packages that other tests import.
Those in ``*_on_gpu.py`` need torch, numpy, PyWavelets and pytest, and nothing else.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest


def pytest_configure() -> None:
    """Signals that a shell in the background ignores count here, and in child processes."""
    for number, handler in (
        (signal.SIGINT, signal.default_int_handler),
        (signal.SIGHUP, signal.SIG_DFL),
    ):
        if signal.getsignal(number) == signal.SIG_IGN:
            signal.signal(number, handler)


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Leave out what has none of the tests that -m gpu asks for; None lets others decide."""
    if config.option.markexpr != "gpu":
        return None
    if collection_path.is_dir():
        return None if any(collection_path.rglob("*_on_gpu.py")) else True
    is_test = collection_path.name.startswith("test_")
    return True if is_test and not collection_path.name.endswith("_on_gpu.py") else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests that wait for a process which runs beside the others come last."""
    items.sort(key=lambda item: item.get_closest_marker("waits") is not None)


@pytest.fixture
def alarm() -> Iterator[Any]:
    """Raises KeyboardInterrupt in the main thread after so many seconds."""

    def fire(*_: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, fire)
    yield lambda seconds: signal.setitimer(signal.ITIMER_REAL, seconds)
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture(scope="session")
def loaded_shim(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The CUDA operators on the host, ``torch.ops.wavprune_shim``; registered once a process."""
    from tests.tools import cuda_shim

    if cuda_shim.compiler() is None:
        pytest.skip("there is no C++ compiler here")
    sanitize = bool(os.environ.get("WAVPRUNE_SANITIZE"))
    cuda_shim.load(cuda_shim.build(tmp_path_factory.mktemp("shim"), sanitize))


@pytest.fixture
def shim(loaded_shim: None) -> Iterator[None]:
    """The same, with its first seed and limits afterwards."""
    import torch

    yield
    torch.ops.wavprune_shim.reseed(0)
    torch.ops.wavprune_shim.set_limits(3, 48 * 1024)
