"""The ``triton`` backend on a GPU; it needs what ``test_cuda_on_gpu.py`` needs, and triton."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import wavprune
from tests.support.cases import (
    BASES,
    Outcome,
    assert_pruned,
    bits,
    layer_of,
    model_of,
    normal,
    prune_weights,
)
from tests.support.cuda_cases import DTYPES, LAYOUTS, laid_out, launched, to_gpu, twin
from wavprune import PruneConfig, Pruner, backends
from wavprune.backends import Budget, Job, Layer
from wavprune.backends.masks import unpack
from wavprune.backends.triton import backend as subject
from wavprune.errors import WavpruneError

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no GPU"),
    pytest.mark.skipif(
        "triton" in backends.unavailable(), reason=backends.unavailable().get("triton", "")
    ),
]


@pytest.fixture
def device() -> torch.device:
    """The current device."""
    return torch.device("cuda", torch.cuda.current_device())


def network(device: torch.device, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    """Weights of several kinds of layers, on the device."""
    weights = {
        "stem": normal(64, 3, 7, 7, dtype=dtype, seed=1),
        "three": normal(256, 129, 3, 3, dtype=dtype, seed=2),
        "point": normal(255, 64, 1, 1, dtype=dtype, seed=3),
        "depthwise": normal(333, 1, 5, 5, dtype=dtype, seed=4),
        "last": normal(64, 32, 3, 3, dtype=dtype, seed=5).to(memory_format=torch.channels_last),
    }
    return {name: weight.to(device) for name, weight in weights.items()}


@pytest.mark.parametrize("settings", BASES.values(), ids=BASES)
@pytest.mark.parametrize("amount", [{"sparsity": 0.7}, {"percentile": 40.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_it_prunes_what_the_matrices_say(
    device: torch.device, settings: dict[str, Any], amount: dict[str, Any], dtype: torch.dtype
) -> None:
    config = PruneConfig(backend="triton", **settings, **amount)
    before = {name: weight.cpu() for name, weight in network(device, dtype).items()}
    after = prune_weights(network(device, dtype), config)
    outcomes = {name: entry._replace(weight=entry.weight.cpu()) for name, entry in after.items()}
    assert_pruned(before, outcomes, config)


def pruned(weights: dict[str, torch.Tensor]) -> torch.Tensor:
    """Prune half of each weight with the backend alone; the host reads nothing."""
    backend = subject.make()
    config = PruneConfig(wavelet="uhaar")
    layers = [layer_of(weight, config) for weight in weights.values()]
    jobs = [Job([layer], Budget(keep=layer.weight.numel() // 2)) for layer in layers]
    return backend.apply_(layers, backend.threshold(jobs))


def test_nothing_makes_the_host_wait(device: torch.device) -> None:
    pruned(network(device))
    weights = network(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = pruned(weights)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    # At least half, as every pass computes the same bits; more only where coefficients tie.
    halves = [weight.numel() // 2 for weight in weights.values()]
    for kept, half in zip(rows[:, 0].tolist(), halves, strict=True):
        assert half <= kept <= half + 2


def in_layout(layout: str, dtype: torch.dtype) -> list[Layer]:
    """Kernels of every kind on the current device, in one layout."""
    shapes = {
        "uhaar": [(130, 60, 3, 3), (300, 1, 3, 3), (64, 3, 4, 3)],
        "dct": [(30, 18, 5, 5), (12, 6, 7, 7)],
        "identity": [(130, 60, 3, 3), (200, 90, 1, 1)],
    }
    return [
        layer_of(
            to_gpu(laid_out(normal(*shape, dtype=dtype, seed=i), layout)),
            PruneConfig(wavelet=wavelet),
        )
        for wavelet, sizes in shapes.items()
        for i, shape in enumerate(sizes)
    ]


def copies(layers: list[Layer]) -> list[Layer]:
    """The same layers with weights of their own, in the same layout."""
    return [replace(layer, weight=twin(layer.weight)) for layer in layers]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_masks_prune_as_thresholds_do_in_every_layout(layout: str, dtype: torch.dtype) -> None:
    backend, layers = subject.make(), in_layout(layout, dtype)
    budget = Budget(keep=40_000)
    dense = [replace(layer, weight=layer.weight.contiguous()) for layer in layers]
    threshold = backend.threshold([Job(layers, budget)])
    assert torch.equal(threshold, backend.threshold([Job(dense, budget)]))
    thresholds = threshold.expand(len(layers)).contiguous()
    masks = backend.masks(layers, thresholds)
    by_threshold, by_mask, projected = copies(layers), copies(layers), copies(layers)
    rows = backend.apply_(by_threshold, thresholds)
    by_mask_rows = backend.apply_(by_mask, masks)
    backend.project_(projected, masks)
    backend.apply_(dense, thresholds)
    for layer, mask, row in zip(layers, masks, rows.tolist(), strict=True):
        size = (layer.num_kernels, layer.num_coefficients)
        assert int(unpack(mask, *size, flat=layer.is_flat).sum()) == row[0]
    assert torch.equal(by_mask_rows, rows)
    for members in zip(by_threshold, by_mask, projected, dense, strict=True):
        assert len({bits(layer.weight.cpu()) for layer in members}) == 1


def test_training_is_pruned_by_it() -> None:
    model = model_of(conv=laid_out(normal(40, 24, 3, 3), "channels_last").cuda())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    pruner = Pruner(model, PruneConfig(wavelet="identity", backend="triton", sparsity=0.75))
    pruner.attach(optimizer)
    weight = model.get_parameter("conv.weight")
    for step in range(3):
        weight.grad = normal(40, 24, 3, 3, seed=step).cuda()
        optimizer.step()
        assert int((weight != 0).sum()) == 40 * 24 * 9 // 4
    assert pruner.finish().layers[0].backend == "triton"


def test_a_captured_graph_projects_again() -> None:
    backend, layers = subject.make(), in_layout("channels_last", torch.float32)
    thresholds = torch.full((len(layers),), 0.7, dtype=torch.float64, device="cuda")
    masks = backend.masks(layers, thresholds)
    expected = copies(layers)
    backend.project_(expected, masks)
    first = copies(layers)
    backend.project_(layers, masks)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        backend.project_(layers, masks)
    for layer, before in zip(layers, first, strict=True):
        layer.weight.copy_(before.weight)
    graph.replay()
    torch.cuda.synchronize()
    for layer, one in zip(layers, expected, strict=True):
        assert torch.equal(layer.weight, one.weight)


def test_at_most_eight_launches(device: torch.device) -> None:
    weights = network(device)
    pruned(weights)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        pruned(weights)
        torch.cuda.synchronize()
    names = launched(profile)
    assert 0 < len(names) <= 8, names


def test_a_captured_graph_prunes_again(device: torch.device) -> None:
    weights = network(device)
    first = {name: weight.clone() for name, weight in weights.items()}
    expected = pruned(weights)
    want = {name: bits(weight.cpu()) for name, weight in weights.items()}
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        rows = pruned(weights)
    for _ in range(2):
        for name, weight in weights.items():
            weight.copy_(first[name])
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(rows, expected)
        assert {name: bits(weight.cpu()) for name, weight in weights.items()} == want


def test_capturing_a_call_that_never_ran_says_so(device: torch.device) -> None:
    # Of a shape that no other test has: a table holds for every weight that lies where it says.
    weights = {"alone": normal(37, 41, 3, 3).to(device)}
    with (
        pytest.raises(WavpruneError, match=r"once before the capture"),
        torch.cuda.graph(torch.cuda.CUDAGraph()),
    ):
        pruned(weights)


def test_two_streams_at_a_time(device: torch.device) -> None:
    expected = pruned(network(device))
    new = torch.cuda.Stream
    streams = [new(device) for _ in range(2)]  # type: ignore[no-untyped-call]  # torch's
    copies = [network(device) for _ in streams]
    torch.cuda.synchronize()
    rows = []
    for stream, weights in zip(streams, copies, strict=True):
        with torch.cuda.stream(stream):
            rows.append(pruned(weights))
    torch.cuda.synchronize()
    for result in rows:
        assert torch.equal(result, expected)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two devices")
def test_on_several_devices_each_weight_is_pruned_where_it_lives() -> None:
    weights = network(torch.device("cuda:0"))
    for name in ("three", "point"):
        weights[name] = weights[name].to("cuda:1")
    before = {name: weight.cpu() for name, weight in weights.items()}
    config = PruneConfig(backend="triton", wavelet="uhaar", scope="global")
    report = wavprune.fast.prune(
        model_of(**weights), backend="triton", wavelet="uhaar", scope="global"
    )
    after = {
        layer.name: (weights[layer.name].cpu(), layer.threshold, layer.kept) for layer in report
    }
    assert_pruned(before, {name: Outcome(*entry) for name, entry in after.items()}, config)
