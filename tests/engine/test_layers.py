from __future__ import annotations

import pytest
import torch
from torch import nn

from wavprune import PruneConfig
from wavprune.engine.layers import non_finite, select_layers, select_names


class Causal(nn.Conv2d):
    """A user's own convolution."""


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 7)
        self.layer1 = nn.Sequential(nn.Conv2d(8, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3, groups=8))
        self.layer2 = nn.Sequential(Causal(8, 8, 3), nn.BatchNorm2d(8))
        self.other = nn.ModuleList([nn.Conv1d(8, 8, 3), nn.ConvTranspose2d(8, 8, 3)])
        self.fc = nn.Linear(8, 2)


CONVOLUTIONS = ["stem", "layer1.0", "layer1.2", "layer2.0", "other.0", "other.1"]


def selected(model: nn.Module, **settings: object) -> list[str]:
    return [ref.name for ref in select_layers(model, PruneConfig(**settings))]  # type: ignore[arg-type]


def test_every_convolution_is_selected_in_the_models_order() -> None:
    assert selected(Net()) == CONVOLUTIONS


def test_the_weights_are_the_models_own() -> None:
    net = Net()
    refs = select_layers(net, PruneConfig())
    assert refs[0].weight is net.stem.weight


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"targets": "stem"}, ["stem"]),
        ({"targets": ["layer2.0", "stem"]}, ["stem", "layer2.0"]),
        ({"targets": "layer1.*"}, ["layer1.0", "layer1.2"]),
        ({"targets": "layer?.0"}, ["layer1.0", "layer2.0"]),
        ({"targets": "layer[12].0"}, ["layer1.0", "layer2.0"]),
        ({"targets": "re:layer"}, ["layer1.0", "layer1.2", "layer2.0"]),
        ({"targets": r"re:.*\.0$"}, ["layer1.0", "layer2.0", "other.0"]),
        ({"ignore": "stem"}, ["layer1.0", "layer1.2", "layer2.0", "other.0", "other.1"]),
        ({"ignore": ["stem", "layer1.*"]}, ["layer2.0", "other.0", "other.1"]),
        ({"targets": "layer*", "ignore": "re:.*2$"}, ["layer1.0", "layer2.0"]),
        ({"targets": "*"}, [*CONVOLUTIONS, "fc"]),
        ({"targets": "fc"}, ["fc"]),
        ({"targets": "*", "ignore": "layer*"}, ["stem", "other.0", "other.1", "fc"]),
    ],
)
def test_targets_and_ignore(settings: dict[str, object], expected: list[str]) -> None:
    assert selected(Net(), **settings) == expected


def test_linear_layers_are_selected_by_targets_only() -> None:
    with pytest.raises(ValueError, match="'fc' matches no layer; the layers are stem"):
        selected(Net(), ignore="fc")
    net = nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))
    with pytest.raises(ValueError, match="no convolution to prune; its Linear layers are pruned"):
        selected(net)
    assert selected(net, targets="1") == ["1"]


def test_a_regular_expression_matches_from_the_beginning() -> None:
    assert selected(Net(), targets="re:(stem|layer2)") == ["stem", "layer2.0"]
    with pytest.raises(ValueError, match=r"'re:tem' matches no layer"):
        selected(Net(), targets="re:tem")


def test_a_name_with_the_letters_of_a_glob_is_taken_as_it_is() -> None:
    assert select_names(["a[0]", "a0"], PruneConfig(targets=("a[0]",))) == ["a[0]"]


def test_case_matters() -> None:
    with pytest.raises(ValueError, match="'STEM' matches no layer"):
        selected(Net(), targets="STEM")


def test_a_model_that_is_a_convolution_has_one_layer_without_a_name() -> None:
    assert selected(nn.Conv2d(1, 1, 3)) == [""]


def test_a_shared_module_and_a_shared_weight_appear_once() -> None:
    conv, twin = nn.Conv2d(4, 4, 3), nn.Conv2d(4, 4, 3)
    twin.weight = conv.weight
    assert selected(nn.Sequential(conv, nn.ReLU(), conv, twin)) == ["0"]
    assert selected(nn.Sequential(conv, twin), targets="1") == ["1"]


def test_non_finite_counts_nan_and_both_infinities() -> None:
    values = torch.tensor([1.0, float("nan"), float("inf"), -float("inf"), 0.0])
    assert non_finite(values) == 3
    assert non_finite(values[:1]) == 0
