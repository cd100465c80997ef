"""What reports look like where they are printed and in a notebook."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

import wavprune
from tests.common.test_tables import cells_of
from wavprune import checkpoint
from wavprune.common.tables import SHORT_ROWS

PAIR = "[two]"


def deep() -> nn.Module:
    net = nn.Sequential(*[nn.Conv2d(2, 2, 3) for _ in range(SHORT_ROWS + 5)])
    net.add_module(PAIR, nn.Conv2d(2, 2, 3))
    return net


def results(tmp_path: Path) -> dict[str, object]:
    images, labels = torch.randn(8, 2, 3, 3), torch.arange(8) % 2
    net = nn.Sequential(nn.Conv2d(2, 6, 3), nn.Flatten())
    report = wavprune.fast.prune(net)
    return {
        "report": report,
        "evaluation": wavprune.evaluate(net, [(images, labels)], report=report),
        "comparison": wavprune.compare(
            net, [(images, labels)], sparsities=[0.5], calibration=None, wavelets=["uhaar"]
        ),
        "saved": checkpoint.save(net, tmp_path / "a.safetensors", config=wavprune.PruneConfig()),
    }


def test_every_result_prints_as_a_table_and_has_one_for_notebooks(tmp_path: Path) -> None:
    for name, result in results(tmp_path).items():
        text = str(result)
        assert text == repr(result)
        assert "object at 0x" not in text
        assert len(text.splitlines()) >= 4, name
        cells = cells_of(result._repr_html_())  # type: ignore[attr-defined]
        shown = [cell for row in cells.rows for cell in row if cell]
        assert shown, name
        assert all(cell in text for cell in shown if len(cell) < 30), name


def test_a_report_of_many_layers_prints_the_first_and_counts_the_others() -> None:
    report = wavprune.fast.prune(deep())
    text = str(report)
    assert f"{len(report) - SHORT_ROWS} more" in text
    assert PAIR not in text
    assert f"{report.kept:,}" in text
    assert len(report.to_table().rows) == len(report) + 1


def test_names_are_shown_as_they_are() -> None:
    net = nn.Sequential()
    net.add_module(PAIR, nn.Conv2d(2, 2, 3))
    assert PAIR in str(wavprune.fast.prune(net))


@pytest.mark.parametrize("max_layers", [None, 1, 100])
def test_a_saved_file_prints_its_totals(tmp_path: Path, max_layers: int | None) -> None:
    saved = checkpoint.save(deep(), tmp_path / "a.safetensors", config=wavprune.PruneConfig())
    table = saved.to_table(max_layers)
    layers = len(saved.layers)
    assert len(table.rows) == (3 if max_layers == 1 else layers + 1)
    assert f"{saved.bytes:,} bytes" in str(table.title)
