"""No result depends on what the caller has switched on; every entry point, every state."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torchmetrics
from torch import nn

import wavprune
from tests.support.cases import BACKENDS, bits, normal
from tests.support.interrupts import interrupted
from wavprune import LayerRef, PruneConfig
from wavprune.engine.ambient import neutral, with_gradients, without_gradients


@contextmanager
def restored(change: Callable[[], Any], undo: Callable[[], Any]) -> Iterator[None]:
    change()
    try:
        yield
    finally:
        undo()


OVERRIDES: Any = torch.overrides
MATMUL: Any = torch.backends.mkldnn.matmul  # type: ignore[attr-defined]  # torch has no types

STATES: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "grad": lambda: torch.enable_grad(),
    "no grad": lambda: torch.no_grad(),
    "inference": lambda: torch.inference_mode(),
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True, check_nan=True),
    "default dtype": lambda: restored(
        lambda: torch.set_default_dtype(torch.float64),
        lambda: torch.set_default_dtype(torch.float32),
    ),
    "meta device": lambda: torch.device("meta"),
    "deterministic": lambda: restored(
        lambda: torch.use_deterministic_algorithms(True),
        lambda: torch.use_deterministic_algorithms(False),
    ),
    "bfloat16 products": lambda: restored(
        lambda: setattr(MATMUL, "fp32_precision", "bf16"),
        lambda: setattr(MATMUL, "fp32_precision", "none"),
    ),
    "flushed denormals": lambda: restored(
        lambda: torch.set_flush_denormal(True), lambda: torch.set_flush_denormal(False)
    ),
    "three threads": lambda: restored(
        lambda: torch.set_num_threads(3), lambda: torch.set_num_threads(1)
    ),
}


def net(scale: float = 1.0) -> nn.Sequential:
    """Two convolutions and a matrix, the last weights denormal for a small scale."""
    model = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Conv2d(8, 8, 5), nn.Linear(40, 24))
    for seed, parameter in enumerate(model.parameters()):
        with torch.no_grad():
            parameter.copy_(normal(*parameter.shape, seed=seed) * scale)
    return model


def pruned(model: nn.Module, backend: str) -> list[object]:
    settings: dict[str, Any] = {"wavelet": "haar", "mode": "zero", "backend": backend}
    report = wavprune.fast.prune(model, targets="*" if backend != "native" else None, **settings)
    return [[row.kept for row in report], [row.threshold for row in report], report.relative_error]


def chosen(model: nn.Module, backend: str) -> list[object]:
    report = wavprune.fast.prune(model, wavelet="auto", scope="global", backend=backend)
    return [[row.wavelet for row in report], report.kept]


def drawn(model: nn.Module, backend: str) -> list[object]:
    return [wavprune.fast.prune(model, "random", seed=3, backend=backend).kept]


def trained(model: nn.Module, backend: str) -> list[object]:
    config = wavprune.PruneConfig(wavelet="dct", sparsity=0.7, backend=backend)
    pruner = wavprune.Pruner(model, config)
    pruner.step()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.data.add_(0.125)
    pruner.step()
    return [pruner.finish().kept, [bits(mask) for mask in pruner.masks.values()]]


ENTRIES = [pruned, chosen, drawn, trained]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("entry", ENTRIES, ids=lambda entry: entry.__name__)
@pytest.mark.parametrize("state", STATES)
def test_results_are_the_same_bits_in_every_state(state: str, entry: Any, backend: str) -> None:
    for scale in (1.0, 1e-41) if state == "flushed denormals" else (1.0,):
        plain, other = net(scale), net(scale)
        expected = entry(plain, backend)
        with STATES[state]():
            result = entry(other, backend)
        assert result == expected
        for one, two in zip(plain.parameters(), other.parameters(), strict=True):
            assert bits(one) == bits(two)


@pytest.mark.parametrize("backend", BACKENDS)
def test_weights_of_inference_mode_are_pruned_like_others(backend: str) -> None:
    plain = net()
    expected = pruned(plain, backend)
    with torch.inference_mode():
        model = net()
    assert all(parameter.is_inference() for parameter in model.parameters())
    assert pruned(model, backend) == expected
    for one, two in zip(plain.parameters(), model.parameters(), strict=True):
        assert bits(one) == bits(two)


def seen() -> list[object]:
    """What a caller has switched on."""
    return [
        torch.is_autocast_enabled("cpu"),
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.get_default_dtype(),
        torch.get_default_device(),
        torch.are_deterministic_algorithms_enabled(),
        MATMUL.fp32_precision,
        float.fromhex("0x1p-1074") * float("1"),
        torch.get_num_threads(),
        len(OVERRIDES._get_current_function_mode_stack()),
    ]


@pytest.mark.parametrize("state", STATES)
def test_the_state_of_the_caller_is_as_it_was(state: str) -> None:
    with STATES[state]():
        before = seen()
        with neutral():
            pass
        assert seen() == before
        with pytest.raises(RuntimeError), neutral():
            raise RuntimeError
        assert seen() == before


def test_what_is_switched_within_a_block_ends_with_it() -> None:
    with torch.no_grad():
        with without_gradients():
            torch.set_grad_enabled(True)
        assert not torch.is_grad_enabled()


def test_an_abandoned_block_ends_with_the_one_around_it_and_only_then() -> None:
    with torch.no_grad():
        with with_gradients():
            abandoned = neutral()
            abandoned.__enter__()
        assert not torch.is_grad_enabled()
        torch.set_grad_enabled(True)
        del abandoned
        assert torch.is_grad_enabled()


def test_a_block_that_ends_late_leaves_the_later_ones_alone() -> None:
    with torch.enable_grad():
        late = without_gradients()
        late.__enter__()
        with neutral():
            with with_gradients():
                del late
                assert torch.is_grad_enabled()
            assert not torch.is_grad_enabled()
        assert torch.is_grad_enabled()


def nested() -> None:
    with neutral(), without_gradients(), neutral():
        pass


# Under a default device torch's own functions, interrupted, lose it.
@pytest.mark.parametrize(
    ("entry", "state"),
    [(nested, state) for state in STATES]
    + [(pruned, state) for state in STATES if state != "meta device"],
    ids=lambda value: getattr(value, "__name__", value),
)
def test_the_state_of_the_caller_is_as_it_was_after_an_interrupt(entry: Any, state: str) -> None:
    model = net()
    arguments = (model, "eager") if entry is pruned else ()
    with STATES[state]():
        before = seen()
        # The first call does more.
        entry(*arguments)
        points = interrupted(lambda: entry(*arguments), at=0)
        assert points is not None
        cut_short = 0
        for at in range(1, points, points // 250 + 1):
            cut_short += interrupted(lambda: entry(*arguments), at) is None
            assert seen() == before, at
        assert cut_short >= 90


INPUTS = normal(12, 2, 7, 7)


def calibrated(network: nn.Module, path: Path) -> None:
    del path
    wavprune.fast.prune(network, sparsity=0.5, calibration=[INPUTS])


def saved(network: nn.Module, path: Path) -> None:
    file = path / "small.safetensors"
    wavprune.checkpoint.save(network, file, calibration=[INPUTS], target_kl=0.1)
    wavprune.checkpoint.attach(network, file)
    network(INPUTS)


METRIC = wavprune.Measure(torchmetrics.MeanSquaredError(), logits=False)


def tried(network: nn.Module, path: Path) -> None:
    del path
    loader = [(INPUTS, torch.zeros(12, 4))]
    wavprune.run_trial(network, loader, PruneConfig(), metric=METRIC, timing=False)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("entry", [calibrated, saved, tried], ids=lambda entry: entry.__name__)
def test_gradients_are_as_they_were_after_an_interrupt(
    entry: Any, mode: Any, tmp_path: Path
) -> None:
    layers = [nn.Conv2d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(100, 4)]
    network = nn.Sequential(*layers).eval()
    switching = ("ambient.py", "contextlib.py", "grad_mode.py")

    def cut_short(at: int) -> int | None:
        model = copy.deepcopy(network)
        with mode():
            before = seen()
            points = interrupted(lambda: entry(model, tmp_path), at, switching)
            assert seen() == before, at
        return points

    cut_short(0)
    points = cut_short(0)
    assert points is not None
    ended = [cut_short(at) for at in range(1, points, points // 20 + 1)]
    assert ended.count(None) >= 10


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one here")
@pytest.mark.parametrize("name", ["cuda", "cuda:0"])
def test_a_default_device_that_is_not_here_changes_nothing(name: str) -> None:
    here, there = (normal(8, 4, 3, 3) for _ in range(2))
    wavprune.prune_layers([LayerRef("conv", here)], PruneConfig())
    with torch.device(name):
        wavprune.prune_layers([LayerRef("conv", there)], PruneConfig())
    assert torch.equal(here, there)
