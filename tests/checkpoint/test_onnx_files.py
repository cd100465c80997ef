from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import onnx
import wavprune
from onnx import ModelProto, TensorProto, helper, numpy_helper
from tests.support import graphs
from wavprune import PruneConfig
from wavprune.checkpoint.formats import open_checkpoint
from wavprune.checkpoint.prune import prune_file
from wavprune.common.skipped import SkippedLayerWarning
from wavprune.onnx.models import rewrite_changed, to_torch
from wavprune.pruned import parse

HALF = PruneConfig(sparsity=0.5)


@pytest.fixture
def inline(tmp_path: Path) -> Path:
    path = tmp_path / "in.onnx"
    onnx.save(graphs.network(), path)
    return path


def expected(config: PruneConfig = HALF) -> ModelProto:
    model = graphs.network()
    wavprune.fast.prune(model, sparsity=config.sparsity, targets=config.targets)
    return model


def assert_same(path: Path, model: ModelProto) -> None:
    onnx.checker.check_model(str(path), full_check=True)
    found = graphs.arrays(onnx.load(path))
    for name, values in graphs.arrays(model).items():
        np.testing.assert_array_equal(found[name], values, err_msg=name)


def test_a_file_is_pruned_like_the_model_in_memory(inline: Path) -> None:
    target = inline.with_name("out.onnx")
    report = prune_file(inline, target, HALF)
    assert [layer.name for layer in report] == ["first", "second", "up"]
    assert_same(target, expected())
    before, after = onnx.load(inline), onnx.load(target)
    (record,) = after.metadata_props
    assert record.key == "wavprune.pruned"
    del before.graph.initializer[:], after.graph.initializer[:], after.metadata_props[:]
    assert before == after


def test_the_share_that_is_pruned_is_that_of_the_network(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Conv", ["x", "w"], ["a"]),
        helper.make_node("Reshape", ["a", "sizes"], ["b"]),
        helper.make_node("MatMul", ["b", "fc"], ["y"]),
    ]
    model = graphs.model_of(nodes, {"w": (4, 3, 7, 7), "fc": (16, 5)})
    model.graph.initializer.append(numpy_helper.from_array(np.array([0, -1]), "sizes"))
    onnx.save(model, tmp_path / "in.onnx")
    inputs = torch.randn(32, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    for calibration in (None, [inputs]):
        copy = ModelProto()
        copy.CopyFrom(model)
        found = wavprune.fast.prune(copy, sparsity=0.5, calibration=calibration).coverage
        assert found is not None
        assert str(found).startswith("pruned 588 of 668 parameters (88.0%)")
    report = prune_file(tmp_path / "in.onnx", None, HALF, dry_run=True)
    assert wavprune.fast.prune(model, sparsity=0.5).coverage == report.coverage


def test_matrices_are_pruned_by_name_as_linear_layers_are(inline: Path) -> None:
    config = PruneConfig(method="min_weight", sparsity=0.5, targets=("mat", "fc"))
    target = inline.with_name("out.onnx")
    report = prune_file(inline, target, config)
    assert [(layer.name, layer.shape) for layer in report] == [("mat", (6, 8)), ("fc", (5, 6))]
    arrays = graphs.arrays(onnx.load(target))
    linear = torch.nn.Linear(8, 6, bias=False)
    linear.weight.data = torch.from_numpy(graphs.arrays(graphs.network())["mat"].T.copy())
    wavprune.fast.prune(linear, method="min_weight", targets="*")
    np.testing.assert_array_equal(arrays["mat"].T, linear.weight.detach().numpy())


@pytest.mark.parametrize("several", [False, True])
def test_external_data_moves_beside_the_new_model(tmp_path: Path, several: bool) -> None:
    source = graphs.external(graphs.network(), tmp_path / "in.onnx", several)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    prune_file(source, tmp_path / "out.onnx", HALF)
    assert_same(tmp_path / "out.onnx", expected())
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert after.keys() - before.keys() == {"out.onnx", "out.onnx.data"}
    assert {name: after[name] for name in before} == before
    with pytest.raises(ValueError, match=r"out\.onnx exists already"):
        prune_file(source, tmp_path / "out.onnx", HALF)
    (tmp_path / "out.onnx").unlink()
    with pytest.raises(ValueError, match=r"out\.onnx\.data exists already"):
        prune_file(source, tmp_path / "out.onnx", HALF)


def test_a_model_can_take_its_own_place(tmp_path: Path) -> None:
    first = graphs.external(graphs.network(), tmp_path / "first.onnx")
    prune_file(first, tmp_path / "net.onnx", PruneConfig(method="min_weight", sparsity=0))
    prune_file(tmp_path / "net.onnx", tmp_path / "net.onnx", HALF, force=True)
    assert_same(tmp_path / "net.onnx", expected())


def test_external_data_is_mapped_and_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = graphs.external(graphs.network(), tmp_path / "in.onnx")
    checkpoint = open_checkpoint(source)

    def refuse(*args: object) -> None:
        raise AssertionError("a tensor was read whole")

    monkeypatch.setattr("wavprune.graph.tensors.read_exactly", refuse)
    (file,) = checkpoint.files
    target = tmp_path / "out.onnx"
    with file.beside(target, force=False), file.open(["first"], target) as (ref,):  # type: ignore[attr-defined]
        ref.weight.zero_()
    assert not graphs.arrays(onnx.load(target))["first.weight"].any()


def shared(path: Path) -> dict[str, np.ndarray]:
    """A file of two equal layers whose weights are the same bytes, and their biases, too."""
    nodes = [
        helper.make_node("Conv", ["x", "a.weight", "a.bias"], ["h"], pads=[1] * 4),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "b.weight", "b.bias"], ["y"], pads=[1] * 4),
    ]
    shapes = {"a.weight": (3, 3, 3, 3), "b.weight": (3, 3, 3, 3), "a.bias": (3,), "b.bias": (3,)}
    model = graphs.model_of(nodes, shapes)
    before = graphs.arrays(model)
    (path.parent / "shared").write_bytes(before["a.weight"].tobytes() + bytes(12))
    for tensor in model.graph.initializer:
        start, size = (0, 324) if tensor.name.endswith("weight") else (324, 12)
        onnx.external_data_helper.set_external_data(tensor, "shared", start, size)
        tensor.ClearField("raw_data")
    path.write_bytes(model.SerializeToString())
    return graphs.arrays(onnx.load(path))


