from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import onnx
import wavprune
from onnx import helper, numpy_helper
from tests.support import graphs
from wavprune import PruneConfig
from wavprune.onnx import SessionModule, decompress, save, session, to_torch

X = torch.randn(4, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def outputs(found: Any) -> Any:
    return found.run(None, {"x": X.numpy()})[0]


SETTINGS: dict[str, dict[str, Any]] = {
    "bits": {"bits": 6, "config": PruneConfig(sparsity=0.5)},
    "floats": {"values": "float32", "wavelet": "dct"},
    "trellis": {"coder": "trellis", "step": 0.02},
    "matrices": {"bits": 8, "targets": ["*"]},
    "calibrated": {"calibration": [X, X + 1], "target_kl": 1e-3},
    "batch norms kept": {"calibration": [X, X + 1], "target_kl": 1e-3, "batchnorm": "keep"},
}


@pytest.mark.parametrize("case", SETTINGS)
def test_a_session_has_the_bits_of_the_decompressed_model(tmp_path: Path, case: str) -> None:
    path, back = tmp_path / "small.onnx", tmp_path / "back.onnx"
    saved = save(graphs.network(), path, **SETTINGS[case])
    assert saved.path == tmp_path / "small.safetensors"
    found = outputs(session(path))
    size = decompress(path, back)
    assert size == back.stat().st_size
    onnx.checker.check_model(str(back), full_check=True)
    np.testing.assert_array_equal(found, graphs.run(back, X))
    dense = graphs.run(graphs.network(), X)
    assert not np.array_equal(found, dense)
    # Errors of the values, and nothing that is in the wrong place.
    assert np.linalg.norm(found - dense) < 0.9 * np.linalg.norm(dense)
    assert {p.name for p in tmp_path.iterdir()} == {"small.onnx", "small.safetensors", "back.onnx"}


def test_weights_come_back_under_their_names_and_in_their_order(tmp_path: Path) -> None:
    # MatMul has its weight the other way round than torch, where the calibrated network runs.
    save(graphs.network(), tmp_path / "a.onnx", calibration=[X, X + 1], target_kl=1e-5)
    decompress(tmp_path / "a.onnx", tmp_path / "b.onnx")
    found, before = (graphs.arrays(m) for m in (onnx.load(tmp_path / "b.onnx"), graphs.network()))
    assert found.keys() == before.keys()
    for name in ("mat", "fc.weight", "up.weight", "second"):
        np.testing.assert_allclose(found[name], before[name], atol=0.2)


MATRICES: dict[str, Any] = {
    "square": ("y = MatMul(x, w)", (8, 8)),
    "oblong": ("y = Gemm(x, w)", (8, 12)),
    "transposed kernels": ("t = Transpose <perm = [1, 0, 2]> (w) y = Conv(x, t)", (8, 12, 3)),
}


@pytest.mark.parametrize("case", MATRICES)
@pytest.mark.parametrize("settings", [{"sparsity": 0.6}, {"pattern": "2:4"}], ids=str)
def test_what_was_pruned_is_stored_exactly(
    tmp_path: Path, case: str, settings: dict[str, Any]
) -> None:
    body, shape = MATRICES[case]
    sizes = "float[N, 8, 5] x" if len(shape) == 3 else "float[N, 8] x"
    axes = ", ".join(["N", *(f"A{axis}" for axis in shape[1:])])
    model = graphs.parse(f"net ({sizes}) => (float[{axes}] y) {{ {body} }}")
    model.graph.initializer.append(graphs.initializer("w", shape))
    pruned = type(model)()
    pruned.CopyFrom(model)
    report = wavprune.fast.prune(pruned, method="min_weight", targets="w", **settings)
    saved = save(pruned, tmp_path / "a.onnx", report=report, values="float32")
    assert saved.layers[0].kept == report.kept
    decompress(tmp_path / "a.onnx", tmp_path / "b.onnx")
    expected = graphs.arrays(pruned)["w"]
    np.testing.assert_array_equal(graphs.arrays(onnx.load(tmp_path / "b.onnx"))["w"], expected)
    method = {"method": "2:4"} if "pattern" in settings else {"method": "min_weight", **settings}
    save(model, tmp_path / "c.onnx", config=PruneConfig(**method, targets=("w",)), values="float32")
    decompress(tmp_path / "c.onnx", tmp_path / "d.onnx")
    np.testing.assert_array_equal(graphs.arrays(onnx.load(tmp_path / "d.onnx"))["w"], expected)


def test_what_was_kept_of_a_square_matrix_for_some_inputs_is_stored(tmp_path: Path) -> None:
    model = graphs.model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": (16, 16)}, ("N", 16)
    )
    inputs = torch.randn(256, 16, generator=torch.Generator().manual_seed(0)) * torch.arange(16)
    report = wavprune.fast.prune(model, targets="w", wavelet="identity", calibration=[inputs])
    save(model, tmp_path / "a.onnx", report=report, values="float32")
    decompress(tmp_path / "a.onnx", tmp_path / "b.onnx")
    found = graphs.arrays(onnx.load(tmp_path / "b.onnx"))["w"]
    np.testing.assert_allclose(found, graphs.arrays(model)["w"], atol=1e-6)


