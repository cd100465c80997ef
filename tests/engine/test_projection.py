from __future__ import annotations

import math

import pytest
import torch

from wavprune import LayerRef, PruneConfig
from wavprune.engine.plan import Plan
from wavprune.engine.projection import (
    checksum,
    distances,
    project_layers,
    projection_plan,
    rounding,
)
from wavprune.engine.run import prune_layers
from wavprune.errors import WavpruneError

Pruned = tuple[Plan, list[LayerRef], list[torch.Tensor]]


def pruned(
    config: PruneConfig,
    dtype: torch.dtype = torch.float32,
    scale: float = 1.0,
    second: torch.dtype | None = None,
) -> Pruned:
    """Two layers, their masks, and how they are projected; the weights are new."""
    torch.manual_seed(0)
    weights = [torch.randn(8, 4, 3, 3).to(dtype), torch.randn(6, 8, 4, 4).to(second or dtype)]
    refs = [LayerRef(str(i), weight) for i, weight in enumerate(weights)]
    report = prune_layers(refs, config, masks=True)
    assert report.masks is not None
    plan = projection_plan(refs, config, [report.bases[ref.name] for ref in refs])
    for ref in refs:
        ref.weight.copy_((torch.randn(ref.weight.shape) * scale).to(ref.weight.dtype))
    return plan, refs, [report.masks[ref.name] for ref in refs]


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("wavelet", ["uhaar", "haar", "dct", "bior4.4", "sym5", "klt", "identity"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.filterwarnings("ignore::wavprune.LevelCollapsedWarning")
def test_a_distance_tells_what_is_projected(backend: str, wavelet: str, dtype: torch.dtype) -> None:
    plan, refs, masks = pruned(PruneConfig(wavelet=wavelet, sparsity=0.7, backend=backend), dtype)
    limits = [rounding(layer) for layer in plan.layers]
    assert all(d > 0.1 for d in distances(plan, refs, masks))
    project_layers(plan, refs, masks)
    assert all(d <= limit for d, limit in zip(distances(plan, refs, masks), limits, strict=True))
    moved = torch.randn(refs[1].weight.shape) * 100 * torch.finfo(dtype).eps
    refs[1].weight.add_(moved.to(dtype))
    first, second = distances(plan, refs, masks)
    assert first <= limits[0]
    assert second > limits[1]


def test_tiny_weights_are_projected_too() -> None:
    plan, refs, masks = pruned(PruneConfig(sparsity=0.7), scale=1e-43)
    project_layers(plan, refs, masks)
    assert distances(plan, refs, masks) == [0.0, 0.0]


@pytest.mark.parametrize("backend", ["native", "eager"])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_named_and_does_not_spread(backend: str, value: float) -> None:
    plan, refs, masks = pruned(PruneConfig(sparsity=0.7, backend=backend))
    refs[1].weight[1, 2, 3, 0] = value
    before = [ref.weight.clone() for ref in refs]
    with pytest.raises(WavpruneError, match="layer '1': 1 of 768 weights are NaN or infinite"):
        project_layers(plan, refs, masks)
    for ref, values in zip(refs, before, strict=True):
        assert torch.equal(ref.weight.nan_to_num(7), values.nan_to_num(7))
    assert not math.isfinite(distances(plan, refs, masks)[1])


@pytest.mark.parametrize("backend", ["native", "eager"])
def test_large_weights_are_projected_unless_they_overflow(backend: str) -> None:
    plan, refs, masks = pruned(PruneConfig(sparsity=0.5, backend=backend), scale=1e25)
    expected = [ref.weight.clone() * 2.0**-80 for ref in refs]
    project_layers(plan, refs, masks)
    small = [LayerRef(ref.name, weight) for ref, weight in zip(refs, expected, strict=True)]
    project_layers(plan, small, masks)
    for ref, weight in zip(refs, expected, strict=True):
        assert torch.equal(ref.weight, weight * 2.0**80)
    refs[1].weight.fill_(3e38)
    before = [ref.weight.clone() for ref in refs]
    with pytest.raises(WavpruneError, match="layer '1': the coefficients overflow although every"):
        project_layers(plan, refs, [torch.full_like(mask, 255) for mask in masks])
    assert all(torch.equal(ref.weight, values) for ref, values in zip(refs, before, strict=True))


@pytest.mark.parametrize(
    ("backend", "second"),
    [("native", torch.float32), ("native", torch.float64), ("eager", torch.float32)],
)
def test_an_interrupt_leaves_weights_projected_or_as_they_were(
    backend: str, second: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, refs, masks = pruned(PruneConfig(sparsity=0.7, backend=backend), second=second)
    before = [ref.weight.clone() for ref in refs]
    runner = plan.backend(scattered=False, masks=True)
    real = type(runner).project_
    calls = []

    def interrupted(self: object, layers: list[object], masks: list[torch.Tensor]) -> None:
        calls.append(len(layers))
        if len(calls) > 1:
            return real(self, layers, masks)  # type: ignore[arg-type]
        real(self, layers[:1], masks[:1])  # type: ignore[arg-type]
        raise KeyboardInterrupt

    monkeypatch.setattr(type(runner), "project_", interrupted)
    with pytest.raises(KeyboardInterrupt) as caught:
        project_layers(plan, refs, masks)
    # One call of the compiled code changes weights of one dtype.
    if backend == "eager" or second == torch.float64:
        pairs = zip(refs, before, strict=True)
        assert all(torch.equal(ref.weight, values) for ref, values in pairs)
    else:
        assert caught.value.__notes__ == [
            "wavprune: all weights were projected before this was raised; nothing else has changed"
        ]
        limits = [rounding(layer) for layer in plan.layers]
        apart = zip(distances(plan, refs, masks), limits, strict=True)
        assert all(distance <= limit for distance, limit in apart)


def test_a_checksum_is_of_all_bits_whatever_the_memory_format() -> None:
    weight = torch.randn(8, 4, 3, 3)
    same = weight.to(memory_format=torch.channels_last)
    assert int(checksum(weight)) == int(checksum(same))
    for other in (weight.flip(0), weight.flip(1) * 1.0001, -weight, weight.double()):
        assert int(checksum(weight)) != int(checksum(other))
    assert int(checksum(torch.empty(0, 4, 3, 3))) == 0
