"""What a worker does, in this process."""

from __future__ import annotations

import json
import shutil
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import onnx
import wavprune
from wavprune import checkpoint
from wavprune.common import loaders
from wavprune.common.progress import reported_to
from wavprune.errors import WavpruneError
from wavprune.service import networks, tasks

from ..support import graphs

SETTINGS = {"basis": "dct", "sparsity": 0.8, "scope": "layer"}
MOST = 1 << 26


def ignore(stage: str, share: float | None) -> None:
    pass


@pytest.fixture
def model(demo: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "models" / "a"
    directory.mkdir(parents=True)
    shutil.copy(demo, directory / "source.safetensors")
    assert tasks.analyze(directory, ".safetensors", MOST, ignore)["layers"] == 9
    return directory


def run(model: Path, task: str, kind: str = ".safetensors", **settings: Any) -> tuple[Any, Path]:
    output = model.parent / f"{task}-out"
    output.mkdir()
    result = tasks.run(task, model, kind, SETTINGS | settings, output, ignore)
    tasks.finish(output, result, model.parent / task)
    assert json.loads((model.parent / task / tasks.RESULT).read_text()) == result
    return result, model.parent / task


def test_pruning_is_what_the_library_does(model: Path) -> None:
    result, made = run(model, "prune", scope="global")
    net = wavprune.demo.resnet()
    report = wavprune.fast.prune(net, wavelet="dct", sparsity=0.8, scope="global")
    assert result["kept"] == report.kept
    found = load_file(made / result["file"])
    assert all(torch.equal(found[name], value) for name, value in net.state_dict().items())
    assert len(json.loads((made / tasks.REPORT).read_text())["layers"]) == 9


def test_graphs_are_pruned_and_compressed(tmp_path: Path) -> None:
    directory = tmp_path / "models" / "a"
    directory.mkdir(parents=True)
    source = directory / "source.onnx"
    onnx.save(graphs.network(), source)
    layers = len(wavprune.fast.prune(onnx.load(source), wavelet="dct", sparsity=0.8).layers)
    assert tasks.analyze(directory, ".onnx", MOST, ignore)["layers"] == layers
    result, made = run(directory, "prune", ".onnx")
    model = onnx.load(source)
    assert result["kept"] == wavprune.fast.prune(model, wavelet="dct", sparsity=0.8).kept
    x = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    np.testing.assert_array_equal(graphs.run(made / result["file"], x), graphs.run(model, x))
    result, made = run(directory, "compress", ".onnx")
    with zipfile.ZipFile(made / result["file"]) as packed:
        packed.extractall(tmp_path)
    (out,) = wavprune.onnx.session(tmp_path / "model.onnx").run(None, {"x": x.numpy()})
    np.testing.assert_allclose(out, graphs.run(model, x), atol=0.05)


def test_compressing_to_a_size_reaches_it(model: Path) -> None:
    result, made = run(model, "compress", basis="auto", target_bytes=30_000, matrices=True)
    assert result["bytes"] == pytest.approx(30_000, rel=0.02)
    assert (made / result["file"]).stat().st_size == result["bytes"]
    assert wavprune.demo.resnet().load_state_dict(checkpoint.load(made / result["file"]))


def test_a_size_that_cannot_be_reached_is_named(model: Path) -> None:
    with pytest.raises(WavpruneError, match="no step brings the file to 10 bytes"):
        run(model, "compress", basis="auto", target_bytes=10, matrices=True)


@pytest.fixture(scope="module")
def packed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small Hugging Face directory in a zip."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        transformers = pytest.importorskip("transformers")
        torch.manual_seed(0)
        config = transformers.ResNetConfig(
            embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], layer_type="basic"
        )
        folder = tmp_path_factory.mktemp("hub")
        transformers.ResNetForImageClassification(config).save_pretrained(folder / "model")
    with zipfile.ZipFile(folder / "model.zip", "w") as archive:
        for path in (folder / "model").iterdir():
            archive.write(path, f"model/{path.name}")
        archive.writestr("model/modeling.py", "raise SystemExit")
    return folder / "model.zip"


@pytest.fixture
def directory(packed: Path, tmp_path: Path) -> Path:
    found = tmp_path / "models" / "a"
    (found / tasks.INPUTS).mkdir(parents=True)
    shutil.copy(packed, found / "source.zip")
    images = np.random.default_rng(0).integers(0, 256, (16, 3, 16, 16)).astype(np.uint8)
    np.savez(found / tasks.INPUTS / "000000.npz", images=images)
    assert tasks.analyze(found, tasks.ZIP, MOST, ignore)["left_out"] == ["model/modeling.py"]
    assert not (found / "source.zip").exists()
    return found


