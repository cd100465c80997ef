from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from wavprune import checkpoint, fast
from wavprune.checkpoint.feedback import divergence_of, factor_of, quantise_matrix
from wavprune.checkpoint.norms import from_grid
from wavprune.checkpoint.study import Study
from wavprune.checkpoint.trellis import values_of
from wavprune.cli.app import main
from wavprune.demo import digits, resnet
from wavprune.errors import WavpruneError

PATH = "small.safetensors"


def network() -> nn.Sequential:
    """Batch norms with statistics of their inputs, a depthwise layer, pooling."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(3, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 24, 3, padding=1, groups=24, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.Conv2d(24, 32, 1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(32, 10),
    )
    with torch.no_grad():
        net.get_parameter("11.weight").mul_(6)
    net.train()
    for _ in range(30):
        net(torch.randn(32, 3, 8, 8))
    return net.eval()


def inputs() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return list(torch.split(torch.randn(240, 3, 8, 8), 40))


def divergence(before: nn.Module, state: dict[str, torch.Tensor]) -> float:
    after = copy.deepcopy(before)
    after.load_state_dict(state)
    x = torch.cat(inputs())
    with torch.no_grad():
        p, q = before(x).double().log_softmax(1), after(x).double().log_softmax(1)
    return float((p.exp() * (p - q)).sum(1).mean())


@pytest.mark.parametrize("batchnorm", ["fold", "keep"])
@pytest.mark.parametrize("kl", [0.002, 0.02])
def test_a_divergence_is_reached(tmp_path: Path, kl: float, batchnorm: str) -> None:
    net = network()
    before = copy.deepcopy(net.state_dict())
    saved = checkpoint.save(
        net, tmp_path / PATH, calibration=inputs(), target_kl=kl, batchnorm=batchnorm
    )
    assert saved.measured_kl is not None
    assert saved.predicted_kl is not None
    assert 0.5 * kl < saved.measured_kl < 1.1 * kl
    assert 0.67 < saved.predicted_kl / saved.measured_kl < 1.5
    state = checkpoint.load(saved.path)
    assert divergence(net, state) == pytest.approx(kl, rel=0.35)
    for layer in saved.layers:
        name = layer.name if len(layer.shape) == 1 else f"{layer.name}.weight"
        error = float((state[name].double() - net.state_dict()[name].double()).norm())
        if batchnorm == "keep":
            assert layer.error == pytest.approx(error, rel=1e-6)
    for name, tensor in before.items():
        assert torch.equal(net.state_dict()[name], tensor)


def test_kept_batch_norms_are_near_their_own(tmp_path: Path) -> None:
    net = network()
    options: dict[str, Any] = {"calibration": inputs(), "target_kl": 0.005}
    folded = checkpoint.save(net, tmp_path / "a.safetensors", **options)
    kept = checkpoint.save(net, tmp_path / PATH, batchnorm="keep", **options)
    assert folded.bytes < kept.bytes < folded.bytes + 3 * (24 + 24 + 32) + 100
    state = checkpoint.load(kept.path)
    for name, norm in net.named_modules():
        if isinstance(norm, nn.BatchNorm2d):
            assert norm.running_var is not None
            assert norm.running_mean is not None
            for part in ("weight", "running_var"):
                ratio = state[f"{name}.{part}"] / getattr(norm, part).detach()
                assert float((ratio.log2().abs()).max()) <= 1 / 32 + 1e-6
            shift = (state[f"{name}.running_mean"] - norm.running_mean) / norm.running_var.sqrt()
            assert float(shift.abs().max()) < 0.5


def alike(count: int) -> list[torch.Tensor]:
    """Many inputs that are nearly one of a few."""
    few = inputs()[0][:count].repeat(96 // count, 1, 1, 1)
    return [few + 0.02 * torch.randn(96, 3, 8, 8)]


def test_what_is_measured_on_can_be_given(tmp_path: Path) -> None:
    net = network()
    options: dict[str, Any] = {"calibration": alike(1), "target_kl": 0.01}
    saved = checkpoint.save(net, tmp_path / PATH, held_out=inputs(), **options)
    assert saved.measured_kl is not None
    assert saved.measured_kl == pytest.approx(divergence(net, checkpoint.load(saved.path)), 1e-3)
    assert saved.measured_kl < 0.011
    misled = checkpoint.save(net, tmp_path / PATH, **options)
    assert misled.measured_kl is not None
    assert divergence(net, checkpoint.load(misled.path)) > 2 * misled.measured_kl


def test_errors_are_not_made_up_for_where_that_harms(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # What makes up for errors on these inputs adds to them on others.
    options: dict[str, Any] = {"calibration": alike(2), "held_out": inputs(), "target_kl": 0.01}
    saved = checkpoint.save(network(), tmp_path / PATH, **options)
    monkeypatch.setattr(Study, "without_feedback", lambda study: study)
    other = checkpoint.save(network(), tmp_path / PATH, **options)
    assert saved.bytes < other.bytes


@pytest.mark.parametrize("seed", range(4))
def test_two_inputs_will_do(tmp_path: Path, seed: int) -> None:
    # One is measured on; what errors do to the other cannot vary.
    torch.manual_seed(seed)
    net = nn.Sequential(
        *(nn.Conv2d(3, 16, 3), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU()),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 5)),
    )
    saved = checkpoint.save(
        net, tmp_path / PATH, calibration=[torch.randn(2, 3, 8, 8)], target_kl=1e-2
    )
    assert saved.measured_kl is not None
    assert saved.measured_kl < 0.011


def test_bytes_are_reached(tmp_path: Path) -> None:
    saved = checkpoint.save(network(), tmp_path / PATH, calibration=inputs(), target_bytes=1700)
    assert saved.bytes == pytest.approx(1700, rel=0.01)
    assert saved.measured_kl is not None
    assert saved.predicted_kl is not None
    # What was measured of a file says nothing about its own prediction.
    assert saved.predicted_kl != saved.measured_kl


def test_a_trained_network_takes_a_third_of_the_bytes(tmp_path: Path) -> None:
    net = resnet(seed=0).eval()
    images = torch.cat([batch for batch, _ in digits("train")])[:400]
    saved = checkpoint.save(
        net, tmp_path / PATH, calibration=torch.split(images, 100), target_kl=2e-4
    )
    with torch.no_grad():
        tests = torch.cat([batch for batch, _ in digits("test")])
        labels = torch.cat([labels for _, labels in digits("test")])
        net.load_state_dict(checkpoint.load(saved.path))
        accuracy = float((net(tests).argmax(1) == labels).double().mean())
    assert saved.bytes < 15_000
    assert accuracy > 0.99


def test_pruned_weights_stay_zero_and_cost_nothing(tmp_path: Path) -> None:
    net = network()
    report = fast.prune(net, wavelet="identity", sparsity=0.5)
    saved = checkpoint.save(
        net, tmp_path / PATH, report=report, calibration=inputs(), target_kl=0.01
    )
    state = checkpoint.load(saved.path)
    for name in ("0.weight", "3.weight", "6.weight"):
        assert not state[name][net.state_dict()[name] == 0].any()
    dense = checkpoint.save(
        net,
        tmp_path / "b.safetensors",
        calibration=inputs(),
        target_kl=0.01,
        targets=["0", "3", "6"],
    )
    assert saved.bytes <= 1.02 * dense.bytes


class Restoring(nn.Module):
    """Images to images: a shared layer, a bias before a batch norm, a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 12, 3, stride=2, padding=1)
        self.norm = nn.BatchNorm2d(12)
        self.shared = nn.Conv2d(12, 12, 3, padding=1)
        self.last = nn.ConvTranspose2d(12, 2, 4, stride=2, padding=1, groups=2)
        self.unused = nn.Linear(2, 2)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.relu(self.norm(self.first(x)))
        for _ in range(2):
            hidden = hidden + torch.relu(self.shared(hidden))
        out: torch.Tensor = self.last(hidden)
        return out


