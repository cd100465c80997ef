from __future__ import annotations

import dataclasses
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

import wavprune
from tests.support import checkpoints
from wavprune import PruneConfig, checkpoint, demo
from wavprune.bases import named_basis
from wavprune.checkpoint.coders.ans import LARGEST, ans_decode, ans_encode, span
from wavprune.checkpoint.synthesis import synthesise

State = dict[str, torch.Tensor]


def network(seed: int = 0) -> nn.Module:
    """Kernels of several sizes, smooth so that a transform pays, and all else that models have."""
    torch.manual_seed(seed)
    smooth = [nn.Conv2d(3, 16, 5), nn.Conv2d(16, 40, 3)]
    with torch.no_grad():
        for conv in smooth:
            conv.weight.copy_(nn.functional.avg_pool2d(conv.weight, 3, 1, 1))
    batch_norm, last = nn.BatchNorm2d(16), nn.Conv2d(40, 24, 1)
    return nn.Sequential(smooth[0], batch_norm, smooth[1], last, nn.Linear(24, 10))


def crc(weight: torch.Tensor) -> int:
    return zlib.crc32(weight.contiguous().view(torch.uint8).numpy().tobytes())


def assert_as_reported(saved: checkpoint.SaveReport, loaded: State, before: State) -> None:
    """What is loaded has the report's checksums and errors, and all else is as it was."""
    assert saved.bytes == saved.path.stat().st_size
    assert list(loaded) == list(before)
    layers = {f"{layer.name}.weight": layer for layer in saved.layers}
    for name, tensor in before.items():
        found = loaded[name]
        assert (found.shape, found.dtype) == (tensor.shape, tensor.dtype)
        if name not in layers:
            assert torch.equal(found, tensor)
            continue
        layer = layers[name]
        assert crc(found) == layer.checksum
        error = (found.double() - tensor.double()).norm() / tensor.double().norm()
        assert layer.relative_error == pytest.approx(float(error), rel=1e-3, abs=1e-6)


@pytest.mark.parametrize(
    ("how", "error"),
    [
        ({}, 0.006),
        ({"bits": 6}, 0.03),
        ({"bits": 4}, 0.13),
        ({"values": "float16"}, 3e-4),
        ({"values": "float32"}, 1e-6),
        ({"step": 1e-3}, 0.03),
        ({"step": 1e-3, "coder": "zstd"}, 0.03),
        ({"step": 1e-3, "coder": "ans"}, 0.03),
        ({"step": 1e-6}, 2e-3),
        ({"wavelet": "identity"}, 0.006),
        ({"wavelet": "klt", "targets": ("0", "2")}, 0.02),
        ({"wavelet": "db2", "values": "float32"}, 1e-6),
        ({"targets": ("*",), "ignore": ("0",)}, 0.006),
    ],
    ids=str,
)
def test_a_model_comes_back_as_reported(tmp_path: Path, how: dict[str, Any], error: float) -> None:
    net = network()
    before = {name: tensor.clone() for name, tensor in net.state_dict().items()}
    saved = checkpoint.save(net, tmp_path / "x.safetensors", **how)
    assert all(torch.equal(tensor, before[name]) for name, tensor in net.state_dict().items())
    assert_as_reported(saved, checkpoint.load(saved.path), before)
    assert saved.relative_error < error
    assert saved.bytes < saved.uncompressed or how.get("values") == "float32"
    with safe_open(saved.path, framework="pt") as file:
        assert set(file.keys()) == set(before)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("how", [{}, {"values": "float32"}, {"step": 1e-4}], ids=str)
def test_every_dtype_stays_what_it_is(
    tmp_path: Path, dtype: torch.dtype, how: dict[str, Any]
) -> None:
    before = network().to(dtype).state_dict()
    saved = checkpoint.save(before, tmp_path / "x.safetensors", **how)
    assert_as_reported(saved, checkpoint.load(saved.path), before)


