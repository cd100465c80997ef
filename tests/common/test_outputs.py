from __future__ import annotations

import pytest
import torch

from wavprune.common.outputs import are_logits, logits_of

LOGITS = torch.tensor([[3.0, -1.0, 0.5], [0.0, 0.0, 7.0], [-2.0, 1.0, 1.0]])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_probabilities_become_logits_of_the_same_probabilities(dtype: torch.dtype) -> None:
    probabilities = LOGITS.softmax(1).to(dtype)
    again = logits_of(probabilities).softmax(1)
    torch.testing.assert_close(again, probabilities.to(again.dtype), rtol=1e-2, atol=1e-3)
    assert are_logits([logits_of(probabilities)])


def test_a_class_of_probability_0_has_a_finite_logit() -> None:
    for dtype in (torch.float32, torch.float16):
        logits = logits_of(torch.tensor([[1.0, 0.0], [0.25, 0.75]], dtype=dtype))
        assert bool(torch.isfinite(logits).all())
        assert logits.argmax(1).tolist() == [0, 1]


@pytest.mark.parametrize(
    "outputs",
    [
        LOGITS,
        LOGITS.sigmoid(),
        LOGITS.softmax(1) * 1.01,
        LOGITS.softmax(1) - 1 / 3,
        torch.ones(4, 1),
        torch.full((2, 2, 2), 0.5),
        torch.empty(0, 3),
        torch.tensor([[0, 1], [1, 0]]),
    ],
    ids=["logits", "sigmoid", "sums", "signs", "one column", "three axes", "empty", "integers"],
)
def test_other_outputs_stay_as_they_are(outputs: torch.Tensor) -> None:
    assert logits_of(outputs) is outputs


def test_gradients_pass() -> None:
    values = LOGITS.clone().requires_grad_(True)
    (ours,) = torch.autograd.grad(logits_of(values.softmax(1))[:, 0].sum(), values)
    (theirs,) = torch.autograd.grad(values.log_softmax(1)[:, 0].sum(), values)
    torch.testing.assert_close(ours, theirs)


def test_logits_are_told_from_values_of_a_sigmoid() -> None:
    assert are_logits([LOGITS, -LOGITS])
    assert not are_logits([LOGITS, LOGITS.sigmoid()])
    assert not are_logits([torch.full((2, 3, 4), -1.0)])
