from __future__ import annotations

import subprocess
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import nn

import wavprune
from tests.support.cases import (
    BACKENDS,
    BASES,
    Outcome,
    Weights,
    assert_pruned,
    layer_of,
    layer_weights,
    model_of,
    normal,
    prune_weights,
)
from wavprune import PruneConfig, backends
from wavprune.backends import Budget, Job, Layer
from wavprune.backends import registry as subject
from wavprune.backends.eager import EagerBackend
from wavprune.common.registry import Registry

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
AMOUNTS: list[dict[str, Any]] = [{"sparsity": 0.7}, {"percentile": 40.0}]


def runnable(weights: Weights, config: PruneConfig) -> Weights:
    """The weights that the backend can prune; skips the test where it can prune none."""
    missing = backends.unavailable().get(config.backend)
    if missing is not None:
        pytest.skip(missing)
    result = {}
    reason = "no weight"
    for name, weight in weights.items():
        try:
            backends.resolve(config.backend, [layer_of(weight, config)])
        except ValueError as error:
            reason = str(error)
        else:
            result[name] = weight
    if not result:
        pytest.skip(reason)
    return result


@pytest.mark.parametrize("backend", backends.names())
@pytest.mark.parametrize("settings", BASES.values(), ids=BASES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_every_backend_prunes_what_the_matrices_say(
    backend: str, settings: dict[str, Any], dtype: torch.dtype, amount: dict[str, Any]
) -> None:
    config = PruneConfig(backend=backend, **settings, **amount)
    before = layer_weights(dtype)
    if config.wavelet == "klt":
        # With fewer kernels than values, some of the vectors are arbitrary.
        before = {name: w for name, w in before.items() if w[:, :, 0, 0].numel() > w[0, 0].numel()}
    chosen = runnable(before, config)
    after = prune_weights({name: layer_weights(dtype)[name] for name in chosen}, config)
    assert_pruned(chosen, after, config)


@pytest.mark.parametrize("backend", backends.names())
@pytest.mark.parametrize("wavelet", ["haar", "db4", "uhaar", "dct"])
def test_large_kernels(backend: str, wavelet: str) -> None:
    config = PruneConfig(backend=backend, wavelet=wavelet, mode="symmetric")
    before = runnable({"large": normal(2, 2, 31, 31)}, config)
    after = prune_weights({"large": normal(2, 2, 31, 31)}, config)
    assert_pruned(before, after, config)


@pytest.mark.parametrize("backend", backends.names())
@pytest.mark.parametrize("settings", BASES.values(), ids=BASES)
def test_global_scope_ranks_all_layers_together(backend: str, settings: dict[str, Any]) -> None:
    config = PruneConfig(backend=backend, **settings, scope="global", sparsity=0.6)

    def weights() -> Weights:
        return {
            "strong": 3 * normal(8, 8, 3, 3, seed=1),
            "weak": normal(4, 8, 3, 3, seed=2),
            "double": normal(8, 6, 3, 5, dtype=torch.float64, seed=3),
        }

    before = runnable(weights(), config)
    after = prune_weights({name: weights()[name] for name in before}, config)
    assert_pruned(before, after, config)
    kept = {name: outcome.kept / before[name].numel() for name, outcome in after.items()}
    assert kept["strong"] > 0.6 > 0.3 > kept["weak"]


@pytest.mark.parametrize("backend", backends.names())
@pytest.mark.parametrize("wavelet", ["haar", "uhaar", "dct"])
@pytest.mark.parametrize("amount", AMOUNTS, ids=str)
def test_coefficients_that_are_equal_but_for_rounding(
    backend: str, wavelet: str, amount: dict[str, Any]
) -> None:
    def weights() -> Weights:
        return {"ties": normal(16, 16, 3, 3).mul(2).round(), "sparse": normal(16, 8, 4, 4).round()}

    config = PruneConfig(backend=backend, wavelet=wavelet, mode="zero", **amount)
    before = runnable(weights(), config)
    assert_pruned(before, prune_weights(weights(), config), config)


def test_names_and_unavailable_agree() -> None:
    assert {"eager", "reference"} <= set(backends.names())
    assert set(backends.unavailable()) <= set(backends.names())
    assert not {"eager", "reference"} & set(backends.unavailable())
    for reason in backends.unavailable().values():
        assert reason


def test_auto_runs_everything_and_never_picks_reference() -> None:
    for settings in BASES.values():
        config = PruneConfig(**settings)
        found = backends.resolve("auto", [layer_of(w, config) for w in layer_weights().values()])
        assert found.name not in ("reference", "ptwt")


def test_the_report_names_the_backend_that_ran() -> None:
    for name in ("eager", "reference"):
        assert [s.backend for s in wavprune.fast.prune(nn.Conv2d(2, 2, 3), backend=name)] == [name]


def test_an_unknown_name_gets_a_suggestion_or_the_list() -> None:
    with pytest.raises(
        ValueError, match=r"unknown backend 'eagr'; close to it: eager; allowed: auto, "
    ):
        backends.resolve("eagr", [])
    with pytest.raises(ValueError, match=r"unknown backend 'zzz'.*allowed: auto, .*eager"):
        backends.resolve("zzz", [])


def test_ptwt_says_which_modes_it_has() -> None:
    pytest.importorskip("ptwt")
    config = PruneConfig(wavelet="haar", mode="periodization")
    expected = (
        r"backend 'ptwt' cannot do this: layer 'conv': ptwt has no mode 'periodization'; it has "
        r".*reflect"
    )
    with pytest.raises(ValueError, match=expected):
        backends.resolve("ptwt", [layer_of(normal(2, 2, 4, 4), config)])


def test_ptwt_says_which_bases_it_has() -> None:
    pytest.importorskip("ptwt")
    for wavelet in ("uhaar", "dct", "klt"):
        with pytest.raises(ValueError, match=f"ptwt has no basis '{wavelet}'"):
            backends.resolve("ptwt", [layer_of(normal(4, 4, 3, 3), PruneConfig(wavelet=wavelet))])


def test_ptwt_names_a_kernel_that_it_cannot_extend() -> None:
    pytest.importorskip("ptwt")
    config = PruneConfig(wavelet="db4", mode="reflect", level=1, force_level=True)
    with pytest.raises(ValueError, match="ptwt cannot extend a 3x3 kernel for 'db4'"):
        backends.resolve("ptwt", [layer_of(normal(2, 2, 3, 3), config)])


def test_ptwt_prunes_minimum_weight_in_every_mode() -> None:
    pytest.importorskip("ptwt")
    model = nn.Conv2d(2, 2, 3)
    report = wavprune.fast.prune(model, "min_weight", mode="antireflect", backend="ptwt")
    assert report[""].kept == 18


class Halving(EagerBackend):
    """Not a pruning at all: every weight becomes half of what it was."""

    name = "halving"

    def synthesise(self, layer: Layer, coefficients: torch.Tensor) -> torch.Tensor:
        return super().synthesise(layer, coefficients) / 2


@pytest.fixture
def registry(monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    """The registry of a test: what is added to it is gone afterwards."""
    copy = Registry[Any]("backend")
    for name in backends.names():
        copy.register(name, subject._REGISTRY[name])
    monkeypatch.setattr(subject, "_REGISTRY", copy)
    return copy


def add_halving(monkeypatch: pytest.MonkeyPatch, *, automatic: bool) -> None:
    module = ModuleType("halving_elsewhere")
    module.__dict__["make"] = Halving
    monkeypatch.setitem(sys.modules, module.__name__, module)
    backends.register("halving", "halving_elsewhere", automatic=automatic)


@pytest.mark.usefixtures("registry")
def test_a_new_backend_is_one_module_and_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    add_halving(monkeypatch, automatic=False)
    assert "halving" in backends.names()
    weights = {"conv": torch.full((2, 2, 1, 1), 6.0)}
    model = model_of(**weights)
    report = wavprune.fast.prune(model, sparsity=0.0, backend="halving")
    assert report["conv"].backend == "halving"
    assert weights["conv"].flatten().tolist() == [3.0] * 4
    assert wavprune.fast.prune(model).layers[0].backend != "halving"


def test_a_backend_says_whether_a_cuda_graph_can_hold_its_calls(
    monkeypatch: pytest.MonkeyPatch, registry: Registry[Any]
) -> None:
    found = backends.capturable()
    assert set(found) == {"native", "triton"} & set(registry) - set(backends.unavailable())
    monkeypatch.setattr(Halving, "can_capture", True)
    add_halving(monkeypatch, automatic=False)
    assert backends.capturable() == [*found, "halving"]


def test_auto_takes_the_first_that_is_there(
    monkeypatch: pytest.MonkeyPatch, registry: Registry[Any]
) -> None:
    others = {name: registry[name] for name in registry}
    for name in others:
        registry.unregister(name)
    backends.register("absent", "no_such_module", automatic=True)
    add_halving(monkeypatch, automatic=True)
    for name, entry in others.items():
        registry.register(name, entry)
    assert "no_such_module" in backends.unavailable()["absent"]
    assert wavprune.fast.prune(nn.Conv2d(2, 2, 3)).layers[0].backend == "halving"
    with pytest.raises(ValueError, match=r"backend 'absent' cannot run here: .*no_such_module"):
        wavprune.fast.prune(nn.Conv2d(2, 2, 3), backend="absent")


def test_the_oracle_sees_a_wrong_result() -> None:
    config = PruneConfig(wavelet="haar")
    before = {"conv": normal(8, 8, 3, 3)}
    right = prune_weights({"conv": normal(8, 8, 3, 3)}, config)["conv"]
    wrong = [
        right._replace(kept=right.kept + 1),
        right._replace(threshold=right.threshold * (1 + 1e-5)),
        right._replace(weight=right.weight * (1 + 1e-5)),
        Outcome(before["conv"], right.threshold, right.kept),
    ]
    assert_pruned(before, {"conv": right}, config)
    for outcome in wrong:
        with pytest.raises(AssertionError):
            assert_pruned(before, {"conv": outcome}, config)


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_job_of_a_call_gets_its_own_budget(backend: str) -> None:
    layers = [layer_of(normal(8, 4, 3, 3, seed=seed), PruneConfig(percentile=1)) for seed in (1, 2)]
    layers.append(layer_of(normal(8, 4, 3, 3, dtype=torch.float64), PruneConfig(percentile=1)))
    budgets = [
        Budget(percentile=20.0),
        Budget(keep=30),
        Budget(percentile=70.0),
        Budget(keep=100),
        Budget(percentile=70.0),
        Budget(percentile=20.0),
    ]
    jobs = [Job((layer,), budget) for layer in layers for budget in budgets]
    chosen = backends.resolve(backend, layers)
    together = chosen.threshold(jobs)
    alone = torch.cat([chosen.threshold([job]) for job in jobs])
    assert together.tolist() == alone.tolist()


def test_auto_says_once_that_there_is_no_compiled_code_and_how_to_get_it() -> None:
    script = """
import sys, warnings
sys.modules["wavprune._C"] = None
import torch, wavprune
nets = [torch.nn.Conv2d(4, 4, 3) for _ in range(3)]
with warnings.catch_warnings(record=True) as said:
    warnings.simplefilter("always")
    report = wavprune.fast.prune(torch.nn.Sequential(nets[0]), backend="eager")
    assert not said
    for net in nets:
        report = wavprune.fast.prune(torch.nn.Sequential(net))
assert report.layers[0].backend == "eager"
(warning,) = said
assert warning.category is wavprune.backends.SlowBackendWarning
print(warning.message)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "'pip install --force-reinstall --no-deps .' in the folder of" in done.stdout
