from __future__ import annotations

import csv
import dataclasses
import io
import math
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import pywt
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

import wavprune
from tests.support.cases import BACKENDS, bits, model_of, normal, prune_weight, quick, weight_of
from wavprune import LayerRef, PruneConfig, PruneReport, basis_for, prune_layers
from wavprune.backends import Layer
from wavprune.backends.native import NativeBackend
from wavprune.bases import named_basis
from wavprune.cli.app import main
from wavprune.engine import auto
from wavprune.engine.auto import TIE, _calls, bases_for

Magnitudes = dict[str, npt.NDArray[np.float64]]

AUTO = PruneConfig(wavelet="auto")
each_backend = pytest.mark.parametrize("backend", BACKENDS)


def wavy(shape: tuple[int, int], wavelet: str) -> torch.Tensor:
    """A matrix of a few coefficients of this wavelet, and a little noise."""
    coeffs = pywt.wavedec2(np.zeros(shape), wavelet, "periodization")
    packed, slices = pywt.coeffs_to_array(coeffs)
    rng = np.random.default_rng(0)
    packed[:] = np.where(rng.random(packed.shape) < 0.1, rng.standard_normal(packed.shape), 0)
    listed = pywt.array_to_coeffs(packed, slices, output_format="wavedec2")
    whole = pywt.waverec2(listed, wavelet, "periodization")
    return torch.from_numpy(whole).float() + 1e-3 * normal(*shape)


def smooth(*shape: int, seed: int = 0) -> torch.Tensor:
    """Kernels whose neighbouring values are alike."""
    steps = normal(*shape, seed=seed)
    return steps.cumsum(-1).cumsum(-2)


def steps(*shape: int) -> torch.Tensor:
    """Kernels of a few Haar coefficients."""
    synthesis = named_basis("uhaar", (3, 3)).synthesis
    coefficients = torch.where(normal(*shape, seed=7) > 0.8, normal(*shape, seed=8), 0.0)
    kernels = coefficients.flatten(2).double() @ torch.tensor(synthesis).T
    return kernels.view(shape).float() + 1e-3 * normal(*shape)


def layers() -> dict[str, torch.Tensor]:
    return {
        "smooth": smooth(16, 8, 3, 3),
        "sparse": torch.where(normal(16, 8, 3, 3, seed=2) > 1, normal(16, 8, 3, 3), 0.0),
        "five": smooth(8, 8, 5, 5, seed=1) + normal(8, 8, 5, 5),
        "pair": normal(16, 8, 2, 2, seed=3),
        "steps": steps(16, 8, 3, 3),
        "point": normal(16, 8, 1, 1, seed=4),
        "row": smooth(8, 8, 1, 7, seed=5),
        "matrix": smooth(36, 32, seed=6),
        "long": wavy((36, 32), "db4"),
    }


@lru_cache
def analysis(name: str, kernel: tuple[int, int]) -> npt.NDArray[np.float64]:
    basis = dataclasses.replace(named_basis(name, kernel))
    # However large: its matrices are for this check alone.
    vars(basis)["is_dense"] = True
    return basis.importance_operator.analysis


def magnitudes(weight: torch.Tensor) -> Magnitudes:
    """By name, what each coefficient of a layer costs the weight, from the matrices in float64."""
    found = {}
    for basis in bases_for(AUTO, weight):
        if basis.name == "identity":
            found[basis.name] = weight.abs().double().numpy().ravel()
            continue
        A = analysis(basis.name, basis.kernel)
        found[basis.name] = np.abs(weight.double().reshape(-1, A.shape[1]).numpy() @ A.T).ravel()
    return found


def ranking(weight: torch.Tensor, keep: int) -> list[tuple[float, str]]:
    """The bases and their errors, best first: what is dropped of an orthonormal basis."""
    norm = float(weight.double().norm())
    errors = {
        name: math.sqrt(float((np.sort(each)[: len(each) - keep] ** 2).sum())) / norm
        for name, each in magnitudes(weight).items()
    }
    # Equal but for rounding, the first comes first.
    return sorted(
        ((error, name) for name, error in errors.items()), key=lambda entry: round(entry[0], 7)
    )


