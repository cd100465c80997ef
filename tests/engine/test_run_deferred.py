"""Runs whose numbers the host has not read when they end, as on a GPU.

Tensors that say they are on a device stand for those: nothing else about them differs.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import pytest
import torch

import wavprune
from tests.support.cases import model_of, normal, weight_of
from wavprune import PruneConfig, PruneReport, WavpruneError, backends
from wavprune.backends import Job, Layer, Selection
from wavprune.backends.eager import EagerBackend
from wavprune.backends.registry import _REGISTRY
from wavprune.engine import plan as planning
from wavprune.engine.run import prune_within

# Not the device of a tensor made on "cpu": weights are copied there as they are to a GPU.
ELSEWHERE = torch.device("cpu", 0)
# Methods that choose masks have no thresholds, and the report says NaN.
METHODS: dict[str, dict[str, Any]] = {
    "uhaar": {},
    "global": {"scope": "global"},
    "random": {"method": "random"},
    "2:4": {"method": "min_weight", "pattern": "2:4"},
    "2:4 by basis": {"wavelet": "identity", "pattern": "2:4"},
}
each_method = pytest.mark.parametrize("settings", METHODS.values(), ids=METHODS)


class There(torch.Tensor):
    """A tensor that says it is on a GPU."""

    device = torch.device("cuda", 0)

    def to(self, *_: object, **__: object) -> There:
        return self


class Remote(EagerBackend):
    """Gives its numbers as tensors on a device."""

    name = "remote"
    can_capture = True

    def threshold(self, jobs: Sequence[Job]) -> torch.Tensor:
        return super().threshold(jobs).as_subclass(There)

    def masks(self, layers: Sequence[Layer], thresholds: torch.Tensor) -> list[torch.Tensor]:
        return super().masks(layers, thresholds.as_subclass(torch.Tensor))

    def apply_(self, layers: Sequence[Layer], selection: Selection) -> torch.Tensor:
        if isinstance(selection, There):
            selection = selection.as_subclass(torch.Tensor)
            # On a device no one sees it before the report is read.
            if selection.isnan().any():
                return torch.full((len(layers), 4), torch.nan).double().as_subclass(There)
        return super().apply_(layers, selection).as_subclass(There)


@pytest.fixture(autouse=True)
def remote(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    module = ModuleType("remote_backend")
    module.__dict__["make"] = Remote
    monkeypatch.setitem(sys.modules, module.__name__, module)
    backends.register("remote", module.__name__, automatic=False)
    yield
    _REGISTRY.unregister("remote")


def pruned(weight: torch.Tensor, **settings: Any) -> tuple[torch.Tensor, PruneReport]:
    model = model_of(conv=weight)
    return weight_of(model), wavprune.fast.prune(model, **settings)


@each_method
def test_a_report_that_is_read_late_says_what_another_says(settings: dict[str, Any]) -> None:
    expected, here = pruned(normal(8, 8, 3, 3), backend="eager", **settings)
    weight, there = pruned(normal(8, 8, 3, 3), backend="remote", **settings)
    assert torch.equal(weight, expected)
    assert there.layers[0].device == "cuda:0"
    assert there.kept == here.kept
    assert there.relative_error == here.relative_error


def test_it_says_late_that_a_weight_is_not_finite() -> None:
    weight = normal(8, 8, 3, 3)
    weight[0, 0, 0, 0] = torch.inf
    after, report = pruned(weight.clone(), backend="remote")
    assert torch.equal(after, weight)
    with pytest.raises(WavpruneError, match=r"layer 'conv': 1 of 576 weights are NaN or infinite"):
        _ = report.kept


def test_a_rule_that_chooses_masks_says_at_once_that_a_weight_is_not_finite() -> None:
    weight = normal(8, 8, 3, 3)
    weight[0, 0, 0, 0] = torch.nan
    with pytest.raises(WavpruneError, match=r"layer 'conv': 1 of 576 weights"):
        pruned(weight, backend="remote", **METHODS["2:4"])


def test_masks_within_masks_prune_copies() -> None:
    model = model_of(conv=normal(8, 8, 3, 3))
    refs, plan = planning.plan_model(model, PruneConfig(backend="eager", sparsity=0.5))
    first = wavprune.prune_layers(refs, plan.config, masks=True)
    assert first.masks is not None
    narrower = planning.plan_layers(refs, PruneConfig(backend="remote", sparsity=0.75))
    report = prune_within(narrower, refs, [first.masks["conv"]])
    assert report.kept == 8 * 8 * 9 // 4


@pytest.fixture
def copied(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Lets weights be copied to another device and back."""

    def start() -> None:
        monkeypatch.setattr(planning, "compute_device", lambda _: ELSEWHERE)

    return start


@each_method
@pytest.mark.parametrize("backend", ["eager", "remote"])
def test_weights_that_are_copied_to_a_device_and_back(
    settings: dict[str, Any], backend: str, copied: Callable[[], None]
) -> None:
    expected, here = pruned(normal(8, 8, 3, 3), backend="eager", **settings)
    copied()
    weight, there = pruned(normal(8, 8, 3, 3), backend=backend, **settings)
    assert torch.equal(weight, expected)
    assert there.kept == here.kept


def test_a_copied_weight_that_is_not_finite_is_refused_at_once(copied: Callable[[], None]) -> None:
    copied()
    with pytest.raises(WavpruneError, match=r"layer 'conv': 1 of 1 weights are NaN"):
        pruned(torch.full((1, 1, 1, 1), torch.nan), backend="remote")
