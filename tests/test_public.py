"""What ``import wavprune`` gives, in a process of its own."""

from __future__ import annotations

import subprocess
import sys

import pytest

import wavprune


def run(script: str) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("name", wavprune.__all__)
def test_every_public_name_is_there(name: str) -> None:
    if name == "ops":
        pytest.importorskip("wavprune.ops")
    assert getattr(wavprune, name) is not None
    assert name in dir(wavprune)


def test_submodules_are_there_right_after_the_import() -> None:
    pytest.importorskip("wavprune.ops")
    run(
        "import wavprune; wavprune.ops.dwt2; wavprune.schedule.Cubic; wavprune.checkpoint.save; "
        "wavprune.bases.named_basis; wavprune.plots.accuracy_by_bytes; wavprune.WavpruneError"
    )


def test_no_module_hides_behind_a_function_of_its_name() -> None:
    script = """
import importlib, wavprune
for name in ("compare", "evaluate", "predict"):
    function = getattr(wavprune, name)
    assert callable(function)
    try:
        importlib.import_module(f"wavprune.{name}")
    except ModuleNotFoundError:
        continue
    raise SystemExit(f"wavprune.{name} is a module too")
"""
    run(script)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="module 'wavprune' has no attribute 'purne'"):
        wavprune.purne  # noqa: B018  # that is the test


def test_the_import_takes_little_more_than_that_of_torch() -> None:
    script = """
import time, torch
start = time.perf_counter()
import wavprune
print(time.perf_counter() - start)
"""
    assert min(float(run(script)) for _ in range(3)) < 0.025
