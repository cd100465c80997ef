"""What a pruned file says of itself, and what compressing it makes of that."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

import wavprune
from tests.support import checkpoints
from wavprune import PruneConfig, WavpruneError, checkpoint
from wavprune.checkpoint.formats.names import Weight
from wavprune.checkpoint.prune import prune_file
from wavprune.checkpoint.recorded import ChangedLayerWarning
from wavprune.cli import main
from wavprune.pruned import KEY, layers_of, parse, pruned_metadata, to_text

HAAR = PruneConfig(wavelet="haar", sparsity=0.9)


@pytest.fixture
def dense(tmp_path: Path) -> Path:
    path = tmp_path / "dense.safetensors"
    save_file(wavprune.demo.resnet().state_dict(), path, metadata={"format": "pt"})
    return path


def entry(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        content: dict[str, Any] = json.loads(file.metadata()[KEY])
    return content


def test_pruning_and_then_compressing_gives_the_bytes_of_one_step(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    how = ["--wavelet", "haar", "--sparsity", "0.9"]
    assert main(["prune", dense.name, "-o", "pruned.safetensors", *how]) == 0
    assert main(["compress", "pruned.safetensors", "-o", "two.safetensors"]) == 0
    assert main(["compress", dense.name, "-o", "one.safetensors", *how]) == 0
    assert main(["compress", dense.name, "-o", "none.safetensors"]) == 0
    one, two, none = (Path(f"{name}.safetensors").stat().st_size for name in ("one", "two", "none"))
    assert abs(one - two) <= 8
    assert one < 0.5 * none


def test_compressing_from_inputs_keeps_what_was_pruned(
    tmp_path: Path, dense: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(
        "import wavprune\n"
        "def inputs():\n"
        "    return list(wavprune.demo.digits('train', batch_size=64))[:2]\n"
    )
    report = prune_file(dense, tmp_path / "pruned.safetensors", HAAR)
    # The same weights without a word of how they were pruned.
    save_file(load_file("pruned.safetensors"), "silent.safetensors", metadata={"format": "pt"})
    how = ["--model", "wavprune.demo:resnet", "--calibration", "mine:inputs"]
    for name in ("pruned", "silent"):
        line = ["compress", f"{name}.safetensors", "-o", f"{name}-small.safetensors", *how]
        assert main([*line, "--target-kl", ".003", "--batchnorm", "keep"]) == 0
    small, silent = (Path(f"{name}-small.safetensors") for name in ("pruned", "silent"))
    assert small.stat().st_size < 0.85 * silent.stat().st_size
    loaded, before = checkpoint.load(small), load_file("pruned.safetensors")
    for stats in report:
        analysis = torch.tensor(report.bases[stats.name].analysis)
        kernels = (
            weights[f"{stats.name}.weight"].double().flatten(2).transpose(1, 2)
            for weights in (loaded, before)
        )
        after, pruned = (analysis @ values for values in kernels)
        gone = pruned.abs() < 1e-6 * pruned.abs().max()
        assert gone.float().mean() > 0.85
        assert after[gone].abs().max() < 1e-6 * after.abs().max()


@pytest.mark.parametrize(
    "config",
    [
        HAAR,
        PruneConfig(wavelet="klt", sparsity=0.8),
        PruneConfig(wavelet="auto", sparsity=0.95, scope="global"),
        PruneConfig(wavelet="dct", percentile=70),
        PruneConfig(method="random", sparsity=0.6),
        PruneConfig(method="min_weight", sparsity=0.9, targets=("*",)),
    ],
    ids=str,
)
@pytest.mark.parametrize("coder", ["auto", "trellis"])
def test_every_kind_of_pruning_is_read_back(
    config: PruneConfig, coder: str, tmp_path: Path, dense: Path
) -> None:
    pruned = tmp_path / "pruned.safetensors"
    report = prune_file(dense, pruned, config)
    assert parse(entry_text(pruned)) == layers_of(report)
    how: dict[str, Any] = {"coder": coder, **({"step": 0.001} if coder == "trellis" else {})}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        saved = checkpoint.save(pruned, tmp_path / "small.safetensors", **how)
    weights = load_file(pruned)
    loaded = checkpoint.load(saved.path)
    assert {layer.name for layer in saved.layers} == {layer.name for layer in report}
    for layer in saved.layers:
        assert layer.wavelet == report[layer.name].wavelet
        assert layer.kept <= report[layer.name].kept
        # Only what was kept is there, and only rounding is lost.
        name = f"{layer.name}.weight"
        change = (loaded[name] - weights[name]).norm() / weights[name].norm()
        assert change < 0.05


def test_a_matrix_is_read_back_in_a_basis_of_the_whole_of_it(tmp_path: Path, dense: Path) -> None:
    pruned = tmp_path / "pruned.safetensors"
    prune_file(dense, pruned, PruneConfig(wavelet="haar", sparsity=0.7, targets=("fc",)))
    saved = checkpoint.save(pruned, tmp_path / "a.safetensors")
    (fc,) = (layer for layer in saved.layers if layer.name == "fc")
    assert (fc.wavelet, fc.relative_error < 0.02) == ("haar", True)
    assert fc.kept <= 0.31 * fc.coefficients
    with pytest.warns(ChangedLayerWarning, match=r"fc \(the coder 'trellis' stores matrices"):
        checkpoint.save(pruned, tmp_path / "b.safetensors", coder="trellis", step=0.01)


def entry_text(path: Path) -> str:
    with safe_open(path, framework="pt") as file:
        return str(file.metadata()[KEY])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_a_rounded_dtype_still_holds_its_zeros(dtype: torch.dtype, tmp_path: Path) -> None:
    state = {name: t.to(dtype) for name, t in wavprune.demo.resnet().state_dict().items()}
    save_file(state, tmp_path / "dense.safetensors")
    prune_file(tmp_path / "dense.safetensors", tmp_path / "pruned.safetensors", HAAR)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        two = checkpoint.save(tmp_path / "pruned.safetensors", tmp_path / "two.safetensors")
    one = checkpoint.save(tmp_path / "dense.safetensors", tmp_path / "one.safetensors", config=HAAR)
    assert two.bytes == pytest.approx(one.bytes, rel=0.01)


def changed(path: Path, change: Any) -> None:
    """Write a file again with another weight in one layer, and its metadata."""
    state = load_file(path)
    state["layer3.conv2.weight"] = change(state["layer3.conv2.weight"])
    with safe_open(path, framework="pt") as file:
        metadata = file.metadata()
    save_file(state, path, metadata=metadata)


@pytest.mark.parametrize("amount", [1e-3, 1.0])
def test_a_layer_that_was_trained_since_is_not_pruned_again(
    amount: float, tmp_path: Path, dense: Path
) -> None:
    pruned = tmp_path / "pruned.safetensors"
    prune_file(dense, pruned, HAAR)
    changed(pruned, lambda weight: weight + amount * weight.std() * torch.randn_like(weight))
    with pytest.warns(ChangedLayerWarning, match=r"layer3\.conv2 \(its weight has changed since"):
        saved = checkpoint.save(pruned, tmp_path / "small.safetensors")
    found = checkpoint.load(saved.path)["layer3.conv2.weight"]
    weight = load_file(pruned)["layer3.conv2.weight"]
    assert (found - weight).norm() < 0.02 * weight.norm()
    others = [layer for layer in saved.layers if layer.name != "layer3.conv2"]
    assert all(layer.kept < 0.11 * layer.coefficients for layer in others)


def test_training_that_keeps_the_zeros_keeps_the_record(tmp_path: Path, dense: Path) -> None:
    pruned = tmp_path / "pruned.safetensors"
    prune_file(dense, pruned, HAAR)
    before = checkpoint.save(pruned, tmp_path / "a.safetensors").bytes
    changed(pruned, lambda weight: 1.25 * weight)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        after = checkpoint.save(pruned, tmp_path / "a.safetensors").bytes
    assert after == pytest.approx(before, rel=0.01)


def test_what_the_caller_says_comes_before_the_record(tmp_path: Path, dense: Path) -> None:
    pruned = tmp_path / "pruned.safetensors"
    prune_file(dense, pruned, HAAR)
    saved = checkpoint.save(pruned, tmp_path / "a.safetensors", wavelet="dct")
    assert {layer.wavelet for layer in saved.layers} == {"dct", "identity"}


def test_an_expansive_basis_is_recorded_and_cannot_be_read_back(
    tmp_path: Path, dense: Path
) -> None:
    pruned = tmp_path / "pruned.safetensors"
    config = PruneConfig(wavelet="db2", mode="zero", level=1, force_level=True, targets=("conv1",))
    with pytest.warns(UserWarning, match="too high"):
        prune_file(dense, pruned, config)
    assert entry(pruned)["bases"] == [["dwt", "db2", "zero", 1, 1, True, True]]
    with pytest.warns(ChangedLayerWarning, match=r"conv1 \(what was kept cannot be told"):
        checkpoint.save(pruned, tmp_path / "a.safetensors")


def test_pruning_again_adds_to_the_record(tmp_path: Path, dense: Path) -> None:
    once, twice = tmp_path / "once.safetensors", tmp_path / "twice.safetensors"
    prune_file(dense, once, PruneConfig(wavelet="haar", targets=("conv1", "fc")))
    prune_file(once, twice, PruneConfig(wavelet="dct", targets=("conv1", "layer1.*")))
    layers = parse(entry_text(twice))
    assert {name: layer.wavelet for name, layer in layers.items()} == {
        "fc": "haar",
        "conv1": "dct",
        "layer1.conv1": "dct",
        "layer1.conv2": "dct",
    }


def test_shards_say_what_is_in_them(tmp_path: Path) -> None:
    source = checkpoints.save_sharded(tmp_path / "model")
    for scope in ("layer", "global"):
        target = tmp_path / scope
        prune_file(source, target, PruneConfig(wavelet="haar", scope=scope))
        names = [set(entry(target / shard)["layers"]) for shard in checkpoints.SHARDS]
        assert names == [{"second", "third"}, {"first"}]
        saved = checkpoint.save(target, tmp_path / "a.safetensors")
        assert {layer.wavelet for layer in saved.layers} == {"haar", "identity"}


def test_a_saver_of_ones_own_writes_the_record(tmp_path: Path) -> None:
    net = wavprune.demo.resnet()
    report = wavprune.fast.prune(net, sparsity=0.9)
    save_file(net.state_dict(), tmp_path / "net.safetensors", metadata=pruned_metadata(report))
    two = checkpoint.save(tmp_path / "net.safetensors", tmp_path / "two.safetensors")
    one = checkpoint.save(net, tmp_path / "one.safetensors", report=report)
    assert abs(two.bytes - one.bytes) < 40
    with pytest.raises(TypeError, match="report must be a PruneReport, not dict"):
        pruned_metadata({})  # type: ignore[arg-type]


def test_a_file_without_metadata_gets_its_format_too(tmp_path: Path) -> None:
    save_file(checkpoints.state(), tmp_path / "in.safetensors")
    prune_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", HAAR)
    with safe_open(tmp_path / "out.safetensors", framework="pt") as file:
        assert file.metadata().keys() == {"format", KEY}
        assert file.metadata()["format"] == "pt"


GOOD = json.loads(to_text(layers_of(wavprune.fast.prune(nn.Conv2d(2, 2, 3), wavelet="klt"))))
BASIS = GOOD["bases"][0]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("{", "is no JSON"),
        ("[" * 100_000, "is no JSON"),
        ("7", "is of version 'None'"),
        ('{"version": 2}', "is of version '2'; this wavprune reads version 1"),
        ('{"version": true}', "is of version 'True'"),
        ('{"version": 1}', "which bases"),
        (json.dumps(GOOD | {"bases": [BASIS[:-1]]}), "which bases"),
        (json.dumps(GOOD | {"bases": [[*BASIS[:-1], 1]]}), "which bases"),
        (json.dumps(GOOD | {"bases": [["x" * 999, *BASIS[1:]]]}), "which bases"),
        (json.dumps(GOOD | {"bases": [[*BASIS[:2], "foo", *BASIS[3:]]]}), "which bases"),
        (json.dumps(GOOD | {"layers": []}), "which bases"),
        (json.dumps(GOOD | {"layers": {"conv1": [1, 5]}}), r"says \[1, 5\] of layer 'conv1'"),
        (json.dumps(GOOD | {"layers": {"conv1": [0, -1]}}), "of layer 'conv1'"),
        (json.dumps(GOOD | {"layers": {"conv1": [0, 1, "%"]}}), "no matrix for layer 'conv1'"),
        (json.dumps(GOOD | {"layers": {"conv1": [0, 1, "A" * 99999]}}), "no matrix"),
    ],
)
def test_a_record_that_is_none_is_refused(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path, target = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    save_file(checkpoints.state(), path, metadata={KEY: text})
    for run in (
        lambda: checkpoint.save(path, target),
        lambda: prune_file(path, target, HAAR),
    ):
        with pytest.raises(WavpruneError, match=message) as caught:
            run()
        assert str(caught.value).startswith(f"{path}: its metadata")
    assert [path] == list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bases": [["dwt", "nothing", *BASIS[2:]]]}, "unknown wavelet 'nothing'"),
        ({"bases": [["dwt", "haar", None, None, 7, False, True]]}, "has no level 7"),
        (
            {"bases": [["dwt", "haar", None, None, 1, False, True]], "layers": {"conv1": [0, 999]}},
            "it keeps 999 of 144 coefficients",
        ),
        ({"layers": {"conv1": [0, 9]}}, "the matrix of its basis 'klt' is not recorded"),
        ({"layers": {"conv1": [0, 9, "AACAPw=="]}}, "a matrix of 1 values"),
        ({"layers": {"conv1": [0, 9, "AACAPw==" * 81]}}, "no matrix"),
    ],
    ids=str,
)
def test_a_record_of_another_weight_is_left_aside(
    change: dict[str, Any], message: str, tmp_path: Path, dense: Path
) -> None:
    text = json.dumps(GOOD | {"layers": {"conv1": [0, 5]}} | change)
    save_file(load_file(dense), tmp_path / "in.safetensors", metadata={KEY: text})
    if "no matrix" in message:
        with pytest.raises(WavpruneError, match=message):
            checkpoint.save(tmp_path / "in.safetensors", tmp_path / "a.safetensors")
        return
    with pytest.warns(ChangedLayerWarning, match=message):
        saved = checkpoint.save(tmp_path / "in.safetensors", tmp_path / "a.safetensors")
    plain = checkpoint.save(dense, tmp_path / "b.safetensors")
    assert [layer.checksum for layer in saved.layers] == [layer.checksum for layer in plain.layers]


def test_matrices_of_many_sizes_have_room_in_the_header(tmp_path: Path) -> None:
    sizes = (4, 8, 16, 32, 64, 128, 256)
    tensors = {f"a{n}.weight": torch.randn(n, n) for n in sizes}
    save_file(tensors, tmp_path / "in.safetensors")
    config = PruneConfig(wavelet="haar", sparsity=0.5, targets=("*",))
    prune_file(tmp_path / "in.safetensors", tmp_path / "out.safetensors", config)
    assert len(entry(tmp_path / "out.safetensors")["layers"]) == len(sizes)


def test_a_matrix_that_has_changed_is_stored_as_it_is(tmp_path: Path, dense: Path) -> None:
    config = PruneConfig(wavelet="haar", sparsity=0.9, targets=("fc",))
    prune_file(dense, tmp_path / "pruned.safetensors", config)
    with safe_open(tmp_path / "pruned.safetensors", framework="pt") as file:
        metadata = file.metadata()
    tensors = load_file(tmp_path / "pruned.safetensors")
    tensors["fc.weight"] = torch.randn_like(tensors["fc.weight"])
    save_file(tensors, tmp_path / "tuned.safetensors", metadata=metadata)
    with pytest.warns(ChangedLayerWarning, match="fc"):
        saved = checkpoint.save(tmp_path / "tuned.safetensors", tmp_path / "small.safetensors")
    assert "fc" not in [layer.name for layer in saved.layers]
    torch.testing.assert_close(
        checkpoint.load(tmp_path / "small.safetensors")["fc.weight"], tensors["fc.weight"]
    )


def test_no_basis_is_computed_of_a_kernel_that_is_too_large(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"a.weight": torch.ones(1, 1, 300_000)}, path)
    with pytest.raises(WavpruneError, match="layer 'a': 300000 kernels are too large"):
        checkpoint.save(path, tmp_path / "b.safetensors")


@pytest.mark.parametrize(
    "wrap",
    [nn.DataParallel, partial(torch.compile, backend="eager")],
    ids=["parallel", "compiled"],
)
def test_names_are_those_within_a_wrapper(wrap: Any, tmp_path: Path) -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    wrapped = wrap(net)
    report = wavprune.fast.prune(wrapped, wavelet="haar", sparsity=0.5)
    path = tmp_path / "a.safetensors"
    saved = checkpoint.save(wrapped, path, report=report, values="float32")
    assert [layer.name for layer in saved.layers] == ["0"]
    net.load_state_dict(checkpoint.load(path))
    inputs = [torch.randn(64, 3, 3, 3) for _ in range(2)]
    saved = checkpoint.save(wrapped, path, calibration=inputs, target_kl=0.01)
    assert saved.layers[0].name == "0"
    net.load_state_dict(checkpoint.load(path))


def test_a_layer_that_is_gone_is_no_matter(tmp_path: Path, dense: Path) -> None:
    text = json.dumps(GOOD | {"layers": {"gone": [0, 5]}})
    save_file(load_file(dense), tmp_path / "in.safetensors", metadata={KEY: text})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        checkpoint.save(tmp_path / "in.safetensors", tmp_path / "a.safetensors")


@settings(max_examples=40, deadline=None)
@given(st.data())
def test_the_reserved_header_holds_every_record(data: st.DataObject) -> None:
    from wavprune.checkpoint.pruned import _room_for

    names = data.draw(
        st.lists(st.text(min_size=1, max_size=9), min_size=1, max_size=4, unique=True)
    )
    sizes = data.draw(st.lists(st.sampled_from([1, 2, 3, 5]), min_size=len(names)))
    wavelet = data.draw(st.sampled_from(["auto", "haar", "klt", "identity", "sym8"]))
    config = PruneConfig(wavelet=wavelet, percentile=data.draw(st.sampled_from([None, 0, 50])))
    weights = {n: torch.randn(3, 4, size, size) for n, size in zip(names, sizes, strict=False)}
    refs = [wavprune.LayerRef(name, weight) for name, weight in weights.items()]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = wavprune.prune_layers(refs, config)
    text = to_text(layers_of(report))
    listed = [Weight(name, name, tuple(weight.shape)) for name, weight in weights.items()]
    assert len(json.dumps(text, ensure_ascii=False).encode()) <= _room_for(listed, config, {})
    assert parse(text) == layers_of(report)