def pruned(weights: dict[str, torch.Tensor], **settings: Any) -> PruneReport:
    refs = [LayerRef(name, weight.clone()) for name, weight in weights.items()]
    return prune_layers(refs, PruneConfig(wavelet="auto", **settings))


def assert_best(weight: torch.Tensor, keep: int, report: PruneReport, name: str) -> None:
    row = report[name]
    best = ranking(weight, keep)
    if len(best) == 1:
        assert (row.wavelet, row.runner_up, row.runner_up_error) == ("identity", None, None)
        return
    assert (row.wavelet, row.runner_up) == (best[0][1], best[1][1]), name
    assert row.runner_up_error == pytest.approx(best[1][0], rel=1e-4)


@each_backend
@pytest.mark.parametrize("sparsity", [0.5, 0.9])
def test_the_choice_is_the_best_by_brute_force(sparsity: float, backend: str) -> None:
    weights = layers()
    if backend == "native":
        weights = {name: w for name, w in weights.items() if w.ndim == 4}
    report = pruned(weights, sparsity=sparsity, backend=backend)
    for name, weight in weights.items():
        keep = math.ceil(round((1 - sparsity) * weight.numel(), 6))
        assert report[name].kept == min(keep, int(weight.count_nonzero()))
        assert_best(weight, keep, report, name)
        assert report[name].relative_error == pytest.approx(ranking(weight, keep)[0][0], rel=1e-4)


@pytest.mark.skipif("native" not in BACKENDS, reason="the compiled extension is not built here")
@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("sparsity", [0.0, 0.5, 0.97])
def test_measuring_chooses_what_trying_on_copies_does(
    monkeypatch: pytest.MonkeyPatch, scope: str, sparsity: float
) -> None:
    weights = {name: w for name, w in layers().items() if w.ndim == 4}
    weights["half"] = weights["smooth"].bfloat16()
    weights["large"] = 1e25 * weights["smooth"]
    weights["zero"] = torch.zeros(4, 4, 3, 3)
    settings = {"scope": scope, "sparsity": sparsity, "backend": "native"}
    quick_one = pruned(weights, **settings)
    monkeypatch.setattr(NativeBackend, "measure", lambda self, jobs: None)
    slow_one = pruned(weights, **settings)
    for row, expected in zip(quick_one, slow_one, strict=True):
        chosen = (row.wavelet, row.runner_up, row.kept, row.threshold)
        assert chosen == (expected.wavelet, expected.runner_up, expected.kept, expected.threshold)
        errors = [
            -1 if error is None else error
            for error in (row.runner_up_error, expected.runner_up_error)
        ]
        assert errors[0] == pytest.approx(errors[1], rel=1e-4, abs=1e-6)


@pytest.mark.skipif("native" not in BACKENDS, reason="the compiled extension is not built here")
def test_what_can_be_measured_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    weights = {name: layers()[name] for name in ("smooth", "five", "pair", "steps")}
    expected = {scope: pruned(weights, scope=scope) for scope in ("layer", "global")}

    def copies(self: object, pairs: object) -> None:
        raise AssertionError("a weight was copied")

    monkeypatch.setattr(auto._Scratch, "copies", copies)
    for scope, report in expected.items():
        assert pruned(weights, scope=scope) == report
    with pytest.raises(AssertionError, match="was copied"):
        pruned({"half": weights["smooth"].half()})


def test_different_layers_get_different_bases() -> None:
    report = pruned(layers(), sparsity=0.5)
    assert {row.wavelet for row in report} >= {"identity", "uhaar", "dct", "db4"}
    assert report["point"].note == "1x1: no spatial axis"
    assert report["sparse"].note == (
        f"runner-up {report['sparse'].runner_up}: {report['sparse'].runner_up_error:.4f}"
    )
    rows = {row["name"]: row for row in csv.DictReader(io.StringIO(report.to_csv()))}
    assert rows["long"]["wavelet"] == "db4"
    assert rows["long"]["runner_up"] == report["long"].runner_up
    assert rows["point"]["runner_up"] == ""