@pytest.mark.parametrize(
    "config",
    [
        PruneConfig(sparsity=0.75),
        PruneConfig(sparsity=0.9, wavelet="auto"),
        PruneConfig(sparsity=0.6, wavelet="klt", targets=("0", "2")),
        PruneConfig(percentile=70.0, wavelet="haar"),
        PruneConfig(
            percentile=70.0,
            wavelet="bior2.2",
            mode="symmetric",
            force_level=True,
            level=1,
            targets=("2",),
        ),
        PruneConfig(method="min_weight", sparsity=0.5, targets=("*",)),
        PruneConfig(method="random", sparsity=0.5, seed=3),
    ],
    ids=str,
)
@pytest.mark.filterwarnings("ignore:'bior2.2' on")
def test_a_config_stores_what_pruning_leaves(tmp_path: Path, config: PruneConfig) -> None:
    net = network()
    saved = checkpoint.save(net, tmp_path / "x.safetensors", config=config, values="float32")
    loaded = checkpoint.load(saved.path)
    report = wavprune.fast.prune(net, **dataclasses.asdict(config))
    assert [layer.kept for layer in saved.layers] == [layer.kept for layer in report]
    assert [layer.wavelet for layer in saved.layers] == [
        "identity" if layer.wavelet == "identity" else layer.wavelet for layer in report
    ]
    for name, tensor in net.state_dict().items():
        assert torch.allclose(loaded[name], tensor, rtol=1e-5, atol=1e-6), name
    assert saved.relative_error == pytest.approx(report.relative_error, rel=1e-4)


@pytest.mark.parametrize("settings", [{}, {"wavelet": "auto", "scope": "global"}], ids=str)
def test_a_report_stores_what_was_pruned(tmp_path: Path, settings: dict[str, Any]) -> None:
    net = network()
    report = wavprune.fast.prune(net, sparsity=0.8, **settings)
    saved = checkpoint.save(net, tmp_path / "x.safetensors", report=report, values="float32")
    assert [layer.kept for layer in saved.layers] == [layer.kept for layer in report]
    assert_as_reported(saved, checkpoint.load(saved.path), net.state_dict())
    assert saved.relative_error < 1e-6


@pytest.mark.filterwarnings("ignore:'db2' on")
def test_a_report_of_an_expansive_basis_is_refused(tmp_path: Path) -> None:
    net = network()
    report = wavprune.fast.prune(net, wavelet="db2", mode="symmetric", force_level=True, level=1)
    with pytest.raises(ValueError, match=r"layer '0': what was kept cannot be told .* 'db2'"):
        checkpoint.save(net, tmp_path / "x.safetensors", report=report)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("bits", [2.5, 4.0, 6.0])
def test_a_target_is_reached(tmp_path: Path, bits: float) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(64, 128, 3), nn.Conv2d(128, 256, 1), nn.Linear(256, 100))
    elements = sum(tensor.numel() for tensor in net.state_dict().values())
    saved = checkpoint.save(
        net, tmp_path / "x.safetensors", target_bits_per_weight=bits, targets=("*",)
    )
    assert 8 * saved.bytes / elements == pytest.approx(bits, rel=0.02)
    goal = saved.bytes * 0.9
    smaller = checkpoint.save(
        net, tmp_path / "y.safetensors", target_bytes=int(goal), targets=("*",)
    )
    assert smaller.bytes == pytest.approx(goal, rel=0.02)
    assert smaller.relative_error > saved.relative_error


def test_one_slope_gives_every_layer_its_share(tmp_path: Path) -> None:
    """A small layer's error counts as much as a large one's, and costs fewer bits to lower."""
    net = nn.Sequential(nn.Conv2d(64, 64, 3), nn.Conv2d(64, 64, 3, groups=64))
    saved = checkpoint.save(net, tmp_path / "x.safetensors", step=1e-3)
    large, small = saved.layers
    assert large.bits_per_coded_weight < small.bits_per_coded_weight
    assert small.relative_error < large.relative_error / 4


