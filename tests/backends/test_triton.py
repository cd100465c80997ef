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
from tests.support.cases import (
    BASES,
    Outcome,
    assert_pruned,
    bits,
    layer_of,
    model_of,
    normal,
    prune_weights,
)
from wavprune import PruneConfig, backends
from wavprune.backends import Budget, Job, Layer
from wavprune.backends.triton import backend as subject
from wavprune.backends.triton import tables
from wavprune.bases import named_basis
from wavprune.errors import WavpruneError

TOOLS = Path(__file__).parents[1] / "tools"
TARGETS = [("sm_80", "sm_90"), ("sm_100", "gfx942")]

needs_device = pytest.mark.skipif(
    not torch.cuda.is_available(), reason="needs a CUDA or ROCm device: torch sees none"
)


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


@pytest.fixture(scope="module")
def start() -> Iterator[Callable[..., Run]]:
    """Starts processes that end with the module."""
    pytest.importorskip("triton", reason="triton is not installed")
    runs: list[Run] = []

    def begin(*command: str, **environment: str) -> Run:
        runs.append(Run(*command, **environment))
        return runs[-1]

    yield begin
    for run in runs:
        run.stop()


@pytest.fixture(scope="module")
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
    assert len(re.findall(r"^(?:sm|gfx)", output, re.MULTILINE)) == 7 * len(targets)


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


def test_it_has_no_masks() -> None:
    layer = identity_layer(torch.ones(2, 2, 1, 1))
    backend = subject.TritonBackend()
    mask = torch.zeros(layer.mask_bytes, dtype=torch.uint8)
    assert not backend.has_masks
    for call in (
        lambda: backend.apply_([layer], [mask]),
        lambda: backend.project_([layer], [mask]),
        lambda: backend.masks([layer], torch.ones(1, dtype=torch.float64)),
    ):
        with pytest.raises(NotImplementedError, match="'triton' backend has no masks"):
            call()


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


def test_a_table_is_uploaded_once_and_other_streams_wait_for_it(streams: Mock) -> None:
    layer, meta = identity_layer(torch.ones(2, 2, 1, 1)), torch.device("meta")
    table = tables.table_of([tables.Member(layer)], [], in_float64=False)
    first = subject._uploaded(table, meta, [layer])
    again = tables.table_of([tables.Member(layer)], [], in_float64=False)
    other_stream = streams.current_stream.return_value = Mock()
    assert subject._uploaded(again, meta, [layer]).table is first.table
    streams.Event.assert_called_once()
    other_stream.wait_event.assert_called_once_with(streams.Event.return_value)
    streams.record_stream.assert_called_with(first.table, other_stream)


def test_a_capture_takes_only_tables_that_are_there(streams: Mock) -> None:
    layer, meta = identity_layer(torch.ones(2, 2, 1, 1)), torch.device("meta")
    table = tables.table_of([tables.Member(layer)], [], in_float64=False)
    streams.is_current_stream_capturing.return_value = True
    with pytest.raises(WavpruneError, match=r"once before the capture"):
        subject._uploaded(table, meta, [layer])
    streams.is_current_stream_capturing.return_value = False
    uploaded = subject._uploaded(table, meta, [layer])
    streams.is_current_stream_capturing.return_value = True
    streams.current_stream.reset_mock()
    for _ in range(2):
        assert subject._uploaded(table, meta, [layer]).table is uploaded.table
    streams.current_stream.assert_not_called()
    assert len(subject._CAPTURED) == 1


def test_equal_bases_share_their_matrices_in_a_table() -> None:
    def words(*kernels: tuple[int, int]) -> int:
        layers = [Layer("conv", torch.ones(2, 2, *k), named_basis("dct", k)) for k in kernels]
        return len(tables.table_of([tables.Member(layer) for layer in layers], [], False).words)

    per_layer = 1 + len(tables.LayerEntry._fields)
    assert words((3, 3), (3, 3)) == words((3, 3)) + per_layer
    assert words((3, 3), (1, 3)) > words((3, 3)) + per_layer


@pytest.fixture
def device() -> torch.device:
    """The current device, for tests that need one."""
    return torch.device("cuda", torch.cuda.current_device())


