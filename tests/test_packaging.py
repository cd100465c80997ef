"""What is built and shipped; ``make release-check`` installs it."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch

import wavprune

ROOT = Path(__file__).parents[1]
HEADERS = ROOT / "csrc" / "torch"
PACKAGE = ROOT / "src" / "wavprune"
SOURCES = (".py", ".h", ".inc", ".c", ".cpp", ".cu", ".cuh", ".yaml", ".txt", ".jinja")
# Where ``make`` compiles; without it the wheel would be compiled here, for minutes.
COMPILED = sorted(ROOT.glob("build/temp.*/_C.so"))


def build(command: str, folder: Path) -> Path:
    """What setuptools makes of the project as it is, with what was compiled already."""
    run = subprocess.run(
        [sys.executable, "setup.py", "--quiet", command, "--dist-dir", str(folder)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    (built,) = folder.iterdir()
    return built


def test_the_headers_are_those_of_torch() -> None:
    version = (HEADERS / "torch/headeronly/version.h").read_text()
    if f'"{torch.__version__.split("+")[0]}"' not in version:
        pytest.skip(f"csrc/torch is not of torch {torch.__version__}")
    include = Path(torch.__file__).parent / "include"
    paths = [path.relative_to(HEADERS) for path in HEADERS.rglob("*.h")]
    assert len(paths) > 40
    for path in paths:
        assert (HEADERS / path).read_bytes() == (include / path).read_bytes(), path


@pytest.mark.skipif(not COMPILED, reason="make has not compiled the extension in build/")
def test_the_wheel_has_the_compiled_code_and_all_files_of_the_package(tmp_path: Path) -> None:
    wheel = build("bdist_wheel", tmp_path)
    assert "-cp311-abi3-" in wheel.name
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
        assert file.read("wavprune/_C.abi3.so")[:4] in (b"\x7fELF", b"\xcf\xfa\xed\xfe")
    ours = {
        f"wavprune/{path.relative_to(PACKAGE)}"
        for path in PACKAGE.rglob("*.*")
        if path.suffix in (".py", ".typed", ".jinja", ".safetensors", ".html", ".js", ".css")
    }
    assert ours <= names
    assert {name.split("/")[0] for name in names} == {
        "wavprune",
        f"wavprune-{wavprune.__version__}.dist-info",
    }
    assert sum(name.endswith("LICENSE") for name in names) == 2


def test_the_archive_has_what_builds_and_tests_it(tmp_path: Path) -> None:
    archive = build("sdist", tmp_path)
    with tarfile.open(archive) as file:
        names = {name.partition("/")[2] for name in file.getnames()}
    tracked = {
        str(path.relative_to(ROOT))
        for folder in ("csrc", "src", "tests", "benchmarks", "examples")
        for path in (ROOT / folder).rglob("*.*")
        if path.suffix in SOURCES and ".egg-info" not in str(path)
    }
    assert tracked <= names
    assert {"Makefile", "constraints.txt", "csrc/torch/LICENSE", "LICENSE"} <= names
    assert not {name for name in names if name.endswith((".so", ".pyc"))}


def test_every_extra_that_messages_name_exists() -> None:
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    named = {
        part.split('"')[0]
        for path in PACKAGE.rglob("*.py")
        for part in path.read_text().split('extra="')[1:]
    }
    assert named - {"forbid"} <= set(extras)
    assert len(named) > 5
