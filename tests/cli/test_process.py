from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.support import checkpoints
from tests.support.commands import listing
from wavprune.cli import main
from wavprune.cli.process import Terminated, raise_if_interrupted, termination

pytestmark = pytest.mark.usefixtures("checkpoint")

PRUNE = ["prune", "in.safetensors", "-o", "out.safetensors"]
FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


def run(*args: str, shell: str = "", **settings: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a process of its own, with redirections as a shell writes them."""
    return subprocess.run(
        ["sh", "-c", f'exec "$@" {shell}', "sh", sys.executable, "-m", "wavprune", *args],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ | settings,
    )


def assert_pruned() -> None:
    expected, _ = checkpoints.pruned({})
    checkpoints.assert_same(load_file("out.safetensors"), expected)


REFERENCE = ["prune", "--backend", "reference"]


@pytest.mark.parametrize(
    ("signum", "status", "message", "how"),
    [
        (signal.SIGINT, 130, "interrupted", REFERENCE),
        (signal.SIGTERM, 143, "ended by SIGTERM", REFERENCE),
        (signal.SIGHUP, 129, "ended by SIGHUP", REFERENCE),
        (signal.SIGINT, 130, "interrupted", ["compress", "--target-bytes", "1500000"]),
    ],
    ids=str,
)
def test_a_signal_ends_it_and_leaves_nothing_behind(
    signum: signal.Signals, status: int, message: str, how: list[str]
) -> None:
    weight = torch.randn(512, 512, 3, 3)
    checkpoints.save(Path("large.safetensors"), {"conv.weight": weight})
    before = listing()
    name, *options = how
    process = subprocess.Popen(
        [
            *(sys.executable, "-m", "wavprune", name, "large.safetensors"),
            *("-o", "out.safetensors", *options),
        ],
        stderr=subprocess.PIPE,
        text=True,
        # A shell starts background jobs with interrupts ignored, nohup with hang-ups.
        preexec_fn=lambda: signal.signal(signum, signal.SIG_DFL),
    )
    deadline = time.monotonic() + 60
    while listing() == before and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert listing() != before, "no temporary file was there to be left behind"
    process.send_signal(signum)
    _, err = process.communicate(timeout=60)
    assert process.returncode == status
    assert err.split("\n")[-2:] == [f"wavprune: error: {message}", ""]
    assert "Traceback" not in err
    assert listing() == before


def test_an_interrupt_that_was_swallowed_is_raised_later() -> None:
    with termination():
        raise_if_interrupted()
        with contextlib.suppress(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            raise_if_interrupted()
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    with termination():
        raise_if_interrupted()


def test_handlers_that_are_there_stay() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with termination():
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_the_second_signal_does_not_disturb_the_cleanup() -> None:
    cleaned = False

    def work() -> None:
        nonlocal cleaned
        with termination():
            try:
                signal.raise_signal(signal.SIGTERM)
            finally:
                signal.raise_signal(signal.SIGTERM)
                cleaned = True

    with pytest.raises(Terminated):
        work()
    assert cleaned
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("closed", ["<&- >&- 2>&-", ">&-", "2>&-"])
def test_without_standard_streams_it_prunes_all_the_same(closed: str) -> None:
    assert run(*PRUNE, "--wavelet", "uhaar", shell=closed).returncode == 0
    assert_pruned()
    assert run(*PRUNE, "--sparsity", "2", shell=closed).returncode == 2


def test_without_stream_objects_it_prunes_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    with Path("closed.txt").open("w") as closed:
        pass
    with monkeypatch.context() as patch:
        for name, stream in (("stdin", None), ("stdout", None), ("stderr", closed)):
            patch.setattr(sys, name, stream)
        assert main(PRUNE) == 0
        assert sys.stdout is None
        assert sys.stderr is closed
    assert_pruned()


@needs_full
def test_a_full_disk_behind_standard_output_is_told_with_what_was_written() -> None:
    done = run(*PRUNE, shell=f"> {FULL}")
    assert done.stderr == (
        "wavprune: error: standard output: No space left on device; "
        "written before that: out.safetensors\n"
    )
    assert done.returncode == 2
    assert_pruned()


@needs_full
@pytest.mark.parametrize("line", ["inspect in.safetensors", "info --json", "--help", "--version"])
def test_what_cannot_be_shown_is_an_error(line: str) -> None:
    done = run(*line.split(), shell=f"> {FULL}")
    assert done.stderr.startswith("wavprune: error: ")
    assert done.stderr.endswith("No space left on device\n")
    assert done.stderr.count("\n") == 1
    assert done.returncode == 2


@needs_full
@pytest.mark.parametrize(("sparsity", "status"), [("0.5", 0), ("2", 2)])
def test_a_full_disk_behind_standard_error_changes_nothing(sparsity: str, status: int) -> None:
    options = ["--wavelet", "bior4.4", "--sparsity", sparsity]  # a warning, and an error
    assert run(*PRUNE, *options, shell=f"2> {FULL}").returncode == status
    assert Path("out.safetensors").exists() == (status == 0)


def test_a_reader_that_left_is_told_as_well() -> None:
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "wavprune", *PRUNE],
        stdout=writer,
        stderr=subprocess.PIPE,
        text=True,
        check=False,
    )
    os.close(writer)
    assert done.stderr == (
        "wavprune: error: standard output: Broken pipe; written before that: out.safetensors\n"
    )
    assert done.returncode == 2


@pytest.mark.parametrize("encoding", ["ascii", "latin-1"])
def test_names_that_the_terminal_cannot_encode_are_escaped(encoding: str) -> None:
    checkpoints.save(
        Path("in.safetensors"),
        {"layer_\N{GREEK SMALL LETTER ALPHA}.weight": torch.ones(1, 1, 3, 3)},
    )
    output = "\N{GREEK SMALL LETTER OMEGA}.safetensors"
    done = run("prune", "in.safetensors", "-o", output, PYTHONIOENCODING=encoding)
    assert done.stderr == ""
    assert r"layer_\u03b1" in done.stdout
    assert r"pruned: \u03c9.safetensors" in done.stdout
    assert done.returncode == 0
    assert Path(output).exists()