def test_the_graph_alone_is_small(tmp_path: Path) -> None:
    model = graphs.network()
    model.graph.node[0].doc_string = "where it came from" * 1000
    save(model, tmp_path / "small.onnx", bits=8)
    graph = onnx.load(tmp_path / "small.onnx", load_external_data=False)
    assert (tmp_path / "small.onnx").stat().st_size < 3000
    assert not any(tensor.raw_data for tensor in graph.graph.initializer)


def test_large_constants_are_stored_like_initializers(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Constant", [], ["w"], value=graphs.initializer("w", (16, 3, 5, 5))),
        helper.make_node("Conv", ["x", "w"], ["y"]),
    ]
    save(graphs.model_of(nodes, {}), tmp_path / "small.onnx", bits=8)
    assert (tmp_path / "small.onnx").stat().st_size < 600
    assert outputs(session(tmp_path / "small.onnx")).shape == (4, 16, 4, 4)


def test_a_model_of_more_than_a_gigabyte_gets_external_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(graphs.network(), tmp_path / "small.onnx", bits=8)
    decompress(tmp_path / "small.onnx", tmp_path / "inline.onnx")
    monkeypatch.setattr("wavprune.onnx.stored.INLINE", 1000)
    size = decompress(tmp_path / "small.onnx", tmp_path / "back.onnx")
    data = tmp_path / "back.onnx.data"
    assert size == data.stat().st_size + (tmp_path / "back.onnx").stat().st_size
    whole, parts = (graphs.arrays(onnx.load(tmp_path / n)) for n in ("inline.onnx", "back.onnx"))
    for name, values in whole.items():
        np.testing.assert_array_equal(parts[name], values)


def test_a_file_is_compressed_as_the_model_in_memory(tmp_path: Path) -> None:
    source = graphs.external(graphs.network(), tmp_path / "in.onnx")
    save(source, tmp_path / "a.onnx", bits=6)
    save(graphs.network(), tmp_path / "b.onnx", bits=6)
    one, other = (tmp_path / f"{name}.safetensors" for name in "ab")
    assert one.read_bytes() == other.read_bytes()


def test_a_compressed_graph_is_named_where_a_model_is_wanted(tmp_path: Path) -> None:
    save(graphs.network(), tmp_path / "small.onnx", bits=8)
    with pytest.raises(ValueError, match=r"small\.onnx is a graph whose weights are compressed"):
        to_torch(tmp_path / "small.onnx")
    onnx.save(graphs.network(), tmp_path / "plain.onnx")
    with pytest.raises(ValueError, match=r"plain\.onnx is no graph of wavprune\.onnx\.save"):
        session(tmp_path / "plain.onnx")


def changed(path: Path, **said: Any) -> None:
    graph = onnx.load(path, load_external_data=False)
    entry = graph.metadata_props[0]
    entry.value = json.dumps(json.loads(entry.value) | said)
    path.write_bytes(graph.SerializeToString())


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"weights": "../small.safetensors"}, r"allowed: a \.safetensors file beside it"),
        ({"weights": "/etc/passwd"}, r"allowed: a \.safetensors file beside it"),
        ({"weights": "other.safetensors"}, r"other\.safetensors does not exist"),
        ({"weights": "link.safetensors"}, r"link\.safetensors is a link"),
        ({"weights": 7}, "its metadata 'wavprune' cannot be read"),
        ({"version": 2}, "is of version 2; this wavprune reads 1"),
        ({"names": {"mat": ["fc.weight", None]}}, r"'fc\.weight' is \(5, 6\), and .* \(8, 6\)"),
        ({"names": {"mat": ["none", None]}}, "'none' is missing"),
        ({"names": {"mat": ["mat", [0, 0]]}}, "its metadata 'wavprune' cannot be read"),
        ({"names": []}, "its metadata 'wavprune' cannot be read"),
    ],
    ids=str,
)
def test_a_graph_that_lies_is_refused(tmp_path: Path, said: dict[str, Any], message: str) -> None:
    path = tmp_path / "small.onnx"
    save(graphs.network(), path, bits=8)
    (tmp_path / "link.safetensors").symlink_to(tmp_path / "small.safetensors")
    changed(path, **said)
    with pytest.raises(ValueError, match=message):
        session(path)


