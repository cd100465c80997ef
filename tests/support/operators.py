"""What the tests of the compiled operators share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

ops = pytest.importorskip("wavprune.ops", reason="the compiled extension is not built here")
call = torch.ops.wavprune


def available_sets() -> list[int]:
    """The instruction sets that this processor has."""
    available = []
    for index in range(len(ops.INSTRUCTION_SETS)):
        try:
            call.use_instruction_set(index)
        except RuntimeError:
            continue
        available.append(index)
    call.use_instruction_set(-1)
    return available


@pytest.fixture
def restored() -> Iterator[None]:
    """Threads and instruction set are afterwards what they were."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)
    call.use_instruction_set(-1)
