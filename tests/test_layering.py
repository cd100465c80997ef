from __future__ import annotations

import ast
import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

import wavprune

PACKAGE = Path(wavprune.__file__).parent

# A package or module imports only those before it; those of one line not each other.
ORDER = (
    ("_version", "errors"),
    ("common",),
    ("config",),
    ("bases",),
    ("decision",),
    ("coverage", "estimate"),
    ("report_table",),
    ("report",),
    ("pruned",),
    ("ops",),
    ("backends",),
    ("engine",),
    # ONNX graphs are models: what prunes, calibrates and stores them reads them here.
    ("graph",),
    ("calibration",),
    ("fast",),
    ("reference",),
    ("training", "evaluation", "checkpoint"),
    ("onnx",),
    ("demo",),
    ("sweep",),
    ("reporting",),
    ("service", "integrations", "experiment"),
    ("cli",),
    ("__main__",),
)
LAZY = [
    "constriction",
    "fastapi",
    "jinja2",
    "joblib",
    "matplotlib",
    "onnx",
    "onnxruntime",
    "pandas",
    "ptwt",
    "pydantic",
    "rich",
    "safetensors",
    "seaborn",
    "sklearn",
    "torchmetrics",
    "triton",
    "uvicorn",
    "yaml",
    "zstandard",
]


def modules() -> dict[str, Path]:
    """Every module of the package but its ``__init__``, by its name in the package."""
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(PACKAGE).with_suffix("").parts
        name = ".".join(part for part in parts if part != "__init__")
        if name:
            found[name] = path
    return found


def imports(text: str, package: str) -> set[str]:
    """The package's modules that a module in ``package`` imports, inside functions too."""
    known = {f"wavprune.{module}" for module in modules()}
    found: set[str] = set()
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            written = "." * node.level + (node.module or "")
            source = importlib.util.resolve_name(written, package)
            names = {f"{source}.{alias.name}" for alias in node.names}
            found |= {name if name in known else source for name in names}
    return {name.removeprefix("wavprune.") for name in found if name.split(".")[0] == "wavprune"}


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_packages_before_its_own(name: str) -> None:
    path = modules()[name]
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    home = name.split(".")[0]
    (level,) = [i for i, names in enumerate(ORDER) if home in names]
    allowed = {home, "_C", *(other for names in ORDER[:level] for other in names)}
    found = imports(path.read_text(), f"wavprune.{package}".removesuffix("."))
    assert {other.split(".")[0] for other in found} <= allowed


def test_imports_are_found_however_they_are_written() -> None:
    text = """
import wavprune.cli, wavprune, torch
from . import Layer, eager
from .. import fast
from ..report import PruneReport
from wavprune.backends import ptwt
def later():
    from ..engine.run import prune_layers
"""
    assert imports(text, "wavprune.backends") == {
        "backends",
        "backends.eager",
        "backends.ptwt",
        "cli",
        "engine.run",
        "fast",
        "report",
        "wavprune",
    }


def test_importing_the_package_leaves_the_rest_for_later() -> None:
    script = (
        f"import json, sys, wavprune; print(json.dumps([m for m in {LAZY} if m in sys.modules]))"
    )
    run = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], check=True, capture_output=True, text=True
    )
    assert json.loads(run.stdout) == []
    assert run.stderr == ""
