from __future__ import annotations

import copy
import json
import math
import sys
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from sklearn import metrics
from torch import nn
from torch.nn import functional

import wavprune
from tests.support.cases import quick
from wavprune import Evaluation, demo, evaluate, predict, stored_bytes

Batches = list[tuple[torch.Tensor, torch.Tensor]]


class Lookup(nn.Module):
    """Answers sample i with row i of its logits."""

    def __init__(self, logits: torch.Tensor) -> None:
        super().__init__()
        self.logits = nn.Parameter(logits)

    def forward(self, samples: torch.Tensor) -> torch.Tensor:
        return self.logits[samples]


def lookup(
    samples: int, classes: int, batch: int = 16, seed: int = 0, present: int | None = None
) -> tuple[Lookup, Batches]:
    """A model with given answers, and a loader of labels that it often gets right."""
    draw = torch.Generator().manual_seed(seed)
    labels = torch.randint(present or classes, (samples,), generator=draw)
    logits = torch.randn(samples, classes, generator=draw)
    logits[torch.arange(samples), labels] += 1
    inputs = torch.split(torch.arange(samples), batch)
    return Lookup(logits), list(zip(inputs, torch.split(labels, batch), strict=True))


def answers(model: Lookup, loader: Batches) -> tuple[Any, Any]:
    return model.logits.detach().numpy(), torch.cat([labels for _, labels in loader]).numpy()


@quick
@given(
    samples=st.integers(1, 60),
    classes=st.integers(2, 12),
    seed=st.integers(0, 1000),
    few=st.booleans(),
)
def test_the_measures_are_those_of_scikit_learn(
    samples: int, classes: int, seed: int, few: bool
) -> None:
    model, loader = lookup(samples, classes, seed=seed, present=2 if few else None)
    found = evaluate(model, loader, timing=False)
    logits, labels = answers(model, loader)
    predicted = logits.argmax(1)
    assert (found.samples, found.classes) == (samples, classes)
    assert found.top1 == pytest.approx(metrics.accuracy_score(labels, predicted))
    assert found.loss == pytest.approx(
        metrics.log_loss(
            labels, torch.from_numpy(logits).double().softmax(1).numpy(), labels=range(classes)
        ),
        rel=1e-5,
    )
    for average in ("macro", "weighted"):
        precision, recall, f1, _ = metrics.precision_recall_fscore_support(
            labels, predicted, average=average, zero_division=0
        )
        assert getattr(found, f"precision_{average}") == pytest.approx(precision)
        assert getattr(found, f"recall_{average}") == pytest.approx(recall)
        assert getattr(found, f"f1_{average}") == pytest.approx(f1)
    confusion = metrics.confusion_matrix(labels, predicted, labels=range(classes))
    assert found.confusion == tuple(map(tuple, confusion.tolist()))


@pytest.mark.parametrize(("classes", "k"), [(3, 3), (5, 5), (20, 5)])
def test_top5_takes_as_many_classes_as_there_are(classes: int, k: int) -> None:
    model, loader = lookup(200, classes)
    logits, labels = answers(model, loader)
    among = np.argsort(-logits, axis=1)[:, :k] == labels[:, None]
    assert evaluate(model, loader, timing=False).top5 == pytest.approx(among.any(1).mean())


def test_neither_batches_nor_chunks_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    results = []
    for batch, rows in ((50, 4096), (1, 4096), (7, 4096), (50, 9)):
        # The package's name for the function hides the module.
        monkeypatch.setattr(sys.modules["wavprune.evaluation.measures"], "CHUNK", rows)
        model, loader = lookup(50, 4, batch)
        results.append(evaluate(model, loader, reference=model, timing=False).to_dict())
    confusions = [result.pop("confusion") for result in results]
    assert confusions[1:] == confusions[:1] * 3
    assert results[1:] == [pytest.approx(results[0])] * 3


def test_a_reference_is_a_model_or_what_it_predicted() -> None:
    (model, loader), (other, _) = lookup(80, 6, seed=1), lookup(80, 6, seed=2)
    predictions = predict(other, loader)
    assert torch.equal(predictions.logits, other.logits)
    assert torch.equal(predictions.labels, torch.cat([labels for _, labels in loader]))
    results = [
        evaluate(model, loader, reference, timing=False)
        for reference in (other, predictions, predictions.logits)
    ]
    assert results[0] == results[1] == results[2]
    alike = model.logits.argmax(1) == other.logits.argmax(1)
    assert results[0].agreement == pytest.approx(float(alike.float().mean()))
    # KL(reference || model), in nats.
    p, q = (each.logits.detach().double().softmax(1) for each in (other, model))
    assert results[0].kl == pytest.approx(float((p * (p / q).log()).sum(1).mean()))


