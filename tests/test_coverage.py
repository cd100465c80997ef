from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import nn

import wavprune
from tests.support import checkpoints
from wavprune import PruneConfig, PruneReport, WavpruneError, checkpoint
from wavprune.checkpoint.prune import prune_file
from wavprune.coverage import Coverage, Skipped


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 32, 3)
        self.up = nn.ConvTranspose2d(32, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.fc = nn.Linear(8, 4)
        self.words = nn.Embedding(10, 4)


SENTENCE = (
    "pruned 864 of 3,300 parameters (26.2%); skipped: up ConvTranspose2d, fc Linear "
    "(not selected); words Embedding (not of a kind that is pruned)"
)


def test_a_report_says_what_was_pruned_and_what_was_skipped() -> None:
    net = Net()
    report = wavprune.fast.prune(net, targets="conv")
    assert str(report.coverage) == SENTENCE
    assert f"{SENTENCE}." in " ".join(str(report).split())
    assert SENTENCE in report._repr_html_().replace("<br>", " ")
    again = PruneReport.from_json(report.to_json())
    assert again == report
    assert str(again.coverage) == SENTENCE
    state = net.state_dict()
    assert report.dense_bytes == sum(t.numel() * t.element_size() for t in state.values())


def test_a_second_call_has_the_coverage_of_its_own_selection() -> None:
    net = Net()
    shares = [
        wavprune.fast.prune(net, targets=targets).coverage.pruned  # type: ignore[union-attr]
        for targets in ("conv", "up", "conv", None)
    ]
    assert shares == [864, 2304, 864, 864 + 2304]


def halve(net: Net) -> None:
    net.fc.half()


def replace_a_weight(net: Net) -> None:
    net.fc.weight = nn.Parameter(torch.zeros(4, 99))


def replace_values(net: Net) -> None:
    net.words.weight.data = torch.zeros(999, 4)


def widen_a_buffer(net: Net) -> None:
    net.norm.running_var = torch.ones(8, dtype=torch.float64)


def add_a_buffer(net: Net) -> None:
    net.register_buffer("more", torch.zeros(5))


def tie(net: Net) -> None:
    net.norm.bias = net.get_parameter("up.bias")


@pytest.mark.parametrize(
    "change", [halve, replace_a_weight, replace_values, widen_a_buffer, add_a_buffer, tie]
)
def test_a_report_is_of_the_model_as_it_was_pruned(change: Callable[[Net], None]) -> None:
    net = Net()
    before = wavprune.fast.prune(net, targets="conv")
    known = before.dense_bytes
    change(net)
    after = wavprune.fast.prune(net, targets="conv")
    tensors = {id(t): t.numel() * t.element_size() for t in (*net.parameters(), *net.buffers())}
    assert after.dense_bytes == sum(tensors.values())
    assert after.coverage is not None
    assert after.coverage.parameters == sum(p.numel() for p in net.parameters())
    assert before.dense_bytes == known


def test_a_model_with_a_sparse_buffer_is_pruned() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False))
    net.register_buffer("graph", torch.eye(5).to_sparse())
    for _ in range(2):
        assert wavprune.fast.prune(net).dense_bytes == 4 * (144 + 25)


def test_tied_weights_count_once_and_buffers_that_no_file_holds_not_at_all() -> None:
    net = nn.Sequential(nn.Conv2d(4, 4, 3, bias=False), nn.Conv2d(4, 4, 3, bias=False))
    net[1].weight = net[0].weight
    net.register_buffer("scratch", torch.zeros(99), persistent=False)
    coverage = wavprune.fast.prune(net).coverage
    assert coverage == Coverage(144, 144, 576, 0, 1)


