from __future__ import annotations

import sqlite3
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
from torch import nn

import wavprune
from wavprune.sweep.store import SCHEMA, Store

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


def test_a_file_of_another_schema_says_so(path: Path) -> None:
    Store(path, create=True).close()
    connection = sqlite3.connect(path)
    connection.execute(f"PRAGMA user_version = {SCHEMA + 1}")
    connection.close()
    with pytest.raises(ValueError, match=f"another version of wavprune .schema {SCHEMA + 1}"):
        Store(path)


def test_there_are_no_pictures_of_a_run_that_is_not_there(path: Path) -> None:
    with Store(path, create=True) as store, pytest.raises(KeyError, match="a"):
        store.pictures("a")