@quick
@given(
    sizes=st.tuples(*(st.integers(1, high) for high in (6, 4, 6, 6))),
    seed=st.integers(0, 999),
    sparsity=st.sampled_from([0.0, 0.3, 0.5, 0.8, 0.95]),
)
def test_no_candidate_has_a_smaller_error(
    sizes: tuple[int, ...], seed: int, sparsity: float
) -> None:
    weight = normal(*sizes, seed=seed, dtype=torch.float64)
    _, chosen = prune_weight(weight, wavelet="auto", sparsity=sparsity)
    for wavelet in ("identity", "uhaar", "dct"):
        _, other = prune_weight(weight, wavelet=wavelet, sparsity=sparsity)
        assert chosen.relative_error <= other.relative_error * (1 + 2 * TIE)
        assert chosen.kept == other.kept
        if wavelet == chosen.wavelet:
            assert chosen.threshold == other.threshold
        if wavelet == chosen.runner_up:
            assert chosen.runner_up_error == pytest.approx(other.relative_error, rel=1e-9)


@pytest.mark.parametrize("wavelet", ["db4", "sym8"])
def test_long_axes_may_be_pruned_in_a_longer_wavelet(wavelet: str) -> None:
    for shape in ((64, 64), (32, 30)):
        weight = wavy(shape, wavelet)
        for tensor in (weight, weight[None, None].clone()):
            row = pruned({"layer": tensor}, sparsity=0.9)["layer"]
            assert (row.wavelet, row.mode) == (wavelet, "periodization")
            assert row.level_used > 0


def test_what_is_chosen_among() -> None:
    def names(*shape: int, **settings: Any) -> list[str]:
        config = PruneConfig(**{"wavelet": "auto", **settings})
        return [basis.name for basis in bases_for(config, torch.zeros(shape))]

    short = ["identity", "uhaar", "dct"]
    assert names(4, 4, 1, 1) == names(1, 1) == ["identity"]
    assert names(4, 4, 3, 3) == names(4, 4, 1, 5) == names(4, 4, 15, 40) == short
    # On 16 values sym8 has no level.
    assert names(4, 4, 16, 16) == [*short, "db4"]
    assert names(4, 4, 30, 30) == names(300, 30) == [*short, "db4", "sym8"]
    assert names(300, 10) == short
    assert names(4, 4, 3, 3, wavelet="dct") == ["dct"]
    assert names(4, 4, 3, 3, method="min_weight") == ["identity"]


@each_backend
def test_percentile_chooses_at_what_it_keeps_of_the_weights(backend: str) -> None:
    weights = {name: layers()[name] for name in ("smooth", "sparse", "five", "point")}
    report = pruned(weights, percentile=60, backend=backend)
    for name, weight in weights.items():
        values = weight.abs().numpy()
        keep = int(np.count_nonzero((values >= np.percentile(values, 60)) & (values > 0)))
        assert_best(weight, keep, report, name)
        _, plain = prune_weight(weight, wavelet=report[name].wavelet, percentile=60.0)
        assert (report[name].kept, report[name].threshold) == pytest.approx(
            (plain.kept, plain.threshold)
        )


