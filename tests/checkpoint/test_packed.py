from __future__ import annotations

import base64
import copy
import itertools
import math
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import zstandard
from torch import nn

from wavprune import PruneConfig, checkpoint, fast
from wavprune.checkpoint import index_store, loading, packed, packed_layout
from wavprune.checkpoint.binary import Writer
from wavprune.checkpoint.formats.safetensors import read_header
from wavprune.checkpoint.norms import NormLink, unfold
from wavprune.checkpoint.packed_layout import TENSOR, Layout
from wavprune.checkpoint.packed_records import Stream
from wavprune.checkpoint.trellis import Ints
from wavprune.checkpoint.unpacked import Unpacked
from wavprune.errors import WavpruneError

from ..support.checkpoints import assert_same
from ..support.packed import even, network

LIMIT = 1 << 26


def block_of(path: Path) -> bytes:
    """The bytes of a file's tensor."""
    entries, _ = read_header(path)
    return path.read_bytes()[entries[TENSOR].start :]


@pytest.mark.parametrize("wavelet", ["identity", "uhaar", "haar", "klt", "auto"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_round_trip(tmp_path: Path, wavelet: str, dtype: torch.dtype) -> None:
    net = network().to(dtype)
    saved = checkpoint.save(
        net, tmp_path / "a.safetensors", wavelet=wavelet, coder="trellis", step=0.003
    )
    assert saved.bytes == saved.path.stat().st_size
    state = checkpoint.load(saved.path)
    assert list(state) == list(net.state_dict())
    compressed = {f"{layer.name}.weight" for layer in saved.layers}
    assert compressed == {f"{layer}.weight" for layer in (0, 2, 3, 4, 6, 7)}
    for name, before in net.state_dict().items():
        assert state[name].dtype == before.dtype
        if name not in compressed:
            assert torch.equal(state[name], before)
    for layer in saved.layers:
        after, before = state[f"{layer.name}.weight"], net.state_dict()[f"{layer.name}.weight"]
        error = float((after.double() - before.double()).norm())
        assert error == pytest.approx(layer.error, rel=1e-6)
        # The squared error of a trellis is 0.85 / 12 of the square of the step, about.
        weights = before.numel()
        assert 0 < layer.relative_error < 0.003 * (weights / 12) ** 0.5 + 0.004


def test_one_tensor_at_a_time_and_an_ordinary_file(tmp_path: Path) -> None:
    net = network()
    saved = checkpoint.save(net, tmp_path / "a.safetensors", coder="trellis", step=0.01)
    state = checkpoint.load(saved.path)
    reader = Unpacked(block_of(saved.path), LIMIT)
    for name, tensor in state.items():
        assert torch.equal(reader.tensor(name), tensor)
    old = checkpoint.save(net, tmp_path / "c.safetensors")
    for path, names in itertools.product((saved.path, old.path), (["4.weight", "0.bias"], [])):
        some = checkpoint.load(path, names=names)
        assert list(some) == names[::-1]
        whole = checkpoint.load(path)
        assert all(torch.equal(some[name], whole[name]) for name in names)
        with pytest.raises(WavpruneError, match="names has 'z', which it does not hold"):
            checkpoint.load(path, names=["z"])
    checkpoint.decompress(saved.path, tmp_path / "b.safetensors")
    from safetensors.torch import load_file

    assert_same(load_file(tmp_path / "b.safetensors"), state)


def test_numpy_gives_the_same_bytes_and_bits(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    net = network()
    first = checkpoint.save(net, tmp_path / "a.safetensors", coder="trellis", step=0.02)
    state = checkpoint.load(first.path)
    for name in ("trellis", "trellis_coder", "synthesis"):
        monkeypatch.setattr(f"wavprune.checkpoint.{name}.ops", None)
    assert_same(checkpoint.load(first.path), state)
    second = checkpoint.save(net, tmp_path / "b.safetensors", coder="trellis", step=0.02)
    assert second.path.read_bytes() == first.path.read_bytes()


def test_streams_are_read_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("wavprune.checkpoint.packed_layout.STREAM", 200)
    net = network()
    saved = checkpoint.save(net, tmp_path / "a.safetensors", coder="trellis", step=0.01)
    reader = Unpacked(block_of(saved.path), LIMIT)
    calls: list[Stream] = []
    decoded = Unpacked._decoded

    def counted(self: Unpacked, stream: Stream) -> object:
        calls.append(stream)
        return decoded(self, stream)

    monkeypatch.setattr(Unpacked, "_decoded", counted)
    tensor = reader.tensor("4.weight")
    (stream,) = calls
    assert "4.weight" in stream.names
    assert "0.weight" not in stream.names
    assert torch.equal(tensor, checkpoint.load(saved.path)["4.weight"])


@pytest.mark.parametrize("options", [{}, {"wavelet": "klt"}, {"sparsity": 0.6}], ids=str)
def test_blocks_change_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    """Large weights are quantised, kept on disk and decoded by blocks of columns."""
    if "sparsity" in options:
        options = {"config": PruneConfig(wavelet="uhaar", **options)}
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(40, 9, 3), nn.ConvTranspose2d(70, 6, 3), nn.Conv2d(300, 5, 1))
    saved = checkpoint.save(net, tmp_path / "a.safetensors", coder="trellis", step=0.01, **options)
    whole = checkpoint.load(saved.path)
    monkeypatch.setattr(packed_layout, "BLOCK", 1)
    monkeypatch.setattr(index_store, "IN_MEMORY", 100)
    monkeypatch.setattr(loading, "SMALL_FILE", 0)
    again = checkpoint.save(net, tmp_path / "b.safetensors", coder="trellis", step=0.01, **options)
    assert again.path.read_bytes() == saved.path.read_bytes()
    assert [layer.error for layer in again.layers] == pytest.approx(
        [layer.error for layer in saved.layers], rel=1e-6
    )
    assert_same(checkpoint.load(saved.path), whole)


def test_tied_weights_are_stored_once(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    net[1].weight = net[0].weight
    alone = checkpoint.save(net[:1], tmp_path / "a.safetensors", coder="trellis", step=0.01)
    saved = checkpoint.save(net, tmp_path / "b.safetensors", coder="trellis", step=0.01)
    assert saved.bytes < alone.bytes + 100
    state = checkpoint.load(saved.path)
    assert state["0.weight"] is state["1.weight"]
    other = nn.Sequential(nn.Conv2d(8, 8, 3), nn.Conv2d(8, 8, 3))
    other.load_state_dict(state)
    loaded = other.state_dict()
    assert torch.equal(loaded["0.weight"], loaded["1.weight"])


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float16, 65504.0),
        (torch.float32, 1e-30),
        (torch.float32, 3e38),
        (torch.float64, 1e-290),
        (torch.bfloat16, 1e-38),
    ],
)
def test_extreme_weights(tmp_path: Path, dtype: torch.dtype, scale: float) -> None:
    weight = even(dtype, scale)
    saved = checkpoint.save(
        {"a.weight": weight}, tmp_path / "a.safetensors", coder="trellis", step=0.003
    )
    after = checkpoint.load(saved.path)["a.weight"]
    assert bool(torch.isfinite(after).all())
    before, after = weight.double() / scale, after.double() / scale
    relative = (after - before).norm() / before.norm()
    assert float(relative) == pytest.approx(saved.relative_error, rel=1e-6)
    assert 0 < float(relative) < 0.04


