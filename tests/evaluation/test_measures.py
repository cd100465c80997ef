from __future__ import annotations

import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional

from tests.support.cases import quick
from wavprune.evaluation.measures import against_labels, against_reference
from wavprune.evaluation.predictions import Predictions


def by_torchmetrics(predictions: Predictions) -> dict[str, float]:
    """What earlier versions reported."""
    from torchmetrics import classification as metrics

    classes = predictions.logits.shape[1]
    kinds = {
        "top1": metrics.MulticlassAccuracy(classes, average="micro"),
        "top5": metrics.MulticlassAccuracy(classes, average="micro", top_k=min(5, classes)),
        **{
            f"{name}_{average}": metric(classes, average=average)
            for name, metric in (
                ("precision", metrics.MulticlassPrecision),
                ("recall", metrics.MulticlassRecall),
                ("f1", metrics.MulticlassF1Score),
            )
            for average in ("macro", "weighted")
        },
    }
    return {name: float(metric(*predictions)) for name, metric in kinds.items()}


@quick
@given(
    samples=st.integers(1, 80),
    classes=st.integers(2, 12),
    present=st.integers(1, 12),
    ties=st.booleans(),
    chunk=st.sampled_from([7, 4096]),
    seed=st.integers(0, 999),
)
def test_they_are_torchmetrics_to_the_last_bit(
    samples: int, classes: int, present: int, ties: bool, chunk: int, seed: int
) -> None:
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(min(present, classes), (samples,), generator=draw)
    logits = torch.randn(samples, classes, generator=draw)
    logits[torch.arange(samples), labels] += 1
    if ties:
        logits = logits.round()
    predictions = Predictions(logits, labels)
    module = sys.modules["wavprune.evaluation.measures"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "CHUNK", chunk)
        found = against_labels(predictions)
    expected = by_torchmetrics(predictions)
    assert {name: found[name] for name in expected} == expected
    assert found["loss"] == pytest.approx(
        float(functional.cross_entropy(logits.double(), labels)), rel=1e-12
    )
    assert sum(map(sum, found["confusion"])) == samples


@pytest.mark.parametrize("chunk", [3, 4096])
def test_what_is_summed_in_chunks_is_the_same(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    labels = torch.arange(20) % 4
    ours, theirs = (Predictions(torch.randn(20, 4), labels) for _ in range(2))
    monkeypatch.setattr(sys.modules["wavprune.evaluation.measures"], "CHUNK", chunk)
    found = against_reference(ours, theirs)
    log_p, log_q = (each.logits.double().log_softmax(1) for each in (theirs, ours))
    assert found["kl"] == pytest.approx(float((log_p.exp() * (log_p - log_q)).sum() / 20))
    same = (ours.logits.argmax(1) == theirs.logits.argmax(1)).double().mean()
    assert found["agreement"] == float(same)
