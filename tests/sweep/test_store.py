from __future__ import annotations

import json
import sqlite3
import subprocess
import sys
import threading
import zlib
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import nn

import wavprune
from wavprune.sweep import schema
from wavprune.sweep.store import Store

FIRST_FORMAT = Path(__file__).parent / "data" / "results-format-1.sql"
RUN = {
    "sweep": "s",
    "started": "2026-01-01T00:00:00.5+00:00",
    "finished": "2026-01-01T00:00:01+00:00",
    "status": "ok",
    "model": "net",
    "data": "digits",
    "method": "dwt",
    "batchnorm": "off",
    "matched": "",
    "settings": "{}",
    "versions": "{}",
}


def row(guid: str, **columns: Any) -> dict[str, Any]:
    return {**RUN, "guid": guid, **columns}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results.db"


def test_a_run_comes_back_as_it_was_added(path: Path) -> None:
    report = wavprune.fast.prune(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 2, 1)))
    pictures = {"confusion": [[3, 1], [0, 2]], "histograms": [{"layer": "0", "counts": [1]}]}
    with Store(path, create=True) as store:
        assert store.add(row("a", level=2, top1=0.5, kept=7), report.layers, pictures)
    with Store(path) as store:
        runs, layers = store.runs(), store.layers()
        assert store.pictures("a") == {**pictures, "kernels": None}
    row_back = runs[["guid", "level", "top1", "kept"]].to_numpy().tolist()
    assert row_back == [["a", 2, 0.5, 7]]
    assert (runs["finished"] - runs["started"]).tolist() == [pd.Timedelta(seconds=0.5)]
    assert layers["name"].tolist() == ["0", "1"]
    assert layers["shape"].tolist() == ["4x3x3x3", "2x4x1x1"]
    assert layers["threshold"].tolist() == [layer.threshold for layer in report]
    assert layers["kept"].tolist() == [layer.kept for layer in report]


def test_types_do_not_depend_on_what_is_there(path: Path) -> None:
    with Store(path, create=True) as store:
        empty = store.runs()
        store.add(row("a", status="failed", error="no"))
        failed = store.runs()
        store.add(row("b", level=1, top1=0.25))
        full = store.runs()
    columns = ["level", "seed", "top1", "sparsity", "kept", "started"]
    assert empty.dtypes[columns].equals(failed.dtypes[columns])
    assert empty.dtypes[columns].equals(full.dtypes[columns])
    assert str(full.dtypes["level"]) == "Int64"


def test_a_finished_run_stays_and_a_failed_one_is_replaced(path: Path) -> None:
    with Store(path, create=True) as store:
        assert store.add(row("a", status="failed", error="first"))
        assert store.known() == {"a"}
        assert store.known(retry_failed=True) == set()
        assert not store.has("a", retry_failed=True)
        assert store.add(row("a", top1=0.5))
        assert not store.add(row("a", top1=0.25))
        assert store.known(retry_failed=True) == {"a"}
        runs = store.runs()
    assert runs["top1"].tolist() == [0.5]
    assert runs["error"].isna().all()


def test_a_run_that_cannot_be_added_leaves_nothing(path: Path) -> None:
    report = wavprune.fast.prune(nn.Sequential(nn.Conv2d(3, 4, 3)))
    with Store(path, create=True) as store:
        with pytest.raises(sqlite3.OperationalError, match="no column"):
            store.add(row("a"), report.layers, {"nonsense": 1})
        assert len(store.runs()) == len(store.layers()) == 0
        assert store.add(row("a"))


def test_what_a_killed_process_was_writing_is_gone_and_the_rest_is_there(path: Path) -> None:
    with Store(path, create=True) as store:
        store.add(row("a"))
    script = f"""
import os, signal, sqlite3
connection = sqlite3.connect({str(path)!r}, isolation_level=None)
connection.execute("PRAGMA cache_size = 1")
connection.execute("BEGIN IMMEDIATE")
connection.execute("UPDATE runs SET settings = hex(zeroblob(1000000)), status = 'half'")
os.kill(os.getpid(), signal.SIGKILL)
"""
    killed = subprocess.run([sys.executable, "-c", script], check=False)
    assert killed.returncode < 0
    assert path.with_name("results.db-journal").exists(), "nothing was half written"
    with Store(path) as store:
        assert store.runs()["status"].tolist() == ["ok"]
        assert store.add(row("b"))


def test_a_file_that_is_no_results_file_is_left_alone(path: Path) -> None:
    with pytest.raises(ValueError, match="does not exist; allowed: a file that a sweep wrote"):
        Store(path)
    assert not path.exists()
    path.write_text("something else entirely, and long enough to be read as a header of a file")
    with pytest.raises(ValueError, match="cannot be used as a results file: file is not a databas"):
        Store(path, create=True)
    path.unlink()
    with sqlite3.connect(path) as connection:
        connection.execute("CREATE TABLE mine (x)")
    connection.close()
    before = path.read_bytes()
    with pytest.raises(ValueError, match="is not a results file"):
        Store(path, create=True)
    assert path.read_bytes() == before


def test_a_file_that_another_process_is_making_is_waited_for(path: Path) -> None:
    path.touch()
    maker = threading.Timer(0.1, lambda: Store(path, create=True).close())
    maker.start()
    with Store(path) as store:
        assert store.known() == set()
    maker.join()


