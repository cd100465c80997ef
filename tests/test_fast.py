from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import wavprune
from tests.support.cases import (
    BACKENDS,
    BASES,
    any_level,
    assert_pruned,
    bits,
    layer_weights,
    model_of,
    outcomes,
)
from wavprune import PruneConfig

METHODS: list[dict[str, Any]] = [
    {"wavelet": "uhaar"},
    {"wavelet": "dct", "percentile": 60.0},
    {"method": "min_weight"},
    {"method": "random"},
]


class Net(nn.Module):
    """Convolutions of every kind, and what goes between them."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 5, padding=2, groups=16)
        self.pointwise = nn.Conv2d(16, 24, 1)
        self.grouped = nn.Conv2d(24, 24, (3, 5), padding=(1, 2), groups=4)
        self.row = nn.Conv2d(24, 8, (1, 7), dilation=2)
        self.fc = nn.Linear(8, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.stem(x)).relu()
        x = self.pointwise(self.depthwise(x)).relu()
        x = self.row(self.grouped(x)).mean((2, 3))
        logits: torch.Tensor = self.fc(x)
        return logits


def net() -> Net:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return Net()


def images() -> torch.Tensor:
    return torch.linspace(-1, 1, 2 * 3 * 32 * 32).sin().view(2, 3, 32, 32)


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name.removesuffix(".weight"): value for name, value in model.named_parameters()}


@pytest.mark.parametrize("settings", BASES.values(), ids=BASES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("amount", [{"sparsity": 0.5}, {"percentile": 75.0}], ids=str)
def test_fast_is_reference_but_for_4_ulp_at_the_threshold(
    settings: dict[str, Any], dtype: torch.dtype, amount: dict[str, Any]
) -> None:
    before = layer_weights(dtype)
    if settings.get("wavelet") == "klt":
        before = {name: w for name, w in before.items() if len(w.flatten(0, 1)) > w[0, 0].numel()}
    for prune in (wavprune.fast.prune, wavprune.reference.prune):
        model = model_of(**{name: w.detach().clone() for name, w in before.items()})
        with any_level():
            report = prune(model, **settings, **amount)
        after = outcomes(weights(model), report)
        assert_pruned(before, after, PruneConfig(**settings, **amount))


@pytest.mark.parametrize("settings", METHODS[2:], ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_fast_is_reference_to_the_bit_where_nothing_is_transformed(
    settings: dict[str, Any], backend: str
) -> None:
    fast, reference = net(), net()
    one = wavprune.fast.prune(fast, **settings, backend=backend)
    other = wavprune.reference.prune(reference, **settings)
    for a, b in zip(one, other, strict=True):
        assert (a.kept, a.threshold, a.weight_zeros) == (b.kept, b.threshold, b.weight_zeros)
        assert a.relative_error == pytest.approx(b.relative_error, rel=1e-6)
    for name, weight in weights(fast).items():
        assert bits(weight) == bits(weights(reference)[name])


def test_the_defaults_halve_every_convolution() -> None:
    model = net()
    report = wavprune.fast.prune(model)
    assert [layer.name for layer in report] == ["stem", "depthwise", "pointwise", "grouped", "row"]
    assert {layer.wavelet for layer in report} == {"uhaar", "identity"}
    assert report.sparsity == 0.5


@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_a_pruned_model_trains_on(settings: dict[str, Any]) -> None:
    model = net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)

    def step() -> float:
        optimizer.zero_grad()
        loss = model(images()).square().mean()
        loss.backward()
        optimizer.step()
        return float(loss.detach())

    step()
    gradient = bits(model.stem.weight.grad) if model.stem.weight.grad is not None else b""
    wavprune.fast.prune(model, **settings)
    assert model.stem.weight.grad is not None
    assert bits(model.stem.weight.grad) == gradient
    pruned = bits(model.stem.weight)
    losses = [step() for _ in range(5)]
    assert losses[-1] < losses[0]
    assert bits(model.stem.weight) != pruned


@pytest.mark.parametrize("backend", BACKENDS)
def test_pruning_between_forward_and_backward_is_not_silent(backend: str) -> None:
    model = net()
    loss = model(images()).sum()
    wavprune.fast.prune(model, backend=backend)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


@pytest.mark.parametrize("settings", METHODS, ids=str)
def test_a_pruned_model_can_be_copied_saved_and_loaded(settings: dict[str, Any]) -> None:
    model = net().eval()
    wavprune.fast.prune(model, **settings)
    expected = model(images())
    file = io.BytesIO()
    torch.save(model.state_dict(), file)
    file.seek(0)
    loaded = net().eval()
    loaded.load_state_dict(torch.load(file))
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model)), loaded):
        assert torch.equal(twin(images()), expected)


def test_pruning_in_inference_mode_and_without_gradients() -> None:
    expected = net()
    wavprune.fast.prune(expected)
    for mode in (torch.no_grad, torch.inference_mode):
        model = net()
        with mode():
            wavprune.fast.prune(model)
        assert bits(model.stem.weight) == bits(expected.stem.weight)
        model(images()).sum().backward()
        assert model.stem.weight.grad is not None


def test_less_is_lost_in_a_basis_that_fits() -> None:
    slopes = torch.cumsum(torch.ones(32, 16, 5, 5), 3) * torch.arange(1, 17).view(1, 16, 1, 1)
    bases: list[dict[str, Any]] = [{"wavelet": "klt"}, {"wavelet": "dct"}, *METHODS[2:]]
    errors = [
        wavprune.fast.prune(model_of(conv=slopes.clone()), **basis, sparsity=0.9).relative_error
        for basis in bases
    ]
    assert errors == sorted(errors)


def test_every_argument_by_name() -> None:
    model = net()
    report = wavprune.fast.prune(
        model,
        method="dwt",
        wavelet="haar",
        level=1,
        mode="zero",
        force_level=True,
        sparsity=0.9,
        percentile=None,
        scope="global",
        device="cpu",
        backend="eager",
        targets=["stem", "grouped"],
        ignore="gr*",
        seed=1,
        progress=False,
        match=None,
    )
    assert [layer.name for layer in report] == ["stem"]
