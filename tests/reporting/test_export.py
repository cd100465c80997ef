from __future__ import annotations

import json
from pathlib import Path

import pandas as pd
import pytest

from tests.support import sweeps
from wavprune.reporting.export import export
from wavprune.sweep.runner import run_sweep
from wavprune.sweep.store import Store

COLUMNS = [
    "GUID",
    "Wavelet",
    "Level",
    "Threshold",
    "Phase",
    "Original Parameter Count",
    "Non-zero Params",
    "Total Pruned Count",
    "Layer Name",
]


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = sweeps.folder(tmp_path_factory.mktemp("export"))
    methods = {"method": ["dwt", "min_weight", "random"], "wavelet": "haar", "sparsity": 0.5}
    grid = [methods, {"wavelet": "haar", "percentile": 60}]
    run_sweep(sweeps.sweep(root, sweeps.content(grid=grid)), root / "results.db", jobs=1)
    return root / "results.db"


@pytest.mark.parametrize("ending", [".csv", ".parquet", ".json"])
@pytest.mark.parametrize("layers", [False, True])
def test_every_format_holds_every_row_and_column(
    results: Path, tmp_path: Path, ending: str, layers: bool
) -> None:
    output = tmp_path / f"out{ending}"
    rows = export(results, output, layers=layers)
    with Store(results) as store:
        expected = store.layers() if layers else store.runs()
    assert rows == len(expected) == (8 if layers else 5)
    frame: pd.DataFrame = getattr(pd, f"read_{ending[1:]}")(output)
    assert frame.columns.tolist() == expected.columns.tolist()
    assert frame["guid"].tolist() == expected["guid"].tolist()
    for column in expected.select_dtypes("number"):
        pd.testing.assert_series_equal(
            frame[column].astype("float64"), expected[column].astype("float64"), rtol=1e-12
        )


def test_parquet_keeps_the_types(results: Path, tmp_path: Path) -> None:
    export(results, tmp_path / "out.parquet")
    with Store(results) as store:
        pd.testing.assert_series_equal(
            pd.read_parquet(tmp_path / "out.parquet")["kept"], store.runs()["kept"]
        )


def test_json_is_a_list_of_objects_without_nan(results: Path, tmp_path: Path) -> None:
    export(results, tmp_path / "out.json")
    rows = json.loads((tmp_path / "out.json").read_text(), parse_constant=pytest.fail)
    assert rows[0]["method"] == "none"
    assert rows[0]["kept"] is None


def test_wavelettransforms_columns(results: Path, tmp_path: Path) -> None:
    assert export(results, tmp_path / "log.csv", wavelettransforms=True) == 8
    log = pd.read_csv(tmp_path / "log.csv")
    assert log.columns.tolist() == COLUMNS
    with Store(results) as store:
        layers = store.layers()
    assert (
        log["Phase"].tolist()
        == [x for x in ("selective", "min", "random") for _ in "12"] + ["selective"] * 2
    )
    assert log["Threshold"].tolist() == [0.5] * 6 + [60] * 2
    assert log["Layer Name"].tolist() == ["conv1", "conv2"] * 4
    assert log["Original Parameter Count"].tolist() == [72, 576] * 4
    pruned = log["Original Parameter Count"] - layers["kept"].astype(int)
    assert log["Total Pruned Count"].tolist() == pruned.tolist()
    zeros = log["Original Parameter Count"] - log["Non-zero Params"]
    assert zeros.tolist() == layers["weight_zeros"].tolist()
    assert log["Wavelet"].tolist() == ["haar"] * 2 + ["identity"] * 4 + ["haar"] * 2
    assert log["Level"].tolist() == [1, 1, 0, 0, 0, 0, 1, 1]


def test_another_ending_is_refused_and_nothing_is_written(results: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"out\.xlsx has an unknown ending; allowed: \.csv, \.par"):
        export(results, tmp_path / "out.xlsx")
    assert list(tmp_path.iterdir()) == []


def test_a_missing_results_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"none\.db does not exist; allowed: a file that a sweep"):
        export(tmp_path / "none.db", tmp_path / "out.csv")


@pytest.fixture
def hostile(tmp_path: Path) -> Path:
    row = {
        "guid": "a",
        "started": "2026-01-01T00:00:00+00:00",
        "finished": "2026-01-01T00:00:01+00:00",
        "status": "failed",
        "method": "dwt",
        "batchnorm": "off",
        "matched": "",
        "settings": "{}",
        "versions": "{}",
        "loss": -0.5,
        "model": "=1+1",
        "data": "@SUM(A1)",
        "error": "-2+3",
        "traceback": "\tx",
        "sweep": "+x",
    }
    with Store(tmp_path / "hostile.db", create=True) as store:
        store.add(row)
    return tmp_path / "hostile.db"


def test_a_spreadsheet_takes_no_text_for_a_formula(hostile: Path, tmp_path: Path) -> None:
    export(hostile, tmp_path / "out.csv")
    row = pd.read_csv(tmp_path / "out.csv", dtype=str).iloc[0]
    assert row[["model", "data", "error", "traceback", "sweep"]].tolist() == [
        "'=1+1",
        "'@SUM(A1)",
        "'-2+3",
        "'\tx",
        "'+x",
    ]
    assert (row["loss"], row["method"]) == ("-0.5", "dwt")


@pytest.mark.parametrize("ending", ["parquet", "json"])
def test_formats_without_formulas_keep_texts(hostile: Path, tmp_path: Path, ending: str) -> None:
    export(hostile, tmp_path / f"out.{ending}")
    frame: pd.DataFrame = getattr(pd, f"read_{ending}")(tmp_path / f"out.{ending}")
    assert frame[["model", "data", "error"]].to_numpy().tolist() == [["=1+1", "@SUM(A1)", "-2+3"]]
