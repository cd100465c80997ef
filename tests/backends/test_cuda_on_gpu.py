"""The CUDA operators and the ``native`` backend on a GPU.

It needs torch, numpy, PyWavelets and pytest, and nothing else that tests use.
"""

from __future__ import annotations

import pytest
import torch

from tests.support.cases import model_of, normal
from tests.support.cuda_cases import (
    DTYPES,
    LAYOUTS,
    Masked,
    Pruned,
    assert_masked,
    assert_same,
    case,
    every_layout,
    laid_out,
    launched,
    mask,
    mixed,
    on_gpu,
    prune,
    resnet_18,
)
from wavprune import LayerRef, PruneConfig, Pruner, backends, prune_layers

pytest.importorskip("wavprune.ops", reason="the compiled extension is not built here")
ops = torch.ops.wavprune

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not torch.cuda.is_available() or not ops.cuda_capabilities(),
        reason="torch sees no GPU, or the compiled extension has no CUDA part",
    ),
]


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_as_the_cpu(dtype: torch.dtype) -> None:
    cases, compute_float64 = mixed(dtype), dtype == torch.float64
    jobs, keep = list(range(len(cases))), [c.keep for c in cases]
    expected = prune(ops, cases, jobs, keep, compute_float64)
    there = [on_gpu(c) for c in cases]
    for _ in range(3):
        assert_same(prune(ops, there, jobs, keep, compute_float64), expected)
    thresholds = expected.thresholds.cuda()
    assert_masked(there, mask(ops, there, thresholds, compute_float64), expected)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_same_bits_in_every_layout(layout: str, dtype: torch.dtype) -> None:
    cases, compute_float64 = every_layout(dtype, layout), dtype == torch.float64
    # Large enough that many blocks write to one mask at a time.
    cases.append(case(laid_out(normal(256, 130, 3, 3, dtype=dtype), layout), "uhaar"))
    cases.append(case(laid_out(normal(256, 130, 3, 3, dtype=dtype), layout), "identity"))
    dense = [entry._replace(weight=entry.weight.contiguous()) for entry in cases]
    jobs, keep = range(len(cases)), [entry.keep for entry in cases]
    expected = prune(ops, dense, jobs, keep, compute_float64)
    on_cpu = mask(ops, dense, expected.thresholds, compute_float64)
    there = [on_gpu(entry) for entry in cases]
    assert_same(prune(ops, there, jobs, keep, compute_float64), expected)
    found = mask(ops, there, expected.thresholds.cuda(), compute_float64)
    assert_masked(there, found, expected)
    for entry, ours, theirs in zip(cases, found.masks, on_cpu.masks, strict=True):
        assert torch.equal(entry.kept(ours), entry.kept(theirs))


def test_random_masks_are_those_of_the_cpu() -> None:
    cases = [case(laid_out(normal(64, 33, 3, 3), layout), "identity") for layout in LAYOUTS]
    jobs, keep, seeds = range(len(cases)), [9000] * len(cases), list(range(len(cases)))
    expected = prune(ops, cases, jobs, keep, True, seeds)
    there = [on_gpu(entry) for entry in cases]
    assert_same(prune(ops, there, jobs, keep, True, seeds), expected)
    assert_masked(there, mask(ops, there, expected.thresholds.cuda(), True, seeds), expected)


def test_a_whole_network_under_one_threshold() -> None:
    cases = [case(normal(*shape), level=None) for shape in resnet_18()]
    jobs, keep = [0] * len(cases), [sum(c.keep for c in cases)]
    there = [on_gpu(c) for c in cases]
    assert_same(prune(ops, there, jobs, keep, False), prune(ops, cases, jobs, keep, False))


