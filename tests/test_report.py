from __future__ import annotations

import copy
import csv
import dataclasses
import gc
import io
import json
import math
import pickle
import weakref
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch

import wavprune
from tests.support.cases import any_level, model_of, normal, weight_of
from wavprune import LayerStats, PruneReport
from wavprune.backends.masks import unpack
from wavprune.report import Outcome


def pruned(**settings: Any) -> PruneReport:
    model = model_of(
        first=normal(8, 4, 3, 3, seed=1),
        second=2 * normal(4, 8, 5, 5, seed=2),
        pointwise=normal(6, 4, 1, 1, seed=3),
    )
    with any_level():
        return wavprune.fast.prune(model, **settings)


@pytest.fixture
def report() -> PruneReport:
    return pruned(wavelet="haar", level=1, sparsity=0.7, backend="eager")


def parsed(text: str) -> Any:
    """JSON by the standard, which has no NaN and no infinity."""

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    return json.loads(text, parse_constant=refuse)


def test_iterating_gives_the_layers_in_the_models_order(report: PruneReport) -> None:
    assert [layer.name for layer in report] == ["first", "second", "pointwise"]
    assert len(report) == 3
    assert report["second"] is report.layers[1]
    with pytest.raises(KeyError, match="third"):
        report["third"]


def test_a_row_says_what_was_done(report: PruneReport) -> None:
    row = report["first"]
    assert row.shape == (8, 4, 3, 3)
    assert (row.method, row.wavelet, row.mode) == ("dwt", "haar", "periodization")
    assert (row.level_requested, row.level_used) == (1, 1)
    assert (row.backend, row.device) == ("eager", "cpu")
    assert row.coefficients == 32 * 9
    assert row.kept == math.ceil(0.3 * 288)
    assert row.sparsity == 1 - row.kept / 288
    assert row.threshold > 0
    assert 0 < row.relative_error < 1
    assert row.seconds > 0


def test_the_totals_are_those_of_the_layers(report: PruneReport) -> None:
    totals = report.totals()
    assert totals["numel"] == report.numel == 288 + 800 + 24
    assert totals["kept"] == report.kept == sum(layer.kept for layer in report)
    assert totals["sparsity"] == report.sparsity == 1 - report.kept / report.numel
    assert totals["weight_zeros"] == sum(layer.weight_zeros for layer in report)
    assert totals["weight_sparsity"] == report.weight_zeros / report.numel
    assert totals["seconds"] == pytest.approx(sum(layer.seconds for layer in report))


def test_the_total_error_is_that_of_all_weights_as_one_vector(report: PruneReport) -> None:
    weights = normal(8, 4, 3, 3, seed=1), 2 * normal(4, 8, 5, 5, seed=2), normal(6, 4, 1, 1, seed=3)
    squares = [float(weight.double().square().sum()) for weight in weights]
    errors = [
        layer.relative_error**2 * square for layer, square in zip(report, squares, strict=True)
    ]
    expected = math.sqrt(sum(errors) / sum(squares))
    assert report.relative_error == pytest.approx(expected, rel=1e-6)


def test_weight_sparsity_is_not_sparsity_in_a_wavelet_basis(report: PruneReport) -> None:
    assert report["first"].weight_sparsity < 0.5 < report["first"].sparsity
    plain = pruned(method="min_weight", sparsity=0.7)
    assert plain.weight_sparsity == plain.sparsity


def test_csv_has_a_row_a_layer_with_every_value(report: PruneReport, tmp_path: Path) -> None:
    text = report.to_csv(tmp_path / "report.csv")
    assert (tmp_path / "report.csv").read_text() == text
    rows = list(csv.DictReader(io.StringIO(text)))
    assert len(rows) == 3
    for row, layer in zip(rows, report, strict=True):
        values = dataclasses.asdict(layer)
        assert row.keys() == values.keys()
        assert row["shape"] == "x".join(map(str, layer.shape))
        assert (row["name"], int(row["kept"])) == (layer.name, layer.kept)
        for name in ("threshold", "sparsity", "relative_error", "seconds"):
            assert float(row[name]) == values[name]


def test_json_has_settings_totals_and_layers(report: PruneReport, tmp_path: Path) -> None:
    text = report.to_json(str(tmp_path / "report.json"))
    assert (tmp_path / "report.json").read_text() == text
    content = parsed(text)
    assert content["totals"] == report.totals()
    assert content["settings"]["wavelet"] == "haar"
    assert content["settings"]["sparsity"] == 0.7
    assert content["settings"]["versions"]["wavprune"] == wavprune.__version__
    rows = [LayerStats(**{**row, "shape": tuple(row["shape"])}) for row in content["layers"]]
    assert tuple(rows) == report.layers


def test_a_threshold_that_is_not_finite_is_null_in_json(report: PruneReport) -> None:
    for value in (math.inf, math.nan):
        row = dataclasses.replace(report.layers[0], threshold=value)
        changed = PruneReport(Outcome((row,), 1.0, 0.5), report.settings)
        assert parsed(changed.to_json())["layers"][0]["threshold"] is None
        assert str(value) in changed.to_csv()


def test_a_dataframe_has_every_value(report: PruneReport) -> None:
    frame = report.to_dataframe()
    assert isinstance(frame, pd.DataFrame)
    assert list(frame["name"]) == ["first", "second", "pointwise"]
    assert list(frame.columns) == [field.name for field in dataclasses.fields(LayerStats)]
    assert int(frame["kept"].sum()) == report.kept
    assert frame["shape"][1] == (4, 8, 5, 5)


