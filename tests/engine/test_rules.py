"""A new selection rule, basis and backend is one file each: here they are, outside the package."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import ModuleType

import numpy as np
import pytest
import torch
from torch import nn

import wavprune
from tests.support.cases import BACKENDS, bits, model_of, normal, weight_of
from wavprune import PruneConfig, backends, bases, prune_layers
from wavprune.backends import Job, Layer
from wavprune.backends.eager import EagerBackend
from wavprune.backends.masks import unpack
from wavprune.bases.factors import kronecker_factors
from wavprune.bases.separable import separable_basis
from wavprune.config import BASES, RULES
from wavprune.engine.layers import LayerRef
from wavprune.engine.rules import Rule, register
from wavprune.errors import WavpruneError
from wavprune.evaluation.compare import _Grid
from wavprune.sweep.traits import unread_settings


class SmallestFirst(Rule):
    """Keeps the coefficients of smallest magnitude, which nobody wants."""

    def scores(self, layer: Layer, coefficients: torch.Tensor) -> torch.Tensor:
        return 1 / (1 + coefficients.abs())


class Dice(Rule):
    """Draws scores for the coefficients of any basis."""

    uses_seed = True

    def prepare(self, layer: Layer, config: PruneConfig) -> Layer:
        return replace(layer, seed=config.seed)

    def scores(self, layer: Layer, coefficients: torch.Tensor) -> torch.Tensor:
        assert layer.seed is not None
        generator = torch.Generator().manual_seed(layer.seed)
        return torch.rand(coefficients.shape, generator=generator)


class Checkerboard(Rule):
    """Keeps every other weight, whatever it is."""

    basis = "identity"

    def masks(self, job: Job, coefficients: Callable[[Layer], torch.Tensor]) -> list[torch.Tensor]:
        masks = []
        for layer in job.layers:
            values = coefficients(layer)
            even = torch.arange(values.numel()).view_as(values) % 2 == 0
            masks.append(even & (values != 0))
        return masks


class Blind(Rule):
    """Keeps everything, without a look at any coefficient."""

    def masks(self, job: Job, coefficients: Callable[[Layer], torch.Tensor]) -> list[torch.Tensor]:
        sizes = [(layer.num_kernels, layer.num_coefficients) for layer in job.layers]
        return [torch.ones(size, dtype=torch.bool) for size in sizes]


class Hadamard(bases.Family):
    """Walsh-Hadamard, of kernels of 2 and 4 values a side."""

    def max_level(self, name: str, kernel: bases.Kernel) -> int:
        return int(kernel in ((2, 2), (4, 4)))

    def build(self, request: bases.Request) -> bases.Basis:
        if not self.max_level(request.name, request.kernel):
            raise WavpruneError(f"no Hadamard matrix of {request.size}; allowed: 2x2, 4x4")
        step = np.array([[1.0, 1.0], [1.0, -1.0]]) / np.sqrt(2)
        matrix = step if request.kernel[0] == 2 else np.kron(step, step)
        spans = [{"all": slice(0, n)} for n in request.kernel]
        factors = kronecker_factors(matrix, matrix, (None, None))
        return separable_basis(request, 1, 1, factors, spans)


class Loud(EagerBackend):
    """Eager by another name."""

    name = "loud"


@pytest.fixture(autouse=True)
def registered(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    register("smallest", SmallestFirst())
    register("checkerboard", Checkerboard())
    register("dice", Dice())
    register("blind", Blind())
    bases.register("hadamard", Hadamard())
    module = ModuleType("loud_backend")
    module.__dict__["make"] = Loud
    monkeypatch.setitem(sys.modules, module.__name__, module)
    backends.register("loud", "loud_backend", automatic=False)
    yield
    RULES.unregister("smallest")
    RULES.unregister("checkerboard")
    RULES.unregister("dice")
    RULES.unregister("blind")
    BASES.unregister("hadamard")
    backends.registry._REGISTRY.unregister("loud")


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_rule_that_scores(scope: str, backend: str) -> None:
    model = model_of(a=normal(8, 4, 3, 3), b=normal(4, 8, 3, 3, seed=1) * 3)
    weights = {name: weight_of(model, name).detach().clone() for name in "ab"}
    report = wavprune.fast.prune(
        model, "smallest", wavelet="identity", sparsity=0.75, scope=scope, backend=backend
    )
    assert report.kept == 144
    everything = torch.cat([weight.abs().flatten() for weight in weights.values()])
    for name, weight in weights.items():
        ranked = everything if scope == "global" else weight.abs().flatten()
        limit = ranked.sort().values[len(ranked) // 4 - 1]
        expected = torch.where(weight.abs() <= limit, weight, 0)
        assert torch.equal(weight_of(model, name), expected)
        assert report[name].kept == int((expected != 0).sum())
    assert (report["a"].wavelet, report["a"].method) == ("identity", "smallest")


def test_a_rule_scores_coefficients_of_any_basis() -> None:
    weight = normal(8, 4, 3, 3)
    basis = bases.named_basis("dct", (3, 3))
    A = torch.tensor(basis.analysis, dtype=torch.float32)
    coefficients = weight.flatten(2) @ A.T
    ranked = coefficients.abs().flatten().sort().values
    ref = LayerRef("conv", weight.clone())
    report = prune_layers([ref], PruneConfig("smallest", wavelet="dct", sparsity=0.5), masks=True)
    assert report.masks is not None
    kept = unpack(report.masks["conv"], 32, 9, flat=False).view(8, 4, 9)
    clear = (coefficients.abs() - ranked[143]).abs() > 1e-5
    assert torch.equal(kept[clear], (coefficients.abs() <= ranked[143])[clear])
    expected = torch.where(kept, coefficients, 0) @ A
    torch.testing.assert_close(ref.weight.flatten(2), expected, atol=1e-5, rtol=0)


def test_a_rule_that_draws_is_tried_with_every_seed() -> None:
    def trials(method: str) -> list[tuple[str, int]]:
        (configs,) = _Grid((0.5,), ("uhaar", "dct"), (method,), (3, 4), {}).plan()
        return [(config.wavelet, config.seed) for config in configs]

    assert trials("dice") == [("uhaar", 3), ("uhaar", 4), ("dct", 3), ("dct", 4)]
    assert trials("smallest") == [("uhaar", 0), ("dct", 0)]
    assert trials("random") == [("uhaar", 3), ("uhaar", 4)]
    assert trials("min_weight") == [("uhaar", 0)]
    for method, reads in (("dice", True), ("random", True), ("smallest", False), ("dwt", False)):
        assert ("seed" in unread_settings(PruneConfig(method=method))) != reads


def test_a_rule_that_gives_masks() -> None:
    model = model_of(conv=normal(4, 4, 3, 3))
    before = weight_of(model).detach().clone()
    report = wavprune.fast.prune(model, "checkerboard")
    assert report["conv"].kept == 72
    assert torch.equal(weight_of(model).flatten()[::2], before.flatten()[::2])
    assert not weight_of(model).flatten()[1::2].any()


def test_a_rule_is_told_what_it_may_not() -> None:
    model = model_of(conv=normal(4, 4, 3, 3))
    before = bits(weight_of(model))
    with pytest.raises(WavpruneError, match=r"percentile=50.* method='smallest' does not"):
        wavprune.fast.prune(model, "smallest", percentile=50)
    register("broken", type("Broken", (Rule,), {"masks": lambda *_: [torch.ones(2, 2)]})())
    try:
        with pytest.raises(WavpruneError, match=r"layer 'conv': the rule Broken gave a mask of"):
            wavprune.fast.prune(model, "broken")
    finally:
        RULES.unregister("broken")
    with torch.no_grad():
        weight_of(model)[0, 0, 0, 0] = torch.nan
    with pytest.raises(WavpruneError, match="layer 'conv': 1 of 144 weights are NaN"):
        wavprune.fast.prune(model, "smallest")
    with torch.no_grad():
        weight_of(model)[0, 0, 0, 0] = 0
    assert bits(weight_of(model))[4:] == before[4:]


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("method", ["smallest", "dice", "blind"])
@pytest.mark.parametrize("backend", BACKENDS)
def test_coefficients_that_overflow_have_no_masks(method: str, scope: str, backend: str) -> None:
    model = model_of(a=normal(2, 2, 4, 4), b=torch.full((2, 2, 4, 4), 3e38))
    before = [bits(weight_of(model, name)) for name in "ab"]
    settings = {"method": method, "sparsity": 0.5, "scope": scope, "backend": backend}
    with pytest.raises(WavpruneError, match="layer 'b': the coefficients overflow although every"):
        wavprune.fast.prune(model, wavelet="haar", **settings)  # type: ignore[arg-type]
    assert [bits(weight_of(model, name)) for name in "ab"] == before
    # In no basis there is no sum that could.
    wavprune.fast.prune(model, wavelet="identity", **settings)  # type: ignore[arg-type]
    assert weight_of(model, "b").isfinite().all()


@pytest.mark.parametrize("backend", [*BACKENDS, "loud"])
def test_a_new_basis_is_pruned_by_every_backend(backend: str) -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 2), nn.Conv2d(8, 8, 4))
    results = []
    for name in ("eager", backend):
        for seed, conv in enumerate(model):
            with torch.no_grad():
                weight = conv.get_parameter("weight")
                weight.copy_(normal(*weight.shape, seed=seed))
        report = wavprune.fast.prune(model, wavelet="hadamard", sparsity=0.5, backend=name)
        assert [row.wavelet for row in report] == ["hadamard", "hadamard"]
        assert {row.backend for row in report} == {name}
        results.append((report.kept, [p.detach().clone() for p in model.parameters()]))
    assert results[0][0] == results[1][0]
    for one, two in zip(results[0][1], results[1][1], strict=True):
        torch.testing.assert_close(one, two)


def test_a_new_basis_says_what_it_cannot() -> None:
    with pytest.raises(WavpruneError, match="layer '': no Hadamard matrix of 3x3; allowed: 2x2"):
        wavprune.fast.prune(nn.Conv2d(2, 2, 3), wavelet="hadamard")
    with pytest.raises(WavpruneError, match="unknown wavelet 'hadamar'; close to it: hadamard"):
        wavprune.fast.prune(nn.Conv2d(2, 2, 3), wavelet="hadamar")


def test_what_is_registered_anew_takes_effect_at_the_next_call() -> None:
    model = model_of(conv=normal(4, 4, 3, 3))
    assert wavprune.fast.prune(model, "smallest", wavelet="identity", sparsity=0.5).kept == 72
    register("smallest", Checkerboard())
    with torch.no_grad():
        weight_of(model).copy_(normal(4, 4, 3, 3))
    wavprune.fast.prune(model, "smallest", wavelet="identity", sparsity=0.5)
    assert not weight_of(model).flatten()[1::2].any()
