"""Sweeps over metrics, stored files and fine-tuning."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

import wavprune
from tests.support import sweeps
from wavprune import PruneConfig, checkpoint
from wavprune.engine.layers import select_layers
from wavprune.engine.run import prune_layers
from wavprune.errors import WavpruneError
from wavprune.sweep.data import load_data
from wavprune.sweep.finishing import fine_tune
from wavprune.sweep.grid import Storage, expand
from wavprune.sweep.models import load_model
from wavprune.sweep.runner import run_sweep
from wavprune.sweep.sources import Training
from wavprune.sweep.store import Store

METRICS = """
class Restorer(torch.nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.conv = torch.nn.Conv2d(1, 1, 3, padding=1, bias=False)
        with torch.no_grad():
            self.conv.weight[0, 0, 1, 1] = 0.3

    def forward(self, x):
        return {"out": self.conv(x)}

def pairs(samples=8):
    images = loader(samples)[0][0]
    torch.manual_seed(0)
    with torch.no_grad():
        return [(images, Restorer().conv(images) + 0.01 * torch.randn(images.shape))]

def psnr(outputs, targets, peak=1.0):
    return 10 * torch.log10(peak**2 / (outputs - targets).square().mean((1, 2, 3)))

def squared(outputs, targets):
    return (outputs - targets).square().mean()
"""
RESTORE: dict[str, Any] = {
    "model": {"factory": "metrics:Restorer", "name": "restorer"},
    "data": {"factory": "metrics:pairs"},
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = sweeps.folder(tmp_path_factory.mktemp("axes"))
    (folder / "metrics.py").write_text(sweeps.MODULE + METRICS)
    return folder


def run(root: Path, db: Path, **settings: Any) -> pd.DataFrame:
    summary = run_sweep(sweeps.sweep(root, sweeps.content(**settings)), db, jobs=1)
    with Store(db) as store:
        runs = store.runs()
    assert summary.failed == 0, runs["error"].dropna().tolist()
    return runs


@pytest.mark.parametrize(
    ("metric", "name", "higher"),
    [
        ("torchmetrics.image:PeakSignalNoiseRatio", "PeakSignalNoiseRatio", 1),
        (
            {"factory": "metrics:psnr", "higher_is_better": True, "arguments": {"peak": 2.0}},
            "psnr",
            1,
        ),
        ({"factory": "metrics:squared", "higher_is_better": False, "name": "MSE"}, "MSE", 0),
    ],
    ids=["torchmetrics", "each", "batch"],
)
def test_a_metric_is_named_as_a_class_or_a_function(
    root: Path, tmp_path: Path, metric: Any, name: str, higher: int
) -> None:
    if name == "PeakSignalNoiseRatio":
        metric = {"factory": metric, "arguments": {"data_range": 1.0}}
    grid = {"method": "min_weight", "sparsity": [0.3, 0.8]}
    runs = run(root, tmp_path / "r.db", **RESTORE, metric=metric, grid=grid)
    assert set(runs["metric"]) == {name}
    assert set(runs["higher_is_better"]) == {higher}
    assert runs["value"].nunique() == 3
    assert runs[["top1", "kl", "classes"]].isna().all(axis=None)
    dense = runs["value"][0]
    assert ((runs["value"][1:] < dense) == bool(higher)).all()
    sweep = sweeps.sweep(root, sweeps.content(**RESTORE))
    ((x, y),) = load_data(sweep.data, 8)
    with torch.no_grad():
        error = (load_model(sweep.models[0])(x)["out"] - y).square().mean((1, 2, 3))
    expected = {
        "PeakSignalNoiseRatio": 10 * (1 / error.mean()).log10(),
        "psnr": (10 * (4 / error).log10()).mean(),
        "MSE": error.mean(),
    }
    assert dense == pytest.approx(float(expected[name]), rel=1e-5)


def test_only_what_a_run_has_is_part_of_its_id(root: Path) -> None:
    usual = expand(sweeps.sweep(root))
    keys = ["batch_size", "batchnorm", "timing", "device", "config", "match", "matched"]
    assert list(usual[1]._own_settings()) == keys
    contents = {"model": "m", "data": "d", "calibration": "c"}
    ids = {run.guid(contents, {}) for run in usual}
    training = {"data": {"npz": "data.npz"}}
    more = sweeps.content(
        metric={"factory": "metrics:psnr", "higher_is_better": True},
        training=training,
        grid={"wavelet": "haar", "sparsity": 0.5, "epochs": [0, 2], "bits": [None, 8, 4]},
    )
    runs = expand(sweeps.sweep(root, more))
    assert len({run.guid(contents, {}) for run in runs} | ids) == len(runs) + len(ids)


def test_ways_to_store_are_alternatives(root: Path) -> None:
    grid = {
        "wavelet": "haar",
        "bits": [None, 8],
        "target_kl": 0.1,
        "target_bits_per_weight": [1, 2],
    }
    found = [run.storage for run in expand(sweeps.sweep(root, sweeps.content(grid=grid)))[1:]]
    assert found == [
        None,
        Storage(bits=8),
        Storage(target_kl=0.1),
        Storage(target_bits_per_weight=1),
        Storage(target_bits_per_weight=2),
    ]
    only = sweeps.content(grid={"wavelet": "haar", "bits": 4})
    assert [run.storage for run in expand(sweeps.sweep(root, only))] == [None, Storage(bits=4)]


def test_stored_runs_are_what_their_files_hold(root: Path, tmp_path: Path) -> None:
    grid = {"wavelet": "uhaar", "sparsity": 0.5, "bits": [None, 32, 8, 4], "target_kl": 0.01}
    runs = run(root, tmp_path / "r.db", grid=grid)
    files = runs["file_bytes"].tolist()
    assert pd.isna(files[0])
    assert pd.isna(files[1])
    assert files[2] > files[3] > files[4] > files[5] > 0
    assert runs["kl"].iloc[1] == pytest.approx(runs["kl"].iloc[2], abs=1e-6)
    sweep = sweeps.sweep(root)
    model = load_model(sweep.models[0])
    report = wavprune.fast.prune(model, sparsity=0.5, wavelet="uhaar")
    path = tmp_path / "model.safetensors"
    saved = checkpoint.save(model, path, report=report, bits=4)
    model.load_state_dict(checkpoint.load(path))
    loader = load_data(sweep.data, sweep.batch_size)
    row = runs[runs["bits"] == 4].iloc[0]
    assert row["file_bytes"] == saved.bytes == path.stat().st_size
    assert row["loss"] == wavprune.evaluate(model, loader, timing=False).loss


@pytest.mark.parametrize("method", ["dwt", "random"])
def test_what_was_pruned_stays_pruned_in_training(root: Path, method: str) -> None:
    sweep = sweeps.sweep(root)
    model = load_model(sweep.models[0])
    config = PruneConfig(method=method, wavelet="db2", level=1, force_level=True, sparsity=0.8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        report = prune_layers(select_layers(model, config), config, masks=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    training = Training.model_validate({"data": {"npz": root / "data.npz"}, "learning_rate": 0.1})
    loader = load_data(training.data, 16)
    loss = wavprune.evaluate(model, loader, timing=False).loss
    fine_tune(model, config, report, training, loader, 3)
    after = wavprune.evaluate(model, loader, timing=False).loss
    assert loss is not None
    assert after is not None
    assert after < loss
    assert not model.training
    assert not torch.equal(model.state_dict()["fc.weight"], before["fc.weight"])
    for stats in report:
        weight = model.get_parameter(f"{stats.name}.weight").detach()
        if method == "random":
            pruned = before[f"{stats.name}.weight"] == 0
            assert torch.equal(weight == 0, pruned)
        assert not torch.equal(weight, before[f"{stats.name}.weight"])


def test_one_sample_left_over_and_frozen_networks() -> None:
    torch.manual_seed(0)
    conv = torch.nn.Conv2d(1, 4, 3)
    model = torch.nn.Sequential(
        conv,
        torch.nn.AdaptiveAvgPool2d(1),
        torch.nn.BatchNorm2d(4),
        torch.nn.Flatten(),
    ).eval()
    config = PruneConfig(sparsity=0.5)
    report = prune_layers(select_layers(model, config), config, masks=True)
    training = Training.model_validate({"data": {"builtin": "demo"}, "learning_rate": 0.1})
    data = TensorDataset(torch.randn(17, 1, 8, 8), torch.arange(17) % 4)
    before = conv.weight.clone()
    fine_tune(model, config, report, training, DataLoader(data, 16), 1)
    assert not torch.equal(conv.weight, before)
    model.requires_grad_(False)
    with pytest.raises(WavpruneError, match="no parameter of the model requires a gradient"):
        fine_tune(model, config, report, training, DataLoader(data, 16), 1)


def test_epochs_of_a_sweep(root: Path, tmp_path: Path) -> None:
    training = {"data": {"npz": "data.npz"}, "learning_rate": 0.05, "batch_size": 16}
    grid = {"wavelet": "uhaar", "sparsity": 0.9, "epochs": [0, 4], "calibrated": ["", "refit"]}
    runs = run(root, tmp_path / "r.db", training=training, grid=grid)
    trained, untrained = runs[runs["epochs"] == 4], runs[runs["epochs"].isna()].iloc[1:]
    assert trained["loss"].max() < untrained["loss"].min()
    assert (trained["kept"].to_numpy() == untrained["kept"].to_numpy()).all()
    assert len(trained) == len(untrained) == 2


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"grid": {"epochs": [0, 3]}},
            r"grid\[0\]: epochs=3 needs data to train on; give training",
        ),
        ({"grid": {"bits": 5}}, r"grid\[0\]\.bits\[0\]: Input should be 32, 16, 8, 6 or 4, not 5"),
        ({"grid": {"target_kl": 0}}, r"target_kl\[0\]: Input should be greater than 0, not 0"),
        ({"metric": "no_colon"}, "metric.factory: String should match pattern"),
        (
            {"metric": {"factory": "a:b", "better": 1}},
            "metric.better: unknown key; allowed: name, fa",
        ),
        ({"training": {"data": {"npz": "a", "x": 1}}}, r"training.data.x: unknown key; .* npz"),
        (
            {"training": {"data": "demo", "rate": 1}},
            "training.rate: unknown key; allowed: data, ba",
        ),
    ],
)
def test_mistakes_are_said(root: Path, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        sweeps.sweep(root, sweeps.content(**settings))


@pytest.mark.parametrize(
    ("metric", "message"),
    [
        ("metrics:psnr", "'psnr' does not say whether higher is better"),
        ("metrics:none", "'metrics:none' cannot be imported"),
        (
            "torchmetrics.image:PeakSignalNoiseRatio",
            "failed at psnr.py:.* could not convert string",
        ),
    ],
)
def test_a_metric_that_cannot_be_made_ends_the_sweep_before_it_starts(
    root: Path, tmp_path: Path, metric: str, message: str
) -> None:
    told = {"factory": metric}
    if "torchmetrics" in metric:
        told["arguments"] = {"data_range": "x"}  # type: ignore[assignment]  # a mistake
    sweep = sweeps.sweep(root, sweeps.content(**RESTORE, metric=told, grid={"sparsity": 0.5}))
    with pytest.raises((ValueError, TypeError), match=message):
        run_sweep(sweep, tmp_path / "r.db", jobs=1)