def test_a_file_of_a_newer_version_says_so(path: Path) -> None:
    Store(path, create=True).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {schema.VERSION + 1}")
    connection.close()
    with pytest.raises(ValueError, match=f"newer version of wavprune .format {schema.VERSION + 1}"):
        Store(path)


def test_there_are_no_pictures_of_a_run_that_is_not_there(path: Path) -> None:
    with Store(path, create=True) as store, pytest.raises(KeyError, match="a"):
        store.pictures("a")


@pytest.fixture
def first_format(path: Path) -> Path:
    """A results file as the first version of the store wrote it."""
    connection = sqlite3.connect(path)
    connection.executescript(FIRST_FORMAT.read_text())
    connection.close()
    return path


@pytest.fixture
def next_format(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a column that only the next version of the format has."""
    column = schema.Column("coverage", float, "Pruned share of the parameters", since=99)
    monkeypatch.setattr(schema, "RUNS", (*schema.RUNS, column))
    monkeypatch.setattr(schema, "VERSION", 99)
    return column.name


def version_of(path: Path) -> int:
    connection = sqlite3.connect(path)
    (version,) = connection.execute("PRAGMA user_version").fetchone()
    connection.close()
    return int(version)


def test_the_first_format_is_read_with_every_value(first_format: Path) -> None:
    assert version_of(first_format) == 1
    with Store(first_format) as store:
        runs, layers = store.runs(), store.layers()
        pictures = store.pictures(runs["guid"][1])
        assert len(store.known()) == 4
        assert len(store.known(retry_failed=True)) == 3
    assert runs["method"].tolist() == ["none", "dwt", "min_weight", "dwt"]
    assert runs["status"].tolist() == ["ok", "ok", "ok", "failed"]
    assert runs["kept"].tolist()[1:3] == [27, 27]
    assert runs["loss"].tolist()[:2] == pytest.approx([1.42054554388, 1.42049474438], abs=1e-11)
    assert runs["error"][3].startswith("ValueError: targets")
    assert json.loads(runs["settings"][1])["config"]["wavelet"] == "uhaar"
    assert layers["name"].tolist() == ["conv1", "conv2"] * 2
    assert layers["threshold"][0] == pytest.approx(0.11053511500358155)
    assert sum(map(sum, pictures["confusion"])) == 64
    assert [entry["layer"] for entry in pictures["histograms"]] == ["conv1", "conv2"]


def test_the_second_format_is_read_and_gets_runs_of_this_one(path: Path) -> None:
    connection = sqlite3.connect(path)
    connection.executescript(FIRST_FORMAT.with_name("results-format-2.sql").read_text())
    connection.close()
    assert version_of(path) == 2
    with Store(path) as store:
        runs = store.runs()
        assert runs["method"].tolist() == ["none", "dwt", "min_weight"]
        assert runs["top1"].round(4).tolist() == [0.9967, 0.995, 0.995]
        assert runs[["metric", "value", "file_bytes", "bits"]].isna().all(axis=None)
        assert store.add(row("a", metric="PSNR", value=30.5, file_bytes=1200))
        assert store.runs()["value"].tolist()[-1] == 30.5
    assert version_of(path) == schema.VERSION


def test_a_file_of_an_earlier_format_is_read_where_it_cannot_be_written(
    first_format: Path, next_format: str
) -> None:
    before = first_format.read_bytes()
    first_format.chmod(0o444)
    with Store(first_format) as store:
        runs = store.runs()
    assert runs[next_format].isna().all()
    assert str(runs[next_format].dtype) == "float64"
    assert first_format.read_bytes() == before


def test_a_run_added_to_an_earlier_format_brings_the_file_to_this_one(
    first_format: Path, next_format: str
) -> None:
    with Store(first_format, create=True) as store:
        assert store.add(row("a", **{next_format: 0.75}))
        runs = store.runs()
    assert runs[next_format].tolist()[-1] == 0.75
    assert runs[next_format].isna().tolist() == [True] * 4 + [False]
    assert version_of(first_format) == 99
    with Store(first_format) as store:
        pd.testing.assert_frame_equal(store.runs(), runs)


def test_two_processes_may_bring_a_file_to_this_format(
    first_format: Path, next_format: str
) -> None:
    with Store(first_format) as one, Store(first_format) as other:
        assert one.add(row("a", **{next_format: 0.5}))
        assert other.add(row("b", **{next_format: 0.25}))
        assert one.runs()[next_format].tolist()[-2:] == [0.5, 0.25]


def test_a_file_that_lacks_columns_of_its_format_is_refused(first_format: Path) -> None:
    connection = sqlite3.connect(first_format)
    connection.execute("ALTER TABLE runs DROP COLUMN top1")
    connection.close()
    with pytest.raises(ValueError, match=r"is not a results file of format 1: .* no column top1"):
        Store(first_format)


@pytest.mark.parametrize("data", [zlib.compress(b"[" + b"0," * 2**26), b"nonsense", b"", "text"])
def test_damaged_pictures_are_one_error_and_bounded(path: Path, data: object) -> None:
    with Store(path, create=True) as store:
        store.add(row("a"), pictures={"confusion": [[1]]})
        store._connection.execute("UPDATE pictures SET confusion = ?", (data,))
        with pytest.raises(ValueError, match="the pictures of run a cannot be read"):
            store.pictures("a")