@pytest.mark.parametrize("batchnorm", ["fold", "keep"])
def test_outputs_that_are_no_logits(tmp_path: Path, batchnorm: str) -> None:
    torch.manual_seed(0)
    net = Restoring().eval()
    net.norm.running_mean = torch.randn(12) / 4
    images = torch.randn(48, 1, 16, 16)
    saved = checkpoint.save(
        *(net, tmp_path / PATH),
        calibration=torch.split(images, 16),
        target_kl=0.0005,
        batchnorm=batchnorm,
    )
    compressed = {layer.name for layer in saved.layers}
    assert {"first", "shared", "last", "norm.bias", "last.bias"} <= compressed
    assert "unused" not in compressed
    state = checkpoint.load(saved.path)
    assert torch.equal(state["unused.weight"], net.unused.weight)
    with torch.no_grad():
        before = net(images)
        net.load_state_dict(state)
        relative = float((net(images) - before).square().mean() / before.var())
    assert relative / 2 == pytest.approx(0.0005, rel=0.5)
    assert saved.predicted_kl is not None
    assert 0.4 < saved.predicted_kl / 0.0005 < 2.5


def test_a_model_without_layers_is_an_error(tmp_path: Path) -> None:
    net = nn.PReLU(3)
    with pytest.raises(WavpruneError, match="its inputs reach no layer with a weight"):
        checkpoint.save(net, tmp_path / PATH, calibration=[torch.randn(4, 3, 2, 2)], target_kl=0.1)


