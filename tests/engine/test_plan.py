from __future__ import annotations

import gc
import sys
import weakref
from dataclasses import replace
from types import FrameType
from typing import Any

import pytest
import torch
from torch import nn

import wavprune
from tests.support.cases import bits, model_of, normal, weight_of
from wavprune import PruneConfig
from wavprune.engine import plan as planning
from wavprune.engine.layers import LayerRef, select_layers
from wavprune.engine.plan import plan_again, plan_layers, plan_model
from wavprune.errors import WavpruneError


def net() -> nn.Sequential:
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Sequential(nn.Conv2d(8, 8, 3)))
    for seed, parameter in enumerate(model.parameters()):
        with torch.no_grad():
            parameter.copy_(normal(*parameter.shape, seed=seed))
    return model


def test_the_same_call_plans_once() -> None:
    model, config = net(), PruneConfig(wavelet="haar")
    refs, plan = plan_model(model, config)
    again, other = plan_model(model, PruneConfig(wavelet="haar"))
    assert other is plan
    assert [ref.weight for ref in again] == [ref.weight for ref in refs]
    assert plan_model(model, PruneConfig(wavelet="dct"))[1] is not plan


def test_weights_like_those_before_are_planned_once() -> None:
    def plan(weight: torch.Tensor, name: str = "conv", **settings: Any) -> object:
        return plan_again([LayerRef(name, weight)], PruneConfig(**settings))

    one, other = normal(8, 3, 3, 3, seed=1), normal(8, 3, 3, 3, seed=2)
    first = plan(one, wavelet="haar")
    assert plan(other, wavelet="haar") is first
    assert plan(one, wavelet="dct") is not first
    assert plan(one, "other", wavelet="haar") is not first
    assert plan(one.double(), wavelet="haar") is not first
    assert plan(one[:4], wavelet="haar") is not first
    assert plan(one.to(memory_format=torch.channels_last), wavelet="haar") is not first
    weight = weakref.ref(one)
    del one
    gc.collect()
    assert weight() is None


def test_a_plan_of_a_basis_that_depends_on_the_weights_is_made_anew() -> None:
    model, config = net(), PruneConfig(wavelet="klt")
    assert plan_model(model, config)[1] is not plan_model(model, config)[1]
    refs = select_layers(model, config)
    assert plan_again(refs, config) is not plan_again(refs, config)


def replace_layer(model: nn.Sequential) -> None:
    model[0] = nn.Conv2d(3, 16, 3)


def replace_parameter(model: nn.Sequential) -> None:
    model[0].weight = nn.Parameter(normal(8, 3, 3, 3, seed=5))


def replace_data(model: nn.Sequential) -> None:
    model[0].weight.data = normal(8, 3, 5, 5, seed=5)


def change_dtype(model: nn.Sequential) -> None:
    model.double()


def change_layout(model: nn.Sequential) -> None:
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]


def add_a_layer(model: nn.Sequential) -> None:
    model.append(nn.Conv2d(8, 4, 3))


def rename_a_layer(model: nn.Sequential) -> None:
    model._modules["last"] = model._modules.pop("2")


def tie(model: nn.Sequential) -> None:
    conv = nn.Conv2d(8, 8, 3)
    conv.weight = model.get_parameter("2.0.weight")
    model[0] = conv


@pytest.mark.parametrize(
    "change",
    [
        replace_layer,
        replace_parameter,
        replace_data,
        change_dtype,
        change_layout,
        add_a_layer,
        rename_a_layer,
        tie,
    ],
)
def test_a_changed_model_is_planned_anew(change: Any) -> None:
    model, fresh = net(), net()
    wavprune.fast.prune(model, sparsity=0.0)
    torch.manual_seed(0)
    change(model)
    torch.manual_seed(0)
    change(fresh)
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        two.data.copy_(one.data)
    result = wavprune.fast.prune(model, wavelet="haar", scope="global")
    expected = wavprune.fast.prune(fresh, wavelet="haar", scope="global")
    assert result == expected
    for one, two in zip(model.parameters(), fresh.parameters(), strict=True):
        assert bits(one) == bits(two)


