from __future__ import annotations

import dataclasses
import math
from collections import OrderedDict
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn
from torchmetrics.image import PeakSignalNoiseRatio

import wavprune
from tests.evaluation.test_metrics import lookup
from wavprune import DenseReference, Measure, PruneConfig, evaluate
from wavprune.errors import WavpruneError
from wavprune.evaluation.spread import Parts, paired_error, share_error, standard_error


def psnr(outputs: torch.Tensor, targets: torch.Tensor, peak: float = 1.0) -> torch.Tensor:
    return 10 * torch.log10(peak**2 / (outputs - targets).square().mean((1, 2, 3)))


def mse(outputs: torch.Tensor, targets: torch.Tensor) -> float:
    return float((outputs - targets).square().mean())


class Denoiser(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        residual: torch.Tensor = self.last(torch.relu(self.norm(self.conv(x))))
        return x + 0.1 * residual


def images(sizes: tuple[int, ...] = (12, 12, 6)) -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    clean = [torch.rand(size, 1, 9, 9, generator=draw) for size in sizes]
    return [(x + 0.1 * torch.randn(x.shape, generator=draw), x) for x in clean]


def whole(model: nn.Module, batches: list[Any]) -> tuple[torch.Tensor, torch.Tensor]:
    with torch.no_grad():
        return torch.cat([model.eval()(x) for x, _ in batches]), torch.cat([y for _, y in batches])


def test_a_torchmetrics_metric_has_the_value_that_it_has_on_all_data() -> None:
    model, data = Denoiser(), images()
    metric = PeakSignalNoiseRatio(data_range=1.0)
    metric.update(torch.zeros(1, 1), torch.ones(1, 1))
    found = evaluate(model, data, metric=metric, timing=False)
    assert found.value == pytest.approx(
        float(PeakSignalNoiseRatio(data_range=1.0)(*whole(model, data)))
    )
    assert (found.metric, found.higher_is_better) == ("PeakSignalNoiseRatio", True)
    assert (found.samples, found.top1, found.confusion, found.kl) == (30, None, None, None)
    # The caller's own is left as it was.
    assert float(metric.compute()) == 0
    assert "PeakSignalNoiseRatio" in repr(found)


def test_a_function_gives_a_value_for_each_input_or_batch() -> None:
    model, data = Denoiser(), images()
    each = psnr(*whole(model, data)).double()
    by_input = evaluate(
        model, data, metric=Measure(partial(psnr, peak=1.0), higher_is_better=True), timing=False
    )
    assert by_input.metric == "psnr"
    assert by_input.value == pytest.approx(float(each.mean()))
    assert by_input.spread == pytest.approx(float(each.std()) / math.sqrt(30), rel=1e-5)
    by_batch = evaluate(model, data, metric=Measure(mse, "MSE", False), timing=False)
    assert by_batch.value == pytest.approx(mse(*whole(model, data)), rel=1e-5)
    assert not by_batch.higher_is_better
    assert by_batch.spread is not None


def test_the_spread_of_a_metric_is_about_what_other_data_would_show() -> None:
    """Of a mean, whose standard error is known; from ten groups it varies by a quarter."""
    draw = torch.Generator().manual_seed(0)
    found, model = [], nn.Identity()
    for _ in range(20):
        values = torch.randn(400, generator=draw)
        batches = [(values[:300], values[:300]), (values[300:], values[300:])]
        mean = Measure(torchmetrics.MeanSquaredError(), higher_is_better=False)
        shifted = [(x, torch.zeros_like(y)) for x, y in batches]
        found.append(evaluate(model, shifted, metric=mean, timing=False).spread)
    expected = math.sqrt(2 / 400)  # of the mean of 400 squared normal numbers
    assert sum(found) / 20 == pytest.approx(expected, rel=0.2)  # type: ignore[arg-type]


def test_a_difference_on_the_same_inputs_is_known_better_than_each_value() -> None:
    model, data = Denoiser(), images()
    other = Denoiser()
    with torch.no_grad():
        other.last.weight.mul_(1.01)
    for metric in (PeakSignalNoiseRatio(data_range=1.0), Measure(psnr, higher_is_better=True)):
        found = evaluate(other, data, reference=model, metric=metric, timing=False)
        assert found.spread is not None
        assert found.change_spread is not None
        assert 0 < found.change_spread < found.spread / 5


def test_of_a_classifier_it_is_mcnemars() -> None:
    (model, loader), (other, _) = lookup(200, 4, seed=1), lookup(200, 4, seed=2)
    labels = torch.cat([labels for _, labels in loader])
    right, wrong = (each.logits.argmax(1) == labels for each in (model, other))
    only_one, only_other = int((right & ~wrong).sum()), int((wrong & ~right).sum())
    variance = (only_one + only_other - (only_one - only_other) ** 2 / 200) / 200 / 199
    found = evaluate(model, loader, other, timing=False)
    assert found.change_spread == pytest.approx(math.sqrt(variance))
    assert found.spread == share_error(found.value, 200)
    assert (found.metric, found.value, found.higher_is_better) == ("top1", found.top1, True)


def test_logits_are_compared_where_outputs_are_logits() -> None:
    (model, loader), (other, _) = lookup(80, 6, seed=1), lookup(80, 6, seed=2)
    accuracy = torchmetrics.Accuracy(task="multiclass", num_classes=6)
    usual = evaluate(model, loader, other, timing=False)
    found = evaluate(model, loader, other, timing=False, metric=accuracy)
    assert found.value == pytest.approx(usual.top1)
    assert found.kl == pytest.approx(usual.kl)
    assert found.agreement == usual.agreement
    assert (
        evaluate(model, loader, other, timing=False, metric=Measure(accuracy, logits=False)).kl
        is None
    )
    # A map of classes is one where the caller says so, position by position.
    maps = [(x, torch.zeros(len(x), 2, 2, dtype=torch.long)) for x, _ in loader]

    class Map(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
            return OrderedDict(out=self.inner(x)[:, :, None, None].expand(-1, -1, 2, 2))

    for logits, kl in ((None, None), (True, pytest.approx(usual.kl))):
        measure = Measure(accuracy, logits=logits)
        assert evaluate(Map(model), maps, Map(other), timing=False, metric=measure).kl == kl


@pytest.mark.parametrize(
    ("wrapped", "output"),
    [
        (lambda x: SimpleNamespace(logits=x), None),
        (lambda x: {"out": x, "aux": 0}, None),
        (lambda x: (x, 0), None),
        (lambda x: {"image": x}, "image"),
        (lambda x: [0, x], 1),
        (lambda x: {"a": [x]}, lambda returned: returned["a"][0]),
    ],
)
def test_outputs_come_in_containers(wrapped: Any, output: Any) -> None:
    class Wrapped(nn.Module):
        def forward(self, x: torch.Tensor) -> Any:
            return wrapped(x)

    metric = Measure(mse, "MSE", False, output=output)
    assert evaluate(Wrapped(), images(), metric=metric, timing=False).value > 0


class Overlap(torchmetrics.Metric):
    """As detection metrics: lists of mappings, and a mapping of results."""

    higher_is_better = True
    total: torch.Tensor
    count: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.add_state("total", torch.tensor(0.0), "sum")
        self.add_state("count", torch.tensor(0), "sum")

    def update(self, outputs: list[Any], targets: list[Any]) -> None:
        for one, other in zip(outputs, targets, strict=True):
            self.total += (one["boxes"] == other["boxes"]).float().mean()
            self.count += 1

    def compute(self) -> dict[str, torch.Tensor]:
        return {"map": self.total / self.count, "count": self.count}


class Features(torchmetrics.Metric):
    """As FID and LPIPS: a metric with a network of its own."""

    higher_is_better = False
    copies = 0
    total: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.network = nn.Conv2d(1, 2, 3)
        self.add_state("total", torch.tensor(0.0), "sum")

    def __deepcopy__(self, memo: dict[int, Any]) -> Features:
        Features.copies += 1
        copied = Features()
        copied.load_state_dict(self.state_dict())
        return copied

    def update(self, outputs: torch.Tensor, targets: torch.Tensor) -> None:
        self.total += (self.network(outputs) - self.network(targets)).abs().mean().detach()

    def compute(self) -> torch.Tensor:
        return self.total


@pytest.mark.parametrize(("reference", "copies"), [(None, 1), (Denoiser(), 2)])
def test_a_metric_with_a_network_is_copied_once_for_each_model(
    reference: nn.Module | None, copies: int
) -> None:
    Features.copies = 0
    found = evaluate(Denoiser(), images(), reference, timing=False, metric=Features())
    assert Features.copies == copies
    assert found.value > 0
    assert (found.spread, found.change_spread) == (None, None)


def test_lists_of_images_with_lists_of_boxes() -> None:
    class Detector(nn.Module):
        def forward(self, pictures: list[torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            return [{"boxes": picture.sum((1, 2)) > 0} for picture in pictures]

    pictures = [torch.full((3, 4, 5 + i), float(i % 2)) for i in range(6)]
    targets = [{"boxes": torch.tensor([True, i < 3, True])} for i in range(6)]
    data = [(pictures[:4], targets[:4]), (pictures[4:], targets[4:])]
    found = evaluate(Detector(), data, metric=Measure(Overlap(), result="map"), timing=False)
    answers = [
        float((p.sum((1, 2)) > 0).eq(t["boxes"]).float().mean())
        for p, t in zip(pictures, targets, strict=True)
    ]
    assert found.value == pytest.approx(sum(answers) / 6)
    assert found.samples == 6
    assert found.spread is not None
    with pytest.raises(ValueError, match="'Overlap' computes map, count; name one of them"):
        evaluate(Detector(), data, metric=Overlap(), timing=False)


def test_compare_and_trials_take_it_too() -> None:
    model, data = Denoiser(), images()
    metric = Measure(psnr, "PSNR", True)
    result = wavprune.compare(
        model, data, sparsities=[0.3, 0.9], wavelets=["uhaar"], seeds=[0, 1], metric=metric
    )
    assert {trial.evaluation.metric for trial in result} == {"PSNR"}
    reference = DenseReference.measure(model, data, metric=metric)
    alone = wavprune.run_trial(
        model, data, PruneConfig(sparsity=0.9, scope="global"), reference=reference, metric=metric
    )
    same = next(t for t in result if t.basis == "uhaar" and t.config and t.config.sparsity == 0.9)
    assert alone.evaluation.value == same.evaluation.value
    text = str(result)
    assert "PSNR" in text
    assert "higher is better" in text.replace("\n", " ")
    assert "KL" not in text
    assert result.rows()[0]["top1"] is None


def test_seeds_that_differ_make_a_change_less_certain() -> None:
    """As on the page of a sweep, where the same runs are a tie."""
    result = wavprune.compare(
        Denoiser(),
        images(),
        sparsities=[0.5],
        methods=["random"],
        seeds=[0, 1],
        metric=Measure(mse, "MSE", False),
    )
    for changes, shown in (((-0.06, 0.0), "-0.0300 ~"), ((-0.031, -0.029), "-0.0300 │")):
        trials = [
            dataclasses.replace(
                trial,
                evaluation=dataclasses.replace(
                    trial.evaluation, value=result.unpruned.value + change, change_spread=0.01
                ),
            )
            for trial, change in zip(result, changes, strict=True)
        ]
        assert shown in str(dataclasses.replace(result, trials=tuple(trials)))


@pytest.mark.parametrize("name", ["error", "loss", "KL", "change", "note", "[b]"])
def test_a_metric_may_be_named_as_a_column(name: str) -> None:
    result = wavprune.compare(
        Denoiser(),
        images(),
        sparsities=[0.5],
        wavelets=["haar"],
        methods=["dwt"],
        metric=Measure(mse, name, False),
    )
    heading, unpruned, pruned = (
        [cell.strip() for cell in line.strip("┃│").replace("┃", "│").split("│")]
        for line in str(result).splitlines()
        if line.startswith(("┃", "│"))
    )
    assert heading[4] == name
    assert unpruned[4] == f"{result.unpruned.value:.4f}"
    assert pruned[4] == f"{result.trials[0].evaluation.value:.4f}"


@pytest.mark.parametrize(
    ("metric", "error", "message"),
    [
        (mse, ValueError, r"'mse' does not say whether higher is better; give Measure\(metric, hi"),
        (PeakSignalNoiseRatio, TypeError, r"is the class PeakSignalNoiseRatio; give an object"),
        (5, TypeError, "must be a torchmetrics.Metric or a function .* not int"),
    ],
)
def test_what_is_no_metric_is_said_before_anything_runs(
    metric: Any, error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        evaluate(nn.Identity(), [], metric=metric)
    with pytest.raises(error, match=message):
        wavprune.compare(Denoiser(), images(), metric=metric)


@pytest.mark.parametrize(
    ("measure", "message"),
    [
        (
            Measure(lambda o, t: o.nope, "bad", True),
            r"'bad' failed on outputs \(12, 1, 9, 9\) float",
        ),
        (Measure(lambda o, t: o[:, 0, 0, :2], "wide", True), r"shape \(12, 2\) for 12 inputs"),
        (Measure(lambda o, t: math.inf, "endless", True), "'endless' is inf for this model"),
        (Measure(mse, "m", False, output="key"), "output='key': the model returned a Tensor"),
        (Measure(mse, "m", False, logits=True), r"logits=True: the outputs are \(12, 1, 9, 9\)"),
        (Measure(PeakSignalNoiseRatio(1.0), result="x"), "computes a Tensor, not a mapping"),
    ],
)
def test_what_a_metric_cannot_take_is_said(measure: Measure, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate(nn.Identity(), images(), metric=measure, timing=False)


@pytest.mark.parametrize("sizes", [(256, 4), (100, 100, 100), (256, 256, 256, 8)])
def test_the_spread_of_batches_is_right_whatever_their_sizes(sizes: tuple[int, ...]) -> None:
    draw = torch.Generator().manual_seed(0)
    counts = torch.tensor(sizes, dtype=torch.float64)
    weights = counts / counts.sum()
    # The accuracies of batches, on 2,000 data sets of which 7 in 10 samples are right.
    right = torch.binomial(counts.expand(2000, -1), torch.tensor(0.7).double(), generator=draw)
    found = [standard_error(Parts(values, weights)) or 0.0 for values in right / counts]
    expected = math.sqrt(0.7 * 0.3 / sum(sizes))
    assert math.sqrt(sum(f**2 for f in found) / 2000) == pytest.approx(expected, rel=0.1)


def test_a_reference_measured_by_another_metric_is_refused() -> None:
    model, data = Denoiser(), images()
    percent = Measure(lambda outputs, targets: 100 * mse(outputs, targets), "100 MSE", False)
    reference = DenseReference.measure(model, data, metric=percent).predictions
    message = "reference was measured by '100 MSE', the model by 'MSE'; allowed: the same metric"
    with pytest.raises(WavpruneError, match=message):
        evaluate(model, data, reference, timing=False, metric=Measure(mse, "MSE", False))


def test_errors_of_parts_and_pairs() -> None:
    draw = torch.Generator().manual_seed(0)
    values, weights = (
        torch.randn(50, generator=draw).double(),
        torch.full((50,), 0.02, dtype=torch.float64),
    )
    parts = Parts(values, weights)
    assert standard_error(parts) == pytest.approx(float(values.std()) / math.sqrt(50))
    assert paired_error(parts, Parts(values + 1, weights)) == pytest.approx(0, abs=1e-12)
    assert paired_error(parts, Parts(values[:9], weights[:9])) is None
    assert standard_error(Parts(values[:1], weights[:1])) is None
    assert standard_error(Parts(values[:2], torch.tensor([1.0, 0.0]).double())) is None
