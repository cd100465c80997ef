"""Packed files decoded by the CUDA operator, which runs on the host: ``tests/tools/cuda_shim``.

What the shim cannot show is in ``test_on_device_on_gpu.py``.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from tests.support.cases import quick
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
from wavprune.checkpoint import attached, on_device, packed_layout
from wavprune.checkpoint.loading import open_packed
from wavprune.checkpoint.on_device import OnDevice, RefusedError, check
from wavprune.checkpoint.unpacked import Unpacked
from wavprune.errors import WavpruneError

pytest.importorskip("wavprune.ops", reason="the compiled extension is not built here")
emulated = torch.ops.wavprune_shim

CPU = torch.device("cpu")
# Multiprocessors and shared memory of a block: tables of four bytes a slot, of one byte, some of
# them and none in shared memory; and several streams a block.
LIMITS = [(100, 227 << 10), (100, 40 << 10), (100, 14 << 10), (100, 0), (1, 227 << 10), (1, 20_000)]


class Device:
    """The host as a device that decodes, and how often it did."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.calls = 0
        self._patch = monkeypatch

    def load(self, path: Path, **options: Any) -> Mapping[str, torch.Tensor]:
        """``checkpoint.load``, decoded there."""
        with self._patch.context() as patch:
            self.use(patch)
            return checkpoint.load(path, **options)

    def use(self, patch: pytest.MonkeyPatch) -> None:
        """Let the host be that device."""
        patch.setattr(on_device, "is_capable", lambda device: True)
        patch.setattr(on_device, "operator", lambda: self._operator)

    def _operator(self, *arguments: Any) -> torch.Tensor:
        self.calls += 1
        found: torch.Tensor = emulated.trellis_load_(*arguments)
        return found


@pytest.fixture
def device(shim: None, monkeypatch: pytest.MonkeyPatch) -> Device:
    return Device(monkeypatch)


@pytest.fixture
def on_host(device: Device, monkeypatch: pytest.MonkeyPatch) -> Device:
    """The host is that device, until the test ends."""
    device.use(monkeypatch)
    return device


@pytest.mark.parametrize("wavelet", WAVELETS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_are_those_of_the_cpu(
    tmp_path: Path, device: Device, dtype: torch.dtype, wavelet: str
) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(network(dtype), path, wavelet=wavelet, coder="trellis", step=0.003)
    assert_same_bits(device.load(path), checkpoint.load(path))
    assert device.calls == 1


@pytest.mark.parametrize(("multiprocessors", "shared_bytes"), LIMITS)
def test_tables_anywhere_and_escapes(
    tmp_path: Path,
    device: Device,
    monkeypatch: pytest.MonkeyPatch,
    multiprocessors: int,
    shared_bytes: int,
) -> None:
    monkeypatch.setattr(packed_layout, "STREAM", 2000)
    emulated.set_limits(multiprocessors, shared_bytes)
    state = {
        f"{i}.weight": heavy_tailed(*shape, seed=i)
        for i, shape in enumerate([(40, 70), (33, 12, 3, 3), (64, 33), (1, 31), (97, 1, 5, 5)])
    }
    path = tmp_path / "a.safetensors"
    checkpoint.save(state, path, coder="trellis", step=2e-4, targets=["*"])
    packed = open_packed(path, None)
    assert packed is not None
    streams = packed.records.streams
    # A matrix over several words of escapes, and more tables than fit.
    assert len(streams) > 2
    assert sum(len(stream.escapes) for stream in streams) > 100
    assert packed.records.frequencies is not None
    assert packed.records.frequencies.any(axis=1).sum() > 20
    expected = checkpoint.load(path)
    for seed in (1, 2):
        emulated.reseed(seed)
        assert_same_bits(device.load(path), expected)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 65504.0),
        (torch.float32, 1e-30),
        (torch.float32, 3e38),
        (torch.float64, 1e-290),
        (torch.float64, 1e300),
        (torch.bfloat16, 1e-38),
        (torch.bfloat16, 3.3e38),
    ],
)
@pytest.mark.parametrize("wavelet", ["identity", "dct"])
def test_extreme_weights(
    tmp_path: Path, device: Device, dtype: torch.dtype, scale: float, wavelet: str
) -> None:
    path = tmp_path / "a.safetensors"
    state = {"a.weight": even(dtype, scale)}
    checkpoint.save(state, path, coder="trellis", step=0.003, wavelet=wavelet)
    assert_same_bits(device.load(path), checkpoint.load(path))


