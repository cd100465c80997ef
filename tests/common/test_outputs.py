from __future__ import annotations

import pytest
import torch

from wavprune.common.outputs import are_logits, are_probabilities, log_of

LOGITS = torch.tensor([[3.0, -1.0, 0.5], [0.0, 0.0, 7.0], [-2.0, 1.0, 1.0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_a_softmax_gives_logits_of_the_same_probabilities(dtype: torch.dtype) -> None:
    wide = 3 * torch.randn(5000, 200, generator=torch.Generator().manual_seed(0))
    probabilities = wide.to(dtype).softmax(1)
    assert are_probabilities(probabilities)
    again = log_of(probabilities)
    torch.testing.assert_close(
        again.softmax(1), probabilities.to(again.dtype), rtol=1e-2, atol=1e-6
    )
    assert are_logits([again])


def test_a_class_of_probability_0_has_a_finite_logit() -> None:
    for dtype in (torch.float32, torch.float16):
        logits = log_of(torch.tensor([[1.0, 0.0], [0.25, 0.75]], dtype=dtype))
        assert bool(torch.isfinite(logits).all())
        assert logits.argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize(
    "outputs",
    [
        LOGITS,
        LOGITS.sigmoid(),
        torch.cat([LOGITS.softmax(1), LOGITS.sigmoid()]),
        LOGITS.softmax(1) * 1.0001,
        LOGITS.softmax(1) - 1 / 3,
        torch.ones(4, 1),
        torch.full((2, 2, 2), 0.5),
        torch.empty(0, 3),
        torch.tensor([[0, 1], [1, 0]]),
        torch.tensor([[torch.nan, 1.0]]),
    ],
    ids=[
        "logits",
        "sigmoid",
        "some",
        "sums",
        "signs",
        "column",
        "axes",
        "empty",
        "integers",
        "nan",
    ],
)
def test_other_outputs_are_none(outputs: torch.Tensor) -> None:
    assert not are_probabilities(outputs)


def test_gradients_pass() -> None:
    values = LOGITS.clone().requires_grad_(True)
    (ours,) = torch.autograd.grad(log_of(values.softmax(1))[:, 0].sum(), values)
    (theirs,) = torch.autograd.grad(values.log_softmax(1)[:, 0].sum(), values)
    torch.testing.assert_close(ours, theirs)


def test_logits_are_told_from_values_of_a_sigmoid() -> None:
    assert are_logits([LOGITS, -LOGITS])
    # A batch of small ones is one of logits still.
    assert are_logits([LOGITS, torch.full((1, 3), 0.25), torch.empty(0, 3)])
    assert not are_logits([LOGITS.sigmoid(), (2 * LOGITS).sigmoid()])
    assert not are_logits([LOGITS, torch.full((2, 3, 4), -1.0)])
