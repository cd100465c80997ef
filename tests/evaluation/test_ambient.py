from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from torch import nn

import wavprune
from wavprune import PruneConfig, compare, evaluate, match_batchnorm, predict, run_trial


def network() -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(1, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.BatchNorm2d(6),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    model(batches()[0][0])
    return model.eval()


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    draw = torch.Generator().manual_seed(1)
    return [(torch.randn(20, 1, 8, 8, generator=draw), torch.arange(20) % 6) for _ in range(2)]


def pruned(model: nn.Module) -> nn.Module:
    result = copy.deepcopy(model)
    wavprune.fast.prune(result, sparsity=0.8)
    return result


DENSE = network()
PRUNED = pruned(DENSE)
DATA = batches()
CONFIG = PruneConfig(sparsity=0.7, scope="global")
LISTED_LABELS = [(inputs, labels.tolist()) for inputs, labels in DATA]


def state(model: nn.Module) -> list[list[Any]]:
    return [value.tolist() for value in model.state_dict().values()]


def matched(reference: Any) -> list[list[Any]]:
    model = copy.deepcopy(PRUNED)
    match_batchnorm(model, reference, DATA)
    return state(model)


def updated() -> list[list[Any]]:
    model = copy.deepcopy(PRUNED)
    wavprune.update_batchnorm(model, DATA)
    return state(model)


def trial() -> tuple[Any, ...]:
    result = run_trial(DENSE, LISTED_LABELS, CONFIG, timing=False)
    assert result.model is not None
    return state(result.model), result.evaluation


def rows() -> list[dict[str, Any]]:
    result = compare(
        DENSE, DATA, sparsities=[0.8], wavelets=["haar", "klt"], mode="zero", seeds=[0]
    )
    return [{k: v for k, v in row.items() if not k.endswith("_seconds")} for row in result.rows()]


# What changes a model, and what measures one.
REPAIRS: dict[str, Callable[[], Any]] = {
    "match, model": lambda: matched(DENSE),
    "match, statistics": lambda: matched(wavprune.batchnorm_statistics(DENSE, DATA)),
    "update": updated,
}
MEASURES: dict[str, Callable[[], Any]] = {
    "predict": lambda: [values.tolist() for values in predict(PRUNED, DATA)],
    "evaluate": lambda: evaluate(PRUNED, DATA, DENSE, timing=False),
    "trial": trial,
    "compare": rows,
}


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@contextmanager
def default_device(device: str) -> Iterator[None]:
    torch.set_default_device(device)
    try:
        yield
    finally:
        torch.set_default_device(None)


@contextmanager
def flushed_denormals() -> Iterator[None]:
    torch.set_flush_denormal(True)
    try:
        yield
    finally:
        torch.set_flush_denormal(False)


AMBIENT: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "default dtype float64": lambda: default_dtype(torch.float64),
    "default dtype bfloat16": lambda: default_dtype(torch.bfloat16),
    "default device": lambda: default_device("meta"),
    "device context": lambda: torch.device("meta"),
    "deterministic": deterministic,
    "flush denormals": flushed_denormals,
    "inference mode": torch.inference_mode,
    "no grad": torch.no_grad,
    "anomaly": lambda: torch.autograd.set_detect_anomaly(True),
    "grad": torch.enable_grad,
}
AUTOCAST: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
}


@pytest.fixture(scope="module")
def expected() -> dict[str, Any]:
    return {name: call() for name, call in (REPAIRS | MEASURES).items()}


@pytest.mark.parametrize("name", REPAIRS)
@pytest.mark.parametrize("ambient", AMBIENT | AUTOCAST)
def test_a_repair_depends_on_nothing_around_it(
    name: str, ambient: str, expected: dict[str, Any]
) -> None:
    with (AMBIENT | AUTOCAST)[ambient]():
        result = REPAIRS[name]()
    assert result == expected[name]


@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("ambient", AMBIENT)
def test_a_measure_depends_on_nothing_but_autocast(
    name: str, ambient: str, expected: dict[str, Any]
) -> None:
    with AMBIENT[ambient]():
        result = MEASURES[name]()
    assert result == expected[name]


def test_under_autocast_the_model_runs_with_it_and_is_measured_in_full_precision() -> None:
    with torch.autocast("cpu", torch.bfloat16):
        logits, labels = predict(PRUNED, DATA)
        result = evaluate(PRUNED, DATA, DENSE, timing=False)
        reference = predict(DENSE, DATA)
        direct = PRUNED(DATA[0][0])
    assert torch.equal(logits[:20], direct)
    log_q = logits.double().log_softmax(1)
    log_p = reference.logits.double().log_softmax(1)
    assert result.loss == pytest.approx(float(nn.functional.nll_loss(log_q, labels)), rel=1e-12)
    assert result.kl == pytest.approx(
        float((log_p.exp() * (log_p - log_q)).sum(1).mean()), rel=1e-9
    )


def test_pruning_and_repair_of_a_trial_do_not_see_autocast(expected: dict[str, Any]) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        weights, _ = trial()
    assert weights == expected["trial"][0]


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", REPAIRS)
def test_a_model_of_inference_tensors_is_repaired(
    name: str, inside: bool, expected: dict[str, Any]
) -> None:
    with torch.inference_mode():
        model = copy.deepcopy(PRUNED)
    assert all(buffer.is_inference() for buffer in model.buffers())
    with torch.inference_mode() if inside else nullcontext():
        if name == "update":
            wavprune.update_batchnorm(model, DATA)
        elif name == "match, model":
            match_batchnorm(model, DENSE, DATA)
        else:
            match_batchnorm(model, wavprune.batchnorm_statistics(DENSE, DATA), DATA)
    assert state(model) == expected[name]


def test_a_model_pruned_by_a_trial_in_inference_mode_can_be_trained() -> None:
    with torch.inference_mode():
        model = run_trial(DENSE, DATA, CONFIG, timing=False).model
    assert model is not None
    model.train()(DATA[0][0]).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
