"""Packed files decoded on a GPU: bits, verdicts and errors are those of the CPU.

It needs torch, numpy, PyWavelets, pytest, safetensors and zstandard.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.packed import (
    DTYPES,
    WAVELETS,
    assert_same_bits,
    cpu_accepts,
    damage,
    even,
    heavy_tailed,
    network,
    save_with_norms,
)
from wavprune import checkpoint
from wavprune.checkpoint import on_device, packed_layout
from wavprune.checkpoint.loading import open_packed
from wavprune.checkpoint.on_device import OnDevice, RefusedError, check
from wavprune.errors import WavpruneError

pytest.importorskip("wavprune.ops", reason="the compiled extension is not built here")
pytest.importorskip("zstandard")
pytest.importorskip("safetensors")

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not torch.ops.wavprune.cuda_capabilities(),
        reason="torch sees no GPU, or the compiled extension has no CUDA part",
    ),
]

GPU = "cuda"


@pytest.fixture(autouse=True)
def strict() -> Iterator[None]:
    """A file that only the CPU decodes is an error here, not a warning."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*does not decode a file to the bits")
        yield


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A number for each call of the operator."""
    made: list[int] = []

    def called(*arguments: Any) -> torch.Tensor:
        made.append(len(made))
        found: torch.Tensor = torch.ops.wavprune.trellis_load_(*arguments)
        return found

    monkeypatch.setattr(on_device, "operator", lambda: called)
    return made


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_the_cpu(
    tmp_path: Path, calls: list[int], dtype: torch.dtype, wavelet: str
) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(network(dtype), path, wavelet=wavelet, coder="trellis", step=0.003)
    expected = checkpoint.load(path)
    found = checkpoint.load(path, device=GPU)
    assert len(calls) == 1
    assert all(tensor.is_cuda for tensor in found.values())
    assert_same_bits(found, expected)


@pytest.mark.parametrize("stream", [150, 4000, 1 << 18])
def test_escapes_and_more_tables_than_fit(
    tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch, stream: int
) -> None:
    # The shortest are several streams for each multiprocessor, the longest one stream.
    monkeypatch.setattr(packed_layout, "STREAM", stream)
    shapes = [(40, 70), (33, 12, 3, 3), (64, 33), (1, 31), (97, 1, 5, 5), *([(9, 17)] * 400)]
    state = {f"{i}.weight": heavy_tailed(*shape, seed=i) for i, shape in enumerate(shapes)}
    path = tmp_path / "a.safetensors"
    checkpoint.save(state, path, coder="trellis", step=2e-4, targets=["*"])
    packed = open_packed(path, None)
    assert packed is not None
    assert sum(len(each.escapes) for each in packed.records.streams) > 100
    assert_same_bits(checkpoint.load(path, device=GPU), checkpoint.load(path))
    assert len(calls) == 1


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 65504.0),
        (torch.float32, 1e-30),
        (torch.float32, 1e-42),
        (torch.float32, 3e38),
        (torch.float64, 1e-290),
        (torch.float64, 1e300),
        (torch.bfloat16, 1e-38),
        (torch.bfloat16, 3.3e38),
    ],
)
@pytest.mark.parametrize("wavelet", ["identity", "dct"])
def test_extreme_weights(
    tmp_path: Path, calls: list[int], dtype: torch.dtype, scale: float, wavelet: str
) -> None:
    path = tmp_path / "a.safetensors"
    state = {"a.weight": even(dtype, scale)}
    checkpoint.save(state, path, coder="trellis", step=0.003, wavelet=wavelet)
    assert_same_bits(checkpoint.load(path, device=GPU), checkpoint.load(path))
    assert len(calls) == 1


def test_large_matrices_and_odd_sizes(tmp_path: Path, calls: list[int]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = {"a": (1000, 1280), "b": (257, 129, 3, 3), "c": (53, 31, 5)}
    state = {
        f"{name}.weight": torch.randn(shape, generator=generator).to(
            torch.float16 if name == "c" else torch.float32
        )
        for name, shape in shapes.items()
    }
    path = tmp_path / "a.safetensors"
    checkpoint.save(
        state, path, coder="trellis", target_bits_per_weight=4, targets=["*"], wavelet="dct"
    )
    assert_same_bits(checkpoint.load(path, device=GPU), checkpoint.load(path))
    assert len(calls) == 1


def test_names_ties_and_batch_norms(
    tmp_path: Path, calls: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_layout, "STREAM", 2000)
    path = tmp_path / "a.safetensors"
    net = save_with_norms(path)
    found = checkpoint.load(path, device=GPU)
    assert_same_bits(found, checkpoint.load(path))
    assert found["4.weight"] is found["3.weight"]
    for names in (["5.weight"], ["0.weight", "1.running_var", "3.bias"], ["4.weight"], []):
        some = checkpoint.load(path, names=names, device=GPU)
        assert_same_bits(some, checkpoint.load(path, names=names))
    assert len(calls) == 4
    memory = checkpoint.attach(net.to(GPU), path)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        weight = memory.weight("0.weight")
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.equal(weight, found["0.weight"])


def test_files_of_other_versions_are_copied(tmp_path: Path, calls: list[int]) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(network(), path)
    found = checkpoint.load(path, device="cuda:0")
    assert_same_bits(found, checkpoint.load(path))
    assert all(str(tensor.device) == "cuda:0" for tensor in found.values())
    assert not calls


@pytest.mark.parametrize("cache_bytes", [0, 5000])
def test_an_attached_model_decodes_there_and_waits_for_nothing(
    tmp_path: Path, calls: list[int], cache_bytes: int
) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 32, 3, padding=1),
        nn.Conv2d(32, 8, 1),
    )
    path = tmp_path / "a.safetensors"
    checkpoint.save(net.eval(), path, coder="trellis", step=0.01)
    net, loaded = net.to(GPU), copy.deepcopy(net).to(GPU)
    loaded.load_state_dict(checkpoint.load(path, device=GPU))
    memory = checkpoint.attach(net, path, cache_bytes=cache_bytes)
    dense = sum(tensor.nbytes for tensor in loaded.state_dict().values())
    assert memory.compressed_bytes < dense / 2
    images = torch.randn(2, 3, 8, 8, device=GPU)
    before = len(calls)
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(net(images), loaded(images))
    assert len(calls) - before == (6 if cache_bytes == 0 else 4)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        weights = [memory.weight(name) for name in ("0.weight", "2.weight", "3.weight")]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for weight, place in zip(weights, (0, 2, 3), strict=True):
        assert torch.equal(weight, loaded.get_parameter(f"{place}.weight"))


@pytest.mark.parametrize("at", [0, 3, 77, 128, 129, 400, -1])
def test_damage_is_refused_with_what_the_cpu_says(tmp_path: Path, at: int) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(network(), path, coder="trellis", step=0.003)
    damage(path, at)
    with pytest.raises(WavpruneError) as expected:
        checkpoint.load(path)
    with pytest.raises(WavpruneError) as found:
        checkpoint.load(path, device=GPU)
    assert str(found.value) == str(expected.value)


def test_any_bytes_get_the_verdict_of_the_cpu(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    state = {"a.weight": heavy_tailed(60, 70), "b.weight": heavy_tailed(19, 15, 3, 3)}
    checkpoint.save(state, path, coder="trellis", step=2e-4, targets=["*"], wavelet="dct")
    packed = open_packed(path, None)
    assert packed is not None
    for seed in range(60):
        generator = np.random.default_rng(seed)
        placed = OnDevice(packed, packed.names, torch.device(GPU))
        own = placed._coded.cpu().numpy().copy()
        hit = generator.random(len(own)) < (0, 1e-3, 0.03, 1)[seed % 4]
        own[hit] = generator.integers(0, 256, int(hit.sum()), dtype=np.uint8)
        placed._coded.copy_(torch.from_numpy(own))
        if seed % 5 == 4:
            # Classes, escapes and synthesis too: then only that it ends counts.
            placed._parts.random_(0, 256)
        _, found, expected = placed.decode(packed.names)
        if seed % 5 != 4:
            assert (int(found.cpu()[0]) == 0) == cpu_accepts(packed, own.tobytes()), seed
        if seed % 20 == 0:
            check(found, expected)
        elif seed % 4 == 3:
            with pytest.raises(RefusedError):
                check(found, expected)


def test_a_stream_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(network(), path, wavelet="uhaar", coder="trellis", step=0.003)
    expected = checkpoint.load(path)
    stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]  # torch's lack
    with torch.cuda.stream(stream):
        found = checkpoint.load(path, device=GPU)
    stream.synchronize()
    assert_same_bits(found, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU here at most")
def test_every_device(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(network(), path, coder="trellis", step=0.003)
    found = checkpoint.load(path, device="cuda:1")
    assert all(tensor.get_device() == 1 for tensor in found.values())
    assert torch.cuda.current_device() == 0
    assert_same_bits(found, checkpoint.load(path))
