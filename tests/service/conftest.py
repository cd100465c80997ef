from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest

from tests.support import service
from wavprune.service.launcher import Launcher, spawned


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return service.demo_file(tmp_path_factory.mktemp("demo") / "digits.safetensors")


@pytest.fixture(scope="session")
def launcher() -> Iterator[Launcher]:
    """One for all tests: it takes seconds to start."""
    found = spawned()
    yield found
    found.close()


@pytest.fixture(scope="session")
def address(tmp_path_factory: pytest.TempPathFactory, launcher: Launcher) -> Iterator[str]:
    """A service that listens."""
    with service.running(tmp_path_factory.mktemp("service"), launcher) as found:
        yield found


@pytest.fixture(scope="session")
def client(address: str) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=address, timeout=service.SECONDS) as found:
        yield found
