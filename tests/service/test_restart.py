"""A service that is killed loses no job that it has called done."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
import pytest

from tests.support.service import SECONDS, upload
from wavprune.cli import main

pytestmark = pytest.mark.waits

KILLS = int(os.environ.get("WAVPRUNE_KILLS", "3"))
KINDS = (
    {"kind": "prune", "basis": "dct", "sparsity": 0.8},
    {"kind": "compress", "basis": "uhaar", "sparsity": 0.8},
    {"kind": "compress", "basis": "auto", "target_bytes": 30_000},
)


# A process that has imported everything, and from which each service is forked.
PRELOADED = """
import os, signal, sys
import uvicorn
from wavprune.service import app, job_routes, routes, worker
from wavprune.cli import main

signal.signal(signal.SIGCHLD, signal.SIG_IGN)
for line in sys.stdin:
    if os.fork() == 0:
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        print(os.getpid(), flush=True)
        status = main(["serve", "--port=0", f"--directory={line.strip()}"])
        print("ended with", status, flush=True)
        os._exit(0)
"""


@pytest.fixture(scope="module")
def preloaded() -> Iterator[subprocess.Popen[str]]:
    with subprocess.Popen(
        [sys.executable, "-c", PRELOADED], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        yield process
        process.kill()


def read(process: subprocess.Popen[str]) -> str:
    assert process.stdout is not None
    return process.stdout.readline()


@contextmanager
def served(process: subprocess.Popen[str], directory: Path) -> Iterator[tuple[int, httpx.Client]]:
    """``wavprune serve`` in a process of its own, which is killed in the end."""
    assert process.stdin is not None
    process.stdin.write(f"{directory}\n")
    process.stdin.flush()
    pid = int(read(process))
    address = read(process).split()[2].rstrip("/")
    try:
        with httpx.Client(base_url=address, timeout=SECONDS) as client:
            yield pid, client
    finally:
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
        wait_for_end(pid)


def wait_for_end(pid: int) -> None:
    end = time.monotonic() + SECONDS
    while True:
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return
        assert time.monotonic() < end
        time.sleep(0.01)


def jobs_of(client: httpx.Client, model: str) -> dict[str, Any]:
    return {job["id"]: job for job in client.get(f"/api/v1/models/{model}/jobs").json()}


def test_no_job_is_lost_at_any_moment(
    preloaded: subprocess.Popen[str], demo: Path, tmp_path: Path
) -> None:
    moments = random.Random(0)
    asked: set[str] = set()
    done: dict[str, Any] = {}
    model = ""
    for kill in range(KILLS + 1):
        with served(preloaded, tmp_path / "kept") as (_, client):
            if not model:
                model = upload(client, demo)["id"]
            found = jobs_of(client, model)
            # What was done is done, with the same result and its file; the rest is not forgotten.
            assert asked == found.keys()
            for identity, before in done.items():
                assert found[identity] == before
                answer = client.get(f"/api/v1/jobs/{identity}/model")
                assert len(answer.content) == before["result"]["bytes"]
            for settings in KINDS:
                answer = client.post(f"/api/v1/models/{model}/jobs", json=settings)
                if answer.status_code == 201:
                    asked.add(answer.json()["id"])
            end = time.monotonic() + (4 * SECONDS if kill == KILLS else moments.uniform(0, 1.5))
            while time.monotonic() < end:
                found = jobs_of(client, model)
                done |= {key: job for key, job in found.items() if job["state"] == "done"}
                is_open = any(job["state"] in ("queued", "running") for job in found.values())
                if kill == KILLS and not is_open:
                    break
                time.sleep(0.02)
    # A job that takes a service down so often is given up, and says so.
    given_up = {job["id"] for job in found.values() if "interrupted" in (job["error"] or "")}
    assert done.keys() | given_up == asked
    assert not given_up or KILLS >= 20
    kept = tmp_path / "kept"
    assert not [path for path in (kept / "jobs").rglob("attempt-*") if path.exists()]
    assert {path.name for path in (kept / "jobs").iterdir()} == asked


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="there is no /proc")
def test_it_ends_at_a_signal_and_takes_its_workers_along(
    preloaded: subprocess.Popen[str], demo: Path, tmp_path: Path
) -> None:
    with served(preloaded, tmp_path / "kept") as (pid, client):
        assert upload(client, demo)["state"] == "ready"
        (launcher,) = children(pid)
        workers = children(launcher)
        assert workers
        os.kill(pid, signal.SIGINT)
        assert read(preloaded) == "ended with 130\n"
        for process in (launcher, *workers):
            wait_for_end(process)


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def test_an_address_that_others_reach_needs_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--host", "0.0.0.0"]) == 2
    assert "--host 0.0.0.0 can be reached from other machines, so" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--upload", "much"], "'much' is no size; write it as 500M or 2GB"),
        (["--token", "short"], "the token has 5 characters; allowed: 16 or more"),
    ],
)
def test_options_are_checked(
    options: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["serve", f"--directory={tmp_path}", *options]) == 2
    assert message in capsys.readouterr().err