@pytest.mark.parametrize(
    ("layer", "shape"), [(nn.Conv1d(3, 8, 5), (3, 20)), (nn.Conv3d(2, 8, 3), (2, 6, 6, 6))]
)
def test_kernels_of_other_dimensions(
    tmp_path: Path, layer: nn.Module, shape: tuple[int, ...]
) -> None:
    torch.manual_seed(0)
    pool = nn.AdaptiveAvgPool1d(1) if len(shape) == 2 else nn.AdaptiveAvgPool3d(1)
    net = nn.Sequential(layer, nn.ReLU(), pool, nn.Flatten(), nn.Linear(8, 6))
    with torch.no_grad():
        net.get_parameter("4.weight").mul_(20)
    images = torch.split(torch.randn(64, *shape), 16)
    saved = checkpoint.save(net, tmp_path / PATH, calibration=images, target_kl=0.003)
    assert {"0", "4"} <= {one.name for one in saved.layers}
    net.load_state_dict(checkpoint.load(saved.path))


@pytest.mark.parametrize("groups", [1, 3])
def test_feedback_takes_up_errors(groups: int) -> None:
    generator = np.random.default_rng(0)
    root = generator.normal(size=(groups, 12, 7))
    hessian = root @ root.transpose(0, 2, 1) + 0.05 * np.eye(12)
    matrix = generator.normal(size=(30, 12))
    errors = []
    for feedback in (True, False):
        factor = factor_of(hessian, feedback)
        indices = quantise_matrix(matrix, factor, 0.1)
        errors.append(divergence_of(matrix, values_of(indices).astype(np.float64) / 10, factor))
    assert errors[0] < 0.5 * errors[1]
    # What is left are D's sums of squares of what each column rounded away, by definition.
    factor = factor_of(hessian)
    # Half the sum of D times the squared error of a trellis.
    expected = 0.07 * 0.1**2 / 0.25 * 30 / groups * float(factor.diagonal.sum()) / 2
    assert errors[0] == pytest.approx(expected, rel=0.3)


def test_the_factor_is_that_of_the_matrix() -> None:
    generator = np.random.default_rng(0)
    root = generator.normal(size=(1, 9, 9))
    hessian = root @ root.transpose(0, 2, 1)
    factor = factor_of(hessian)
    assert factor.lower is not None
    L = factor.lower.astype(np.float64)[0]
    again = L * factor.diagonal[0] @ L.T
    order = factor.order
    assert np.allclose(again, hessian[0][np.ix_(order, order)], rtol=1e-4, atol=1e-5)
    # A singular one is damped.
    assert np.isfinite(factor_of(np.ones((1, 5, 5))).scale)


