from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import wavprune
from tests.support import checkpoints
from tests.support.commands import listing
from wavprune.cli import main
from wavprune.common.optional import require
from wavprune.errors import WavpruneError

pytestmark = pytest.mark.usefixtures("checkpoint")


def fail_with(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let ``wavprune prune`` fail with an error."""

    def fail(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr("wavprune.cli.prune.prune_file", fail)


def test_the_module_runs_and_knows_its_version() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "wavprune", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout == f"wavprune, version {wavprune.__version__}\n"
    assert done.stderr == ""


MISTAKES = {
    "prunes": "No such command 'prunes'",
    "prune": "Missing argument 'IN'",
    "prune in.safetensors": "Missing option '-o'",
    "prune in.safetensors -o out.safetensors --sparsty 1": "--sparsty",
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
    "prune flat.safetensors -o out.safetensors": "holds no '*.weight' tensor of 3 to 5 axes",
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


def test_a_warning_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["prune", "in.safetensors", "-o", "out.safetensors", "--wavelet", "bior4.4"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    for line, size in zip(lines, ("3x3", "5x5"), strict=True):
        assert line.startswith(f"wavprune: warning: 'bior4.4' is too long for {size} kernels")


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (WavpruneError("sparsity\nis wrong"), "sparsity is wrong"),
        (OSError(errno.EACCES, "Permission denied", "out.safetensors"), None),
        (OSError(errno.EACCES, "Permission denied", "x.tmp", None, "out.safetensors"), None),
        (OSError(errno.EACCES, "Permission denied", b"out.safetensors"), None),
        (OSError(errno.ENOSPC, "No space left on device"), "No space left on device"),
        (OSError("it broke"), "it broke"),
        (shutil.Error([("pipe", "copy", "is a named pipe")]), "pipe: is a named pipe"),
        (MemoryError(), "not enough memory"),
        (MemoryError("8 GiB"), "not enough memory: 8 GiB"),
    ],
    ids=repr,
)
def test_what_is_not_a_defect_is_one_line(
    error: Exception,
    line: str | None,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fail_with(error, monkeypatch)
    assert main(["prune", "in.safetensors", "-o", "out.safetensors"]) == 2
    expected = line or "out.safetensors: Permission denied"
    assert capsys.readouterr().err == f"wavprune: error: {expected}\n"


def test_an_allocation_that_fails_in_torch_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(1 << 59, dtype=torch.uint8)
    fail_with(caught.value, monkeypatch)
    assert main(["prune", "in.safetensors", "-o", "out.safetensors"]) == 2
    assert capsys.readouterr().err == "wavprune: error: not enough memory\n"


def test_a_missing_extra_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(ImportError) as caught:
        require("no_such_module", extra="report", purpose="pictures")
    fail_with(caught.value, monkeypatch)
    assert main(["prune", "in.safetensors", "-o", "out.safetensors"]) == 2
    assert capsys.readouterr().err == f"wavprune: error: {caught.value}\n"


@pytest.mark.parametrize(
    "error",
    [ValueError("a"), TypeError("b"), ImportError("c"), EOFError("d"), AssertionError("e")],
    ids=repr,
)
def test_a_defect_says_so_and_shows_where(
    error: Exception, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(error, monkeypatch)
    assert main(["prune", "in.safetensors", "-o", "out.safetensors"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "Traceback (most recent call last):"
    assert lines[-2] == f"{type(error).__name__}: {error}"
    assert lines[-1].startswith("wavprune: error: this is a defect of wavprune")


def test_an_interrupt_has_a_status_of_its_own(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fail_with(KeyboardInterrupt(), monkeypatch)
    assert main(["prune", "in.safetensors", "-o", "out.safetensors"]) == 130
    assert capsys.readouterr().err == "wavprune: error: interrupted\n"


@pytest.mark.parametrize("option", ["--help", "--version"])
def test_help_and_version_do_without_torch(option: str) -> None:
    script = (
        "import sys; sys.modules['torch'] = None; from wavprune.cli import main; "
        f"raise SystemExit(main([{option!r}]))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "wavprune" in done.stdout


def test_the_help_lists_every_command_and_each_has_its_own(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(["--help"]) == 0
    listed = capsys.readouterr().out.split("Commands:")[1].splitlines()
    names = [line.split()[0] for line in listed if line.startswith("  ") and line[2] != " "]
    assert {"prune", "sweep", "decompress"} <= set(names)
    for name in names:
        assert main([name, "--help"]) == 0
        assert capsys.readouterr().out.startswith(f"Usage: wavprune {name} [OPTIONS]")


def test_the_tab_key_completes_commands_without_torch() -> None:
    script = "import sys; sys.modules['torch'] = None; from wavprune.cli import main; main([])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env={
            **os.environ,
            "_WAVPRUNE_COMPLETE": "bash_complete",
            "COMP_WORDS": "wavprune de",
            "COMP_CWORD": "1",
        },
        capture_output=True,
        text=True,
    )
    assert done.stdout == "plain,decompress\n", done.stderr
