"""The results of a small sweep, and their page."""

from __future__ import annotations

import warnings
from pathlib import Path

import pytest

from wavprune import LevelCollapsedWarning
from wavprune.reporting.page import write_page
from wavprune.sweep.runner import run_sweep
from wavprune.sweep.settings import parse_sweep

HOSTILE = '<script>alert("x")</script>'


@pytest.fixture(scope="session")
def results(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sweep") / "results.db"
    sweep = {
        "name": HOSTILE,
        "model": [{"builtin": "demo", "name": HOSTILE}, {"builtin": "demo", "seed": 1}],
        "data": "demo",
        "grid": [
            {
                "method": ["dwt", "min_weight"],
                "wavelet": ["uhaar", "bior4.4"],
                "sparsity": [0.5, 0.9],
                "scope": "global",
            },
            {"method": "random", "sparsity": 0.9, "scope": "global", "seed": [0, 1]},
            {"targets": "no_such_layer"},
        ],
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", LevelCollapsedWarning)
        run_sweep(parse_sweep(sweep), path, jobs=2)
    return path


@pytest.fixture(scope="session")
def page(results: Path) -> str:
    path = results.with_name("page.html")
    write_page(results, path)
    return path.read_text(encoding="utf-8")
