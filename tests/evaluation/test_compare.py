from __future__ import annotations

import copy
import csv
import dataclasses
import io
import json
import math
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

import wavprune
from tests.support.cases import any_level
from wavprune import (
    Comparison,
    DenseReference,
    PruneConfig,
    Trial,
    batchnorm_statistics,
    compare,
    demo,
    evaluate,
    predict,
    run_trial,
    stored_bytes,
)
from wavprune.config import RULES
from wavprune.engine import rules
from wavprune.errors import WavpruneError
from wavprune.evaluation.predictions import Predictions

TEST = demo.digits("test")
TRAIN = [next(iter(demo.digits("train", batch_size=600)))]


def small() -> nn.Sequential:
    """A network that answers in no time, for what does not depend on accuracy."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 10, 5),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    for images, _ in TEST:
        model(images)
    return model.eval()


def state(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(value, two[name]) for name, value in one.items())


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    """Every method on the digits, with an expansive basis among those of dwt."""
    return compare(
        demo.resnet(),
        TEST,
        calibration=TRAIN,
        sparsities=[0.9, 0.6],
        wavelets=["uhaar", "haar", "klt"],
        mode="zero",
        level=1,
    )


def kept(comparison: Comparison) -> list[Trial]:
    return [trial for trial in comparison if trial.matched == "kept"]


def test_every_method_is_tried_at_every_sparsity(comparison: Comparison) -> None:
    bases = ["uhaar", "haar", "klt", "min_weight", "random", "random", "random"]
    assert [trial.basis for trial in kept(comparison)] == bases * 2
    asked = [trial.config.sparsity for trial in kept(comparison) if trial.config]
    assert asked == [0.6] * 7 + [0.9] * 7
    seeds = [t.config.seed for t in kept(comparison) if t.config and t.method == "random"]
    assert seeds == [0, 1, 2] * 2


def test_all_methods_keep_the_same_count(comparison: Comparison) -> None:
    convs = [each for each in demo.resnet().modules() if isinstance(each, nn.Conv2d)]
    numel = sum(conv.weight.numel() for conv in convs)
    asked = [math.ceil(round(part * numel, 6)) for part in (0.4, 0.1) for _ in range(7)]
    for trial, count in zip(kept(comparison), asked, strict=True):
        assert trial.report is not None
        if trial.method == "min_weight":
            # The demo's weights are rounded to 16 bits, so some tie, and ties are kept.
            assert count <= trial.report.kept < 1.002 * count
        else:
            assert trial.report.kept == count


def test_what_costs_more_bytes_is_tried_in_min_weights_bytes_too(comparison: Comparison) -> None:
    fitted = [trial for trial in comparison if trial.matched == "bytes"]
    assert [trial.basis for trial in fitted] == ["haar", "klt"] * 2
    for trial in fitted:
        before = comparison.trials[: comparison.trials.index(trial)]
        equal = [each for each in before if each.basis == "min_weight"][-1]
        same_count = [
            each for each in before if each.basis == trial.basis and each in kept(comparison)
        ][-1]
        # One kept value more would not fit.
        budget = equal.evaluation.stored_bytes
        assert budget - 4 < trial.evaluation.stored_bytes <= budget
        assert same_count.evaluation.stored_bytes > budget
        assert trial.evaluation.sparsity > equal.evaluation.sparsity


def test_a_basis_whose_masks_alone_are_too_large_is_named() -> None:
    result = compare(small(), TEST, sparsities=[0.99], wavelets=["haar"], mode="zero", seeds=[0])
    assert len(result.notes) == 1
    assert "99.00%" in result.notes[0]
    assert "haar" in result.notes[0]
    assert result.notes[0] in " ".join(str(result).split())
    assert [trial.matched for trial in result] == ["kept"] * 3


def test_a_trial_is_what_its_parts_give() -> None:
    model = demo.resnet()
    config = PruneConfig(wavelet="uhaar", sparsity=0.9, scope="global")
    trial = run_trial(model, TEST, config, calibration=TRAIN, timing=False)
    pruned = copy.deepcopy(model)
    report = wavprune.fast.prune(pruned, wavelet="uhaar", sparsity=0.9, scope="global")
    wavprune.match_batchnorm(pruned, model, TRAIN)
    assert trial.evaluation == evaluate(pruned, TEST, model, report, timing=False)
    assert trial.model is not None
    assert same(state(pruned), state(trial.model))
    assert trial.report is not None
    assert [dataclasses.replace(layer, seconds=0) for layer in trial.report] == [
        dataclasses.replace(layer, seconds=0) for layer in report
    ]
    assert (trial.config, trial.batchnorm, trial.matched) == (config, "match", "kept")
    assert trial.prune_seconds > 0
    assert trial.repair_seconds > 0
    assert trial.evaluate_seconds > 0


def test_what_compare_tries_is_what_a_trial_gives(comparison: Comparison) -> None:
    chosen = next(trial for trial in comparison if trial.basis == "random")
    alone = run_trial(demo.resnet(), TEST, chosen.config, calibration=TRAIN, timing=False)
    assert alone.evaluation == chosen.evaluation


def test_the_unpruned_model_is_a_trial_too(comparison: Comparison) -> None:
    model = demo.resnet()
    trial = run_trial(model, TEST, None, batchnorm="update", timing=False)
    assert trial.evaluation == evaluate(model, TEST, model, timing=False) == comparison.unpruned
    assert (trial.method, trial.basis, trial.batchnorm, trial.matched) == (
        "none",
        "unpruned",
        "off",
        "",
    )
    assert trial.report is None


@pytest.mark.parametrize("batchnorm", ["off", "update", "match"])
def test_the_original_stays_as_it_is(batchnorm: str) -> None:
    model = small().train()
    before = state(model)
    result = compare(
        model, TEST, sparsities=[0.5], wavelets=["dct"], seeds=[1], batchnorm=batchnorm
    )
    assert same(before, state(model))
    assert all(module.training for module in model.modules())
    assert {trial.batchnorm for trial in result} == {batchnorm}
    assert all(trial.model is None for trial in result)


def test_the_repairs_are_those_of_the_package() -> None:
    model = demo.resnet()
    config = PruneConfig(sparsity=0.9, scope="global")
    found = {}
    for batchnorm in ("off", "update", "match"):
        trial = run_trial(model, TEST, config, batchnorm=batchnorm, calibration=TRAIN, timing=False)
        assert trial.model is not None
        found[batchnorm] = trial
    pruned = copy.deepcopy(model)
    wavprune.fast.prune(pruned, sparsity=0.9, scope="global")
    off, update = found["off"].model, found["update"].model
    assert off is not None
    assert update is not None
    assert same(state(pruned), state(off))
    wavprune.update_batchnorm(pruned, TRAIN)
    assert same(state(pruned), state(update))
    accuracies = [trial.evaluation.value for trial in found.values()]
    assert accuracies[0] < 0.8 < 0.95 < min(accuracies[1:])


def test_a_reference_is_measured_once_for_many() -> None:
    model = small()
    reference = DenseReference.measure(model, TEST)
    assert isinstance(reference.predictions, Predictions)
    assert torch.equal(reference.predictions.logits, predict(model, TEST).logits)
    assert reference.statistics is not None
    assert reference.statistics.norms.keys() == batchnorm_statistics(model, TEST).norms.keys()
    config = PruneConfig(sparsity=0.5)
    shared = run_trial(model, TEST, config, reference=reference, timing=False)
    assert shared.evaluation == run_trial(model, TEST, config, timing=False).evaluation
    without = DenseReference.measure(model, TEST, "off")
    assert without.statistics is None
    with pytest.raises(ValueError, match="without the statistics that batchnorm='match' needs"):
        run_trial(model, TEST, config, reference=without)


def test_a_trial_may_match_a_report_or_a_size() -> None:
    model = small()
    first = run_trial(model, TEST, PruneConfig(wavelet="haar", percentile=70), timing=False)
    assert first.report is not None
    assert first.matched == ""
    matched = run_trial(
        model, TEST, PruneConfig(method="min_weight"), match=first.report, timing=False
    )
    assert matched.report is not None
    assert matched.matched == "kept"
    assert matched.report.kept == pytest.approx(first.report.kept, abs=2)
    fitted = run_trial(model, TEST, PruneConfig(wavelet="dct"), match=5000, timing=False)
    assert fitted.matched == "bytes"
    assert 4996 < fitted.evaluation.stored_bytes <= 5000
    assert fitted.evaluation.stored_bytes == stored_bytes(small(), fitted.report)
    with pytest.raises(ValueError, match="does not fit into 100 bytes at any sparsity"):
        run_trial(model, TEST, PruneConfig(), match=100, timing=False)
    everything = run_trial(model, TEST, PruneConfig(), match=10**6, timing=False)
    assert everything.evaluation.sparsity == 0


class Counting(nn.Sequential):
    """Says how many samples it got, each time, in all its copies."""

    sizes: ClassVar[list[int]] = []

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        self.sizes.append(len(inputs))
        result: torch.Tensor = super().forward(inputs)  # type: ignore[no-untyped-call]  # torch's lack
        return result


def counting() -> Counting:
    model = Counting(*small()).eval()
    Counting.sizes.clear()
    return model


def test_matched_on_what_it_is_evaluated_on_a_model_runs_once() -> None:
    model = counting()
    reference = DenseReference.measure(model, TEST)
    config = PruneConfig(sparsity=0.8, scope="global")
    for separate in (TRAIN, list(TEST)):
        Counting.sizes.clear()
        run_trial(model, TEST, config, calibration=separate, reference=None, timing=False)
        assert Counting.sizes[-4:] == [sum(len(batch[0]) for batch in separate), 200, 200, 200]
    Counting.sizes.clear()
    trial = run_trial(model, TEST, config, reference=reference, timing=False)
    assert Counting.sizes == [600]
    assert trial.model is not None
    alone = evaluate(trial.model, TEST, reference.predictions, trial.report, timing=False)
    found = trial.evaluation.to_dict()
    assert found == {
        name: pytest.approx(value, rel=1e-5) if isinstance(value, float) else value
        for name, value in alone.to_dict().items()
    }
    assert found["confusion"] == alone.to_dict()["confusion"]
    # A forward pass that is timed is one of the batches as they are.
    Counting.sizes.clear()
    timed = run_trial(model, TEST, config, reference=reference)
    assert Counting.sizes[:2] == [600, 200]
    assert timed.evaluation.latency_median is not None
    with torch.autocast("cpu", torch.bfloat16):
        Counting.sizes.clear()
        cast = run_trial(model, TEST, config, reference=reference, timing=False)
    assert Counting.sizes == [600, 200, 200, 200]
    assert cast.model is not None
    assert same(state(trial.model), state(cast.model))


def test_the_unpruned_model_answers_once() -> None:
    model = counting()
    result = compare(model, TEST, sparsities=[0.5], wavelets=["uhaar"], methods=["dwt"])
    # Its predictions, a probe of whether batches can be joined, its statistics, and the trial.
    assert Counting.sizes == [200] * 3 + [4] + [1] * 4 + [600] * 2
    assert result.unpruned == evaluate(small(), TEST, small(), timing=False)


def test_only_the_chosen_layers_are_pruned() -> None:
    result = compare(small(), TEST, sparsities=[0.5], wavelets=["uhaar"], seeds=[0], targets="3")
    assert all([layer.name for layer in trial.report or ()] == ["3"] for trial in result)


def test_rows_say_what_was_asked_and_what_came_of_it(comparison: Comparison) -> None:
    rows = comparison.rows()
    assert len(rows) == len(comparison) + 1
    unpruned, first = rows[:2]
    assert unpruned["method"] == "none"
    assert unpruned["top1"] == comparison.unpruned.top1
    assert (first["method"], first["wavelet"], first["level"]) == ("dwt", "uhaar", 1)
    assert (first["sparsity_requested"], first["scope"], first["matched"]) == (
        0.6,
        "global",
        "kept",
    )
    assert first["sparsity"] == pytest.approx(0.6, abs=1e-4)
    assert first["seed"] is None
    random = next(row for row in rows if row["method"] == "random")
    assert (random["wavelet"], random["mode"], random["level"], random["seed"]) == (
        None,
        None,
        None,
        0,
    )


def test_tables_hold_all_rows(comparison: Comparison, tmp_path: Path) -> None:
    rows = comparison.rows()
    frame = comparison.to_dataframe()
    assert frame["top1"].tolist() == [row["top1"] for row in rows]
    assert list(frame.columns) == list(rows[0])
    text = comparison.to_csv(tmp_path / "rows.csv")
    assert (tmp_path / "rows.csv").read_text() == text
    parsed = list(csv.DictReader(io.StringIO(text)))
    assert [float(row["loss"]) for row in parsed] == [row["loss"] for row in rows]
    assert parsed[0]["kept"] == ""


def test_without_pandas_it_says_what_to_install(
    comparison: Comparison, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pandas", None)
    with pytest.raises(ImportError, match=r"pip install 'wavprune\[dataframe\]'"):
        comparison.to_dataframe()


def test_json_holds_settings_layers_and_confusions(comparison: Comparison, tmp_path: Path) -> None:
    text = comparison.to_json(tmp_path / "all.json")
    assert (tmp_path / "all.json").read_text() == text

    def refuse(constant: str) -> None:
        raise AssertionError(constant)

    content: Any = json.loads(text, parse_constant=refuse)
    assert content["settings"]["scope"] == "global"
    assert content["settings"]["wavelets"] == ["uhaar", "haar", "klt"]
    assert content["settings"]["versions"]["torch"] == torch.__version__
    assert content["notes"] == list(comparison.notes)
    layers = [len(trial["layers"]) for trial in content["trials"]]
    assert layers == [0] + [len(trial.report or ()) for trial in comparison]
    assert sum(map(sum, content["trials"][0]["confusion"])) == comparison.unpruned.samples


def test_the_table_shows_seeds_as_one_row_with_their_range(comparison: Comparison) -> None:
    text = str(comparison)
    rows = [line for line in text.splitlines() if line.startswith("│")]
    lines = [line for line in text.splitlines() if "random" in line]
    assert len(lines) == 2
    values = [100 * t.evaluation.value for t in kept(comparison) if t.basis == "random"][:3]
    shown = f"{sum(values) / 3:.2f} [{min(values):.2f}, {max(values):.2f}]"
    assert shown in lines[0]
    assert "3 seeds" in lines[0]
    assert len([line for line in text.splitlines() if "min_weight" in line]) == 2
    assert "unpruned" in text
    assert sum("same bytes" in line for line in rows) == len(comparison) - len(kept(comparison))
    assert all(len(line) <= 200 for line in text.splitlines())


def test_a_level_that_collapsed_is_shown() -> None:
    with any_level():
        result = compare(small(), TEST, sparsities=[0.5], wavelets=["bior4.4"], level=5, seeds=[0])
    text = str(result)
    assert "level 0 in 2 of 2 layers" in text
    alike = [trial.evaluation.value for trial in result if trial.basis in ("bior4.4", "min_weight")]
    assert alike[0] == alike[1]


def test_uhaar_beats_min_weight_on_the_digits(comparison: Comparison) -> None:
    accuracy = {
        trial.basis: trial.evaluation.value
        for trial in kept(comparison)
        if trial.config and trial.config.sparsity == 0.9
    }
    assert accuracy["uhaar"] >= accuracy["min_weight"] > accuracy["random"]


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"batchnorm": "fix"}, ValueError, "unknown batchnorm 'fix'; allowed: off, update, match"),
        ({"methods": ["dwt", "size"]}, ValueError, "unknown method 'size'"),
        ({"methods": "dwt"}, TypeError, "methods must be a list, not 'dwt'"),
        ({"wavelets": ["harr"]}, ValueError, "unknown wavelet 'harr'; close to it: haar"),
        ({"wavelets": []}, ValueError, "wavelets is empty"),
        ({"sparsities": [0.5, 1.5]}, ValueError, r"sparsity must be in \[0, 1\), not 1.5"),
        ({"sparsities": 0.5}, TypeError, "sparsities must be a list, not 0.5"),
        ({"seeds": [-1]}, ValueError, "seed must be an integer, from 0"),
        ({"scope": "model"}, ValueError, "unknown scope 'model'"),
        ({"backend": "magic"}, ValueError, "unknown backend 'magic'"),
        ({"targets": "conv9"}, ValueError, "targets: 'conv9' matches no layer"),
        ({"calibration": iter(TEST)}, TypeError, "calibration is a .* read only once"),
        ({"device": "xpu"}, ValueError, "device 'xpu' is not available here"),
    ],
)
def test_what_is_wrong_is_said_before_anything_runs(
    settings: dict[str, Any], error: type[Exception], message: str
) -> None:
    class Never(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv = nn.Conv2d(1, 1, 3)

        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            raise AssertionError("it ran")

    with pytest.raises(error, match=message):
        compare(Never(), TEST, **{"wavelets": ["uhaar"], **settings})


def test_a_trials_arguments_are_checked() -> None:
    with pytest.raises(ValueError, match="unknown batchnorm 'fix'"):
        run_trial(small(), TEST, PruneConfig(), batchnorm="fix")
    with pytest.raises(ValueError, match="match needs a config"):
        run_trial(small(), TEST, None, match=1000)


def test_a_weight_found_not_finite_on_the_device_stops_a_trial(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def wait(report: wavprune.PruneReport) -> wavprune.PruneReport:
        raise WavpruneError("layer '0': its weight is not finite")

    class Once(list[Any]):
        """Read for the reference alone."""

        reads = 0

        def __iter__(self) -> Iterator[Any]:
            self.reads += 1
            assert self.reads <= 2, "it was evaluated"
            return super().__iter__()

    monkeypatch.setattr(wavprune.PruneReport, "wait", wait)
    for match in (None, 5000):
        with pytest.raises(WavpruneError, match="layer '0': its weight is not finite"):
            run_trial(small(), Once(TEST), PruneConfig(), match=match)


def test_a_method_from_outside_is_compared_in_every_wavelet(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(RULES._entries, "largest", rules.Magnitude())
    result = compare(
        small(), TEST, sparsities=[0.5], wavelets=["uhaar", "dct"], methods=["dwt", "largest"]
    )
    assert [trial.basis for trial in result] == ["uhaar", "dct", "largest uhaar", "largest dct"]
    assert [row["wavelet"] for row in result.rows()[1:]] == ["uhaar", "dct"] * 2
    errors = [trial.report.relative_error for trial in result if trial.report]
    assert errors[:2] == errors[2:]


def test_progress_is_shown_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    settings: dict[str, Any] = {"sparsities": [0.5], "wavelets": ["uhaar"], "seeds": [0]}
    compare(small(), TEST, progress=True, **settings)
    assert "3/3" in capsys.readouterr().err
    compare(small(), TEST, **settings)
    assert capsys.readouterr().err == ""
