from __future__ import annotations

import copy
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

import wavprune
from tests.support import graphs
from wavprune import PruneConfig, compare, evaluate, run_trial
from wavprune.evaluation.unlabelled import answered, distance, has_labels

IMAGES = list(torch.randn(2, 20, 1, 8, 8, generator=torch.Generator().manual_seed(0)))


def classifier() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 5, 6, bias=False), nn.Flatten()
    ).eval()


@pytest.mark.parametrize(
    ("batch", "labelled"),
    [
        (IMAGES[0], False),
        ([IMAGES[0]], False),
        ({"pixel_values": IMAGES[0]}, False),
        ((IMAGES[0], torch.zeros(20)), True),
        ({"pixel_values": IMAGES[0], "labels": torch.zeros(20)}, True),
    ],
)
def test_batches_have_labels_or_not(batch: object, labelled: bool) -> None:
    assert has_labels([batch]) is labelled


def test_agreement_and_divergence_are_measured_without_labels() -> None:
    model = classifier()
    result = compare(model, IMAGES, sparsities=[0.9], wavelets=["dct"], methods=["dwt"])
    assert result.settings["labels"] is False
    (trial,) = result
    pruned = copy.deepcopy(model)
    report = wavprune.fast.prune(pruned, wavelet="dct", sparsity=0.9, scope="global")
    labels = [(images, model(images).argmax(1)) for images in IMAGES]
    known = evaluate(pruned, labels, model, report, timing=False)
    assert trial.evaluation.value == pytest.approx(known.top1)
    assert 0 < trial.evaluation.value < 1
    assert trial.evaluation.agreement == pytest.approx(known.agreement)
    assert trial.evaluation.kl == pytest.approx(known.kl)
    assert result.unpruned.value == 1
    text = str(result)
    assert text.count("agreement %") == 1
    assert f"{100 * trial.evaluation.value:.2f}" in text
    assert "top-1" not in text


def test_of_other_networks_the_change_of_the_output_is_measured() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 8, 3), nn.ReLU(), nn.Conv2d(8, 1, 3))
    result = compare(model, IMAGES, sparsities=[0.5], methods=["min_weight"])
    pruned = copy.deepcopy(model)
    wavprune.fast.prune(pruned, method="min_weight", sparsity=0.5, scope="global")
    with torch.no_grad():
        x = torch.cat(IMAGES)
        change = (pruned(x) - model(x)).flatten(1).norm(dim=1) / model(x).flatten(1).norm(dim=1)
    assert result.unpruned.value == 0
    assert result.trials[0].evaluation.value == pytest.approx(float(change.mean()), rel=1e-5)
    assert result.trials[0].evaluation.kl is None
    assert "output change" in str(result)
    assert "lower is better" in " ".join(str(result).split())


def test_networks_with_one_number_for_an_input() -> None:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 1, 8), nn.Flatten(0))
    result = compare(model, IMAGES, sparsities=[0.5], wavelets=["identity"], methods=["min_weight"])
    assert result.trials[0].evaluation.value > 0
    with pytest.raises(ValueError, match=r"returns \(\) for 20 inputs; allowed: an output for"):
        answered(nn.Sequential(nn.Conv2d(1, 1, 8), Total()), IMAGES)


class Total(nn.Module):
    """One number for all inputs."""

    def forward(self, values: torch.Tensor) -> torch.Tensor:
        return values.sum()


