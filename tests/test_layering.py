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

# A module imports only what stands above it.
ORDER = [
    "_version",
    "config",
    "_C",
    "atomic",
    "matrices",
    "factored",
    "bases",
    "shards",
    "layers",
    "masks",
    "ops",
    "report",
    "backends",
    "backends.staging",
    "backends.reference",
    "backends.eager",
    "backends.sharded",
    "backends.ptwt",
    "backends.native",
    "backends.triton_tables",
    "backends.triton_tiles",
    "backends.triton_kernels",
    "backends.triton",
    "clock",
    "auto",
    "pipeline",
    "schedule",
    "finetune",
    "integrations",
    "integrations.lightning",
    "integrations.transformers",
    "fast",
    "reference",
    "formats",
    "files",
    "checkpoint.container",
    "checkpoint.synthesis",
    "checkpoint.coders",
    "checkpoint.record",
    "checkpoint.decode",
    "checkpoint.encode",
    "checkpoint.sources",
    "checkpoint.plan",
    "checkpoint.rate",
    "checkpoint.report",
    "checkpoint.saving",
    "checkpoint.loading",
    "checkpoint",
    "checkpoint.commands",
    "inference",
    "moments",
    "size",
    "batchnorm",
    "evaluate",
    "trial",
    "compare",
    "demo",
    "demo.train",
    "series",
    "plots.style",
    "plots.accuracy",
    "plots.layers",
    "plots.run",
    "plots",
    "experiment",
    "experiment.sources",
    "experiment.settings",
    "experiment.models",
    "experiment.data",
    "experiment.store",
    "experiment.worker",
    "experiment.runner",
    "experiment.export",
    "experiment.summary",
    "experiment.tables",
    "experiment.page",
    "experiment.commands",
    "cli",
    "__main__",
]
LAZY = [
    "constriction",
    "jinja2",
    "joblib",
    "matplotlib",
    "pandas",
    "ptwt",
    "pydantic",
    "rich",
    "safetensors",
    "seaborn",
    "sklearn",
    "torchmetrics",
    "triton",
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
    known = {f"wavprune.{module}" for module in ORDER}
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


def test_every_module_has_its_place() -> None:
    assert set(modules()) <= set(ORDER)


@pytest.mark.parametrize("name", modules())
def test_a_module_imports_only_what_stands_above_it(name: str) -> None:
    path = modules()[name]
    package = name if path.stem == "__init__" else name.rpartition(".")[0]
    found = imports(path.read_text(), f"wavprune.{package}".removesuffix("."))
    assert found <= set(ORDER[: ORDER.index(name)])


def test_the_config_imports_no_other_module() -> None:
    assert imports(modules()["config"].read_text(), "wavprune") == set()


def test_imports_are_found_however_they_are_written() -> None:
    text = """
import wavprune.cli, wavprune, torch
from . import Batch, eager
from .. import fast
from ..report import PruneReport
from wavprune.backends import ptwt
def later():
    from ..pipeline import prune_layers
"""
    assert imports(text, "wavprune.backends") == {
        "backends",
        "backends.eager",
        "backends.ptwt",
        "cli",
        "fast",
        "pipeline",
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