def test_a_directory_is_calibrated_and_compared(directory: Path) -> None:
    result, made = run(directory, "calibrate", tasks.ZIP, level="refit", sparsity=0.5)
    assert result["inputs"] == 16
    assert 0 <= result["agreement"] <= 1
    assert 0 < result["kl"] < 1
    with zipfile.ZipFile(made / result["file"]) as archive:
        assert {"model/config.json", "model/model.safetensors"} <= set(archive.namelist())
    jobs = directory.parent.parent / "jobs" / "b"
    jobs.mkdir(parents=True)
    made.rename(jobs / "result")
    compared, _ = run(directory, "compare", tasks.ZIP, job="b")
    assert compared["kl"] == pytest.approx(result["kl"], rel=1e-6)
    assert compared["agreement"] == result["agreement"]


@pytest.fixture
def graph(tmp_path: Path) -> Path:
    """A graph with its inputs."""
    found = tmp_path / "models" / "graph"
    (found / tasks.INPUTS).mkdir(parents=True)
    onnx.save(graphs.network(), found / "source.onnx")
    images = np.random.default_rng(0).normal(size=(16, 3, 8, 8)).astype(np.float32)
    np.savez(found / tasks.INPUTS / "000000.npz", images=images)
    tasks.analyze(found, ".onnx", MOST, ignore)
    return found


def finished(model: Path, task: str, job: str) -> None:
    """Let what a task made be the result of a job."""
    jobs = model.parent.parent / "jobs" / job
    jobs.mkdir(parents=True)
    (model.parent / task).rename(jobs / "result")


def test_a_graph_is_calibrated_and_compared(graph: Path) -> None:
    seen: list[tuple[str, float | None]] = []
    with reported_to(lambda stage, share: seen.append((stage, share))):
        result, made = run(graph, "calibrate", ".onnx", level="refit", sparsity=0.5)
    assert {"calibrate", "prune", "compare"} <= {stage for stage, _ in seen}
    images = torch.from_numpy(np.load(graph / tasks.INPUTS / "000000.npz")["images"])
    dense = graphs.run(graph / "source.onnx", images)
    pruned = graphs.run(made / result["file"], images)
    expected = np.linalg.norm(pruned - dense) / np.linalg.norm(dense)
    assert 0 < expected < 0.5
    assert result["inputs"] == 16
    assert result["output_error"] == pytest.approx(expected, rel=1e-4)
    assert result["agreement"] == np.mean(pruned.argmax(1) == dense.argmax(1))
    finished(graph, "calibrate", "b")
    compared, _ = run(graph, "compare", ".onnx", job="b")
    for name in ("output_error", "kl", "agreement"):
        assert compared[name] == pytest.approx(result[name], rel=1e-4)


def test_what_was_compressed_is_compared_as_it_decodes(graph: Path) -> None:
    run(graph, "compress", ".onnx")
    finished(graph, "compress", "b")
    folder = graph.parent.parent / "jobs" / "b" / "result"
    compared, made = run(graph, "compare", ".onnx", job="b")
    images = np.load(graph / tasks.INPUTS / "000000.npz")["images"]
    dense = graphs.run(graph / "source.onnx", torch.from_numpy(images))
    (decoded,) = wavprune.onnx.session(folder / "model.onnx").run(None, {"x": images})
    expected = np.linalg.norm(decoded - dense) / np.linalg.norm(dense)
    assert compared["output_error"] == pytest.approx(expected, rel=1e-4)
    assert [path.name for path in made.iterdir()] == [tasks.RESULT]


def test_a_compressed_directory_is_compared_as_it_decodes(directory: Path) -> None:
    run(directory, "compress", tasks.ZIP, sparsity=0.0)
    finished(directory, "compress", "b")
    compared, _ = run(directory, "compare", tasks.ZIP, job="b")
    # Eight bits a value change little.
    assert 0 < compared["output_error"] < 0.05


def without_a_bias(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: value for name, value in state.items() if name != "classifier.1.bias"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (without_a_bias, "1 of the network's tensors are not in it: 'classifier.1.bias'; allowed"),
        (lambda state: {**state, "more": torch.ones(2)}, "are not the network's: 'more'; allowed"),
        (
            lambda state: {**state, "classifier.1.bias": torch.ones(7)},
            r"a\.safetensors has not the weights of the model: .*size mismatch for classifier",
        ),
    ],
    ids=["fewer", "more", "another size"],
)
def test_a_compressed_file_of_another_network_is_refused(
    directory: Path, tmp_path: Path, change: Callable[[Any], Any], message: str
) -> None:
    state = load_file(directory / "source" / "model.safetensors")
    checkpoint.save(change(state), tmp_path / "a.safetensors")
    with pytest.raises(WavpruneError, match=f"(?s){message}"):
        networks.load_stored(directory / "source", tmp_path / "a.safetensors", tmp_path)


def test_files_hold_tied_tensors_once_and_may_lack_counters(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def network(_: Path) -> torch.nn.Module:
        found = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3))
        found.append(torch.nn.Linear(3, 3))
        found[2].weight = found[0].weight
        return found

    monkeypatch.setattr(networks, "load_network", network)
    state = network(tmp_path).state_dict()
    del state["2.weight"], state["1.num_batches_tracked"]
    checkpoint.save(state, tmp_path / "a.safetensors", targets="*")
    loaded = networks.load_stored(tmp_path, tmp_path / "a.safetensors", tmp_path)
    stored = checkpoint.load(tmp_path / "a.safetensors")["0.weight"]
    assert torch.equal(loaded.get_parameter("2.weight"), stored)