def test_a_target_that_cannot_be_reached_writes_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"no step brings the file to 100 bytes; the nearest has"):
        checkpoint.save(network(), tmp_path / "x.safetensors", target_bytes=100)
    assert list(tmp_path.iterdir()) == []


def test_smooth_kernels_take_fewer_bytes_in_a_basis(tmp_path: Path) -> None:
    net = network()
    sizes = {}
    for wavelet in ("identity", "auto"):
        saved = checkpoint.save(
            net, tmp_path / "x.safetensors", wavelet=wavelet, step=1e-3, targets=("0", "2")
        )
        sizes[wavelet] = sum(layer.bytes for layer in saved.layers)
    assert saved.layers[0].wavelet != "identity"
    assert sizes["auto"] < 0.9 * sizes["identity"]


def test_the_demo_network_keeps_its_accuracy_in_an_eighth_of_its_bytes(tmp_path: Path) -> None:
    net = demo.resnet(0)
    images, labels = (torch.cat(each) for each in zip(*demo.digits("test"), strict=True))
    with torch.no_grad():
        before = (net(images).argmax(1) == labels).float().mean()
        saved = checkpoint.save(net, tmp_path / "x.safetensors", bits=4, targets=("*",))
        net.load_state_dict(checkpoint.load(saved.path))
        after = (net(images).argmax(1) == labels).float().mean()
    assert saved.bytes < saved.uncompressed / 5
    assert after > before - 0.02


def test_a_file_is_the_same_every_time(tmp_path: Path) -> None:
    for name in ("a", "b"):
        checkpoint.save(network(), tmp_path / f"{name}.safetensors", step=1e-3)
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("kind", ["single", "sharded", "state dict"])
def test_a_checkpoint_on_disk_is_compressed_as_its_state_dict_is(tmp_path: Path, kind: str) -> None:
    state = checkpoints.state()
    if kind == "single":
        source = checkpoints.save(tmp_path / "in.safetensors")
    elif kind == "sharded":
        source = checkpoints.save_sharded(tmp_path / "in")
    else:
        source = tmp_path / "in.pt"
        torch.save({"state_dict": state}, source)
    saved = checkpoint.save(source, tmp_path / "x.safetensors")
    expected = checkpoint.save(state, tmp_path / "y.safetensors")
    assert {s.name: s.checksum for s in saved.layers} == {
        s.name: s.checksum for s in expected.layers
    }
    checkpoints.assert_same(
        checkpoint.load(saved.path), dict(checkpoint.load(expected.path).items())
    )


def test_decompressing_gives_an_ordinary_file(tmp_path: Path) -> None:
    source = checkpoints.save(tmp_path / "in.safetensors")
    saved = checkpoint.save(source, tmp_path / "x.safetensors")
    checkpoint.decompress(saved.path, tmp_path / "out.safetensors")
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata() == checkpoints.METADATA
        found = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # no mapping
    checkpoints.assert_same(found, checkpoint.load(saved.path))


@pytest.mark.parametrize("wavelet", ["uhaar", "dct", "haar", "db2", "bior2.2"])
@pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (2, 7)])
def test_compiled_and_plain_synthesis_give_the_same_bits(
    wavelet: str, kernel: tuple[int, int]
) -> None:
    pytest.importorskip("wavprune.ops")
    rng = np.random.default_rng(0)
    operator = named_basis(wavelet, kernel, "symmetric", 1, True).importance_operator
    matrix = operator.synthesis.astype(np.float32)
    values = rng.standard_normal((matrix.shape[1], 1000)).astype(np.float32)
    values *= rng.random(values.shape) < 0.5
    values[:, :100] *= np.float32(1e-38)
    fast = synthesise(values, matrix)
    slow = synthesise(values, matrix, compiled=False)
    assert fast.tobytes() == slow.tobytes()
    # A value of no coefficient is 0, not -0.
    matrix[1], values[:] = 0, -1
    assert not synthesise(values, matrix)[:, 1].tobytes().strip(b"\0")


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_symbols_come_back(data: st.DataObject) -> None:
    largest = data.draw(st.sampled_from(LARGEST))
    symbol = st.integers(-largest, largest)
    rows = [
        np.array(row, dtype=np.int16)
        for row in data.draw(st.lists(st.lists(symbol, max_size=40), min_size=1, max_size=5))
    ]
    fitting = span(rows)
    assert fitting is not None
    assert fitting <= largest
    coded = ans_encode(rows, fitting)
    found = ans_decode(coded, fitting, [len(row) for row in rows])
    assert all(np.array_equal(a, b) for a, b in zip(found, rows, strict=True))


