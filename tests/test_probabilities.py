"""Every door takes a network that ends in a softmax for what it is: the same network of logits."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import wavprune
from wavprune.evaluation.unlabelled import distance

INPUTS = [torch.randn(32, 2, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(2)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(2, 8, 3), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten(), nn.Linear(128, 5)
    )
    with torch.no_grad():
        net[4].get_parameter("weight").mul_(20)
    return net.eval()


LOGITS = network()
SOFTMAX = nn.Sequential(network(), nn.Softmax(1))
with torch.no_grad():
    LABELLED = [(x, LOGITS(x).argmax(1)) for x in INPUTS]


def pruned(model: nn.Module) -> nn.Module:
    model = copy.deepcopy(model)
    wavprune.fast.prune(model, sparsity=0.6)
    return model


def both(door: Any) -> tuple[Any, Any]:
    return door(LOGITS), door(SOFTMAX)


@pytest.mark.parametrize("reference", ["model", "predictions", "outputs"])
def test_evaluate(reference: str) -> None:
    def door(model: nn.Module) -> Any:
        known = wavprune.predict(model, LABELLED)
        dense: Any = {"model": model, "predictions": known, "outputs": known.logits}[reference]
        return wavprune.evaluate(pruned(model), LABELLED, dense, timing=False)

    ours, theirs = both(door)
    assert ours.kl > 0.01
    for name in ("kl", "loss", "top1", "agreement"):
        assert getattr(theirs, name) == pytest.approx(getattr(ours, name), rel=1e-4), name


def test_compare() -> None:
    def door(model: nn.Module) -> Any:
        return wavprune.compare(
            model, LABELLED, sparsities=[0.6], wavelets=["dct"], methods=["dwt"]
        )

    ours, theirs = (table.trials[0].evaluation for table in both(door))
    assert ours.kl > 0.01
    assert theirs.kl == pytest.approx(ours.kl, rel=1e-4)


def test_without_labels() -> None:
    ours, theirs = both(lambda model: distance(pruned(model), model, INPUTS))
    assert ours.kl > 0.01
    assert theirs.kl == pytest.approx(ours.kl, rel=1e-4)


def test_files_for_a_divergence(tmp_path: Path) -> None:
    def door(model: nn.Module) -> Any:
        path = tmp_path / "small.safetensors"
        report = wavprune.checkpoint.save(model, path, calibration=INPUTS, target_kl=0.01)
        again = copy.deepcopy(model)
        again.load_state_dict(wavprune.checkpoint.load(path))
        return report, distance(again, model, INPUTS).kl

    (ours, _), (theirs, kl) = both(door)
    assert theirs.measured_kl == pytest.approx(ours.measured_kl, rel=0.02)
    assert theirs.predicted_kl == pytest.approx(ours.predicted_kl, rel=0.02)
    assert 0.003 < kl < 0.03


def test_pruning_from_inputs() -> None:
    def door(model: nn.Module) -> Any:
        model = copy.deepcopy(model)
        return wavprune.fast.prune(model, sparsity=0.6, calibration=INPUTS).decision

    ours, theirs = both(door)
    for name in ("magnitude", "selected bn"):
        assert theirs.losses[name] == pytest.approx(ours.losses[name], rel=1e-3)
