"""A network that lives on a GPU, through every door; what comes out is what the CPU gives.

It needs torch, numpy, PyWavelets and pytest; the doors that need more are skipped without it.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional

import wavprune
from wavprune import PruneConfig, Pruner, backends, schedule

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
]

GPU = "cuda"
SETTINGS: dict[str, dict[str, Any]] = {
    "uhaar": {"wavelet": "uhaar", "sparsity": 0.8},
    "dct": {"wavelet": "dct", "sparsity": 0.8},
    "klt": {"wavelet": "klt", "sparsity": 0.8},
    "auto": {"wavelet": "auto", "sparsity": 0.8},
    "auto global": {"wavelet": "auto", "sparsity": 0.8, "scope": "global"},
    "percentile": {"wavelet": "haar", "percentile": 75.0},
    "min-weight": {"method": "min_weight", "sparsity": 0.8, "scope": "global"},
    "random": {"method": "random", "sparsity": 0.8},
    "2:4": {"method": "min_weight", "pattern": "2:4", "ignore": ["3"]},
}


@pytest.fixture(autouse=True)
def full_precision(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same precision in both places: TF32 rounds inputs of convolutions to 10 bits."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    # False by default where torch has CUDA.
    assert not torch.backends.cuda.matmul.allow_tf32


def network() -> nn.Sequential:
    """Convolutions of all kinds, random and seeded, with statistics of batch norms."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = nn.Sequential(
            nn.Conv2d(4, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 24, 5, padding=2, groups=4),
            nn.BatchNorm2d(24),
            nn.ReLU(),
            nn.Conv2d(24, 32, 1),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
            nn.Linear(32, 10),
        )
        with torch.no_grad():
            for _ in range(20):
                net(torch.randn(64, 4, 8, 8))
    return net.eval()


def batches(count: int = 4, device: str = "cpu", seed: int = 1) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(32, 4, 8, 8, generator=generator).to(device) for _ in range(count)]


def labelled(device: str = "cpu") -> list[tuple[torch.Tensor, torch.Tensor]]:
    net = network()
    with torch.no_grad():
        return [(x.to(device), net(x).argmax(1).to(device)) for x in batches(seed=2)]


def tensors(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.cpu() for name, tensor in model.state_dict().items()}


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=2e-3, atol=2e-4)


def assert_near(ours: nn.Module, theirs: nn.Module) -> None:
    expected = tensors(theirs)
    for name, tensor in tensors(ours).items():
        assert_close(tensor, expected[name])
    assert {tensor.device.type for tensor in ours.state_dict().values()} == {GPU}


def outputs(model: nn.Module) -> torch.Tensor:
    """Of the test inputs, on the CPU."""
    device = next(model.parameters()).device
    with torch.no_grad():
        return torch.cat([model(x.to(device)).cpu() for x in batches(seed=2)])


@pytest.mark.parametrize("name", SETTINGS)
def test_pruning(name: str) -> None:
    here, there = network(), network().to(GPU)
    expected = wavprune.fast.prune(here, **SETTINGS[name])
    report = wavprune.fast.prune(there, **SETTINGS[name])
    assert report.kept == expected.kept
    for ours, theirs in zip(report, expected, strict=True):
        assert ours.wavelet == theirs.wavelet
    assert_near(there, here)