@each_backend
def test_global_scope_chooses_at_the_counts_of_the_shared_threshold(backend: str) -> None:
    weights = layers()
    weights["five"] *= 3
    if backend == "native":
        weights = {name: w for name, w in weights.items() if w.ndim == 4}
    report = pruned(weights, sparsity=0.8, scope="global", backend=backend)
    total = math.ceil(0.2 * sum(weight.numel() for weight in weights.values()))
    assert report.kept == total
    assert len({row.threshold for row in report}) == 1

    sizes = {name: magnitudes(weight) for name, weight in weights.items()}
    chosen = dict.fromkeys(weights, "identity")
    for _ in range(2):
        every = np.concatenate([sizes[name][basis] for name, basis in chosen.items()])
        cut = np.sort(every)[::-1][total - 1] * (1 - 1e-6)
        counts = {name: int((sizes[name][chosen[name]] >= cut).sum()) for name in weights}
        chosen = {name: ranking(weight, counts[name])[0][1] for name, weight in weights.items()}
    assert {row.name: row.wavelet for row in report} == chosen
    for name in ("smooth", "five", "row"):
        assert_best(weights[name], counts[name], report, name)


def test_the_choice_does_not_depend_on_the_other_layers() -> None:
    weights = {name: weight for name, weight in layers().items() if weight.ndim == 4}
    together = pruned(weights, backend="eager")
    for name, weight in weights.items():
        alone = pruned({name: weight}, backend="eager")[name]
        row = together[name]
        assert (alone.wavelet, alone.runner_up) == (row.wavelet, row.runner_up)
        assert alone.runner_up_error == row.runner_up_error


@each_backend
def test_the_same_every_time(backend: str) -> None:
    def run() -> list[Any]:
        model = model_of(**{name: w for name, w in layers().items() if w.ndim == 4})
        report = wavprune.fast.prune(model, wavelet="auto", backend=backend)
        rows = [(row.wavelet, row.runner_up, row.runner_up_error, row.threshold) for row in report]
        return [rows, *(bits(parameter) for parameter in model.parameters())]

    assert run() == run()


def test_equal_errors_go_to_the_first() -> None:
    nothing = pruned({"zero": torch.zeros(4, 4, 3, 3)})["zero"]
    assert (nothing.wavelet, nothing.runner_up, nothing.runner_up_error) == ("identity", "uhaar", 0)
    everything = pruned({"all": normal(4, 4, 3, 3)}, sparsity=0)["all"]
    assert (everything.wavelet, everything.relative_error) == ("identity", 0)
    for seed in range(8):
        row = pruned({"pair": smooth(8, 8, 2, 2, seed=seed)})["pair"]
        assert (row.wavelet, row.runner_up) == ("uhaar", "dct")


def test_a_level_bounds_every_candidate() -> None:
    weights = {"five": layers()["five"], "long": wavy((64, 64), "db4")}
    report = pruned(weights, level=1)
    assert all(row.level_used <= 1 and row.level_requested == 1 for row in report)
    assert report["long"].wavelet == "db4"


def test_half_precision_and_any_layout() -> None:
    plain = smooth(8, 8, 3, 3).half()
    expected = pruned({"layer": plain})["layer"]
    for layout in (plain.to(memory_format=torch.channels_last), plain[:, :, :, [0, 0, 1, 0, 2, 0]]):
        weight = layout if layout.shape == plain.shape else layout[..., ::2]
        row = pruned({"layer": weight if weight.shape == plain.shape else plain})["layer"]
        assert (row.wavelet, row.kept) == (expected.wavelet, expected.kept)


def test_no_more_is_tried_at_a_time_than_the_largest_layer() -> None:
    sizes = [5, 900, 30, 40, 1000, 1, 600, 600, 2]
    basis = named_basis("identity", (1, 1))
    options = [
        [Layer("conv", torch.zeros(size, 1, 1, 1), basis)] * (1 if i == 5 else 2)
        for i, size in enumerate(sizes)
    ]
    several = [0, 1, 2, 3, 4, 6, 7, 8]
    calls = _calls(options, several)
    assert [i for call in calls for i in call] == several
    assert all(sum(sizes[i] for i in call) <= 1000 for call in calls)
    assert len(calls) < len(several)
    assert _calls([], []) == []


