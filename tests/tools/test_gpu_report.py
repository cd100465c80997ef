"""``make gpu`` where there is no GPU, and tests of a GPU where little is installed."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_report

ROOT = Path(__file__).resolve().parents[2]
# What a machine with a GPU and no package index may lack, of all that is installed for tests.
ABSENT = """
atheris click constriction fastapi httpx hypothesis jinja2 joblib lightning matplotlib onnx
onnxruntime onnxscript pandas pydantic pytest_benchmark ptwt rich safetensors schemathesis seaborn
sklearn starlette torchmetrics transformers yaml zstandard
"""
COLLECT = """
import sys, pytest
sys.modules.update(dict.fromkeys(sys.argv[1].split()))
arguments = ["--collect-only", "-m", "gpu", "-o", "filterwarnings=default"]
sys.exit(pytest.main([*arguments, "-p", "no:cacheprovider", *sys.argv[2:]]))
"""


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Run this interpreter in the project's directory, without plugins of pytest."""
    return subprocess.run(
        [sys.executable, *arguments],
        cwd=ROOT,
        env={**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        check=False,
    )


def test_tests_of_a_gpu_are_collected_where_little_is_installed() -> None:
    files = ("tests", "benchmarks/bench_gpu.py", "benchmarks/bench_gpu_decode.py")
    run = python("-c", COLLECT, ABSENT, *files)
    assert run.returncode == 0, run.stdout
    for name in (
        "test_cuda_on_gpu",
        "test_triton_on_gpu",
        "test_run_on_gpu",
        "bench_gpu",
        "bench_gpu_decode",
    ):
        assert re.search(rf"{name}\.py", run.stdout), run.stdout


def test_all_tests_of_a_gpu_are_where_they_are_collected() -> None:
    marked = [path for path in ROOT.glob("tests/**/test_*.py") if "mark.gpu" in path.read_text()]
    elsewhere = [path.name for path in marked if not path.name.endswith("_on_gpu.py")]
    assert elsewhere == [Path(__file__).name]


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
def test_without_a_gpu_it_says_so_and_writes_nothing(tmp_path: Path) -> None:
    run = python("-m", "benchmarks.gpu_report", "--out", str(tmp_path / "report.json"))
    assert run.returncode == gpu_report.NO_GPU
    assert re.search(r"nothing was run: there is no GPU here: torch \S+ sees no CUDA", run.stderr)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_fails_or_takes_too_long_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_report, "STARTED", time.monotonic())
    monkeypatch.setitem(gpu_report.LIMITS, "tests", 1)
    slow = gpu_report.Step("tests", [sys.executable, "-c", "import time; time.sleep(60)"])
    wrong = gpu_report.Step("build", [sys.executable, "-c", "raise SystemExit('why')"])
    fine = gpu_report.Step("build", [sys.executable, "-c", ""])
    assert "stopped after 1 seconds" in slow.facts()["output"]
    assert "why" in wrong.facts()["output"]
    for step, failed in ((slow, True), (wrong, True), (fine, False)):
        assert gpu_report.has_failed(step.facts()) == failed
    assert gpu_report.has_failed({"memcheck": wrong.facts(), "racecheck": fine.facts()})
    assert not gpu_report.has_failed({"skipped": "compute-sanitizer is not installed"})
