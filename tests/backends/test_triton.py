from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, cast
from unittest.mock import MagicMock, Mock

import pytest
import torch
import torch.distributed as dist

import wavprune
from wavprune import backends
from wavprune.backends import Layer
from wavprune.backends.triton import backend as subject
from wavprune.backends.triton import tables
from wavprune.bases import named_basis
from wavprune.errors import WavpruneError

TOOLS = Path(__file__).parents[1] / "tools"
TARGETS = [("sm_80", "sm_90"), ("sm_100", "gfx942")]


class Run:
    """A process that runs beside the tests, and its output."""

    def __init__(self, *command: str, **environment: str) -> None:
        settings = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        self._process = subprocess.Popen(
            [sys.executable, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env=settings,
        )

    def finish(self) -> tuple[int, str]:
        """Wait for it to end: its exit status and output."""
        output, _ = self._process.communicate(timeout=900)
        return self._process.returncode, output

    def stop(self) -> None:
        """Kill it if it still runs."""
        if self._process.poll() is None:
            self._process.kill()
            self._process.communicate()


@pytest.fixture(scope="session")
def start() -> Iterator[Callable[..., Run]]:
    """Starts processes that end with the tests."""
    pytest.importorskip("triton", reason="triton is not installed")
    runs: list[Run] = []

    def begin(*command: str, **environment: str) -> Run:
        runs.append(Run(*command, **environment))
        return runs[-1]

    yield begin
    for run in runs:
        run.stop()


@pytest.fixture(scope="session")
def interpreted(start: Callable[..., Run]) -> Run:
    """The tests of the Triton kernels in the interpreter, started."""
    script = str(TOOLS / "triton_interpret.py")
    return start("-m", "pytest", "-q", "-p", "no:cacheprovider", script, TRITON_INTERPRET="1")


@pytest.mark.usefixtures("interpreted")
@pytest.mark.parametrize("targets", TARGETS, ids=" ".join)
def test_no_triton_kernel_spills_or_takes_more_than_128_registers(
    start: Callable[..., Run], targets: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run = start(str(TOOLS / "compile_triton.py"), *targets, TRITON_INTERPRET="0")
    status, output = run.finish()
    with capsys.disabled():
        print(f"\n{output}")
    assert status == 0, output
    assert len(re.findall(r"^(?:sm|gfx)", output, re.MULTILINE)) == 11 * len(targets)


@pytest.mark.waits
def test_the_triton_kernels_pass_in_the_interpreter(interpreted: Run) -> None:
    status, output = interpreted.finish()
    assert status == 0, output


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a device")
def test_without_a_device_it_says_why() -> None:
    pytest.importorskip("triton")
    if os.environ.get("TRITON_INTERPRET", "0") != "0":
        pytest.skip("interpreted, it runs here")
    assert "no CUDA or ROCm device" in backends.unavailable()["triton"]
    with pytest.raises(ValueError, match=r"backend 'triton' cannot run here: torch sees no CUDA"):
        wavprune.fast.prune(torch.nn.Conv2d(2, 2, 3), backend="triton")


def test_without_triton_it_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "triton", None)
    with pytest.raises(ImportError, match=r"pip install 'wavprune\[triton\]'"):
        subject.make()


def identity_layer(weight: torch.Tensor) -> Layer:
    return Layer("conv", weight, named_basis("identity", (1, 1)))


def test_it_refuses_sharded_weights() -> None:
    group = cast("dist.ProcessGroup", object())
    layer = replace(identity_layer(torch.ones(2, 2, 1, 1)), group=group)
    reason = subject.TritonBackend().unsupported(layer)
    assert reason == "it is sharded, which only 'eager' takes"


def test_tables_of_captured_graphs_are_kept_as_long_as_their_weights() -> None:
    captured = subject.CapturedTables()
    table, other_table = (torch.zeros(1, dtype=torch.int64) for _ in range(2))
    first, second = (identity_layer(torch.ones(2, 2, 1, 1)) for _ in range(2))
    for _ in range(3):
        captured.keep(table, [first])
    assert len(captured) == 1
    captured.keep(table, [first, second])
    captured.keep(table, [second])
    assert len(captured) == 3
    del first
    captured.keep(other_table, [second])
    assert len(captured) == 2


@pytest.fixture
def streams(monkeypatch: pytest.MonkeyPatch) -> Iterator[Mock]:
    """Stands in for ``torch.cuda``; what is uploaded to the meta device passes through it."""
    cuda = MagicMock()
    cuda.is_current_stream_capturing.return_value = False
    monkeypatch.setattr(torch, "cuda", cuda)
    monkeypatch.setattr(torch.Tensor, "pin_memory", torch.Tensor.clone)

    def record_stream(tensor: torch.Tensor, stream: Any) -> None:
        cuda.record_stream(tensor, stream)

    monkeypatch.setattr(torch.Tensor, "record_stream", record_stream)
    monkeypatch.setattr(subject, "_CAPTURED", subject.CapturedTables())
    subject._UPLOADS.clear()
    yield cuda
    subject._UPLOADS.clear()


def uploaded(layer: Layer, key: str = "key") -> torch.Tensor:
    """The table of a launch that prunes this layer, on the meta device."""
    make = Mock(return_value=tables.table_of([tables.Member(layer)], [], in_float64=False))
    return subject.uploaded(key, make, torch.device("meta"), [layer]).table


def test_a_table_is_uploaded_once_and_other_streams_wait_for_it(streams: Mock) -> None:
    layer = identity_layer(torch.ones(2, 2, 1, 1))
    first = uploaded(layer)
    other_stream = streams.current_stream.return_value = Mock()
    assert uploaded(layer) is first
    streams.Event.assert_called_once()
    other_stream.wait_event.assert_called_once_with(streams.Event.return_value)
    streams.record_stream.assert_called_with(first, other_stream)
    assert uploaded(layer, "another") is not first


def test_a_capture_takes_only_tables_that_are_there(streams: Mock) -> None:
    layer = identity_layer(torch.ones(2, 2, 1, 1))
    streams.is_current_stream_capturing.return_value = True
    with pytest.raises(WavpruneError, match=r"once before the capture"):
        uploaded(layer)
    streams.is_current_stream_capturing.return_value = False
    first = uploaded(layer)
    streams.is_current_stream_capturing.return_value = True
    streams.current_stream.reset_mock()
    for _ in range(2):
        assert uploaded(layer) is first
    streams.current_stream.assert_not_called()
    assert len(subject._CAPTURED) == 1


def test_equal_bases_share_their_matrices_in_a_table() -> None:
    def words(*kernels: tuple[int, int]) -> int:
        layers = [Layer("conv", torch.ones(2, 2, *k), named_basis("dct", k)) for k in kernels]
        return len(tables.table_of([tables.Member(layer) for layer in layers], [], False).words)

    per_layer = 1 + len(tables.LayerEntry._fields)
    assert words((3, 3), (3, 3)) == words((3, 3)) + per_layer
    assert words((3, 3), (1, 3)) > words((3, 3)) + per_layer