@pytest.mark.parametrize("scale", [0.1, 0.5, 3.0, 40.0])
@pytest.mark.parametrize("law", ["laplace", "normal"])
def test_the_coder_of_small_layers_comes_near_the_entropy(scale: float, law: str) -> None:
    values = getattr(np.random.default_rng(0), law)(size=20_000) * scale
    symbols = np.rint(values).astype(np.int16)
    counts = np.unique(symbols, return_counts=True)[1]
    entropy = -(counts * np.log2(counts / counts.sum())).sum() / 8
    largest = span([symbols])
    assert largest is not None
    assert len(ans_encode([symbols], largest)) < 1.02 * entropy + 40


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"bits": 5}, "bits must be one of 8, 6, 4, not 5"),
        ({"bits": 8, "step": 0.1}, r"bits=8, step=0\.1 were given; give one of them"),
        ({"values": "int8"}, "unknown values 'int8'; allowed: float32, float16"),
        ({"coder": "lzma"}, "unknown coder 'lzma'; allowed: auto, zstd, ans"),
        ({"step": 0.0}, r"step must be a positive number, not 0\.0"),
        ({"target_bytes": -5}, "target_bytes must be a positive number, not -5"),
        ({"wavelet": "dtc"}, "unknown wavelet 'dtc'; close to it"),
        ({"targets": ("9",)}, "targets: '9' matches no layer"),
        ({"config": PruneConfig(), "wavelet": "dct"}, "config, wavelet were given"),
    ],
    ids=str,
)
def test_a_wrong_argument_is_named(tmp_path: Path, how: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        checkpoint.save(network(), tmp_path / "x.safetensors", **how)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["module", "file"])
def test_layers_that_are_ranked_together_are_stored_as_pruned_together(
    kind: str, tmp_path: Path
) -> None:
    net = network()
    source: Any = net
    if kind == "file":
        source = tmp_path / "in.safetensors"
        save_file(net.state_dict(), source)
    config = PruneConfig(wavelet="haar", sparsity=0.9, scope="global")
    saved = checkpoint.save(source, tmp_path / "x.safetensors", config=config)
    pruned = network()
    report = wavprune.fast.prune(pruned, wavelet="haar", sparsity=0.9, scope="global")
    assert [layer.kept for layer in saved.layers] == pytest.approx(
        [layer.kept for layer in report], abs=3
    )
    for name, tensor in checkpoint.load(saved.path).items():
        torch.testing.assert_close(tensor, pruned.state_dict()[name], rtol=0, atol=0.02)


def test_a_weight_that_is_not_finite_is_named(tmp_path: Path) -> None:
    net = network()
    with torch.no_grad():
        net.get_parameter("2.weight")[0, 0, 0, :2] = torch.nan
    with pytest.raises(ValueError, match="layer '2': 2 of 5760 weights are NaN or infinite"):
        checkpoint.save(net, tmp_path / "x.safetensors")
    assert list(tmp_path.iterdir()) == []


def test_what_is_no_model_is_refused(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=r"model must be a torch\.nn\.Module.*not int"):
        checkpoint.save(3, tmp_path / "x.safetensors")  # type: ignore[arg-type]  # the point
    with pytest.raises(ValueError, match=r"path must be a file that ends in \.safetensors"):
        checkpoint.save(network(), tmp_path / "x.pt")
    with pytest.raises(ValueError, match="of 3 to 5 axes"):
        checkpoint.save(nn.Linear(3, 4), tmp_path / "x.safetensors")