def test_a_table_has_the_layers_the_notes_and_the_totals() -> None:
    table = str(pruned(wavelet="db2", level=3, sparsity=0.75, backend="eager"))
    lines = table.splitlines()
    assert "dwt db2, sparsity 0.75, scope layer" in lines[0]
    (first,) = (line for line in lines if "first" in line)
    assert "8x4x3x3" in first
    assert "level 0: no transform ran" in first
    assert "0 of 3" in first
    (pointwise,) = (line for line in lines if "pointwise" in line)
    assert "1x1: no spatial axis" in pointwise
    (total,) = (line for line in lines if "total" in line)
    assert "278" in total
    assert "75.00%" in total
    assert "eager on cpu" in table


def test_a_layer_that_was_transformed_has_no_note(report: PruneReport) -> None:
    assert [layer.note for layer in report] == ["", "", "1x1: no spatial axis"]
    assert {layer.note for layer in pruned(method="min_weight")} == {""}
    assert pruned(wavelet="identity")["first"].note == ""


def test_a_long_name_is_shown_whole() -> None:
    name = "x" * 150
    report = wavprune.fast.prune(model_of(**{name: normal(2, 2, 3, 3)}))
    assert name in str(report)


def test_titles_of_other_runs(report: PruneReport) -> None:
    assert "percentile 30" in str(pruned(percentile=30))
    assert "scope global" in str(pruned(scope="global"))
    matched = pruned(method="random", match=report)
    assert "random, as pruned by dwt haar" in str(matched)
    assert parsed(matched.to_json())["settings"]["match"] == "dwt haar"


def test_a_report_survives_pickle_and_copy(report: PruneReport) -> None:
    assert pickle.loads(pickle.dumps(report)) == report
    assert copy.deepcopy(report) == report


def test_a_failing_write_leaves_the_old_file(report: PruneReport, tmp_path: Path) -> None:
    path = tmp_path / "report.csv"
    path.write_text("old")
    unwritable = dataclasses.replace(report.layers[0], name="\udc80")
    with pytest.raises(UnicodeEncodeError):
        PruneReport(Outcome((unwritable,), 1.0, 0.5), report.settings).to_csv(path)
    assert path.read_text() == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_that_is_there_is_replaced(report: PruneReport, tmp_path: Path) -> None:
    path = tmp_path / "report.json"
    path.write_text("old")
    assert report.to_json(path) == path.read_text()
    assert list(tmp_path.iterdir()) == [path]


def test_a_directory_is_not_replaced(report: PruneReport, tmp_path: Path) -> None:
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "precious").write_text("old")
    with pytest.raises(OSError, match="results"):
        report.to_json(tmp_path / "results")
    assert (tmp_path / "results" / "precious").read_text() == "old"


def test_a_missing_directory_is_named(report: PruneReport, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere"):
        report.to_json(tmp_path / "nowhere" / "report.json")


def test_numbers_are_fetched_once_and_when_they_are_asked_for(report: PruneReport) -> None:
    fetched = []

    def outcome() -> Outcome:
        fetched.append(1)
        return Outcome(report.layers, report.squared_norm, report.squared_error)

    later = PruneReport(outcome, report.settings, coverage=report.coverage)
    assert fetched == []
    assert later.kept == report.kept
    assert later == report
    assert pickle.loads(pickle.dumps(later)) == report
    assert fetched == [1]


def test_reports_are_equal_whatever_time_they_took() -> None:
    one, two = (
        wavprune.fast.prune(model_of(conv=normal(8, 4, 3, 3)), wavelet="haar") for _ in range(2)
    )
    assert one.seconds != two.seconds
    assert one == two
    assert one != wavprune.fast.prune(model_of(conv=normal(8, 4, 3, 3)), wavelet="dct")


@pytest.mark.parametrize("sparsity", [0.5, 0.0])
@pytest.mark.parametrize(
    "settings",
    [{"wavelet": "haar"}, {"wavelet": "auto"}, {"method": "random", "targets": ["a", "b"]}],
    ids=str,
)
def test_json_is_read_back(settings: dict[str, Any], sparsity: float) -> None:
    model = model_of(a=normal(8, 4, 3, 3), b=torch.zeros(2, 2, 1, 1), c=torch.zeros(0, 2, 3, 3))
    report = wavprune.fast.prune(model, sparsity=sparsity, **settings)
    back = PruneReport.from_json(report.to_json())
    assert back == report
    assert back.settings == report.settings
    assert back.to_json() == report.to_json()
    assert back.relative_error == report.relative_error
    again = wavprune.fast.prune(model_of(a=normal(8, 4, 3, 3)), "min_weight", match=back)
    assert again.settings.match == report.settings.label


def test_json_of_something_else_is_refused() -> None:
    for text in ("", "{}", "[]", '{"settings": {}, "totals": {}}'):
        with pytest.raises(wavprune.errors.WavpruneError, match=r"not what PruneReport.to_json"):
            PruneReport.from_json(text)


def test_an_unread_report_holds_no_weights() -> None:
    model = model_of(conv=normal(8, 4, 3, 3))
    storage = weakref.ref(weight_of(model).untyped_storage())
    report = wavprune.fast.prune(model)
    del model
    gc.collect()
    assert storage() is None
    assert report.wait() is report
    assert report.kept == 144


def test_a_report_knows_its_bases_and_masks() -> None:
    weight = normal(8, 4, 3, 3)
    report = wavprune.prune_layers(
        [wavprune.LayerRef("conv", weight)], wavprune.PruneConfig(wavelet="dct"), masks=True
    )
    assert report.bases["conv"] == wavprune.bases.named_basis("dct", (3, 3))
    assert report.masks is not None
    kept = unpack(report.masks["conv"], 32, 9, flat=False)
    assert int(kept.sum()) == report.kept
    assert wavprune.fast.prune(model_of(conv=weight)).masks is None