def test_percentiles_masks_and_transforms() -> None:
    entry = case(normal(64, 64, 3, 3))
    weight, plan, dropped = entry.weight, entry.plan, entry.dropped
    there = weight.cuda()
    for ours, theirs in (
        (
            ops.percentile_threshold([there], [plan], [dropped], 60.0, False),
            ops.percentile_threshold([weight], [plan], [dropped], 60.0, False),
        ),
        (ops.percentile_mask(there, 60.0, True), ops.percentile_mask(weight, 60.0, True)),
        (ops.percentile_mask(there, 60.0, False), ops.percentile_mask(weight, 60.0, False)),
        (ops.dwt2(there.view(-1, 9), plan, 9), ops.dwt2(weight.view(-1, 9), plan, 9)),
        (ops.idwt2(there.view(-1, 9), plan, 9), ops.idwt2(weight.view(-1, 9), plan, 9)),
    ):
        assert torch.equal(ours.cpu(), theirs)


def test_opcheck() -> None:
    entry = on_gpu(case(normal(8, 8, 3, 3)))
    weights, plans, masks = [entry.weight], [entry.plan], [entry.empty_mask()]
    thresholds = torch.tensor([0.02], dtype=torch.float64, device="cuda")
    rows = entry.weight.view(-1, 9)
    for operator, arguments in (
        (ops.topk_threshold, (weights, plans, [], [0], [50], False)),
        (ops.percentile_threshold, (weights, plans, [0], 50.0, False)),
        (ops.prune_, (weights, plans, [], thresholds, False)),
        (ops.mark_, (weights, plans, [], thresholds, masks, False)),
        (ops.project_, (weights, plans, masks, False)),
        (ops.prune_by_mask_, (weights, plans, masks, False)),
        (ops.dwt2, (rows, entry.plan, 9)),
        (ops.idwt2, (rows, entry.plan, 9)),
        (ops.percentile_mask, (entry.weight, 50.0, True)),
    ):
        torch.library.opcheck(operator.default, arguments)