def test_a_checksum_of_several_blocks_and_odd_bytes(tmp_path: Path, device: Device) -> None:
    torch.manual_seed(0)
    state = {
        "odd.weight": torch.randn(53, 31, 5).half() * 0.1,
        "long.weight": torch.randn(250, 107) * 0.1,
        "one.weight": torch.randn(1, 1, 3, 3).bfloat16(),
    }
    path = tmp_path / "a.safetensors"
    checkpoint.save(state, path, coder="trellis", step=0.01, targets=["*"])
    assert_same_bits(device.load(path), checkpoint.load(path))


def test_names_ties_and_batch_norms(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_layout, "STREAM", 2000)
    path = tmp_path / "a.safetensors"
    save_with_norms(path)
    expected = checkpoint.load(path)
    found = device.load(path)
    assert_same_bits(found, expected)
    assert found["4.weight"] is found["3.weight"]
    for names in (["5.weight"], ["0.weight", "1.running_var", "3.bias"], ["4.weight"], []):
        some = device.load(path, names=names)
        assert_same_bits(some, checkpoint.load(path, names=names))


def test_an_attached_model_decodes_where_it_is(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_layout, "STREAM", 500)
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 4, 1))
    path = tmp_path / "a.safetensors"
    checkpoint.save(net, path, coder="trellis", step=0.01)
    loaded = copy.deepcopy(net)
    loaded.load_state_dict(checkpoint.load(path))
    images = torch.randn(2, 3, 8, 8)
    device.use(monkeypatch)
    memory = checkpoint.attach(net, path, cache_bytes=300)
    # Checked once, a stream at a time.
    assert device.calls == 2
    assert memory.compressed_bytes < 4000
    with torch.no_grad():
        for _ in range(2):
            assert torch.equal(net(images), loaded(images))
    # The smallest stays; the others are decoded again.
    assert device.calls == 2 + 3 + 2


def test_a_kept_batch_norm_costs_a_layer_one_stream_of_its_own(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packed_layout, "STREAM", 500)
    path = tmp_path / "a.safetensors"
    net = save_with_norms(path)
    expected = checkpoint.load(path)
    device.use(monkeypatch)
    memory = checkpoint.attach(net, path)
    # Afterwards the host decodes nothing, neither a weight nor what its batch norm is made of.
    monkeypatch.setattr(Unpacked, "stored", None)
    for name in ("0.weight", "3.weight", "5.weight"):
        before = device.calls
        assert torch.equal(memory.weight(name), expected[name])
        assert device.calls == before + 1


def test_what_a_capture_decodes_is_not_kept(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3))
    checkpoint.save(net, tmp_path / "a.safetensors", coder="trellis", step=0.01)
    device.use(monkeypatch)
    with torch.device("meta"):
        memory = checkpoint.attach(net, tmp_path / "a.safetensors", cache_bytes=1 << 20)
    monkeypatch.setattr(attached, "is_capturing", lambda: True)
    net(torch.ones(1, 3, 3, 3))
    assert memory.cached_bytes == 0
    monkeypatch.undo()
    device.use(monkeypatch)
    net(torch.ones(1, 3, 3, 3))
    assert memory.cached_bytes == 4 * 3 * 8 * 9