@pytest.mark.parametrize("wavelet", ["identity", "uhaar", "haar"])
def test_pruned_coefficients_stay_zero(tmp_path: Path, wavelet: str) -> None:
    net = network()
    report = fast.prune(net, wavelet=wavelet, sparsity=0.7)
    saved = checkpoint.save(
        net, tmp_path / "a.safetensors", report=report, coder="trellis", step=0.005
    )
    dense = checkpoint.save(network(), tmp_path / "b.safetensors", coder="trellis", step=0.005)
    assert saved.bytes < dense.bytes
    for layer in saved.layers:
        assert layer.kept <= report[layer.name].kept
    if wavelet == "identity":
        state = checkpoint.load(saved.path)
        for name in ("0.weight", "4.weight"):
            assert not state[name][net.state_dict()[name] == 0].any()
    with_config = checkpoint.save(
        network(),
        tmp_path / "c.safetensors",
        config=PruneConfig(wavelet=wavelet, sparsity=0.7),
        coder="trellis",
        step=0.005,
    )
    assert with_config.bytes == pytest.approx(saved.bytes, rel=0.02)


def test_targets(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 128, 1))
    path = tmp_path / "a.safetensors"
    saved = checkpoint.save(net, path, coder="trellis", target_bytes=12_000)
    assert saved.bytes == pytest.approx(12_000, rel=0.01)
    saved = checkpoint.save(net, path, coder="trellis", target_bits_per_weight=3)
    elements = sum(parameter.numel() for parameter in net.parameters())
    assert 8 * saved.bytes / elements == pytest.approx(3, rel=0.01)
    with pytest.raises(WavpruneError, match="no step brings the file to 100 bytes"):
        checkpoint.save(net, path, coder="trellis", target_bytes=100)
    with pytest.raises(WavpruneError, match="give step, target_bytes or"):
        checkpoint.save(net, path, coder="trellis")


