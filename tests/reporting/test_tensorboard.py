from __future__ import annotations

import sys
from pathlib import Path

import pandas as pd
import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import metadata, plugin_data_pb2

from wavprune.cli import main
from wavprune.reporting.tensorboard import _folder, export_tensorboard
from wavprune.sweep.store import Store


def test_tensorboard_reads_every_run_with_its_settings(
    results: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    logs = tmp_path / "logs"
    assert main(["export", str(results), "--to", "tensorboard", "-o", str(logs)]) == 0
    with Store(results) as store:
        runs = store.runs()
    finished = runs[runs["status"] == "ok"]
    assert capsys.readouterr().out == f"{len(finished)} runs: tensorboard --logdir {logs}\n"
    folders = {path.parent for path in logs.rglob("events.out.tfevents*")}
    assert len(folders) == len(finished)
    assert [path.name for path in tmp_path.iterdir()] == ["logs"]
    for _, run in finished.iterrows():
        (folder,) = [path for path in folders if path.name.endswith(run["guid"][:8])]
        read = EventAccumulator(str(folder))
        read.Reload()
        for tag, column in (("top1", "top1"), ("stored_bytes", "stored_bytes"), ("kl", "kl")):
            (event, *_) = read.Scalars(tag)
            assert event.value == pytest.approx(float(run[column]), rel=1e-6)
            assert event.wall_time == pytest.approx(run["finished"].timestamp(), abs=1)
        content = read.summary_metadata[metadata.SESSION_START_INFO_TAG].plugin_data.content
        settings = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
        assert settings["model"].string_value == run["model"]
        assert settings["method"].string_value == run["method"]
        assert ("wavelet" in settings) == (run["method"] == "dwt")
        if run["method"] != "none":
            assert settings["sparsity_requested"].number_value == run["sparsity_requested"]


@pytest.mark.parametrize(
    ("sweep", "folder"), [("/runs", "runs"), ("!!", "sweep"), ("..", "sweep"), ("a/../b", "a-..-b")]
)
def test_logs_stay_within_their_folder(sweep: str, folder: str) -> None:
    run = pd.Series({"sweep": sweep, "model": "/net/..", "sparsity": 0.5, "guid": "0123456789"})
    assert _folder(run, "dct") == f"{folder}/net-..-dct-0.5-01234567"


def test_what_is_there_stays(results: Path, tmp_path: Path) -> None:
    (tmp_path / "logs").mkdir()
    with pytest.raises(ValueError, match=r"logs exists already; name a folder that does not"):
        export_tensorboard(results, tmp_path / "logs")
    command = ["export", str(results), "--to", "tensorboard", "-o", str(tmp_path / "l")]
    assert main([*command, "--layers"]) == 2


def test_without_tensorboard_the_extra_is_named(
    results: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with pytest.raises(ImportError, match=r"pip install 'wavprune\[tensorboard\]'"):
        export_tensorboard(results, tmp_path / "logs")
    assert list(tmp_path.iterdir()) == []
