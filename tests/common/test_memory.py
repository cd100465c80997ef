from __future__ import annotations

import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from wavprune.common import memory
from wavprune.common.memory import kept_memory

pytestmark = pytest.mark.skipif(memory._glibc() is None, reason="no glibc, or one configured")

# More than glibc ever keeps by itself.
LARGE = 20_000_000
PAGES = LARGE // 1024


def faults() -> int:
    """Page faults of five large tensors, one after the other."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(5):
        torch.ones(LARGE)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


def huge_pages() -> bool:
    try:
        return "[always]" in Path("/sys/kernel/mm/transparent_hugepage/enabled").read_text()
    except OSError:
        return False


def in_a_process_of_its_own() -> None:
    assert faults() >= PAGES
    before = resident()
    with kept_memory():
        faults()
        with kept_memory():
            pass
        assert min(faults() for _ in range(5)) < PAGES
    assert resident() < before + PAGES
    # Of five tensors the first needs new pages at least: what was freed before went back.
    assert faults() >= PAGES


@pytest.mark.skipif(huge_pages(), reason="a fault maps a huge page here")
def test_what_is_freed_is_used_again_and_given_back_at_the_end() -> None:
    # What other tests left in the heap would lie in the way.
    command = [sys.executable, "-c", f"from {__name__} import *; in_a_process_of_its_own()"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_an_environment_that_configures_its_allocator_is_left_alone(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    memory._glibc.cache_clear()
    try:
        assert memory._glibc() is None
        with kept_memory():
            assert float(torch.ones(3).sum()) == 3
    finally:
        memory._glibc.cache_clear()