def test_a_trellis_is_smaller_than_the_other_coders(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(96, 96, 3))
    error, size = [], []
    for coder in ("auto", "trellis"):
        saved = checkpoint.save(
            net, tmp_path / "a.safetensors", wavelet="identity", coder=coder, target_bytes=40_000
        )
        size.append(saved.bytes)
        error.append(saved.relative_error)
    # 1 dB of error at equal bytes is a sixth of a bit.
    assert error[1] < 0.93 * error[0]


@pytest.mark.parametrize("name", ["alone.", ""])
def test_single_and_empty_tensors(tmp_path: Path, name: str) -> None:
    state = {f"{name}weight": torch.randn(3, 2, 3, 3), "b": torch.empty(0), "c": torch.tensor(3)}
    saved = checkpoint.save(state, tmp_path / "a.safetensors", coder="trellis", step=1e-4)
    loaded = checkpoint.load(saved.path)
    assert torch.equal(loaded["b"], state["b"])
    assert torch.equal(loaded["c"], state["c"])


def test_an_unknown_basis_name_still_decodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from wavprune.checkpoint import stored_basis

    def renamed(basis: stored_basis.StoredBasis) -> list[object]:
        return ["a basis of tomorrow", *stored_basis.basis_to_json(basis)[1:]]

    net = network()
    options = {"wavelet": "dct", "coder": "trellis", "step": 0.01}
    expected = checkpoint.save(net, tmp_path / "a.safetensors", **options)  # type: ignore[arg-type]  # of several types
    monkeypatch.setattr(packed, "basis_to_json", renamed)
    saved = checkpoint.save(net, tmp_path / "b.safetensors", **options)  # type: ignore[arg-type]  # of several types
    assert saved.path.read_bytes() != expected.path.read_bytes()
    assert_same(checkpoint.load(saved.path), checkpoint.load(expected.path))


def test_every_changed_byte_is_noticed(tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8))
    saved = checkpoint.save(net, tmp_path / "a.safetensors", coder="trellis", step=0.02)
    block = block_of(saved.path)
    state = checkpoint.load(saved.path)
    for position in range(0, len(block), 3):
        damaged = bytearray(block)
        damaged[position] ^= 1 << position % 8
        with pytest.raises(WavpruneError):
            dict(Unpacked(bytes(damaged), LIMIT).tensors())
    for length in (0, 3, 30, len(block) - 1):
        with pytest.raises(WavpruneError):
            dict(Unpacked(block[:length], LIMIT).tensors())
    assert_same(dict(Unpacked(block, LIMIT).tensors()), state)


def test_files_that_claim_too_much_are_refused(tmp_path: Path) -> None:
    state = {"0.weight": torch.zeros(64, 64, 3, 3)}
    saved = checkpoint.save(state, tmp_path / "a.safetensors", coder="trellis", step=0.02)
    with pytest.raises(WavpruneError, match=r"allowed: up to 1,000, or what max_bytes says"):
        checkpoint.load(saved.path, max_bytes=1000)
    assert not checkpoint.load(saved.path)["0.weight"].any()


def test_records_that_unfold_into_much_are_refused() -> None:
    bomb = zstandard.ZstdCompressor(level=19).compress(bytes(1 << 26))
    block = Writer()
    block.numbers([1 << 26, len(bomb), 0, 0])
    block.raw(bomb)
    with pytest.raises(WavpruneError, match="its records say 67108864 where at most"):
        Unpacked(bytes(block.data), LIMIT)


def test_indices_beyond_the_largest_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def several_signed(self: Writer, values: Ints) -> None:
        assert len(values)
        self.numbers(1 << 32 for _ in values)

    monkeypatch.setattr(Writer, "several_signed", several_signed)
    weight = torch.linspace(-1, 1, 3 * 3 * 9).reshape(3, 3, 3, 3)
    options = {"wavelet": "identity", "coder": "trellis", "step": 1e-4}
    path = checkpoint.save({"a.weight": weight}, tmp_path / "a.safetensors", **options).path  # type: ignore[arg-type]  # of several types
    with pytest.raises(WavpruneError, match="its records say 4294967296 where at most 4194304"):
        checkpoint.load(path)