def test_bytes_that_tensors_share_are_pruned_for_one_of_them(tmp_path: Path) -> None:
    before = shared(tmp_path / "in.onnx")
    prune_file(tmp_path / "in.onnx", tmp_path / "out.onnx", PruneConfig(ignore=("b",)))
    after = graphs.arrays(onnx.load(tmp_path / "out.onnx"))
    np.testing.assert_array_equal(after["b.weight"], before["b.weight"])
    assert not np.array_equal(after["a.weight"], before["a.weight"])


def test_bytes_that_tensors_share_get_the_values_of_each(tmp_path: Path) -> None:
    shared(tmp_path / "in.onnx")
    network = to_torch(tmp_path / "in.onnx")
    with torch.no_grad():
        for number, parameter in enumerate(network.parameters(), 1):
            parameter.fill_(number)
    report = wavprune.fast.prune(network, sparsity=0)
    rewrite_changed(tmp_path / "in.onnx", tmp_path / "out.onnx", network, report, force=False)
    after = graphs.arrays(onnx.load(tmp_path / "out.onnx"))
    for name, values in network.tensors().items():
        np.testing.assert_array_equal(after[name], values.numpy())


def test_tensors_that_overlap_do_not_fill_a_disk(tmp_path: Path) -> None:
    shared(tmp_path / "in.onnx")
    model = onnx.load(tmp_path / "in.onnx", load_external_data=False)
    for number in range(12):
        more = model.graph.initializer.add()
        more.CopyFrom(model.graph.initializer[0])
        more.name = f"more{number}"
        more.dims[:] = [70]
        more.raw_data = b" "
        onnx.external_data_helper.set_external_data(more, "shared", 4 * number, 280)
        more.ClearField("raw_data")
    (tmp_path / "in.onnx").write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"come to [0-9,]+ bytes, in files of 336; allowed"):
        prune_file(tmp_path / "in.onnx", tmp_path / "out.onnx", HALF)
    assert {path.name for path in tmp_path.iterdir()} == {"in.onnx", "shared"}