@pytest.mark.parametrize("name", ["native", "triton", "eager", "ptwt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_every_backend_takes_every_dtype(name: str, dtype: torch.dtype) -> None:
    if name in backends.unavailable():
        pytest.skip(backends.unavailable()[name])
    settings = {"wavelet": "haar", "sparsity": 0.8, "mode": "zero"}
    here, there = network().to(dtype), network().to(dtype).to(GPU)
    expected = wavprune.fast.prune(here, backend="reference", **settings)  # type: ignore[arg-type]
    report = wavprune.fast.prune(there, backend=name, **settings)  # type: ignore[arg-type]
    assert all(layer.backend == name for layer in report)
    assert abs(report.kept - expected.kept) <= 2
    for ours, theirs in zip(there.parameters(), here.parameters(), strict=True):
        wrong = ~torch.isclose(ours.cpu().double(), theirs.double(), rtol=1e-2, atol=1e-4)
        # A coefficient at the threshold may fall on either side.
        assert int(wrong.sum()) <= 25


@pytest.mark.parametrize("home", ["cpu", GPU])
@pytest.mark.parametrize("level", ["refit", "sequential", "full"])
def test_calibrated_pruning(level: str, home: str) -> None:
    dense = network()
    here, there = network(), network().to(GPU)
    settings: dict[str, Any] = {"sparsity": 0.8, "wavelet": "dct", "calibration_level": level}
    wavprune.fast.prune(here, calibration=wavprune.calibrate(here, batches()), **settings)
    calibration = wavprune.calibrate(there, batches(device=home))
    report = wavprune.fast.prune(there, calibration=calibration, **settings)
    assert report.kept > 0
    assert {tensor.device.type for tensor in there.state_dict().values()} == {GPU}
    wanted = outputs(dense)
    errors = [float((outputs(net) - wanted).square().mean()) for net in (here, there)]
    assert errors[1] < 1.3 * errors[0]


def test_calibration_runs_on_a_borrowed_gpu(tmp_path: Path) -> None:
    net = network()
    calibration = wavprune.calibrate(net, batches(), device=GPU)
    calibration.save(tmp_path / "calibration.safetensors")
    again = wavprune.Calibration.load(tmp_path / "calibration.safetensors")
    report = wavprune.fast.prune(
        net, calibration=again, sparsity=0.8, device=GPU, calibration_level="sequential"
    )
    assert report.kept > 0
    assert {tensor.device.type for tensor in net.state_dict().values()} == {"cpu"}


@pytest.mark.parametrize("home", ["cpu", GPU])
def test_repairs_and_measures(home: str) -> None:
    dense = network()
    here, there = network(), network().to(GPU)
    for net in (here, there):
        wavprune.fast.prune(net, sparsity=0.8, wavelet="dct")
    wavprune.match_batchnorm(here, dense, batches())
    wavprune.match_batchnorm(there, dense.to(GPU), batches(device=home))
    assert_near(there, here)
    wavprune.match_biases(here, network(), batches())
    wavprune.match_biases(there, dense, batches(device=home))
    assert_near(there, here)
    data = labelled(home)
    ours = wavprune.evaluate(there, data, reference=dense)
    theirs = wavprune.evaluate(here, labelled(), reference=network())
    assert ours.top1 == pytest.approx(theirs.top1, abs=0.02)
    assert ours.kl == pytest.approx(theirs.kl, rel=0.02)
    wavprune.update_batchnorm(here, batches())
    wavprune.update_batchnorm(there, batches(device=home))
    assert_near(there, here)
    table = wavprune.compare(dense, data, sparsities=[0.8], wavelets=["dct"], seeds=[0])
    assert len(table) >= 3


@pytest.mark.parametrize("amp", [None, torch.bfloat16, torch.float16])
def test_training_stays_pruned(amp: torch.dtype | None) -> None:
    net = network().to(GPU).train()
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3)
    scaler = torch.amp.GradScaler(GPU, enabled=amp == torch.float16)
    pruner = Pruner(
        net,
        config=PruneConfig(wavelet="dct", scope="global"),
        schedule=schedule.Cubic(0.2, 0.9, start=0, end=8),
    )
    pruner.attach(optimizer)
    for x, y in 3 * labelled():
        with torch.autocast(GPU, dtype=amp, enabled=amp is not None):
            loss = functional.cross_entropy(net(x.to(GPU)), y.to(GPU))
        optimizer.zero_grad()
        scaler.scale(loss).backward()  # type: ignore[no-untyped-call]  # torch's lack
        scaler.step(optimizer)
        scaler.update()
    state = copy.deepcopy(pruner.state_dict())
    report = pruner.finish()
    assert report.sparsity == pytest.approx(0.9, abs=0.01)
    assert state
    assert all(layer.backend in ("native", "triton", "eager") for layer in report)


@pytest.mark.parametrize("options", [{"bits": 6}, {"coder": "trellis", "step": 0.02}])
def test_compressed_files(tmp_path: Path, options: dict[str, Any]) -> None:
    pytest.importorskip("zstandard")
    pytest.importorskip("constriction")
    here, there = network(), network().to(GPU)
    for net, name in ((here, "cpu.safetensors"), (there, "gpu.safetensors")):
        report = wavprune.fast.prune(net, sparsity=0.8, wavelet="dct")
        wavprune.checkpoint.save(net, tmp_path / name, report=report, **options)
    stored = [wavprune.checkpoint.load(path) for path in sorted(tmp_path.iterdir())]
    for name, tensor in stored[0].items():
        torch.testing.assert_close(stored[1][name], tensor, rtol=0.05, atol=0.02)
    there.load_state_dict(stored[1])
    assert next(there.parameters()).device.type == GPU


@pytest.mark.parametrize("batchnorm", ["fold", "keep"])
@pytest.mark.parametrize("home", ["cpu", GPU])
def test_calibrated_files_and_attached_weights(tmp_path: Path, home: str, batchnorm: str) -> None:
    pytest.importorskip("zstandard")
    dense = network().to(GPU)
    saved = wavprune.checkpoint.save(
        dense,
        tmp_path / "a.safetensors",
        calibration=batches(8, home),
        target_kl=0.01,
        batchnorm=batchnorm,
    )
    assert saved.measured_kl is not None
    assert saved.measured_kl < 0.0115
    assert {tensor.device.type for tensor in dense.state_dict().values()} == {GPU}
    attached = network().to(GPU)
    wavprune.checkpoint.attach(attached, tmp_path / "a.safetensors")
    wanted, found = (outputs(net).log_softmax(1) for net in (dense, attached))
    assert float((wanted.exp() * (wanted - found)).sum(1).mean()) < 0.05
    assert saved.bytes < 0.4 * sum(t.nbytes for t in dense.state_dict().values())


def test_the_command_line(tmp_path: Path) -> None:
    pytest.importorskip("click")
    pytest.importorskip("rich")
    from safetensors.torch import load_file, save_file

    from wavprune.cli import main

    save_file(network().state_dict(), tmp_path / "a.safetensors")
    for device in ("cpu", GPU):
        command = ["prune", str(tmp_path / "a.safetensors"), "-o"]
        command.append(str(tmp_path / f"{device}.safetensors"))
        assert main([*command, "--sparsity", "0.8", "--device", device]) == 0
    there, here = (load_file(tmp_path / f"{device}.safetensors") for device in (GPU, "cpu"))
    for name, tensor in here.items():
        assert_close(there[name], tensor)


def test_a_sweep(tmp_path: Path) -> None:
    for module in ("pydantic", "joblib", "yaml", "sklearn"):
        pytest.importorskip(module)
    from wavprune.sweep.runner import run_sweep
    from wavprune.sweep.settings import parse_sweep

    for device in ("cpu", GPU):
        sweep = parse_sweep(
            {
                "model": "demo",
                "data": "demo",
                "device": device,
                "grid": {"method": ["dwt", "min_weight"], "wavelet": "dct", "sparsity": 0.9},
            }
        )
        summary = run_sweep(sweep, tmp_path / f"{device}.db", jobs=1)
        assert (summary.ok, summary.failures) == (3, ())