def test_an_empty_tensor_that_torch_cannot_have_is_refused(tmp_path: Path) -> None:
    packer = packed.Packer({})
    packer.raw("a", "F32", (0, 1 << 40, 1 << 40), lambda: [])
    path = tmp_path / "a.safetensors"
    with path.open("wb") as file:
        packer.finish(tmp_path).write(file)
    with pytest.raises(WavpruneError, match="'a' is said to be "):
        checkpoint.load(path)


def test_layouts_turn_back() -> None:
    generator = np.random.default_rng(0)
    for groups, transposed, kernel in itertools.product((1, 2), (False, True), (1, 6)):
        layout = Layout((4, 6, 2, 3), groups, transposed, 6, kernel)
        values = generator.normal(size=(24, kernel))
        matrix = layout.split(values)
        assert matrix.shape == (layout.rows, layout.columns)
        assert np.array_equal(layout.join(matrix), values)


def test_the_model_is_not_changed(tmp_path: Path) -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    checkpoint.save(net, tmp_path / "a.safetensors", coder="trellis", step=0.02)
    assert_same(dict(net.state_dict()), before)


# A file of the first release of version 3: a layer in dct, with an escape, and two plain tensors.
FIRST_FILE = base64.b85decode(
    "Z~y=R00000dm>+7ZDn*}WMOn+Utc0Rdm?vXc5rfaZe=1mB70mSc4cyNX>V>^B04jDB7H0(cVTvLa&>NHB075_WOR"
    "9OWg<EvRX8FnB6DbAaAhJoTQoQ{T`VGGVRT_%Z)Rq5Wpr~QI$JO-"
    "G&nR}eSIJxkOJ2MH6<vuFa2N;0Br^U<O&aaB4%%LZDDjGIwEj%B7G5IE_Y>VXJ~W)VJ>26VRHa(19)3oB4lH9A}m"
    "`oEHhm!IV>|aH!(LeFg7$ZbaHiNEM{SBb7d?dGht(7F*7q}W-"
    "~A}Gc_}2Wn(ZkWn^MGFg7+aG&M0|W?~{;T>=pV1_c8H0s#$}syzVMo09zi5dj7lkmr#A5&(+Wt?K|C000040BBTj"
    "aGac^m2sGGNUW#;0I>kY0Qdm(3jjC~+<_2t<Vz02<pK&Zl@P#q=gUA75VvgZ0VuUE{U9~v005!^1&~Al009yJ0y7"
    "YfNRT?y#L(vdzySa<EMwef6{)xi6@%T}0sx$zKoR;43;-"
    "7Y1pqp!umD%y%_^0szXEO_EC?IB_IF(_0|44eX)b*Q2mtL;ER3JU$#-"
    "e(5C9qGS1w=x0RUhC0RUhC0RUhC0RVjk2ms~6fH0rM$#+m~0stB2S1w=x0RUhC0RUhC0RUhC0RVjk2ms~6fG`lDC"
    "#sArG&Ws~Ft1pQP%T)DDsZLi_&{#a_!{^c&O3O%Xf9|j)L);)8Rq4}P%Q!dCEWNL_!>U_wPe!Q00000004kL0000"
    "$002Nh004kM005vs0{{R300000"
)


def test_files_of_the_first_release_are_read(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(FIRST_FILE)
    state = checkpoint.load(path)
    assert list(state) == ["a.weight", "a.bias", "n"]
    assert state["a.weight"].shape == (6, 5, 3, 3)
    assert zlib.crc32(state["a.weight"].numpy().tobytes()) == 4254243800
    assert state["a.bias"].tolist() == [0, 1, 2, 3, 4, 5]
    assert int(state["n"]) == 3


def test_a_square_root_does_not_depend_on_the_machine() -> None:
    """Torch's differs from IEEE 754 in one of 150 values where it calls a library for vectors."""
    generator = torch.Generator().manual_seed(0)
    variance = torch.rand(4000, generator=generator, dtype=torch.float64)
    ones = torch.ones(4000, dtype=torch.float64)
    parts = {"w": ones.view(-1, 1), "g": ones, "v": variance, "m": ones, "b": 0 * ones}
    unfolded = unfold(NormLink("w", "g", "v", "m", "b", 0.0), parts)
    expected = [1 / math.sqrt(value) for value in variance.tolist()]
    assert unfolded["b"].tolist() == expected