def with_constant(path: Path) -> None:
    """A network that adds a constant of integers, which lies in another file."""
    model = graphs.network()
    nodes = [
        helper.make_node("Constant", [], ["whole"], value=numpy_helper.from_array(np.arange(5))),
        helper.make_node("Cast", ["whole"], ["floats"], to=1),
        helper.make_node("Add", ["before", "floats"], ["y"]),
    ]
    model.graph.node[-1].output[0] = "before"
    model.graph.node.extend(nodes)
    onnx.save_model(
        model, path, save_as_external_data=True, size_threshold=0, convert_attribute=True
    )


def test_all_else_in_external_data_moves_into_the_graph(tmp_path: Path) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    with_constant(folder / "in.onnx")
    save(folder / "in.onnx", tmp_path / "small.onnx", bits=8)
    decompress(tmp_path / "small.onnx", tmp_path / "back.onnx")
    found = outputs(session(tmp_path / "small.onnx"))
    np.testing.assert_array_equal(found, graphs.run(tmp_path / "back.onnx", X))


@pytest.mark.parametrize("place", ["beside", "../x", "/etc/passwd"])
def test_a_constant_of_a_graph_is_read_from_no_file(tmp_path: Path, place: str) -> None:
    path = tmp_path / "small.onnx"
    save(graphs.network(), path, bits=8)
    graph = onnx.load(path, load_external_data=False)
    node = helper.make_node("Constant", [], ["c"], value=graphs.initializer("inner", (4,)))
    onnx.external_data_helper.set_external_data(node.attribute[0].t, place)
    graph.graph.node.append(node)
    path.write_bytes(graph.SerializeToString())
    for read in (session, lambda path: decompress(path, tmp_path / "back.onnx")):
        with pytest.raises(ValueError, match=rf"small\.onnx: tensor 'inner' is in '{place}'"):
            read(path)


def test_a_pair_is_replaced_together(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save(graphs.network(), tmp_path / "small.onnx", bits=8)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    monkeypatch.setattr("wavprune.graph.writing.LARGEST_FILE", 1000)
    with pytest.raises(ValueError, match="the model would have"):
        save(graphs.network(), tmp_path / "small.onnx", bits=4)
    assert {path: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_session_is_evaluated_like_a_network(tmp_path: Path) -> None:
    save(graphs.network(), tmp_path / "small.onnx", bits=8)
    deployed = SessionModule(session(tmp_path / "small.onnx"))
    data = [(X, torch.arange(4))]
    result = wavprune.evaluate(deployed, data, reference=to_torch(graphs.network()), timing=False)
    assert result.agreement == 1


def test_a_model_is_compared_calibrated_and_evaluated_as_it_is() -> None:
    model = graphs.network()
    data = [(X.repeat(4, 1, 1, 1), torch.arange(16) % 5)]
    result = wavprune.compare(model, data, sparsities=[0.5], wavelets=["uhaar"], seeds=[0])
    assert [trial.basis for trial in result] == ["uhaar", "min_weight", "random"]
    assert wavprune.calibrate(model, data).fitted.keys() == {"first", "second", "up"}
    assert wavprune.evaluate(model, data, timing=False).samples == 16


@pytest.mark.parametrize("path", ["small.safetensors", "none/small.onnx"])
def test_only_an_onnx_file_is_written(tmp_path: Path, path: str) -> None:
    with pytest.raises(
        ValueError, match=r"must be a file that ends in \.onnx|there is no directory"
    ):
        save(graphs.network(), tmp_path / path)
    onnx.save(graphs.network(), tmp_path / "in.onnx")
    with pytest.raises(ValueError, match=r"wavprune\.onnx\.save stores both"):
        wavprune.checkpoint.save(tmp_path / "in.onnx", tmp_path / "small.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["in.onnx"]
