from __future__ import annotations

import csv
import io

import pytest
import torch
from torch import nn

import wavprune
from wavprune.common.text import csv_cell


@pytest.mark.parametrize("text", ["=1+1", "+1", "-1", "@SUM(A1)", "\t=1", "\r=1"])
def test_a_formula_is_text(text: str) -> None:
    assert csv_cell(text) == f"'{text}"


@pytest.mark.parametrize("cell", ["conv1", "", "a=b", -1.5, 3, None])
def test_everything_else_stays(cell: object) -> None:
    assert csv_cell(cell) is cell


def test_a_report_has_no_formula_for_a_layer() -> None:
    model = nn.ModuleDict({"=cmd()": nn.Conv2d(1, 1, 3)})
    with torch.no_grad():
        model["=cmd()"].get_parameter("weight").fill_(-1)
    (row,) = csv.DictReader(io.StringIO(wavprune.fast.prune(model).to_csv()))
    assert row["name"] == "'=cmd()"
    assert row["kept"] == "1"