def test_an_error_leaves_nothing_behind(tmp_path: Path) -> None:
    model = graphs.network()
    weight = np.full((8, 3, 3, 3), np.nan, dtype=np.float32)
    model.graph.initializer[0].CopyFrom(numpy_helper.from_array(weight, "first.weight"))
    source = graphs.external(model, tmp_path / "in.onnx")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(ValueError, match="'first': 216 of 216 weights are NaN"):
        prune_file(source, tmp_path / "out.onnx", HALF)
    assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float64"])
def test_every_float_is_pruned_in_its_own_dtype(tmp_path: Path, dtype: str) -> None:
    kind = {"float16": 10, "bfloat16": 16, "float64": 11}[dtype]
    values = torch.randn(4, 3, 3, 3, generator=torch.Generator().manual_seed(0))
    values = values.to(getattr(torch, dtype))
    weight = TensorProto(name="w", data_type=kind, dims=values.shape)
    if dtype == "float64":
        weight.double_data.extend(values.reshape(-1).tolist())
    else:
        # As integers of their bits, one of the two ways that there are.
        weight.int32_data.extend(values.view(torch.uint16).to(torch.int32).reshape(-1).tolist())
    graph = helper.make_graph(
        [helper.make_node("Conv", ["x", "w"], ["y"])],
        "net",
        [helper.make_tensor_value_info("x", kind, [1, 3, 4, 4])],
        [helper.make_tensor_value_info("y", kind, [1, 4, 2, 2])],
        [weight],
    )
    opset = helper.make_opsetid("", 22)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), tmp_path / "in.onnx")
    prune_file(tmp_path / "in.onnx", tmp_path / "out.onnx", HALF)
    layer = torch.nn.Conv2d(3, 4, 3, bias=False)
    layer.weight = torch.nn.Parameter(values.clone())
    wavprune.fast.prune(layer)
    (info,) = open_checkpoint(tmp_path / "out.onnx").inspect()
    assert info.dtype == dtype
    (ref,) = [ref for file in open_checkpoint(tmp_path / "out.onnx").files for ref in _refs(file)]
    assert torch.equal(ref.weight, layer.weight)


def _refs(file: object) -> list[wavprune.LayerRef]:
    with file.open(["w"], None) as refs:  # type: ignore[attr-defined]
        return list(refs)


def test_what_is_left_out_is_said(tmp_path: Path) -> None:
    model = graphs.model_of(
        [
            helper.make_node("Mul", ["v", "g"], ["w"]),
            helper.make_node("Conv", ["x", "w"], ["a"], "normed"),
            helper.make_node("Conv", ["a", "plain.weight"], ["y"]),
        ],
        {"v": (4, 3, 3, 3), "g": (4, 1, 1, 1), "plain.weight": (2, 4, 3, 3)},
    )
    onnx.save(model, tmp_path / "in.onnx")
    with pytest.warns(SkippedLayerWarning, match=r"normed \(its weight is computed by Mul"):
        report = prune_file(tmp_path / "in.onnx", tmp_path / "out.onnx", HALF)
    assert [layer.name for layer in report] == ["plain"]


def entry(model: ModelProto, key: str, value: str) -> None:
    for said in model.graph.initializer[0].external_data:
        if said.key == key:
            said.value = value
            return
    said = model.graph.initializer[0].external_data.add()
    said.key, said.value = key, value


def dims(model: ModelProto, *sizes: int) -> None:
    model.graph.initializer[0].dims[:] = sizes