def network(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights of several kinds of layers, on the device."""
    weights = {
        "stem": normal(64, 3, 7, 7, dtype=dtype, seed=1),
        "three": normal(256, 129, 3, 3, dtype=dtype, seed=2),
        "point": normal(255, 64, 1, 1, dtype=dtype, seed=3),
        "depthwise": normal(333, 1, 5, 5, dtype=dtype, seed=4),
        "last": normal(64, 32, 3, 3, dtype=dtype, seed=5).to(memory_format=torch.channels_last),
    }
    return {name: weight.to(device) for name, weight in weights.items()}


@pytest.mark.gpu
@needs_device
@pytest.mark.parametrize("settings", BASES.values(), ids=BASES)
@pytest.mark.parametrize("amount", [{"sparsity": 0.7}, {"percentile": 40.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_on_a_device_it_prunes_what_the_matrices_say(
    device: torch.device, settings: dict[str, Any], amount: dict[str, Any], dtype: torch.dtype
) -> None:
    config = PruneConfig(backend="triton", **settings, **amount)
    before = {name: weight.cpu() for name, weight in network(device, dtype).items()}
    after = prune_weights(network(device, dtype), config)
    outcomes = {name: entry._replace(weight=entry.weight.cpu()) for name, entry in after.items()}
    assert_pruned(before, outcomes, config)


def pruned(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Prune half of each weight with the backend alone; the host reads nothing."""
    backend = subject.make()
    config = PruneConfig(wavelet="uhaar")
    layers = [layer_of(weight, config) for weight in weights.values()]
    jobs = [Job([layer], Budget(keep=layer.weight.numel() // 2)) for layer in layers]
    return backend.apply_(layers, backend.threshold(jobs))


@pytest.mark.gpu
@needs_device
def test_on_a_device_nothing_makes_the_host_wait(device: torch.device) -> None:
    pruned(network(device))
    weights = network(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = pruned(weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # At least half, as every pass computes the same bits; more only where coefficients tie.
    halves = [weight.numel() // 2 for weight in weights.values()]
    for kept, half in zip(rows[:, 0].tolist(), halves, strict=True):
        assert half <= kept <= half + 2


@pytest.mark.gpu
@needs_device
def test_on_a_device_at_most_eight_launches(device: torch.device) -> None:
    weights = network(device)
    pruned(weights)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        pruned(weights)
        torch.cuda.synchronize()
    names = [event.name for event in profile.events() if "Memcpy" not in event.name]
    assert 0 < len(names) <= 8, names


@pytest.mark.gpu
@needs_device
def test_on_a_device_a_captured_graph_prunes_again(device: torch.device) -> None:
    weights = network(device)
    first = {name: weight.clone() for name, weight in weights.items()}
    expected = pruned(weights)
    want = {name: bits(weight.cpu()) for name, weight in weights.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = pruned(weights)
    for _ in range(2):
        for name, weight in weights.items():
            weight.copy_(first[name])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(rows, expected)
        assert {name: bits(weight.cpu()) for name, weight in weights.items()} == want


@pytest.mark.gpu
@needs_device
def test_on_a_device_capturing_a_call_that_never_ran_says_so(device: torch.device) -> None:
    weights = network(device)
    with (
        pytest.raises(WavpruneError, match=r"once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        pruned(weights)


@pytest.mark.gpu
@needs_device
def test_on_a_device_two_streams_at_a_time(device: torch.device) -> None:
    expected = pruned(network(device))
    new = torch.cuda.Stream
    streams = [new(device) for _ in range(2)]  # type: ignore[no-untyped-call]  # torch's
    copies = [network(device) for _ in streams]
    torch.cuda.synchronize()
    rows = []
    for stream, weights in zip(streams, copies, strict=True):
        with torch.cuda.stream(stream):
            rows.append(pruned(weights))
    torch.cuda.synchronize()
    for result in rows:
        assert torch.equal(result, expected)


@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_on_several_devices_each_weight_is_pruned_where_it_lives() -> None:
    weights = network(torch.device("cuda:0"))
    for name in ("three", "point"):
        weights[name] = weights[name].to("cuda:1")
    before = {name: weight.cpu() for name, weight in weights.items()}
    config = PruneConfig(backend="triton", wavelet="uhaar", scope="global")
    report = wavprune.fast.prune(
        model_of(**weights), backend="triton", wavelet="uhaar", scope="global"
    )
    after = {
        layer.name: (weights[layer.name].cpu(), layer.threshold, layer.kept) for layer in report
    }
    assert_pruned(before, {name: Outcome(*entry) for name, entry in after.items()}, config)
