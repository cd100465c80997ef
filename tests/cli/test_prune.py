from __future__ import annotations

import csv
import dataclasses
import errno
import json
import os
import pty
import shlex
import subprocess
import sys
import termios
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import checkpoints
from tests.support.commands import json_of, listing
from wavprune import PruneConfig, PruneReport
from wavprune.cli import main
from wavprune.cli.prune import REPORT_WRITERS, prune
from wavprune.errors import WavpruneError

pytestmark = pytest.mark.usefixtures("checkpoint")


def test_prunes_with_a_bar_on_a_terminal() -> None:
    command = [sys.executable, "-m", "wavprune", "prune", "in.safetensors", "-o", "out.safetensors"]
    terminal, end = pty.openpty()
    termios.tcsetwinsize(end, (24, 100))
    done = subprocess.run(
        [*command, "--wavelet", "haar", "--sparsity", "0.75"],
        stdout=subprocess.PIPE,
        stderr=end,
        text=True,
        check=True,
    )
    os.close(end)
    shown = os.read(terminal, 1 << 16).decode()
    os.close(terminal)
    assert "prune" in shown
    assert "100%" in shown
    for text in ("dwt haar, sparsity 0.75", "second", "4x8x5x5", "pruned: out.safetensors"):
        assert text in done.stdout
    state, _ = checkpoints.pruned({"wavelet": "haar", "sparsity": 0.75})
    checkpoints.assert_same(load_file("out.safetensors"), state)


def test_every_setting_is_an_option() -> None:
    options = {parameter.name for parameter in prune.params}
    assert options >= {field.name for field in dataclasses.fields(PruneConfig)}


def test_every_option_reaches_the_run(capsys: pytest.CaptureFixture[str]) -> None:
    line = (
        "prune in.safetensors -o out.safetensors --method dwt --wavelet sym2 --level 2 "
        "--mode symmetric --force-level --sparsity 0.25 --scope global --targets second "
        "--targets f* --ignore first --device cpu --backend reference --seed 3"
    )
    assert main([*line.split(), "--json"]) == 0
    out, _ = capsys.readouterr()
    settings = json.loads(out)["settings"]
    del settings["versions"]
    assert settings == {
        "method": "dwt",
        "wavelet": "sym2",
        "level": 2,
        "mode": "symmetric",
        "force_level": True,
        "sparsity": 0.25,
        "percentile": None,
        "scope": "global",
        "targets": ["second", "f*"],
        "ignore": ["first"],
        "device": "cpu",
        "backend": "reference",
        "seed": 3,
    }


def test_json_is_the_report_and_nothing_else(capsys: pytest.CaptureFixture[str]) -> None:
    content = json_of(capsys, "prune", "in.safetensors", "-o", "out.safetensors")
    _, expected = checkpoints.pruned({})
    assert isinstance(content["totals"], dict)
    assert content["totals"]["kept"] == expected.kept
    assert isinstance(content["layers"], list)
    assert [layer["name"] for layer in content["layers"]] == checkpoints.LAYERS
    assert Path("out.safetensors").exists()


def test_the_report_goes_to_a_file(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("report.csv", "report.json"):
        assert main(f"prune in.safetensors -o out.safetensors --force --report {name}".split()) == 0
    _, expected = checkpoints.pruned({})
    with Path("report.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    layers = json.loads(Path("report.json").read_text())["layers"]
    for found in (rows, layers):
        assert [(row["name"], int(row["kept"])) for row in found] == [
            (layer.name, layer.kept) for layer in expected
        ]
    assert capsys.readouterr().err == ""


def test_a_dry_run_says_so_and_writes_nothing(
    checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = checkpoint.read_bytes()
    for target in ([], ["-o", "out.safetensors"], ["--report", "report.csv"]):
        assert main(["prune", "in.safetensors", "--dry-run", *target]) == 0
        out, err = capsys.readouterr()
        assert "dry run: no file was written" in out
        assert "second" in out
        assert err == ""
    assert listing() == {"in.safetensors"}
    assert checkpoint.read_bytes() == before


@pytest.mark.parametrize("name", ["min-weight", "min_weight", "magnitude"])
def test_minimum_weight_has_several_names(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    content = json_of(capsys, "prune", "in.safetensors", "--dry-run", "--method", name)
    assert isinstance(content["settings"], dict)
    assert content["settings"]["method"] == "min_weight"


def test_only_force_replaces_a_report(capsys: pytest.CaptureFixture[str]) -> None:
    Path("report.csv").write_text("mine")
    line = "prune in.safetensors -o out.safetensors --report report.csv"
    for extra in ([], ["--dry-run"]):
        assert main([*line.split(), *extra]) == 2
        assert "report.csv exists already; only --force" in capsys.readouterr().err
        assert listing() == {"in.safetensors", "report.csv"}
    assert Path("report.csv").read_text() == "mine"
    assert main([*line.split(), "--force"]) == 0
    assert Path("report.csv").read_text().startswith("name,")


def test_json_stays_json_when_there_are_warnings(capsys: pytest.CaptureFixture[str]) -> None:
    line = "prune in.safetensors --dry-run --json --wavelet bior4.4"
    assert main(line.split()) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["settings"]["wavelet"] == "bior4.4"
    assert "wavprune: warning: " in err


def test_a_weight_that_the_device_found_not_finite_is_an_error(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def wait(_: PruneReport) -> None:
        raise WavpruneError("layer 'first': 1 of 216 weights are NaN or infinite")

    monkeypatch.setattr(PruneReport, "wait", wait)
    line = "prune in.safetensors -o out.safetensors --report report.csv"
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("wavprune: error: layer 'first': 1 of 216 weights are NaN")
    assert not Path("report.csv").exists()


def test_what_was_written_before_an_error_is_named(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "report.csv")

    monkeypatch.setitem(REPORT_WRITERS, ".csv", full)
    assert main(["prune", "in.safetensors", "-o", "out.safetensors", "--report", "report.csv"]) == 2
    assert capsys.readouterr().err == (
        "wavprune: error: report.csv: No space left on device; "
        "written before that: out.safetensors\n"
    )
    assert listing() == {"in.safetensors", "out.safetensors"}


def test_the_last_lines_say_what_the_file_costs_and_the_command_that_makes_it_small(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["prune", "in.safetensors", "-o", "out it.safetensors", "--sparsity", "0.9"]) == 0
    *_, pruned, text, command = capsys.readouterr().out.splitlines()
    size = Path("out it.safetensors").stat().st_size
    assert pruned == f"pruned: out it.safetensors, {size:,} bytes"
    estimate = text.removeprefix(
        "the pruned file is as large as its input; this makes it small, about "
    ).removesuffix(" bytes:")
    program, *line = shlex.split(command)
    assert program == "wavprune"
    assert main(line) == 0
    small = Path("out it-small.safetensors").stat().st_size
    assert int(estimate.replace(",", "")) == pytest.approx(small, rel=0.25)


@pytest.mark.parametrize(
    "line",
    [
        "in.pt -o out.pt",
        "in.safetensors -o out.safetensors --wavelet db2 --mode zero --level 1 --force-level",
    ],
)
def test_where_a_file_does_not_tell_what_was_kept_its_input_is_to_be_compressed(
    line: str, capsys: pytest.CaptureFixture[str]
) -> None:
    torch.save(checkpoints.state(), "in.pt")
    assert main(["prune", *line.split()]) == 0
    assert "not tell what was kept; `wavprune compress` of the input" in capsys.readouterr().out