def test_logarithms_come_back() -> None:
    values = torch.tensor([0.0, -0.0, 1.0, -3.7, 1e-38, -2e30, 2.0**0.5])
    read = from_grid(values)
    assert read[0] == 0
    assert read[2] == 1
    assert read[6] == np.float32(2**0.5)
    assert torch.equal(read.sign(), values.sign())
    ratio = (read[2:] / values[2:]).log2().abs()
    assert float(ratio.max()) <= 1 / 32 + 1e-6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"target_kl": 0.1}, "target_kl=0.1 without calibration; give calibration"),
        ({"batchnorm": "keep"}, "batchnorm='keep' without calibration"),
        ({"held_out": [torch.ones(4, 3, 8, 8)], "bits": 8}, "held_out without calibration"),
        (
            {"calibration": [torch.ones(4, 3, 8, 8)], "held_out": [], "target_kl": 0.1},
            "held_out is empty",
        ),
        (
            {
                "calibration": [torch.ones(4, 3, 8, 8)],
                "held_out": torch.ones(4, 3, 8, 8),
                "target_kl": 0.1,
            },
            r"held_out: a batch is torch.float32 \(3, 8, 8\); allowed: batches like torch.float32 "
            r"\(4, 3, 8, 8\)",
        ),
        (
            {
                "calibration": [torch.ones(4, 3, 8, 8)],
                "held_out": [torch.full((4, 3, 8, 8), torch.nan)],
                "target_kl": 0.1,
            },
            "held_out: 40 of 40 outputs",
        ),
        (
            {"calibration": [torch.ones(4, 3, 8, 8)], "held_out": ["a"], "target_kl": 0.1},
            "held_out: a batch",
        ),
        ({"calibration": [torch.ones(4, 3, 8, 8)]}, "give target_kl, target_bytes or"),
        (
            {"calibration": [torch.ones(4, 3, 8, 8)], "target_kl": 0.1, "target_bytes": 9},
            "give one of them",
        ),
        ({"calibration": [torch.ones(4, 3, 8, 8)], "bits": 8}, "bits=8 with calibration"),
        ({"calibration": [torch.ones(1, 3, 8, 8)], "target_kl": 0.1}, "it has 1 input"),
        ({"calibration": [torch.ones(4, 3, 8, 8)], "target_kl": -1}, "target_kl must be"),
        (
            {"calibration": [torch.ones(4, 3, 8, 8)], "target_kl": 0.1, "batchnorm": "fuse"},
            "unknown batchnorm 'fuse'; allowed: fold, keep",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_errors_come_before_anything_is_written(
    tmp_path: Path, options: dict[str, Any], message: str
) -> None:
    with pytest.raises((WavpruneError, TypeError), match=message):
        checkpoint.save(network(), tmp_path / PATH, **options)
    assert not list(tmp_path.iterdir())


def test_the_command_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    save_file(network().state_dict(), "in.safetensors")
    data = torch.cat(inputs()).numpy()
    np.savez("data.npz", images=data, labels=np.zeros(len(data), dtype=np.int64))
    options = ["--calibration", "data.npz", "--target-kl", "0.01", "--json"]
    model = ["--model", f"{__name__}:network"]
    assert main(["compress", "in.safetensors", "-o", PATH, *options, *model]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert facts["bytes"] == Path(PATH).stat().st_size
    assert facts["measured_kl"] < 0.011
    assert main(["compress", f"{__name__}:network", "-o", "b.safetensors", *options]) == 0
    assert Path("b.safetensors").read_bytes() == Path(PATH).read_bytes()
    np.savez("other.npz", images=data[:50] + 1)
    other = ["--held-out", "other.npz"]
    line = ["compress", f"{__name__}:network", "-o", "d.safetensors", *options, *other]
    assert main(line) == 0
    assert Path("d.safetensors").read_bytes() != Path(PATH).read_bytes()
    capsys.readouterr()
    assert main(["compress", PATH, "-o", "e.safetensors", *other]) == 2
    assert "--held-out goes with --calibration" in capsys.readouterr().err
    capsys.readouterr()
    assert main(["compress", "in.safetensors", "-o", "c.safetensors", *options]) == 2
    assert "has only its weights; give --model" in capsys.readouterr().err


@pytest.mark.parametrize("calibrated", [True, False])
def test_progress_is_shown(
    calibrated: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    how: dict[str, Any] = {"calibration": inputs(), "target_kl": 0.01} if calibrated else {}
    how |= {} if calibrated else {"coder": "trellis", "step": 0.01}
    checkpoint.save(network(), tmp_path / "a.safetensors", progress=True, **how)
    shown = capsys.readouterr().err
    assert "compress" in shown
    assert ("calibrate" in shown) == calibrated
    assert "100%" in shown
