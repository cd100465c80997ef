from __future__ import annotations

import csv
import dataclasses
import json
import os
import pty
import signal
import subprocess
import sys
import termios
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import wavprune
from tests.support import checkpoints
from wavprune import PruneConfig
from wavprune.bases.basis import named_basis
from wavprune.cli.app import main, prune


@pytest.fixture(autouse=True)
def checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A checkpoint, ``in.safetensors``, in the working directory."""
    monkeypatch.chdir(tmp_path)
    return checkpoints.save(tmp_path / "in.safetensors")


def listing() -> set[str]:
    return {path.name for path in Path.cwd().iterdir()}


def json_of(capsys: pytest.CaptureFixture[str], *args: str) -> dict[str, object]:
    assert main([*args, "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    content = json.loads(out)
    assert isinstance(content, dict)
    return content


def cells(table: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in table.splitlines()]


def test_the_module_runs_and_knows_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wavprune", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"wavprune, version {wavprune.__version__}\n"
    assert done.stderr == ""


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
    assert "prune: 100%" in shown
    for text in ("dwt haar, sparsity 0.75", "second", "4x8x5x5", "pruned: out.safetensors"):
        assert text in done.stdout
    state, _ = checkpoints.pruned({"wavelet": "haar", "sparsity": 0.75})
    checkpoints.assert_same(load_file("out.safetensors"), state)


def test_ctrl_c_ends_it_and_leaves_nothing_behind() -> None:
    weight = torch.randn(512, 512, 3, 3)
    checkpoints.save(Path("large.safetensors"), {"conv.weight": weight})
    before = listing()
    command = [sys.executable, "-m", "wavprune", "prune", "large.safetensors"]
    process = subprocess.Popen(
        [*command, "-o", "out.safetensors", "--backend", "reference"],
        stderr=subprocess.PIPE,
        text=True,
        # In a job that a shell runs in the background, interrupts are ignored; not so here.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while listing() == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert listing() != before, "no temporary file was there to be left behind"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert err.split("\n")[-2:] == ["wavprune: error: interrupted", ""]
    assert "Traceback" not in err
    assert listing() == before


MISTAKES = {
    "prunes": "No such command 'prunes'",
    "prune": "Missing argument 'IN'",
    "prune in.safetensors": "Missing option '-o'",
    "prune in.safetensors -o out.safetensors --sparsty 1": "No such option '--sparsty'",
    "prune in.safetensors -o out.safetensors --sparsity x": "'x' is not a valid float",
    "prune in.safetensors -o out.safetensors --sparsity 1.5": "sparsity must be in [0, 1), not 1.5",
    "prune in.safetensors -o out.safetensors --sparsity 0.5 --percentile 5": "were both given",
    "prune in.safetensors -o out.safetensors --method foo": "'foo' is not one of 'dwt'",
    "prune in.safetensors -o out.safetensors --mode foo": "'foo' is not one of 'zero'",
    "prune in.safetensors -o out.safetensors --scope foo": "'foo' is not one of 'layer', 'global'",
    "prune in.safetensors -o out.safetensors --level 0": "0 is not in the range x>=1",
    "prune in.safetensors -o out.safetensors --seed -1": "seed must be an integer, from 0",
    "prune in.safetensors -o out.safetensors --wavelet harr": "close to it: haar",
    "prune in.safetensors -o out.safetensors --backend foo": "unknown backend 'foo'",
    "prune in.safetensors -o out.safetensors --device foo": "unknown device 'foo'",
    "prune in.safetensors -o out.safetensors --device meta": "device 'meta' holds no values",
    "prune in.safetensors -o out.safetensors --targets foo": "targets: 'foo' matches no layer",
    "prune in.safetensors -o out.safetensors --ignore *": "no layer is left to prune",
    "prune in.safetensors -o out.safetensors --report a.txt": "must end in .csv or .json",
    "prune in.safetensors -o out.safetensors --report no/a.csv": "in a directory that exists",
    "prune in.safetensors -o in.safetensors": "in.safetensors exists already; only --force",
    "prune in.safetensors -o out.pt": "out.pt must end in .safetensors",
    "prune in.safetensors -o no/out.safetensors": "there is no directory no",
    "prune no.safetensors -o out.safetensors": "no.safetensors does not exist",
    "prune text.txt -o out.safetensors": "text.txt is of no kind that can be pruned",
    "prune folder -o out": "folder holds neither model.safetensors nor",
    "prune half.safetensors -o out.safetensors": "half.safetensors cannot be read as a safetensors",
    "prune module.pt -o out.pt": "module.pt cannot be read without unpickling of torch.nn.modules",
    "prune nan.safetensors -o out.safetensors": "'conv': 1 of 9 weights are NaN",
    "prune flat.safetensors -o out.safetensors": "flat.safetensors holds no 4-D '*.weight' tensor",
    "inspect": "Missing argument 'IN'",
    "inspect no.safetensors": "no.safetensors does not exist",
    "bases": "Missing option '--kernel'",
    "bases --kernel 0x3": "'0x3' is not a kernel size; write it as 3x3 or 3",
    "bases --kernel 33": "'33' has more than 1024 values",
}


@pytest.mark.parametrize("line", MISTAKES)
def test_a_mistake_is_one_line_and_changes_nothing(
    line: str, checkpoint: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("half.safetensors").write_bytes(checkpoint.read_bytes()[:-9])
    Path("text.txt").touch()
    Path("folder").mkdir()
    torch.save(torch.nn.Conv2d(1, 1, 3), "module.pt")
    weight = torch.ones(1, 1, 3, 3)
    weight[0, 0, 1, 1] = torch.nan
    checkpoints.save(Path("nan.safetensors"), {"conv.weight": weight})
    checkpoints.save(Path("flat.safetensors"), {"head.weight": torch.ones(3, 3)})
    before = listing()
    assert main(line.split()) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("wavprune: error: ")
    assert err.count("\n") == 1
    assert err.endswith("\n")
    assert MISTAKES[line] in err
    assert listing() == before


@pytest.mark.parametrize("args", [[], ["--help"], ["prune", "--help"]])
def test_help_is_no_mistake(args: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(args) == 0
    out, err = capsys.readouterr()
    assert out.startswith("Usage: wavprune")
    assert err == ""


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


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "in.safetensors", "-o", "out.safetensors", "--wavelet", "bior4.4"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line, size in zip(lines, ("3x3", "5x5"), strict=True):
        assert line.startswith(f"wavprune: warning: 'bior4.4' is too long for {size} kernels")


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
    for target in ([], ["-o", "out.safetensors"]):
        assert main(["prune", "in.safetensors", "--dry-run", *target]) == 0
        out, err = capsys.readouterr()
        assert "dry run: nothing pruned was written" in out
        assert "second" in out
        assert err == ""
    assert listing() == {"in.safetensors"}
    assert checkpoint.read_bytes() == before


def test_inspect_shows_layers_zeros_and_levels(capsys: pytest.CaptureFixture[str]) -> None:
    tensors = checkpoints.state()
    tensors["first.weight"][:2] = 0
    tensors["counts.weight"] = torch.ones(1, 1, 2, 3, dtype=torch.int8)
    checkpoints.save(Path("in.safetensors"), tensors)
    assert main(["inspect", "in.safetensors"]) == 0
    rows = cells(capsys.readouterr().out)
    assert ["first", "8x3x3x3", "float32", "216", "54", "25.00%"] in rows
    assert ["counts", "1x1x2x3", "int8", "6", "", ""] in rows
    assert ["3x3", "1", "2", "uhaar"] in rows
    assert ["3x3", "1", "1", "dct, klt, bior1.1, db1, haar, rbio1.1"] in rows
    assert ["3x3", "1", "0", "102 bases: no transform runs"] in rows


def test_inspect_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    content = json_of(capsys, "inspect", "in.safetensors")
    layers, kernels = content["layers"], content["kernels"]
    assert isinstance(layers, list)
    assert isinstance(kernels, list)
    assert layers[1] == {
        "name": "second",
        "shape": [4, 8, 5, 5],
        "dtype": "float32",
        "numel": 800,
        "zeros": 0,
        "kernel": [5, 5],
    }
    levels = {tuple(entry["kernel"]): entry["levels"] for entry in kernels}
    assert levels.keys() == {(3, 3), (5, 5), (1, 1)}
    assert levels[3, 3]["haar"] == 1
    assert levels[3, 3]["bior4.4"] == 0
    assert levels[5, 5]["haar"] == 2
    assert set(levels[1, 1].values()) == {0}


def test_bases_shows_what_each_is_like(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["bases", "--kernel", "3x3"]) == 0
    out, err = capsys.readouterr()
    rows = cells(out)
    assert ["haar", "1", "9", "7", "no", "no"] in rows
    assert ["uhaar", "2", "9", "0", "no", "yes"] in rows
    assert ["klt", "1", "9", "0", "no", "yes"] in rows
    assert ["identity", "0", "9", "0", "no", "yes"] in rows
    assert "bior4.4" not in out
    assert "102 bases reach level 0 on 3x3: no transform runs; --all shows them" in out
    assert err == ""
    assert main(["bases", "--kernel", "3", "--all"]) == 0
    out, _ = capsys.readouterr()
    assert "bior4.4" in out
    assert "--all shows them" not in out


@pytest.mark.parametrize(
    ("line", "settings", "names"),
    [
        ("--kernel 8x6 --mode symmetric", ((8, 6), "symmetric"), ["haar", "db2", "uhaar"]),
        ("--kernel 3 --level 1", ((3, 3), "periodization", 1), ["haar", "uhaar", "dct"]),
        (
            "--kernel 3x5 --level 2 --force-level",
            ((3, 5), "periodization", 2, True),
            ["haar", "bior4.4", "dct"],
        ),
    ],
)
def test_bases_as_json_is_what_named_basis_builds(
    line: str, settings: tuple[Any, ...], names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    content = json_of(capsys, "bases", *line.split())
    assert isinstance(content["bases"], list)
    rows = {row["basis"]: row for row in content["bases"]}
    for name in names:
        basis = named_basis(name, *settings)
        assert rows[name] == {
            "basis": name,
            "level": basis.level_used,
            "coefficients": basis.coefficients,
            "structural_zeros": int(basis.structural.sum()),
            "expansive": basis.expansive,
            "orthonormal": basis.orthonormal,
        }
    assert isinstance(content["level_0"], list)
    assert ("bior4.4" in content["level_0"]) != ("bior4.4" in rows)


def test_on_a_single_value_every_basis_is_the_identity(capsys: pytest.CaptureFixture[str]) -> None:
    content = json_of(capsys, "bases", "--kernel", "1", "--level", "2", "--force-level")
    assert isinstance(content["bases"], list)
    assert [row["basis"] for row in content["bases"]] == ["identity"]