HOSTILE: dict[str, tuple[Callable[[ModelProto], object], str]] = {
    "absolute": (lambda m: entry(m, "location", "/etc/passwd"), r"'/etc/passwd'; allowed: a file"),
    "parent": (lambda m: entry(m, "location", "../outside"), r"'../outside'; allowed: a file in"),
    "inner parent": (lambda m: entry(m, "location", "a/../../outside"), r"allowed: a file in"),
    "backslash": (lambda m: entry(m, "location", "..\\outside"), r"allowed: a file in"),
    "nothing": (lambda m: entry(m, "location", ""), r"is in ''; allowed: a file in"),
    "missing": (lambda m: entry(m, "location", "none"), r"'none', which does not exist"),
    "directory": (lambda m: entry(m, "location", "folder"), r"'folder', which is no file"),
    "link": (lambda m: entry(m, "location", "link"), r"of which 'link' is a link"),
    "linked folder": (lambda m: entry(m, "location", "way/outside"), r"of which 'way' is a link"),
    "offset": (lambda m: entry(m, "offset", "4096"), r"ends at byte 4,960 of 'in\.weights'"),
    "huge offset": (lambda m: entry(m, "offset", "9" * 30), r"the offset '9+'; allowed: a natural"),
    "negative": (lambda m: entry(m, "offset", "-8"), r"the offset '-8'; allowed: a natural"),
    "length": (lambda m: entry(m, "length", "12"), r"12 bytes; its shape needs 864"),
    "huge dims": (lambda m: dims(m, 1 << 40, 1 << 40), r"1099511627776x1099511627776; allowed"),
    "negative dims": (lambda m: dims(m, -8, 3, 3, 3), r"is said to be -8x3x3x3"),
    "dtype": (lambda m: setattr(m.graph.initializer[0], "data_type", 99), r"has the dtype 99"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_hostile_external_data_is_refused_by_name(tmp_path: Path, case: str) -> None:
    folder = tmp_path / "net"
    folder.mkdir()
    (folder / "folder").mkdir()
    (tmp_path / "outside").write_bytes(bytes(4096))
    (folder / "link").symlink_to(tmp_path / "outside")
    (folder / "way").symlink_to(tmp_path)
    path = graphs.external(graphs.network(), folder / "in.onnx")
    model = onnx.load(path, load_external_data=False)
    change, message = HOSTILE[case]
    change(model)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=rf"in\.onnx: tensor 'first\.weight' .*{message}"):
        open_checkpoint(path)


def test_hostile_data_of_an_attribute_is_refused_too(tmp_path: Path) -> None:
    tensor = graphs.initializer("inner", (3, 3))
    onnx.external_data_helper.set_external_data(tensor, "../outside")
    tensor.ClearField("raw_data")
    node = helper.make_node("Constant", [], ["c"], value_floats=[1.0])
    model = graphs.network()
    model.graph.node.insert(0, node)
    node = model.graph.node[0]
    node.attribute[0].CopyFrom(helper.make_attribute("value", tensor))
    path = tmp_path / "in.onnx"
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"'\.\./outside'; allowed: a file in the folder"):
        open_checkpoint(path)


def test_bytes_that_do_not_fit_their_shape_are_refused(inline: Path) -> None:
    model = graphs.network()
    dims(model, 1 << 20, 1 << 20)
    inline.write_bytes(model.SerializeToString())
    with pytest.raises(
        ValueError, match=r"'first\.weight' has 864 bytes; FLOAT of 1048576x1048576"
    ):
        open_checkpoint(inline)


def test_a_cycle_is_refused(inline: Path) -> None:
    model = graphs.network()
    model.graph.node[0].input[0] = "c"
    inline.write_bytes(model.SerializeToString())
    with pytest.raises(ValueError, match=r"in\.onnx is no valid ONNX model: .*sorted"):
        open_checkpoint(inline)