def test_the_cpu_decodes_what_the_device_lacks_memory_for(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(network(), path, coder="trellis", step=0.003)
    expected = checkpoint.load(path)
    device.use(monkeypatch)

    def full(*_: Any) -> torch.Tensor:
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(on_device, "operator", lambda: full)
    with pytest.warns(UserWarning, match="cpu lacks memory to decode it; the CPU does, and did"):
        assert_same_bits(checkpoint.load(path), expected)
    with pytest.warns(UserWarning, match="lacks memory"):
        checkpoint.attach(network(), path)


@pytest.mark.parametrize("at", [0, 3, 77, 128, 129, 400, -1])
def test_damage_is_refused_with_what_the_cpu_says(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch, at: int
) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(network(), path, coder="trellis", step=0.003)
    damage(path, at)
    with pytest.raises(WavpruneError) as expected:
        checkpoint.load(path)
    with pytest.raises(WavpruneError) as found:
        device.load(path)
    assert str(found.value) == str(expected.value)
    assert device.calls == 1
    net = network()
    device.use(monkeypatch)
    with pytest.raises(WavpruneError) as attached:
        checkpoint.attach(net, path)
    assert str(attached.value) == str(expected.value)


def test_a_stream_whose_own_checksum_differs_is_not_decoded(tmp_path: Path, device: Device) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(network(), path, coder="trellis", step=0.003)
    packed = open_packed(path, None)
    assert packed is not None
    data = bytearray(path.read_bytes())
    data[len(data) - packed.size + packed.records.streams[0].start + 150] ^= 1
    path.write_bytes(bytes(data))
    with pytest.raises(WavpruneError, match="its checksum differs"):
        device.load(path)
    assert device.calls == 0


def test_where_only_the_device_refuses_the_cpu_decodes_and_a_warning_says_so(
    tmp_path: Path, device: Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a.safetensors"
    checkpoint.save(network(), path, coder="trellis", step=0.003)
    expected = checkpoint.load(path)
    device.use(monkeypatch)
    monkeypatch.setattr(on_device, "operator", lambda: wrong)

    def wrong(*arguments: Any) -> torch.Tensor:
        found: torch.Tensor = emulated.trellis_load_(*arguments)
        return found + 1

    with pytest.warns(UserWarning, match="cpu does not decode a file to the bits that it has"):
        assert_same_bits(checkpoint.load(path), expected)
    net, loaded = network(), network()
    loaded.load_state_dict(expected)
    with pytest.warns(UserWarning, match="the CPU does, and did"):
        checkpoint.attach(net, path)
    assert torch.equal(net[0](torch.ones(1, 3, 3, 3)), loaded[0](torch.ones(1, 3, 3, 3)))


class Changed(OnDevice):
    """A file on the device, with other bytes there."""

    def __init__(self, packed: Unpacked, seed: int, share: float, coded: bool) -> None:
        matrices = [name for name in packed.names if packed.is_matrix(name)]
        super().__init__(packed, matrices, CPU)
        generator = np.random.default_rng(seed)
        for part, used in ((self._coded, coded), (self._parts, not coded)):
            flat = part.numpy()
            hit = generator.random(len(flat)) < share * used
            flat[hit] = generator.integers(0, 256, int(hit.sum()), dtype=np.uint8)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Unpacked:
    path = tmp_path_factory.mktemp("packed") / "a.safetensors"
    state = {"a.weight": heavy_tailed(20, 70), "b.weight": heavy_tailed(9, 5, 3, 3)}
    checkpoint.save(state, path, coder="trellis", step=2e-4, targets=["*"], wavelet="dct")
    found = open_packed(path, None)
    assert found is not None
    assert len(found.records.streams[0].escapes) > 10
    return found


@pytest.mark.usefixtures("on_host")
class TestAnyBytes:
    """Whatever the bytes are: no access beyond memory, an end, and the verdict of the CPU."""

    @given(
        seed=st.integers(0, 999),
        share=st.sampled_from([0.0, 1e-3, 0.03, 1.0]),
        coded=st.booleans(),
        limits=st.sampled_from(LIMITS),
    )
    @quick
    def test_verdicts(
        self, packed: Unpacked, seed: int, share: float, coded: bool, limits: tuple[int, int]
    ) -> None:
        changed = Changed(packed, seed, share, coded)
        emulated.set_limits(*limits)
        _, found, expected = changed.decode(name for name in packed.names)
        if coded:
            assert (int(found[0]) == 0) == cpu_accepts(packed, changed._coded.numpy().tobytes())
        if share == 0:
            check(found, expected)
        elif share == 1.0:
            with pytest.raises(RefusedError):
                check(found, expected)

    def test_a_table_that_codes_nothing_is_an_error(self, packed: Unpacked) -> None:
        empty = OnDevice(packed, [name for name in packed.names if packed.is_matrix(name)], CPU)
        empty._frequencies = torch.zeros_like(empty._frequencies)
        for limits in LIMITS:
            emulated.set_limits(*limits)
            _, found, _ = empty.decode(packed.names)
            assert int(found[0]) != 0

    def test_what_nobody_asks_for_is_not_written(self, packed: Unpacked) -> None:
        emulated.set_limits(*LIMITS[0])
        placed = OnDevice(packed, ["b.weight"], CPU)
        before = emulated.launches()
        tensors, found, expected = placed.decode(["b.weight"])
        # A table, the codes, the streams, values, kernels, checksums.
        assert emulated.launches() - before == 6
        first = placed.decode(["a.weight"])
        check(found, expected)
        check(first.found, first.expected)
        assert list(tensors) == ["b.weight"]
        assert torch.equal(tensors["b.weight"], packed.tensor("b.weight"))
        assert torch.equal(first.tensors["a.weight"], packed.tensor("a.weight"))

    @pytest.mark.parametrize(
        ("argument", "change", "message"),
        [
            ("coded", lambda t: t[:-32], "coded bytes have .* items at 0"),
            ("coded", lambda t: t[1:], "multiple of 16 bytes"),
            ("coded", lambda t: t.int(), "contiguous bytes"),
            ("parts", lambda t: t[:64], "parts have 64 bytes"),
            ("frequencies", lambda t: t[:4], "frequencies of 4 tables; allowed: 80"),
            ("frequencies", lambda t: t // 2, "add up to"),
            ("frequencies", lambda t: -t, "has a frequency of -"),
            ("frequencies", lambda t: t.long(), "rows of 256 numbers"),
            ("streams", lambda t: t[:, :5], "rows of 8 numbers"),
            ("streams", lambda t: set_to(t, 0, -16), "items at -16"),
            ("streams", lambda t: set_to(t, 0, 64), "coded bytes have"),
            ("streams", lambda t: set_to(t, 1, -1), "stream 0 of -1 words"),
            ("streams", lambda t: set_to(t, 1, 2**62), "words"),
            ("streams", lambda t: set_to(t, 2, 2), "items at 2"),
            ("streams", lambda t: set_to(t, 3, 2**30), "parts have"),
            ("streams", lambda t: set_to(t, 4, 1), "from 1 on"),
            ("streams", lambda t: set_to(t, 5, 3), "of 3 matrices"),
            ("streams", lambda t: set_to(t, 5, 1), "of which 1 are in streams"),
            ("streams", lambda t: set_to(t, 7, 1 << 40), "has no class of 40"),
            ("matrices", lambda t: set_to(t, 0, 0), "of 0 rows"),
            ("matrices", lambda t: set_to(t, 1, 2**31), "rows and 2147483648 columns"),
            ("matrices", lambda t: set_to(t, 2, 2**40), "parts have"),
            ("matrices", lambda t: set_to(t, 3, -1), "items at -1"),
            ("matrices", lambda t: set_to(t, 5, 2**40), "parts have"),
            ("matrices", lambda t: set_to(t, 6, 2**31), "kernels of matrix 0"),
            ("matrices", lambda t: set_to(t, 7, 11), "11 coefficients"),
            ("matrices", lambda t: set_to(t, 8, 7), "7 groups"),
            ("matrices", lambda t: set_to(t, 10, 2000), "2000"),
            ("decoded", lambda t: t[:1], "2 matrices came with 1 tensors"),
            ("decoded", lambda t: [t[0], t[1][:-1]], "tensor 1 must have 405 elements"),
            ("decoded", lambda t: [t[0].int(), t[1]], "bfloat16"),
        ],
    )
    def test_bad_arguments_are_errors(
        self,
        packed: Unpacked,
        monkeypatch: pytest.MonkeyPatch,
        argument: str,
        change: Any,
        message: str,
    ) -> None:
        names = ("coded", "parts", "frequencies", "streams", "matrices", "decoded")

        def called(*arguments: Any) -> torch.Tensor:
            given = dict(zip(names, arguments, strict=True))
            given[argument] = change(given[argument])
            found: torch.Tensor = emulated.trellis_load_(*given.values())
            return found

        placed = OnDevice(packed, packed.names, CPU)
        monkeypatch.setattr(on_device, "operator", lambda: called)
        with pytest.raises(RuntimeError, match=message):
            placed.decode(packed.names)


def set_to(table: torch.Tensor, column: int, value: int) -> torch.Tensor:
    """A table with another value in its first row."""
    changed = table.clone()
    changed[0, column] = value
    return changed


def test_any_device_that_is_there(tmp_path: Path) -> None:
    path, old = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    net = network()
    checkpoint.save(net, path, coder="trellis", step=0.003)
    checkpoint.save(net, old)
    devices: tuple[str | torch.device, ...] = ("cpu", "cpu:0", CPU)
    for file, device in itertools.product((path, old), devices):
        assert_same_bits(checkpoint.load(file, device=device), checkpoint.load(file))
    for wrong, message in (
        ("meta", "device 'meta' holds no values"),
        ("nowhere", "device 'nowhere' is not available here"),
        ("cuda:99", "device 'cuda:99' is not available here"),
    ):
        with pytest.raises(WavpruneError, match=message):
            checkpoint.load(path, device=wrong)
    with pytest.raises(TypeError, match=r"device must be a str or a torch\.device, not 3"):
        checkpoint.load(path, device=3)  # type: ignore[arg-type]  # what the test is about