def test_a_metric_that_is_called_agreement_is_no_share() -> None:
    def agreement(outputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        return 7 * (outputs.argmax(1) == targets).float()

    metric = wavprune.Measure(agreement, higher_is_better=True)
    data = [(images, classifier()(images).argmax(1)) for images in IMAGES]
    result = compare(classifier(), data, sparsities=[0.5], methods=["min_weight"], metric=metric)
    assert "7.0000" in str(result)
    assert result.settings["labels"] is True


class Words(nn.Module):
    """Answers with no numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3)

    def forward(self, images: torch.Tensor) -> list[str]:
        return ["yes"] * len(images)


@pytest.mark.parametrize(
    "change",
    [
        lambda data: data[::-1],
        lambda data: data[:1],
        lambda data: [data[0].flip(0), data[1]],
    ],
    ids=["another order", "fewer", "another order within a batch"],
)
def test_other_batches_than_were_answered_are_refused(
    change: Callable[[list[torch.Tensor]], list[torch.Tensor]],
) -> None:
    class Changing:
        """Yields something else from the third time on: a look at it and the answers come first."""

        def __init__(self) -> None:
            self.times = 0

        def __iter__(self) -> Iterator[torch.Tensor]:
            self.times += 1
            return iter(IMAGES if self.times <= 2 else change(IMAGES))

    with pytest.raises(ValueError, match="yields other batches than the unpruned model answered"):
        compare(classifier(), Changing(), sparsities=[0.5])


def test_what_cannot_be_compared_is_said() -> None:
    pairs = [{"pixel_values": images, "targets": images} for images in IMAGES]
    with pytest.raises(TypeError, match="has targets, and there is no metric that compares"):
        compare(classifier(), pairs, sparsities=[0.5])
    with pytest.raises(ValueError, match="has no labels, and the model returns no floating-point"):
        compare(Words(), IMAGES, sparsities=[0.5])
    with pytest.raises(ValueError, match="loader is empty"):
        answered(classifier(), [])


@pytest.mark.parametrize("head", [nn.Identity(), nn.Softmax(1)], ids=["logits", "probabilities"])
def test_how_far_a_network_is_from_another(head: nn.Module) -> None:
    model = classifier()
    pruned = copy.deepcopy(model)
    wavprune.fast.prune(pruned, wavelet="dct", sparsity=0.9)
    labels = [(images, model(images).argmax(1)) for images in IMAGES]
    known = evaluate(pruned, labels, model, timing=False)
    x = torch.cat(IMAGES)
    with torch.no_grad():
        ours, theirs = head(pruned(x)), head(model(x))
    uneven = [x[:3], {"pixel_values": x[3:25]}, (x[25:],)]
    found = distance(nn.Sequential(pruned, head), nn.Sequential(model, head), uneven)
    assert found.inputs == 40
    assert found.agreement == pytest.approx(known.agreement)
    assert found.kl == pytest.approx(known.kl, rel=1e-4)
    assert found.output_error == pytest.approx(float((ours - theirs).norm() / theirs.norm()))


def test_how_far_a_network_is_that_is_no_classifier() -> None:
    torch.manual_seed(0)
    dense, other = nn.Conv2d(1, 2, 3), nn.Conv2d(1, 2, 3)
    found = distance(other, dense, IMAGES)
    assert (found.agreement, found.kl) == (None, None)
    assert found.output_error > 0.5
    with pytest.raises(
        ValueError, match="the model returns a list; allowed: a floating-point tensor"
    ):
        distance(Words(), dense, IMAGES)
    nn.init.constant_(other.get_parameter("bias"), torch.nan)
    with pytest.raises(ValueError, match="1440 of 1440 outputs are NaN or infinite"):
        distance(other, dense, IMAGES)


def test_biases_of_a_graph_take_up_what_pruning_shifts() -> None:
    images = torch.randn(200, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    dense = wavprune.onnx.to_torch(graphs.network())
    config = PruneConfig(wavelet="dct", sparsity=0.8)
    batches = [(part, torch.zeros(len(part), dtype=torch.long)) for part in torch.split(images, 60)]
    trial = run_trial(dense, batches, config, timing=False)
    pruned = copy.deepcopy(dense)
    wavprune.fast.prune(pruned, wavelet="dct", sparsity=0.8)
    # On no more inputs than may run as one batch.
    assert wavprune.match_biases(pruned, dense, [images[:128]])
    wavprune.match_batchnorm(pruned, dense, [images])
    assert trial.model is not None
    for name, value in pruned.state_dict().items():
        torch.testing.assert_close(trial.model.state_dict()[name], value, atol=1e-4, rtol=1e-4)
    off = run_trial(dense, batches, config, batchnorm="off", timing=False)
    assert trial.evaluation.kl is not None
    assert off.evaluation.kl is not None
    assert trial.evaluation.kl < 0.5 * off.evaluation.kl
