from __future__ import annotations

import importlib
from pathlib import Path
from types import ModuleType

import pandas as pd
import pytest
from click.testing import CliRunner

from wavprune.demo import resnet
from wavprune.demo.train import accuracy

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def gradual(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(EXAMPLES)
    return importlib.import_module("gradual")


@pytest.mark.parametrize("basis", ["min-weight", "uhaar"])
def test_gradual_pruning_to_80_percent_costs_less_than_a_point(
    gradual: ModuleType, basis: str
) -> None:
    dense = accuracy(resnet(0))
    assert gradual.measure(0, basis, 0.8, "gradually", epochs=8) >= dense - 0.01


def test_the_table_has_every_run(
    gradual: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gradual, "SPARSITIES", (0.9,))
    monkeypatch.setattr(gradual, "BASES", ("uhaar",))
    monkeypatch.setattr(gradual, "SEEDS", (1,))
    out = tmp_path / "tables" / "gradual.csv"
    command = ["--out", str(out), "--epochs", "2", "--jobs", "1"]
    result = CliRunner().invoke(gradual.main, command, catch_exceptions=False)
    assert result.exit_code == 0
    table = pd.read_csv(out)
    assert list(table.columns) == ["seed", "basis", "sparsity", "way", "top1"]
    assert list(table["way"]) == [*gradual.WAYS, "unpruned"]
    assert table["top1"].between(0.8, 1).all()
    assert "gradually" in result.output
