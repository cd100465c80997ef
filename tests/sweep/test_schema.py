from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from torch import nn

from wavprune import LayerStats, PruneConfig, run_trial
from wavprune.evaluation.metrics import Evaluation
from wavprune.sweep import schema

DOCS = Path(__file__).parents[2] / "docs" / "results.md"


@pytest.mark.parametrize("columns", [schema.RUNS, schema.LAYERS], ids=["runs", "layers"])
def test_every_column_has_one_name_and_a_description(columns: tuple[schema.Column, ...]) -> None:
    names = [column.name for column in columns]
    assert len(set(names)) == len(names)
    assert [column.name for column in columns if not column.description] == []
    # SQLite cannot add such a column to a table that has rows.
    assert [column.name for column in columns if column.required and column.since > 1] == []


def test_everything_that_is_measured_has_a_column() -> None:
    evaluation = {field.name for field in dataclasses.fields(Evaluation)} - {"confusion"}
    assert {column.name for column in schema.EVALUATION} == evaluation
    layer = {field.name for field in dataclasses.fields(LayerStats)}
    assert {column.name for column in schema.LAYERS} == layer | {"guid"}


def test_compared_trials_have_the_columns_of_a_results_file() -> None:
    """So that the same pictures can be drawn of both."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    data = [(torch.randn(8, 1, 6, 6), torch.arange(8) % 4)]
    row = run_trial(net, data, PruneConfig(sparsity=0.5), batchnorm="off").row()
    kinds = {column.name: column.kind for column in schema.RUNS}
    assert set(row) <= set(kinds)
    for name, value in row.items():
        assert value is None or isinstance(value, kinds[name]), name


def test_the_reference_in_docs_is_that_of_the_schema() -> None:
    assert DOCS.read_text() == schema.markdown(), (
        "run: python -m wavprune.sweep.schema > docs/results.md"
    )