def inputs_of(source: Path, folder: Path, **settings: Any) -> torch.Tensor:
    (batch,) = networks.load_inputs(source, folder, settings)
    found = loaders.inputs_of(batch)
    assert isinstance(found, torch.Tensor)
    return found


def test_images_are_brought_to_the_size_that_is_asked_for(directory: Path, graph: Path) -> None:
    pil = pytest.importorskip("PIL.Image")
    folder = directory.parent / "images"
    folder.mkdir()
    pil.new("RGB", (24, 20), (255, 255, 255)).save(folder / "000000.png")
    assert inputs_of(directory / "source", folder, image_size=16).shape == (1, 3, 16, 16)
    # A graph says how large its images are.
    found = inputs_of(graph / "source.onnx", folder, mean=[0.5], std=[0.5, 0.25, 0.125])
    assert found.shape == (1, 3, 8, 8)
    assert found[0, :, 0, 0].tolist() == [1, 2, 4]


def test_what_is_left_out_by_itself_is_not_named_again(tmp_path: Path) -> None:
    """Of layers whose weights are computed, no file has the names."""
    nodes = [
        onnx.helper.make_node("Conv", ["x", "a"], ["y1"]),
        onnx.helper.make_node("Mul", ["b", "x0"], ["computed"]),
        onnx.helper.make_node("Conv", ["y1", "computed"], ["y"], "c2"),
    ]
    nodes.insert(0, onnx.helper.make_node("ReduceMean", ["x"], ["x0"], keepdims=0))
    model = graphs.model_of(nodes, {"a": (4, 3, 3, 3), "b": (4, 4, 3, 3)})
    directory = tmp_path / "models" / "a"
    directory.mkdir(parents=True)
    onnx.save(model, directory / "source.onnx")
    assert tasks.analyze(directory, ".onnx", MOST, ignore)["layers"] == 1
    result, _ = run(directory, "prune", ".onnx")
    assert result["kept"] == 22


def test_layers_that_cannot_be_pruned_are_left_as_they_are(tmp_path: Path) -> None:
    directory = tmp_path / "models" / "a"
    directory.mkdir(parents=True)
    broken = torch.full((2, 2, 3, 3), float("nan"))
    weights = {"a.weight": torch.randn(2, 2, 3, 3), "b.weight": broken}
    save_file(weights, str(directory / "source.safetensors"))
    tasks.analyze(directory, ".safetensors", MOST, ignore)
    result, made = run(directory, "prune")
    assert result["kept"] == 8
    assert load_file(made / result["file"])["b.weight"].isnan().all()


def test_a_directory_is_pruned_into_a_zip(directory: Path) -> None:
    result, made = run(directory, "prune", tasks.ZIP)
    with zipfile.ZipFile(made / result["file"]) as archive:
        assert archive.testzip() is None
        assert {"model/config.json", "model/model.safetensors"} <= set(archive.namelist())


def unsupported() -> onnx.ModelProto:
    """A graph with a convolution and an operator that torch has no form of."""
    nodes = [
        onnx.helper.make_node("Conv", ["x", "w"], ["a"]),
        onnx.helper.make_node("Hardmax", ["a"], ["y"], "hard"),
    ]
    return graphs.model_of(nodes, {"w": (4, 3, 3, 3)})


def test_what_cannot_be_run_is_said(model: Path, directory: Path, graph: Path) -> None:
    def reason(folder: Path, kind: str) -> Any:
        return tasks.analyze(folder, kind, MOST, ignore)["cannot_run"]

    assert reason(model, ".safetensors") == "it has only its weights"
    assert reason(directory, tasks.ZIP) is None
    config = directory / "source" / "config.json"
    config.write_text(config.read_text().replace("ForImageClassification", "Backbone"))
    assert reason(directory, tasks.ZIP) == (
        "it is a ResNetBackbone; networks ForImageClassification run"
    )
    for text in ("[]", "{", "[" * 100_000):
        config.write_text(text)
        assert reason(directory, tasks.ZIP) == "its config.json is no JSON object"
    config.unlink()
    assert reason(directory, tasks.ZIP) == "it holds no config.json"
    assert reason(graph, ".onnx") is None
    onnx.save(unsupported(), graph / "source.onnx")
    assert reason(graph, ".onnx").endswith("cannot be computed by torch: Hardmax (hard)")


def test_a_pickle_is_not_unpickled(tmp_path: Path) -> None:
    class Evil:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path(tmp_path / "ran").touch, ())

    torch.save({"conv.weight": torch.ones(2, 2, 3, 3), "x": Evil()}, tmp_path / "source.pt")
    with pytest.raises(WavpruneError, match=r"source\.pt"):
        tasks.analyze(tmp_path, ".pt", MOST, ignore)
    assert not (tmp_path / "ran").exists()
