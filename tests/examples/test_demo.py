from __future__ import annotations

import contextlib
import csv
import functools
import importlib.util
import io
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from wavprune.sweep.store import Store

SCRIPT = Path(__file__).parents[2] / "examples" / "demo.py"
NAMES = ["dwt-uhaar", "dwt-haar", "min-weight", "random"]


@pytest.fixture(scope="module")
def demo() -> ModuleType:
    spec = importlib.util.spec_from_file_location("demo", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("demo") / "out"


@pytest.fixture(scope="module", autouse=True)
def printed(demo: ModuleType, out: Path) -> str:
    """What one run of the demo prints, with a smaller sweep; it leaves its files in ``out``."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as text:
        patch.setattr(demo, "run_sweep", functools.partial(demo.run_sweep, jobs=1))
        patch.setitem(demo.SWEEP, "models", demo.SWEEP["models"][:2])
        methods, stored = demo.SWEEP["grid"]
        patch.setitem(methods, "sparsity", [0.5, 0.95])
        patch.setitem(stored, "sparsity", 0.95)
        patch.setitem(stored, "bits", 8)
        demo.main(["--out", str(out), "--sparsity", "0.7"], standalone_mode=False)
    return text.getvalue()


@pytest.fixture(scope="module")
def original(demo: ModuleType) -> nn.Module:
    network: nn.Module = demo.load_network()
    return network


def report_of(out: Path, name: str) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((out / f"{name}.json").read_text())
    return content


def test_writes_weights_and_reports_and_nothing_else(out: Path) -> None:
    expected = {f"{name}.{kind}" for name in NAMES for kind in ("safetensors", "csv", "json")}
    assert {path.name for path in out.iterdir()} == expected | {"results.db", "report.html"}


@pytest.mark.parametrize("name", NAMES)
def test_saved_weights_are_what_the_report_says(
    out: Path, original: nn.Module, demo: ModuleType, name: str
) -> None:
    report = report_of(out, name)
    network = demo.load_network()
    network.load_state_dict(load_file(out / f"{name}.safetensors"))
    for layer in report["layers"]:
        weight = network.get_parameter(f"{layer['name']}.weight").detach()
        before = original.get_parameter(f"{layer['name']}.weight").detach()
        assert list(weight.shape) == layer["shape"]
        assert torch.count_nonzero(weight == 0) == layer["weight_zeros"]
        error = float((weight - before).double().norm() / before.double().norm())
        assert error == pytest.approx(layer["relative_error"], rel=1e-5)
        if layer["wavelet"] == "identity":
            assert torch.count_nonzero(weight) == layer["kept"]


def test_only_convolutions_change(out: Path, original: nn.Module) -> None:
    names = {layer["name"] for layer in report_of(out, "random")["layers"]}
    saved = load_file(out / "random.safetensors")
    for key, value in original.state_dict().items():
        assert torch.equal(saved[key], value) == (key.removesuffix(".weight") not in names), key


def test_every_method_keeps_the_same_count_in_every_layer(out: Path) -> None:
    kept = [[layer["kept"] for layer in report_of(out, name)["layers"]] for name in NAMES]
    assert kept[1:] == kept[:-1]
    for name in NAMES:
        assert report_of(out, name)["totals"]["sparsity"] == pytest.approx(0.7, abs=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_csv_agrees_with_json(out: Path, name: str) -> None:
    with (out / f"{name}.csv").open() as file:
        rows = list(csv.DictReader(file))
    layers = report_of(out, name)["layers"]
    assert [(r["name"], int(r["kept"])) for r in rows] == [(x["name"], x["kept"]) for x in layers]


def test_prints_a_summary_that_fits(printed: str, demo: ModuleType) -> None:
    rows = {
        cells[0]: [float(cell) for cell in cells[4:8]]
        for line in printed[: printed.index("Accuracy on digits")].splitlines()
        if (cells := line.split()) and cells[0] in NAMES
    }
    assert list(rows) == NAMES
    assert max(map(len, printed.splitlines())) <= demo.WIDTH
    for layer in ("_conv_stem", "_blocks.15._depthwise_conv", "_conv_head"):
        assert layer not in printed
    pointwise, small, *_ = zip(*rows.values(), strict=True)
    uhaar, haar, min_weight, random = range(4)
    assert pointwise[uhaar] == pointwise[haar] == pointwise[min_weight] < pointwise[random]
    assert max(small[uhaar], small[haar]) < small[min_weight] < small[random]


def test_prints_the_mean_accuracy_that_the_results_file_holds(printed: str, out: Path) -> None:
    with Store(out / "results.db") as store:
        runs = store.runs()
    assert set(runs["status"]) == {"ok"}
    assert len(runs) == 2 * (1 + 6 * 2 + 3)
    assert runs["file_bytes"].notna().sum() == 2 * 3
    runs = runs[runs["bits"].isna()]
    table = printed[printed.index("Accuracy on digits") :]
    shown = {
        cells[0]: [float(cell) for cell in cells[1:]]
        for line in table.splitlines()
        if len(cells := line.split()) == 3 and cells[0] != "sparsity"
    }
    unpruned = runs.loc[runs["method"] == "none", "top1"].mean()
    assert shown["unpruned"] == [pytest.approx(100 * unpruned, abs=0.05)] * 2
    names = {"uhaar", "haar", "dct", "auto", "min-weight", "random"}
    assert names <= set(shown)
    for name in names:
        method = name.replace("-", "_")
        rows = runs[(runs["wavelet"] == name) | (runs["method"] == method)]
        for accuracy, sparsity in zip(shown[name], (0.5, 0.95), strict=True):
            mean = rows.loc[rows["sparsity_requested"] == sparsity, "top1"].mean()
            assert accuracy == pytest.approx(100 * mean, abs=0.05)
    assert shown["random"][1] < shown["min-weight"][1] < shown["uhaar"][1]


def test_the_page_shows_every_basis(out: Path) -> None:
    page = (out / "report.html").read_text()
    for name in ("uhaar", "haar", "dct", "auto", "min-weight", "random"):
        assert name in page


def test_a_failed_save_leaves_the_old_file(
    demo: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "net.safetensors"
    demo.save_weights(nn.Linear(2, 2), path, "first")
    content = path.read_bytes()

    def fail(self: Path, data: bytes) -> int:
        with self.open("wb") as file:
            file.write(data[:10])
        raise OSError("no space left on device")

    monkeypatch.setattr(Path, "write_bytes", fail)
    with pytest.raises(OSError, match="no space"):
        demo.save_weights(nn.Linear(2, 2), path, "second")
    assert path.read_bytes() == content
    assert list(tmp_path.iterdir()) == [path]
