from __future__ import annotations

import copy
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from wavprune import PruneConfig, Pruner
from wavprune.errors import WavpruneError
from wavprune.training.schedules import Cubic

# Short runs on purpose.
pytestmark = pytest.mark.filterwarnings("ignore:finished after step")

FIRST_FORMAT = Path(__file__).parent / "states" / "format-1.pt"
CONFIGS = {
    "uhaar": PruneConfig(sparsity=0.6),
    "klt": PruneConfig(wavelet="klt", sparsity=0.6),
    "auto": PruneConfig(wavelet="auto", scope="global"),
    "percentile": PruneConfig(wavelet="haar", percentile=60),
}


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(2, 4, 3, bias=False), nn.Conv2d(4, 3, 1, bias=False))


def pruner_of(net: nn.Module, name: str) -> Pruner:
    schedule = Cubic(0.2, 0.7, 0, 4, 2) if name == "auto" else None
    return Pruner(net, CONFIGS[name], schedule)


@pytest.mark.parametrize("name", CONFIGS)
def test_states_of_the_first_format_are_read(name: str) -> None:
    stored = torch.load(FIRST_FORMAT, weights_only=True)[name]
    net = network()
    net.load_state_dict(stored["weights"])
    pruner = pruner_of(net, name)
    assert stored["pruner"]["format"] == 1
    assert pruner.describes(stored["pruner"])
    pruner.load_state_dict(stored["pruner"])
    assert pruner.steps == 3
    report = pruner.finish()
    rows = stored["pruner"]["report"]["layers"]
    assert [layer.kept for layer in report] == [row["kept"] for row in rows]
    assert report.settings.wavelet == CONFIGS[name].wavelet
    again = pruner_of(net, name)
    again.load_state_dict(pruner.state_dict())
    assert again.state_dict()["format"] == 2
    again.step()
    assert again.finish().kept <= report.kept
    with torch.no_grad():
        net.get_parameter("0.weight").copy_(network().get_parameter("0.weight"))
    assert not pruner_of(net, name).describes(stored["pruner"])


def test_masks_are_bound_to_weights() -> None:
    net = network()
    pruner = pruner_of(net, "uhaar")
    pruner.step()
    state = pruner.state_dict()
    assert pruner.describes(state)
    with torch.no_grad():
        net.get_parameter("1.weight")[0, 0] += 1e-6
    assert not pruner.describes(state)


def damaged(value: Any, generator: random.Random) -> Any:
    """A copy with one thing in it replaced."""
    if isinstance(value, dict) and value and generator.random() < 0.9:
        key = generator.choice(list(value))
        if generator.random() < 0.1:
            return {k: v for k, v in value.items() if k != key}
        return {**value, key: damaged(value[key], generator)}
    if isinstance(value, list) and value and generator.random() < 0.9:
        i = generator.randrange(len(value))
        return [*value[:i], damaged(value[i], generator), *value[i + 1 :]]
    if isinstance(value, torch.Tensor) and generator.random() < 0.7:
        options = [
            value[:-1],
            value.float(),
            value.to("meta"),
            ~value if value.dtype == torch.uint8 else value * torch.nan,
            value[None],
            value.to_sparse() if value.ndim == 2 else value[:0],
            value * 2,
        ]
        return generator.choice(options)
    odd: list[Any] = [
        None,
        -1,
        10**40,
        2.5,
        float("nan"),
        "x",
        b"x",
        [],
        {},
        (1, 2),
        True,
        torch.ones(2, 2),
    ]
    return generator.choice(odd)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.filterwarnings("ignore:.* are not pruned as their masks say")
def test_a_damaged_state_is_refused_or_harmless(name: str) -> None:
    net = network()
    pruner = pruner_of(net, name)
    pruner.step()
    state = pruner.state_dict()
    fresh = pruner_of(net, name)
    before = str(fresh.state_dict())
    generator = random.Random(0)
    refused = 0
    for _ in range(300):
        try:
            fresh.load_state_dict(damaged(copy.deepcopy(state), generator))
        except WavpruneError:
            refused += 1
            assert str(fresh.state_dict()) == before
            continue
        # What was taken is fit for use.
        str(fresh.finish(enforce=True) if fresh.masks else fresh.steps)
        fresh.step()
        fresh.state_dict()
        fresh = pruner_of(net, name)
    assert refused > 200


@pytest.mark.parametrize("state", [None, 7, [], {}, "state", {"format": 2}, {"format": [1]}])
def test_what_is_no_state_is_refused(state: Any) -> None:
    with pytest.raises(WavpruneError, match="the state"):
        pruner_of(network(), "uhaar").load_state_dict(state)
