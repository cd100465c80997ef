from __future__ import annotations

import codecs
import json
import os
import pty
import re
import subprocess
import sys
import termios
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.support import sweeps
from wavprune.cli.app import main
from wavprune.sweep.grid import expand
from wavprune.sweep.settings import read_sweep
from wavprune.sweep.store import Store

EXAMPLE = Path(__file__).parents[2] / "examples" / "sweep.yaml"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sweeps.folder(tmp_path_factory.mktemp("commands"))


@pytest.fixture(autouse=True)
def here(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A sweep file, ``sweep.yaml``, beside what it names; the results go elsewhere."""
    write(folder, sweeps.content())
    monkeypatch.chdir(tmp_path)
    return folder


def write(folder: Path, content: dict[str, Any]) -> str:
    (folder / "sweep.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "sweep.yaml")


def test_a_sweep_is_run_exported_and_reported(
    here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = str(here / "sweep.yaml")
    assert main(["sweep", file, "--jobs", "1"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    assert re.match(r"results\.db: 5 of 5 runs finished in [\d.]+ s, 0 failed, 0 were there", out)
    assert "pruning" in out
    last = out.splitlines()[-1]
    assert re.match(r"[\d,]+ runs an hour on 1 process; its time: forward passes of the ev", last)
    shares = [float(share) for share in re.findall(r"([\d.]+)%", last)]
    assert len(shares) == 9
    assert sum(shares) == pytest.approx(100, abs=0.5)
    assert main(["sweep", file, "--jobs", "1", "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert (summary["runs"], summary["known"], summary["ok"]) == (5, 5, 0)
    assert main(["sweep", file, "--jobs", "1"]) == 0
    assert capsys.readouterr().out == "results.db: 5 of 5 runs done, nothing to do\n"
    assert main(["export", "results.db", "-o", "runs.csv"]) == 0
    assert capsys.readouterr().out == "5 rows: runs.csv\n"
    assert main(["export", "results.db", "-o", "l.csv", "--layers"]) == 0
    assert main(["export", "results.db", "-o", "w.csv", "--wavelettransforms"]) == 0
    assert Path("w.csv").read_text().startswith("GUID,Wavelet,Level,Threshold,Phase,Original")
    assert len(Path("l.csv").read_text().splitlines()) == 9
    assert main(["report", "results.db", "-o", "page.html", "--tolerance", "0.5"]) == 0
    page = Path("page.html").read_text()
    assert "within 50 points of" in page
    assert "</html>" in page


@pytest.mark.parametrize("command", [["export", "runs.csv"], ["report", "page.html"]])
def test_what_is_there_is_replaced_only_when_asked(
    here: Path, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    file = write(here, sweeps.content(grid={"method": "min_weight", "sparsity": 0.5}))
    assert main(["sweep", file, "-o", "results.db", "--jobs", "1"]) == 0
    name, output = command
    Path(output).write_text("mine")
    assert main([name, "results.db", "-o", output]) == 2
    assert "exists already; only --force replaces it" in capsys.readouterr().err
    assert Path(output).read_text() == "mine"
    assert main([name, "results.db", "-o", output, "--force"]) == 0
    assert Path(output).read_text() != "mine"


def test_failed_runs_are_said_and_kept(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(sweeps.BROKEN, "1")
    grid = {"method": "min_weight", "sparsity": [0.5, 0.9]}
    file = write(here, sweeps.content("Breakable", grid=grid))
    assert main(["sweep", file, "-o", "bad.db", "--jobs", "1"]) == 1
    error = capsys.readouterr().err
    assert (
        "1 of 3 runs failed; Breakable: min_weight, sparsity 0.9, layer, batch norm off: " in error
    )
    assert error.endswith("all errors are in bad.db\n")
    monkeypatch.delenv(sweeps.BROKEN)
    assert main(["sweep", file, "-o", "bad.db", "--jobs", "1", "--retry-failed"]) == 0
    with Store("bad.db") as store:
        assert (store.runs()["status"] == "ok").all()


def _read(terminal: int) -> Iterator[str]:
    """What a process writes to a terminal, until it closes it; a full one would block it."""
    decoder = codecs.getincrementaldecoder("utf-8")()
    while True:
        try:
            yield decoder.decode(os.read(terminal, 1 << 16))
        except OSError:
            return


def test_on_a_terminal_a_bar_says_how_long_it_takes(here: Path) -> None:
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    command = [sys.executable, "-m", "wavprune", "sweep", str(here / "sweep.yaml"), "--jobs", "1"]
    with subprocess.Popen(command, stderr=end, stdout=subprocess.DEVNULL) as process:
        os.close(end)
        shown = "".join(_read(terminal))
    assert process.returncode == 0
    os.close(terminal)
    plain = re.sub(r"\x1b\[[\d;?]*[A-Za-z]", "", shown)
    # The time spent, and the time left.
    assert re.search(r"sweep .* 5/5 runs \d:\d\d:\d\d \d:\d\d:\d\d", plain)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("sweep", "Missing argument 'SWEEP'"),
        ("sweep none.yaml", "none.yaml: No such file or directory; allowed: a sweep file"),
        ("sweep none.yaml --cluster slurm", "'slurm' is not one of 'ray', 'dask'"),
        ("sweep none.yaml --jobs 0", "0 is not in the range x>=1"),
        ("sweep none.yaml -o no/results.db", "no/results.db is not a file in a directory that ex"),
        ("export none.db -o out.csv", "none.db does not exist; allowed: a file that a sweep wrote"),
        ("export none.db", "Missing option '-o'"),
        ("report none.db -o out.html", "none.db does not exist"),
        ("report none.db -o out.pdf", "out.pdf must end in .html"),
    ],
)
def test_a_mistake_is_one_line(line: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    err = capsys.readouterr().err
    assert message in err
    assert len(err.splitlines()) == 1


def test_a_missing_extra_is_named(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "joblib", None)
    assert main(["sweep", str(here / "sweep.yaml"), "-o", "other.db"]) == 2
    assert "pip install 'wavprune[sweep]'" in capsys.readouterr().err


def test_the_example_is_a_sweep() -> None:
    runs = expand(read_sweep(EXAMPLE))
    assert len(runs) == 3 * (1 + 5 * (4 + 1 + 3))