def test_a_device_is_looked_up_again(monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    for index in (None, 0):
        device = torch.device("cpu") if index is None else torch.device("cpu", index)
        monkeypatch.setattr(planning, "compute_device", lambda _, device=device: device)
        _, plan = plan_model(model, PruneConfig(device="cpu"))
        assert plan.device == device
        assert (
            plan_again(select_layers(model, PruneConfig()), PruneConfig(device="cpu")).device
            == device
        )


def test_a_layer_that_moves_to_another_parent_has_another_name() -> None:
    model = nn.ModuleDict({"a": nn.ModuleDict({"x": nn.Conv2d(4, 4, 3)}), "b": nn.ModuleDict()})
    assert wavprune.fast.prune(model).layers[0].name == "a.x"
    model["b"]["x"] = model["a"].pop("x")  # type: ignore[operator]
    assert wavprune.fast.prune(model).layers[0].name == "b.x"


@pytest.mark.parametrize(
    "change",
    [
        {"destination": torch.device("cuda", 1)},
        {"compute_dtype": torch.float64},
        {"seed": 3},
    ],
)
def test_layers_that_no_single_call_takes_are_not_uniform(change: dict[str, Any]) -> None:
    options = plan_model(net(), PruneConfig(wavelet="haar"))[1].options
    assert planning.is_uniform(options)
    (first,), (last,) = options
    assert not planning.is_uniform([(first,), (replace(last, **change),)])


def test_what_was_removed_from_a_model_is_let_go() -> None:
    model = net()
    report = wavprune.fast.prune(model)
    gone = weakref.ref(model[0].weight)
    storage = weakref.ref(model.get_parameter("0.weight").untyped_storage())
    model[0] = nn.Identity()
    gc.collect()
    assert gone() is None
    assert storage() is None
    assert len(report) == 2
    alone = weakref.ref(model)
    del model
    gc.collect()
    assert alone() is None


def test_a_call_reaches_the_compiled_code_in_few_frames(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wavprune.ops")
    model = net()
    wavprune.fast.prune(model)
    depths: list[int] = []
    call = torch._ops.OpOverloadPacket.__call__

    def counted(self: Any, *args: Any, **kwargs: Any) -> Any:
        frame: FrameType | None = sys._getframe(1)
        depth = 0
        while frame is not None and frame.f_code.co_name != "warm_call":
            depth, frame = depth + 1, frame.f_back
        depths.append(depth)
        return call(self, *args, **kwargs)

    def warm_call() -> None:
        wavprune.fast.prune(model)

    monkeypatch.setattr(torch._ops.OpOverloadPacket, "__call__", counted)
    warm_call()
    assert len(depths) == 2
    assert max(depths) <= 12


def test_settings_that_do_not_fit_are_refused_by_the_plan() -> None:
    refs = select_layers(net(), PruneConfig())
    with pytest.raises(WavpruneError, match="unknown backend 'eagr'"):
        plan_layers(refs, PruneConfig(backend="eagr"))


@pytest.mark.parametrize("wavelet", ["haar", "db38"])
def test_levels_that_do_not_end_are_refused(wavelet: str) -> None:
    model = model_of(conv=normal(4, 4, 3, 3))
    before = bits(weight_of(model))
    with pytest.raises(
        WavpruneError,
        match=r"layer 'conv': level=200 with force_level=True on 3x3.*allowed: 1 to 5",
    ):
        wavprune.fast.prune(model, wavelet=wavelet, level=200, force_level=True)
    assert bits(weight_of(model)) == before


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_data_driven_basis_of_a_weight_that_is_not_finite_names_the_layer(bad: float) -> None:
    weights = {"fine": normal(4, 4, 3, 3), "bad": normal(4, 4, 3, 3), "last": normal(4, 4, 5, 5)}
    weights["bad"][3, 3, 2, 2] = bad
    before = [bits(weight) for weight in weights.values()]
    model = model_of(**weights)
    with pytest.raises(WavpruneError, match="layer 'bad': 1 of 144 weights are NaN or infinite"):
        wavprune.fast.prune(model, wavelet="klt")
    assert [bits(weight) for weight in weights.values()] == before


def test_a_data_driven_basis_that_does_not_exist_names_the_layer() -> None:
    for shape, reason in (((2, 2, 65, 64), "at most 4096 values"), ((8, 8), "every other basis")):
        refs = [LayerRef("fine", normal(4, 4, 3, 3)), LayerRef("odd", torch.zeros(shape))]
        with pytest.raises(WavpruneError, match=f"layer 'odd': .*{reason}"):
            plan_layers(refs, PruneConfig(wavelet="klt"))


def test_a_layers_klt_is_the_same_whichever_other_layers_are_pruned() -> None:
    weights = {f"{k}x{n}": normal(n, 3, k, k, seed=n) for k in (1, 2, 3, 5) for n in (1, 7, 40)}
    refs = [LayerRef(name, weight) for name, weight in weights.items()]
    config = PruneConfig(wavelet="klt")
    together = plan_layers(refs, config).layers
    for ref, layer in zip(refs, together, strict=True):
        (alone,) = plan_layers([ref], config).layers
        assert alone.basis.analysis.tobytes() == layer.basis.analysis.tobytes()