def test_files_that_are_none_are_named(inline: Path) -> None:
    content = inline.read_bytes()
    for bad in (content[: len(content) // 2], b"hello, world" * 20, b"", b"<!doctype html>"):
        inline.write_bytes(bad)
        with pytest.raises(ValueError, match=r"in\.onnx (cannot be read as an|is no valid) ONNX"):
            open_checkpoint(inline)
    inline.unlink()
    os.mkfifo(inline)
    with pytest.raises(ValueError, match="is a named pipe"):
        open_checkpoint(inline)


def test_a_graph_without_convolutions_says_what_there_is(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "head.weight"], ["y"])
    model = graphs.model_of([node], {"head.weight": (6, 4)}, ("N", 6))
    onnx.save(model, tmp_path / "in.onnx")
    with pytest.raises(ValueError, match=r"no convolution .* 2-D ones are used .*: head"):
        prune_file(tmp_path / "in.onnx", tmp_path / "out.onnx", HALF)


def test_pruning_and_then_compressing_gives_the_bytes_of_one_step(tmp_path: Path) -> None:
    config = PruneConfig(wavelet="haar", sparsity=0.9)
    weight = torch.randn(32, 16, 5, 5, generator=torch.Generator().manual_seed(0))
    layer = torch.nn.Conv2d(16, 32, 5)
    layer.weight.data.copy_(weight)
    wavprune.onnx.export(torch.nn.Sequential(layer), tmp_path / "net.onnx", torch.ones(1, 16, 8, 8))
    prune_file(tmp_path / "net.onnx", tmp_path / "pruned.onnx", config)
    two = wavprune.onnx.save(tmp_path / "pruned.onnx", tmp_path / "two.onnx")
    one = wavprune.onnx.save(tmp_path / "net.onnx", tmp_path / "one.onnx", config=config)
    none = wavprune.onnx.save(tmp_path / "net.onnx", tmp_path / "none.onnx")
    assert abs(one.bytes - two.bytes) <= 8
    assert one.bytes < 0.5 * none.bytes


INPUTS = [
    torch.randn(64, 3, 8, 8, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1)
]


@pytest.mark.parametrize("calibration", [None, INPUTS], ids=["plain", "calibrated"])
@pytest.mark.parametrize("wavelet", ["haar", "klt"])
def test_a_model_that_was_pruned_in_memory_says_what_was_kept(
    wavelet: str, calibration: list[torch.Tensor] | None, tmp_path: Path
) -> None:
    model = wide()
    model.metadata_props.add(key="author", value="me")
    report = wavprune.fast.prune(
        model, wavelet=wavelet, sparsity=0.9, calibration=calibration, calibration_level="refit"
    )
    assert [entry.key for entry in model.metadata_props] == ["author", "wavprune.pruned"]
    onnx.save(model, tmp_path / "pruned.onnx")
    said = wavprune.onnx.save(tmp_path / "pruned.onnx", tmp_path / "said.onnx")
    told = wavprune.onnx.save(model, tmp_path / "told.onnx", report=report)
    del model.metadata_props[:]
    silent = wavprune.onnx.save(model, tmp_path / "silent.onnx")
    assert abs(said.bytes - told.bytes) <= 8
    assert said.bytes < 0.85 * silent.bytes


def wide() -> ModelProto:
    """A model whose weights take most of its bytes."""
    nodes = [
        helper.make_node("Conv", ["x", "a.weight"], ["b"]),
        helper.make_node("Relu", ["b"], ["c"]),
        helper.make_node("Conv", ["c", "d.weight", "d.bias"], ["y"]),
    ]
    return graphs.model_of(
        nodes, {"a.weight": (48, 3, 5, 5), "d.weight": (8, 48, 3, 3), "d.bias": (8,)}
    )


def test_what_was_pruned_before_is_still_said(tmp_path: Path) -> None:
    model = wide()
    wavprune.fast.prune(model, wavelet="haar", sparsity=0.9, targets="a")
    wavprune.fast.prune(
        model, sparsity=0.9, targets="d", calibration=INPUTS, calibration_level="refit"
    )
    (record,) = (entry.value for entry in model.metadata_props)
    assert {name: layer.wavelet for name, layer in parse(record).items()} == {
        "a": "haar",
        "d": "uhaar",
    }
    # A record that no version wrote is refused before anything has changed.
    model.metadata_props[0].value = "no record"
    before = model.SerializeToString()
    with pytest.raises(ValueError, match=r"its metadata 'wavprune.pruned' is no JSON"):
        wavprune.fast.prune(model, sparsity=0.5)
    assert model.SerializeToString() == before


def test_calibrated_files_keep_what_was_pruned_before(tmp_path: Path) -> None:
    model = wide()
    report = wavprune.fast.prune(model, wavelet="haar", sparsity=0.9)
    pruned = wavprune.onnx.to_torch(model)
    how: dict[str, Any] = {"calibration": INPUTS, "target_kl": 1e-3}
    said = wavprune.onnx.save(model, tmp_path / "said.onnx", **how)
    layers = {layer.name: layer for layer in said.layers}
    for stats in report:
        assert (layers[stats.name].wavelet, layers[stats.name].kept) <= ("haar", stats.kept)
    loaded = wavprune.checkpoint.load(said.path)
    for name, weight in pruned.state_dict().items():
        if weight.ndim == 4:
            basis = report.bases[name.removesuffix(".weight")]
            after, before = (
                torch.tensor(basis.analysis) @ values.double().flatten(2).transpose(1, 2)
                for values in (loaded[name], weight)
            )
            gone = before.abs() < 1e-5
            assert gone.float().mean() > 0.85
            assert float(after[gone].abs().max()) < 1e-5
    del model.metadata_props[:]
    silent = wavprune.onnx.save(model, tmp_path / "silent.onnx", **how)
    assert said.bytes < 0.75 * silent.bytes