def test_a_file_has_a_coverage_too(tmp_path: Path) -> None:
    source = checkpoints.save(tmp_path / "in.safetensors")
    report = prune_file(source, None, PruneConfig(targets=("second",)), dry_run=True)
    tensors = checkpoints.state()
    assert report.coverage is not None
    assert report.coverage.parameters == sum(tensor.numel() for tensor in tensors.values())
    assert report.dense_bytes == sum(t.numel() * t.element_size() for t in tensors.values())
    skipped = [(one.name, one.kind) for one in report.coverage.skipped]
    assert set(skipped) == {("first", "4-D"), ("third", "4-D"), ("head", "2-D")}


def test_many_skipped_layers_are_counted() -> None:
    skipped = tuple(Skipped(str(i), "Linear") for i in range(20))
    text = str(Coverage(1, 10, 40, 36, 2, skipped))
    assert text.endswith("7 Linear (not selected) and 12 more")


@pytest.mark.parametrize(
    "change",
    [{"pruned": -1}, {"parameters": 1.5}, {"bytes": None}, {"skipped": [["a"]]}, {"skipped": "a"}],
    ids=str,
)
def test_a_report_with_a_broken_coverage_is_refused(change: dict[str, object]) -> None:
    content = json.loads(wavprune.fast.prune(nn.Conv2d(2, 2, 3)).to_json())
    content["coverage"] |= change
    with pytest.raises(WavpruneError, match="coverage"):
        PruneReport.from_json(json.dumps(content))


def test_a_report_without_a_coverage_is_one_of_an_earlier_version() -> None:
    content = json.loads(wavprune.fast.prune(nn.Conv2d(2, 2, 3)).to_json())
    del content["coverage"]
    report = PruneReport.from_json(json.dumps(content))
    assert report.estimated_bytes() is report.dense_bytes is None
    assert "total" in str(report)


SETTINGS = [
    {"wavelet": "uhaar", "sparsity": 0.9},
    {"wavelet": "auto", "sparsity": 0.8, "scope": "global"},
    {"wavelet": "dct", "sparsity": 0.97},
    {"method": "min_weight", "sparsity": 0.5},
    {"method": "random", "sparsity": 0.7},
]


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_the_estimate_is_near_what_a_file_takes(
    settings: dict[str, object], tmp_path: Path
) -> None:
    net = wavprune.demo.resnet()
    report = wavprune.fast.prune(net, **settings)  # type: ignore[arg-type]
    for bits in (8, 6, 4):
        saved = checkpoint.save(net, tmp_path / "a.safetensors", report=report, bits=bits)
        estimate = report.estimated_bytes(bits)
        assert estimate is not None
        assert math.isclose(estimate, saved.bytes, rel_tol=0.06), (bits, estimate, saved.bytes)


def test_the_estimate_is_near_for_weights_of_another_distribution(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = nn.Sequential(*[nn.Conv2d(64, 64, 3) for _ in range(3)])
    report = wavprune.fast.prune(net, sparsity=0.8)
    saved = checkpoint.save(net, tmp_path / "a.safetensors", report=report)
    assert report.estimated_bytes() == pytest.approx(saved.bytes, rel=0.06)


def test_the_estimate_asks_for_bits_that_exist() -> None:
    with pytest.raises(WavpruneError, match="bits must be one of 8, 6, 4, not 5"):
        wavprune.fast.prune(nn.Conv2d(2, 2, 3)).estimated_bytes(5)


def test_bits_per_weight_are_of_the_whole_file_over_all_weights(tmp_path: Path) -> None:
    net = wavprune.demo.resnet()
    saved = checkpoint.save(
        net, tmp_path / "a.safetensors", config=PruneConfig(sparsity=0.9), bits=6
    )
    elements = sum(tensor.numel() for tensor in net.state_dict().values())
    assert saved.bits_per_weight == 8 * saved.bytes / elements
    layers = sum(layer.bytes for layer in saved.layers)
    assert saved.bits_per_coded_weight == 8 * layers / saved.numel < saved.bits_per_weight
    aimed = checkpoint.save(net, tmp_path / "b.safetensors", target_bits_per_weight=6)
    assert aimed.bits_per_weight == pytest.approx(6, rel=0.02)
