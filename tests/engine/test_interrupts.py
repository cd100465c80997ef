from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
from torch import nn

import wavprune
from tests.support.cases import BACKENDS, bits, normal
from wavprune.backends import native
from wavprune.backends.eager import EagerBackend
from wavprune.engine import plan as planning
from wavprune.engine.staging import Stage


def net() -> nn.Sequential:
    model = nn.Sequential(*[nn.Conv2d(64, 64, 3, bias=False) for _ in range(6)])
    for seed, conv in enumerate(model):
        with torch.no_grad():
            conv.get_parameter("weight").copy_(normal(64, 64, 3, 3, seed=seed))
    return model


# An alarm in a finalizer is reported and goes no further, as Ctrl-C there does.
@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("backend", BACKENDS)
def test_an_interrupted_call_prunes_all_or_nothing(backend: str, alarm: Any) -> None:
    before, after = net(), net()
    wavprune.fast.prune(after, wavelet="haar", backend=backend)
    states = {tuple(bits(p) for p in model.parameters()) for model in (before, after)}
    interrupted = 0
    for i in range(30):
        model = net()
        try:
            try:
                alarm(0.0005 * (i + 1))
                wavprune.fast.prune(model, wavelet="haar", backend=backend)
            finally:
                # The alarm may come here, too.
                signal.setitimer(signal.ITIMER_REAL, 0)
        except KeyboardInterrupt:
            interrupted += 1
        assert tuple(bits(p) for p in model.parameters()) in states
    assert interrupted or backend == "native"


def test_copies_are_taken_back_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    # A device whose weights are copied there and back.
    monkeypatch.setattr(planning, "compute_device", lambda _: torch.device("cpu", 0))
    after = net()
    wavprune.fast.prune(after)
    leave = Stage.leave

    def interrupted(stage: Stage, *arguments: Any) -> Any:
        signal.raise_signal(signal.SIGINT)
        return leave(stage, *arguments)

    monkeypatch.setattr(Stage, "leave", interrupted)
    model = net()
    with pytest.raises(KeyboardInterrupt):
        wavprune.fast.prune(model)
    pairs = zip(model.parameters(), after.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_weights_of_two_dtypes_are_pruned_all_or_none(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wavprune.ops")
    after, model = net(), net()
    for each in (after, model):
        each[3].double()
    wavprune.fast.prune(after, backend="native")

    def interrupted(*_: Any) -> None:
        # The compiled code takes the layers of one dtype after those of the other.
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(native, "mark_changed", interrupted)
    with pytest.raises(KeyboardInterrupt):
        wavprune.fast.prune(model, backend="native")
    pairs = zip(model.parameters(), after.parameters(), strict=True)
    assert all(torch.equal(ours, theirs) for ours, theirs in pairs)


def test_an_error_half_way_says_what_has_changed(monkeypatch: pytest.MonkeyPatch) -> None:
    rewrite = EagerBackend._rewrite

    def failing(self: Any, layer: Any, *args: Any) -> torch.Tensor:
        if layer.name == "2":
            raise MemoryError("no more")
        return rewrite(self, layer, *args)

    monkeypatch.setattr(EagerBackend, "_rewrite", failing)
    with pytest.raises(MemoryError, match="no more") as caught:
        wavprune.fast.prune(net(), backend="eager")
    assert caught.value.__notes__ == [
        "wavprune: pruned before this error: 0, 1; perhaps in part: 2"
    ]