def test_the_bar_ends_when_everything_is_done(capsys: pytest.CaptureFixture[str]) -> None:
    for scope in ("layer", "global"):
        model = model_of(a=normal(8, 4, 3, 3), b=normal(4, 8, 1, 1))
        wavprune.fast.prune(model, wavelet="auto", scope=scope, progress=True)
        assert "100%" in capsys.readouterr().err


def test_other_methods_do_not_look_at_the_wavelet() -> None:
    one, other = (model_of(conv=normal(8, 4, 3, 3)) for _ in range(2))
    row = wavprune.fast.prune(one, "min_weight", wavelet="auto")["conv"]
    wavprune.fast.prune(other, "min_weight")
    assert (row.wavelet, row.runner_up) == ("identity", None)
    assert bits(weight_of(one)) == bits(weight_of(other))


def test_what_does_not_go_with_auto() -> None:
    with pytest.raises(ValueError, match=r"force_level=True .* wavelet='auto'"):
        PruneConfig(wavelet="auto", level=2, force_level=True)
    with pytest.raises(ValueError, match="wavelet='auto' is a choice among bases"):
        basis_for(AUTO, torch.zeros(4, 4, 3, 3))
    with pytest.raises(ValueError, match=r"unknown wavelet 'aut'; close to it: auto"):
        PruneConfig(wavelet="aut")
    model = nn.Conv2d(4, 4, 3)
    with pytest.raises(ValueError, match="match goes with"):
        wavprune.fast.prune(model, wavelet="auto", match=pruned({"a": normal(4, 4, 3, 3)}))


def test_ptwt_has_not_every_candidate() -> None:
    pytest.importorskip("ptwt")
    with pytest.raises(
        ValueError, match="backend 'ptwt' cannot do this: layer '': ptwt has no basis 'uhaar'"
    ):
        wavprune.fast.prune(nn.Conv2d(4, 4, 3), wavelet="auto", backend="ptwt")


@each_backend
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_a_nan_is_named_and_nothing_changes(scope: str, backend: str) -> None:
    weights = {"first": normal(8, 4, 3, 3), "last": normal(8, 4, 5, 5)}
    weights["last"][1, 2, 3, 4] = math.nan
    model = model_of(**weights)
    before = [bits(weight) for weight in weights.values()]
    with pytest.raises(ValueError, match="layer 'last': 1 of 800 weights are NaN"):
        wavprune.fast.prune(model, wavelet="auto", scope=scope, backend=backend)
    assert [bits(weight) for weight in weights.values()] == before


@each_backend
def test_a_basis_whose_coefficients_overflow_is_not_chosen(backend: str) -> None:
    weight = torch.full((4, 4, 3, 3), 3e38)
    with np.errstate(over="ignore", invalid="ignore"):
        row = pruned({"huge": weight}, backend=backend)["huge"]
    assert (row.wavelet, row.relative_error) == ("identity", 0)


def test_the_reference_entry_and_the_command_line(tmp_path: Path) -> None:
    weights = {"a": smooth(8, 8, 3, 3), "b": normal(8, 8, 5, 5)}
    model = model_of(**{name: weight.clone() for name, weight in weights.items()})
    report = wavprune.reference.prune(model, wavelet="auto", sparsity=0.75)
    assert report.settings.wavelet == "auto"
    assert str(report).startswith("dwt auto, sparsity 0.75")
    save_file(
        {f"{name}.weight": weight for name, weight in weights.items()}, tmp_path / "in.safetensors"
    )
    arguments = ["--wavelet", "auto", "--sparsity", "0.75", "--report", str(tmp_path / "r.csv")]
    where = [str(tmp_path / "in.safetensors"), "-o", str(tmp_path / "out.safetensors")]
    assert main(["prune", *where, *arguments]) == 0
    rows = list(csv.DictReader(io.StringIO((tmp_path / "r.csv").read_text())))
    assert [row["wavelet"] for row in rows] == [row.wavelet for row in report]
    found = load_file(tmp_path / "out.safetensors")
    for name in weights:
        torch.testing.assert_close(found[f"{name}.weight"], weight_of(model, name).detach())