def test_nothing_waits_for_the_device() -> None:
    there = [on_gpu(case(normal(64, 64, 3, 3, seed=s), level=None)) for s in range(2)]
    weights, plans = [c.weight for c in there], [c.plan for c in there]
    masks = [c.empty_mask() for c in there]
    prune(ops, there, [0, 1], [10_000, 10_000], False)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        found = ops.topk_threshold(weights, plans, [], [0, 1], [10_000, 10_000], False)
        ops.mark_(weights, plans, [], found, masks, False)
        ops.prune_(weights, plans, [], found, False)
        ops.project_(weights, plans, masks, False)
        ops.prune_by_mask_(weights, plans, masks, False)
        ops.percentile_mask(weights[0], 50.0, True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_six_launches_for_a_resnet_18_and_two_for_its_projection() -> None:
    there = [on_gpu(case(normal(*shape), level=None)) for shape in resnet_18()]
    weights, plans = [c.weight for c in there], [c.plan for c in there]
    masks = [c.empty_mask() for c in there]
    jobs = list(range(len(there)))

    def select_and_prune() -> None:
        found = ops.topk_threshold(weights, plans, [], jobs, [c.keep for c in there], False)
        ops.prune_(weights, plans, [], found, False)

    select_and_prune()
    for run, launches in (
        (select_and_prune, 6),
        (lambda: ops.project_(weights, plans, masks, False), 2),
    ):
        torch.cuda.synchronize()
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
            run()
            torch.cuda.synchronize()
        names = launched(profile)
        assert len(names) == launches, names
        assert all("wavprune::cuda::" in name for name in names)


@pytest.mark.parametrize("layout", ["contiguous", "tensorflow"])
def test_a_captured_graph_prunes_what_is_there_when_it_runs(layout: str) -> None:
    entry = case(laid_out(normal(64, 60, 3, 3), layout), level=None)
    there, masks, keep = on_gpu(entry).weight, [on_gpu(entry).empty_mask()], [entry.keep]
    projected, masked = on_gpu(entry).weight, on_gpu(entry).weight
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = ops.topk_threshold([there], [entry.plan], [], [0], keep, False)
        ops.mark_([there], [entry.plan], [], found, masks, False)
        rows = ops.prune_([there], [entry.plan], [], found, False)
        ops.project_([projected], [entry.plan], masks, False)
        by_mask = ops.prune_by_mask_([masked], [entry.plan], masks, False)
    for seed in (5, 6):
        fresh = entry._replace(weight=normal(64, 60, 3, 3, seed=seed))
        for weight in (there, projected, masked):
            weight.copy_(fresh.weight)
        graph.replay()
        expected = prune(ops, [fresh], [0], keep, False)
        assert_same(Pruned(found, [there], rows), expected)
        assert_masked([fresh], Masked(masks, [projected], [masked], by_mask), expected)


def test_streams_of_their_own() -> None:
    cases = [case(normal(256, 256, 3, 3, seed=s), level=None) for s in range(4)]
    there = [on_gpu(c) for c in cases]
    streams = [torch.cuda.Stream() for _ in cases]  # type: ignore[no-untyped-call]  # torch's lack
    done = []
    for entry, stream in zip(there, streams, strict=True):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            done.append(prune(ops, [entry], [0], [entry.keep], False))
    torch.cuda.synchronize()
    for found, entry in zip(done, cases, strict=True):
        assert_same(found, prune(ops, [entry], [0], [entry.keep], False))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU here at most")
def test_every_device_and_no_call_for_two() -> None:
    entry = case(normal(64, 64, 3, 3), level=None)
    expected = prune(ops, [entry], [0], [entry.keep], False)
    places = [entry._replace(weight=entry.weight.to(f"cuda:{d}")) for d in (0, 1)]
    for place in places:
        assert_same(prune(ops, [place], [0], [entry.keep], False), expected)
        assert torch.cuda.current_device() == 0
    weights, plans = [c.weight for c in places], [c.plan for c in places]
    with pytest.raises(RuntimeError, match="on one CUDA device"):
        ops.topk_threshold(weights, plans, [], [0, 0], [10], False)
    with pytest.raises(RuntimeError, match="mask of weight 0"):
        ops.project_(weights[:1], plans[:1], [places[1].empty_mask()], False)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one GPU here at most")
@pytest.mark.parametrize("name", ["native", "triton"])
def test_layers_on_two_devices_are_projected_where_they_are(name: str) -> None:
    if name in backends.unavailable():
        pytest.skip(backends.unavailable()[name])
    model = model_of(
        one=normal(8, 9, 3, 3).to("cuda:0"), other=normal(8, 9, 3, 3, seed=1).to("cuda:1")
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    pruner = Pruner(model, PruneConfig(wavelet="identity", backend=name, sparsity=0.75))
    pruner.attach(optimizer)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert [int((weight != 0).sum()) for weight in model.parameters()] == [162, 162]


def test_the_native_backend_runs_there() -> None:
    weight = normal(64, 64, 3, 3)
    there = weight.cuda()
    config = PruneConfig(wavelet="haar", backend="native")
    report = prune_layers([LayerRef("conv", there)], config)
    expected = prune_layers([LayerRef("conv", weight)], config)
    assert torch.equal(there.cpu(), weight)
    assert report.kept == expected.kept


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_on_a_gpu_is_pruned_as_on_the_cpu(dtype: torch.dtype) -> None:
    def trained(device: str, wavelet: str) -> tuple[torch.Tensor, str]:
        weight = normal(40, 24, 3, 3, dtype=dtype)
        model = model_of(conv=weight.to(device, memory_format=torch.channels_last))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
        pruner = Pruner(model, PruneConfig(wavelet=wavelet, sparsity=0.75))
        pruner.attach(optimizer)
        for step in range(3):
            gradient = normal(40, 24, 3, 3, dtype=dtype, seed=step)
            model.get_parameter("conv.weight").grad = gradient.to(device)
            optimizer.step()
        return model.get_parameter("conv.weight").detach().cpu(), pruner.finish().layers[0].backend

    for wavelet in ("uhaar", "identity"):
        (here, _), (there, backend) = trained("cpu", wavelet), trained("cuda", wavelet)
        assert backend == "native"
        assert torch.equal(here, there)
