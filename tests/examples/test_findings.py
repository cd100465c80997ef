from __future__ import annotations

import copy
import importlib
import math
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pandas as pd
import pytest
import torch
from torch import nn

import wavprune
from wavprune.sweep.runner import run_sweep
from wavprune.sweep.settings import parse_sweep
from wavprune.sweep.store import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def findings() -> ModuleType:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "examples")
        return importlib.import_module("findings")


@pytest.fixture(scope="module")
def page(findings: ModuleType) -> ModuleType:
    """The module that writes the page; its folder is on the path once ``findings`` is imported."""
    return sys.modules["findings_page"]


def runs_of(accuracies: dict[str, list[list[float]]], unpruned: float = 0.99) -> pd.DataFrame:
    """Runs of one sweep: method or wavelet -> for each network, its accuracy at each sparsity."""
    asked = [0.4, 0.5, 0.9, 0.95]
    rows = [
        {
            "model": f"net-{network}",
            "method": "min_weight" if basis == "min_weight" else "dwt",
            "wavelet": None if basis == "min_weight" else basis,
            "scope": "global",
            "sparsity_requested": sparsity,
            "sparsity": sparsity,
            "top1": top1,
        }
        for basis, networks in accuracies.items()
        for network, values in enumerate(networks)
        for sparsity, top1 in zip(asked, values, strict=True)
    ]
    networks = range(len(next(iter(accuracies.values()))))
    rows += [
        {"model": f"net-{network}", "method": "none", "top1": unpruned, "sparsity": 0.0}
        for network in networks
    ]
    return pd.DataFrame(rows).assign(sweep="study", samples=500)


def study_of(page: ModuleType, accuracies: dict[str, list[list[float]]]) -> Any:
    layers = pd.DataFrame({"sweep": []})
    return page.Study(runs_of(accuracies), layers, "study")


MIN_WEIGHT = [[0.99, 0.98, 0.9, 0.7], [0.99, 0.98, 0.9, 0.8]]


def test_a_verdict_says_where_a_basis_is_behind_and_by_how_many_answers(
    page: ModuleType,
) -> None:
    uhaar = [[0.5, 0.98, 0.89, 0.9], [0.5, 0.99, 0.9, 0.85]]
    verdict = study_of(page, {"uhaar": uhaar, "min_weight": MIN_WEIGHT}).verdict("uhaar")
    assert "at 2 of the 3 sparsities from 50% up" in verdict
    assert "behind at 90% by 0.50 points (5 of the 1,000 answers of 2 networks)" in verdict
    assert "lead of `uhaar` is +12.5 points at 95%, where it has lost 24.0. That reaches" in verdict


def test_a_verdict_on_a_basis_that_wins_everywhere_or_not_enough(page: ModuleType) -> None:
    better = [[value + 0.01 for value in values] for values in MIN_WEIGHT]
    verdict = study_of(page, {"dct": better, "min_weight": MIN_WEIGHT}).verdict("dct")
    assert "at least as accurate as min-weight at every sparsity from 50% up" in verdict
    assert (
        "lead of `dct` is +1.0 points at 95%, where it has lost 24.0. That does not reach"
        in verdict
    )


def test_a_verdict_where_min_weight_loses_little(page: ModuleType) -> None:
    good = [[0.99, 0.99, 0.98, 0.9]]
    verdict = study_of(page, {"dct": good, "min_weight": good}).verdict("dct")
    assert "Min-weight loses less than 20 points at all of them." in verdict


def test_a_lead_is_taken_between_prunings_of_the_same_network(page: ModuleType) -> None:
    # Over networks both methods have the same mean, lowest and highest accuracy.
    uhaar = [[0.99, 0.98, 0.9, 0.8], [0.99, 0.98, 0.9, 0.7]]
    table = study_of(page, {"uhaar": uhaar, "min_weight": MIN_WEIGHT}).leads("uhaar")
    assert table.splitlines()[-1] == "| 95% | 24.0 | +0.0 (-10.0 to +10.0) |"


@pytest.mark.parametrize("wavelet", ["uhaar", "dct", "identity"])
@pytest.mark.parametrize("sparsity", [0.5, 0.9, 0.99])
def test_white_noise_has_the_error_that_the_page_says_in_every_basis(
    page: ModuleType, wavelet: str, sparsity: float
) -> None:
    torch.manual_seed(0)
    conv = nn.Conv2d(128, 256, 3)
    nn.init.normal_(conv.weight)
    report = wavprune.fast.prune(conv, wavelet=wavelet, sparsity=sparsity)
    assert report.relative_error == pytest.approx(page.noise_error(sparsity), rel=5e-3)


def test_the_tables_hold_what_the_results_file_holds(findings: ModuleType, tmp_path: Path) -> None:
    content = copy.deepcopy(findings.SWEEPS[0])
    content["models"] = content["models"][:1]
    for block in content["grid"]:
        block |= {"sparsity": 0.9, "wavelet": "uhaar", "method": ["dwt", "min_weight"]}
    run_sweep(parse_sweep(content), tmp_path / "results.db", jobs=1)
    findings.write_tables(tmp_path / "results.db", tmp_path)
    with Store(tmp_path / "results.db") as store:
        expected = store.runs()
    runs = pd.read_csv(tmp_path / "runs.csv")
    assert len(runs) == len(expected) == 5
    assert sorted(runs["top1"]) == pytest.approx(sorted(expected["top1"]), abs=1e-6)
    layers = pd.read_csv(tmp_path / "layers.csv")
    assert set(layers["method"]) == {"dwt", "min_weight"}
    layerwise = runs[(runs["scope"] == "layer") & (runs["method"] == "dwt")]
    rows = layers[layers["method"] == "dwt"]
    sizes = [math.prod(map(int, shape.split("x"))) for shape in rows["shape"]]
    pruned = sum(sparsity * size for sparsity, size in zip(rows["sparsity"], sizes, strict=True))
    assert pruned / sum(sizes) == pytest.approx(layerwise["sparsity"].item(), abs=1e-5)


def test_the_page_is_what_the_script_writes_from_the_tables_beside_it(
    findings: ModuleType, tmp_path: Path
) -> None:
    tables = tmp_path / "findings"
    shutil.copytree(ROOT / "docs" / "findings", tables)
    for picture in tables.glob("*.png"):
        picture.unlink()
    findings.write_page(tables, tmp_path / "findings.md")
    page = (tmp_path / "findings.md").read_text()
    assert page == (ROOT / "docs" / "findings.md").read_text()
    for name in ("digits", "mnist", "mlp"):
        assert f"](findings/{name}.png)" in page
        assert (tables / f"{name}.png").read_bytes().startswith(b"\x89PNG")