def test_a_model_agrees_with_itself() -> None:
    model, loader = lookup(80, 6)
    found = evaluate(model, loader, reference=model, timing=False)
    assert (found.agreement, found.kl) == (1.0, 0.0)
    alone = evaluate(model, loader, timing=False)
    assert (alone.agreement, alone.kl) == (None, None)


def test_a_loader_may_shuffle_where_the_reference_runs_beside_it() -> None:
    model, _ = lookup(60, 5, seed=1)
    other, loader = lookup(60, 5, seed=2)

    class Shuffled:
        turn = 0

        def __iter__(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
            self.turn += 1
            yield from loader[self.turn % 4 :] + loader[: self.turn % 4]

    there = evaluate(model, Shuffled(), other, timing=False)
    assert there.kl == pytest.approx(evaluate(model, loader, other, timing=False).kl)
    with pytest.raises(ValueError, match="other labels than when it was measured"):
        evaluate(model, Shuffled(), predict(other, loader), timing=False)


def test_hugging_faces_batches_and_outputs() -> None:
    class HuggingFace(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, pixel_values: torch.Tensor) -> SimpleNamespace:
            return SimpleNamespace(loss=None, logits=self.inner(pixel_values))

    model, loader = lookup(40, 4)
    batches = [{"pixel_values": inputs, "labels": labels} for inputs, labels in loader]
    assert evaluate(HuggingFace(model), batches, timing=False) == evaluate(
        model, loader, timing=False
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_logits_of_any_floating_dtype(dtype: torch.dtype) -> None:
    model, loader = lookup(64, 4)
    model.to(dtype)
    found = evaluate(model, loader, reference=model, timing=False)
    labels = torch.cat([each for _, each in loader])
    loss = functional.cross_entropy(model.logits.detach().double(), labels)
    assert found.loss == pytest.approx(float(loss))
    assert found.kl == 0


class Counting(nn.Module):
    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.sizes = inner, list[int]()

    def forward(self, inputs: torch.Tensor) -> Any:
        assert not self.training
        assert not torch.is_grad_enabled()
        self.sizes.append(len(inputs))
        return self.inner(inputs)


def test_time_is_measured_on_batches_of_one_size() -> None:
    inner, loader = lookup(36, 4)
    model = Counting(inner)
    found = evaluate(model, loader, warmup=2)
    assert found.latency_median is not None
    assert found.latency_p95 is not None
    assert found.throughput is not None
    assert 0 < found.latency_median <= found.latency_p95
    # 2 to warm up, all 3 batches once, and the first again until 10 of its size were timed.
    assert model.sizes == [16] * 2 + [16, 16, 4] + [16] * 8
    assert found.throughput > 0


def test_without_timing_every_batch_runs_once() -> None:
    inner, loader = lookup(36, 4)
    model = Counting(inner)
    found = evaluate(model, loader, timing=False)
    assert model.sizes == [16, 16, 4]
    assert (found.latency_median, found.latency_p95, found.throughput) == (None, None, None)


def test_a_pruned_models_sizes() -> None:
    model, loader = demo.resnet(), demo.digits("test")
    report = wavprune.fast.prune(model, sparsity=0.7, scope="global")
    found = evaluate(model, loader, report=report, timing=False)
    assert found.sparsity == report.sparsity
    assert found.weight_sparsity == report.weight_sparsity > 0
    assert found.stored_bytes == stored_bytes(model, report) < stored_bytes(model)
    assert found.parameters == sum(each.numel() for each in demo.resnet().parameters())
    unpruned = evaluate(demo.resnet(), loader, timing=False)
    assert (unpruned.sparsity, unpruned.weight_sparsity) == (0, 0)
    assert unpruned.stored_bytes == stored_bytes(model)


def test_it_becomes_json() -> None:
    model, loader = lookup(30, 3)
    found = evaluate(model, loader, reference=model)
    parsed = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    parsed["confusion"] = tuple(map(tuple, parsed["confusion"]))
    assert Evaluation(**parsed) == found


def test_the_model_and_its_modes_stay_as_they_were() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(64, 10), nn.BatchNorm1d(10), nn.Dropout(0.5))
    model[2].eval()
    reference = copy.deepcopy(model)
    before = copy.deepcopy(model.state_dict())
    loader = demo.digits("test")
    results = [evaluate(model, loader, reference, timing=False) for _ in range(2)]
    assert results[0] == results[1]
    for each in (model, reference):
        assert [module.training for module in each.modules()] == [True, True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert torch.is_grad_enabled()


def stream() -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    yield from lookup(4, 3)[1]


X, Y = torch.arange(4), torch.tensor([0, 1, 2, 0])


@pytest.mark.parametrize(
    ("loader", "error", "message"),
    [
        ([], ValueError, "loader is empty; it must yield at least one batch"),
        (stream(), TypeError, "a generator, which can be read only once"),
        (5, TypeError, "loader must yield batches, as a DataLoader does, not be of type int"),
        ([X], TypeError, "a batch of type Tensor has no labels"),
        ([(X,)], TypeError, r"a batch \(Tensor\) has no labels"),
        ([("x", Y)], TypeError, r"a batch \(str, Tensor\) has no input tensor"),
        ([{"image": X, "labels": Y}], TypeError, r"with the keys \['image', 'labels'\]"),
        ([{"pixel_values": X}], TypeError, r"\['pixel_values'\] has no labels"),
        (
            [{"pixel_values": X, "targets": Y}],
            TypeError,
            "has targets, and there is no metric .* m",
        ),
        ([{"pixel_values": X, "target": Y}], TypeError, r"'target'\] has targets, .* and 'labels'"),
        ([(X, Y + 0.5)], TypeError, "other targets need a metric that compares .* metric= of eval"),
        ([(X, Y + 0.5)], TypeError, r"must be integers, .* not torch.float32; the first is \[0.5"),
        ([(X, Y > 0)], TypeError, "not torch.bool"),
        ([(X, Y[:3])], ValueError, r"4 samples has labels of shape \(3,\); allowed: \(4,\)"),
        ([(X, Y[:, None])], ValueError, r"labels of shape \(4, 1\)"),
        ([(X, Y + 1)], ValueError, "label 3 is no class of the model, which returns 3; allowed: 0"),
        ([(X, Y - 1)], ValueError, "label -1 is no class"),
        ([(X[:0], Y[:0])], ValueError, r"a batch of shape \(0,\) holds no sample"),
    ],
)
def test_what_is_wrong_with_a_loader_is_said(
    loader: Any, error: type[Exception], message: str
) -> None:
    model = Lookup(torch.randn(4, 3))
    with pytest.raises(error, match=message):
        evaluate(model, loader, timing=False)
    with pytest.raises(error, match=message):
        predict(model, loader)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.zeros(4, 3, 2), r"shape \(4, 3, 2\) for 4 samples; allowed: \(4, C\)"),
        (torch.zeros(4, 1), r"shape \(4, 1\) for 4 samples; .* C classes, 2 or more"),
        (torch.zeros(4), r"shape \(4,\) for 4 samples"),
        (torch.full((4, 3), torch.nan), "12 of 12 logits that the model returned are NaN or inf"),
        (torch.tensor([[0, math.inf]] * 4), "4 of 8 logits"),
    ],
)
def test_what_is_wrong_with_an_output_is_said(logits: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(Lookup(logits), [(X, torch.zeros(4, dtype=torch.long))], timing=False)


def test_what_else_is_wrong_is_said() -> None:
    class Odd(nn.Module):
        def forward(self, inputs: torch.Tensor) -> Any:
            return {"scores": inputs}

    class Fewer(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(inputs) - 1, 3)

    class Changing(nn.Module):
        def forward(self, inputs: torch.Tensor) -> torch.Tensor:
            return torch.zeros(len(inputs), 3 + int(inputs[0]))

    model, loader = lookup(4, 3)
    with pytest.raises(TypeError, match=r"the model returned a dict; allowed: a tensor \(N, C\)"):
        evaluate(Odd(), loader)
    with pytest.raises(ValueError, match=r"shape \(3, 3\) for 4 samples"):
        evaluate(Fewer(), loader)
    with pytest.raises(ValueError, match="returned 3 and 5 classes for different batches"):
        evaluate(Changing(), [(X[:1], Y[:1]), (X[2:], Y[2:])], timing=False)
    with pytest.raises(TypeError, match=r"model must be a torch.nn.Module, not str"):
        evaluate("resnet", loader)  # type: ignore[arg-type]  # what is tested
    with pytest.raises(ValueError, match="warmup must be an integer, 0 or more, not -1"):
        evaluate(model, loader, warmup=-1)
    with pytest.raises(ValueError, match=r"reference: its logits are \(4, 2\), the model's \(4, 3"):
        evaluate(model, loader, torch.zeros(4, 2))
    with pytest.raises(TypeError, match="not str"):
        evaluate(model, loader, "resnet")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="device 'xpu' is not available here"):
        evaluate(model, loader, device="xpu")


def test_a_model_on_several_devices_stays_there() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2, device="meta"))
    with pytest.raises(ValueError, match=r"device='cpu': .* several devices \(cpu, meta\)"):
        evaluate(model, [(torch.zeros(1, 2), torch.zeros(1, dtype=torch.long))], device="cpu")


def test_after_an_error_the_modes_are_back() -> None:
    model = Lookup(torch.full((4, 3), torch.nan)).train()
    with pytest.raises(ValueError, match="NaN"):
        evaluate(model, [(X, Y)])
    assert model.training


def test_progress_is_shown_where_asked_for(capsys: pytest.CaptureFixture[str]) -> None:
    model, loader = lookup(40, 4)
    evaluate(model, loader, timing=False, progress=True)
    assert "evaluate" in capsys.readouterr().err
    evaluate(model, loader, timing=False)
    assert capsys.readouterr().err == ""
