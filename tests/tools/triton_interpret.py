"""The Triton kernels in Triton's interpreter, on the CPU; test_triton.py runs it as a process.

The interpreter must be chosen before triton is imported, so these tests are not collected with the
others: ``TRITON_INTERPRET=1 pytest tests/tools/triton_interpret.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import given
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.cases import (
    BASES,
    Weights,
    assert_pruned,
    bits,
    layer_of,
    model_of,
    normal,
    prune_weights,
    quick,
)
from tests.support.cuda_cases import DTYPES, LAYOUTS, laid_out
from wavprune import PruneConfig, Pruner, backends
from wavprune.backends import Budget, Job, Layer
from wavprune.backends.masks import unpack
from wavprune.backends.triton import backend as subject
from wavprune.backends.triton import tables
from wavprune.bases import named_basis

interpreter = pytest.importorskip("triton.runtime.interpreter")

# numpy warns where a device goes on with infinity or NaN.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton.runtime.interpreter")

BACKEND = subject.make()
EAGER = backends.resolve("eager", [])
NAN, INF = math.nan, math.inf
DENORMAL = 1e-45


@dataclass
class Launches:
    """What would have been launched on a device.

    Attributes:
        kernels: names of the Triton kernels.
        operators: names of torch's operators.
        running: True while a Triton kernel runs.
    """

    kernels: list[str] = field(default_factory=list)
    operators: list[str] = field(default_factory=list)
    running: bool = False


@pytest.fixture(autouse=True)
def launches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Launches]:
    """Counts launches; assertions in Triton kernels are checked, unwritten memory is NaN."""
    recorded = Launches()
    launch, patch = interpreter.GridExecutor.__call__, interpreter._patch_lang
    patched: set[tuple[int, ...]] = set()

    subject._UPLOADS.clear()

    def launched(self: Any, *arguments: Any, **settings: Any) -> None:
        recorded.kernels.append(self.fn.__name__)
        recorded.running = True
        patched.clear()
        launch(self, *arguments, **settings)
        recorded.running = False

    def patch_once(function: Any) -> Any:
        # The interpreter patches at every function call, which takes most of its time.
        modules = tuple(id(value) for value in function.__globals__.values() if _is_module(value))
        if modules in patched:
            return None
        patched.add(modules)
        return patch(function)

    options = interpreter.InterpreterOptions(debug=True)
    monkeypatch.setattr(interpreter.interpreter_builder, "options", options)
    monkeypatch.setattr(interpreter.GridExecutor, "__call__", launched)
    monkeypatch.setattr(interpreter, "_patch_lang", patch_once)
    torch.use_deterministic_algorithms(True)
    yield recorded
    torch.use_deterministic_algorithms(False)


def _is_module(value: Any) -> bool:
    return value in (interpreter.tl, interpreter.tl.core) if hasattr(value, "__spec__") else False


def weights(dtype: torch.dtype = torch.float32) -> Weights:
    """Kernels of every kind that is computed differently, odd sizes, several memory layouts."""
    return {
        "pointwise": normal(7, 5, 1, 1, dtype=dtype, seed=1),
        "three": normal(11, 13, 3, 3, dtype=dtype, seed=2),
        "five": normal(33, 1, 5, 5, dtype=dtype, seed=3),
        "seven": normal(3, 5, 7, 7, dtype=dtype, seed=4),
        "oblong": normal(5, 3, 3, 5, dtype=dtype, seed=5),
        "channels_last": normal(8, 8, 3, 3, dtype=dtype, seed=6).to(
            memory_format=torch.channels_last
        ),
        "strided": normal(3, 5, 4, 6, dtype=dtype, seed=7)[..., ::2],
        "single": normal(1, 1, 3, 3, dtype=dtype, seed=8),
    }


def embedded(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight surrounded by NaN, and the memory that holds both."""
    extent = sum((n - 1) * s for n, s in zip(weight.shape, weight.stride(), strict=True)) + 1
    memory = torch.full((extent + 256,), NAN, dtype=weight.dtype)
    inside = memory.as_strided(weight.shape, weight.stride(), 128)
    inside.copy_(weight)
    return inside, memory


def check(config: PruneConfig, dtype: torch.dtype = torch.float32) -> None:
    before = weights(dtype)
    if config.wavelet == "klt":
        # With fewer kernels than values, some of the vectors are arbitrary.
        before = {name: w for name, w in before.items() if w[:, :, 0, 0].numel() > w[0, 0].numel()}
    pairs = {name: embedded(weight) for name, weight in before.items()}
    guards = {name: memory.isnan() for name, (_, memory) in pairs.items()}
    after = prune_weights({name: inside for name, (inside, _) in pairs.items()}, config)
    assert_pruned(before, after, config)
    for name, (_, memory) in pairs.items():
        assert torch.equal(memory.isnan(), guards[name]), name


@pytest.mark.parametrize("basis", ["uhaar", "haar", "db2-symmetric", "dct", "identity", "klt"])
@pytest.mark.parametrize("amount", [{"sparsity": 0.7}, {"percentile": 40.0}], ids=str)
def test_prunes_what_the_matrices_say(basis: str, amount: dict[str, Any]) -> None:
    check(PruneConfig(backend="triton", **BASES[basis], **amount))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("basis", ["haar", "identity"])
def test_every_dtype(basis: str, dtype: torch.dtype) -> None:
    check(PruneConfig(backend="triton", **BASES[basis], sparsity=0.6), dtype)


def test_one_threshold_for_layers_of_several_dtypes() -> None:
    def several() -> Weights:
        return {
            "strong": 3 * normal(8, 8, 3, 3, seed=1),
            "weak": normal(4, 8, 5, 5, dtype=torch.float16, seed=2),
            "double": normal(8, 6, 3, 5, dtype=torch.float64, seed=3),
            "pointwise": normal(8, 6, 1, 1, seed=4),
        }

    config = PruneConfig(backend="triton", wavelet="uhaar", scope="global", sparsity=0.6)
    assert_pruned(several(), prune_weights(several(), config), config)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("scope", ["layer", "global"])
def test_random_pruning_keeps_what_it_keeps_on_the_cpu(scope: str, dtype: torch.dtype) -> None:
    config = PruneConfig(backend="triton", method="random", scope=scope, sparsity=0.55, seed=7)
    pruned, expected = weights(dtype), weights(dtype)
    outcomes = prune_weights(pruned, config)
    expected_outcomes = prune_weights(expected, replace(config, backend="eager"))
    for name in pruned:
        assert bits(pruned[name]) == bits(expected[name]), name
        assert outcomes[name][1:] == expected_outcomes[name][1:], name


def test_part_of_a_weight_gets_the_random_numbers_of_the_whole() -> None:
    def random(weight: torch.Tensor, first_channel: int) -> Layer:
        basis = named_basis("identity", (3, 3))
        return Layer("conv", weight, basis, seed=-(2**63) + 5, first_channel=first_channel)

    whole = normal(7, 5, 3, 3)
    parts = [random(whole[:3].clone(), 0), random(whole[3:].clone(), 3)]
    thresholds = torch.full((2,), 0.6, dtype=torch.float64)
    BACKEND.apply_(parts, thresholds)
    EAGER.apply_([random(whole, 0)], thresholds[:1])
    assert torch.equal(torch.cat([part.weight for part in parts]), whole)


def test_random_numbers_beyond_32_bits_of_the_index() -> None:
    # As in the last part of a weight of more than 2**32 values.
    weight = torch.ones(3, 64, 3, 3)
    layer = Layer(
        "conv", weight, named_basis("identity", (3, 3)), seed=11, first_channel=(1 << 33) // 576
    )
    other = replace(layer, weight=weight.clone())
    threshold = torch.full((1,), 0.5, dtype=torch.float64)
    BACKEND.apply_([layer], threshold)
    EAGER.apply_([other], threshold)
    assert torch.equal(layer.weight, other.weight)
    near_zero = replace(layer, weight=torch.ones(3, 64, 3, 3), first_channel=0)
    EAGER.apply_([near_zero], threshold)
    assert not torch.equal(near_zero.weight, other.weight)


def pointwise(values: Sequence[float], dtype: torch.dtype = torch.float32) -> Layer:
    """A layer whose coefficients are these values."""
    weight = torch.tensor(values, dtype=dtype).view(-1, 1, 1, 1)
    return Layer("conv", weight, named_basis("identity", (1, 1)), compute_dtype=dtype)


def adversarial() -> dict[str, list[float]]:
    generator = np.random.default_rng(0)
    largest = float(np.finfo(np.float32).max)
    return {
        "all equal": [0.5] * 1025,
        "two values": [1.0, -2.0] * 600,
        "neighbours": [1.0, float(np.nextafter(np.float32(1), np.float32(2)))] * 600,
        "one outlier": [*([1e-30] * 1100), 1e30],
        "a small outlier": [*([1e30] * 1100), 1e-30],
        "mostly zeros": [*([0.0] * 1287), *generator.normal(size=13)],
        "all zeros": [0.0, -0.0] * 10,
        "denormals": [*(DENORMAL * generator.integers(0, 9, 200)), -DENORMAL, 3e-39],
        "the largest": [largest, -largest, 1.0, largest],
        "every octave": [2.0**e for e in range(-149, 128)],
        "wide": list(10.0 ** generator.uniform(-38, 38, 1200)),
        "few levels": list(generator.integers(-4, 5, 1100) / 4),
        "one": [-3.0],
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_thresholds_are_the_order_statistics(dtype: torch.dtype) -> None:
    jobs: list[Job] = []
    expected: list[float] = []
    for values in adversarial().values():
        layer = pointwise(values, dtype)
        ranks = np.sort(np.abs(layer.weight.flatten().numpy()))
        keep = len(ranks) // 3 + 1
        jobs.append(Job([layer], Budget(keep=keep)))
        expected.append(float(ranks[-keep]))
        for percentile in (33.3, 50.0, 100.0):
            jobs.append(Job([layer], Budget(percentile=percentile)))
            expected.append(float(np.percentile(ranks, percentile)))
    assert BACKEND.threshold(jobs).tolist() == expected


@quick
@given(
    values=st.lists(
        st.floats(width=32, allow_nan=False, allow_infinity=False) | st.sampled_from([0.0, 1.0]),
        min_size=1,
        max_size=40,
    ),
    data=st.data(),
)
def test_any_values_at_any_rank(values: list[float], data: st.DataObject) -> None:
    layer = pointwise(values)
    ranks = np.sort(np.abs(layer.weight.flatten().numpy()))
    keep = data.draw(st.integers(1, len(ranks)))
    percentile = data.draw(st.floats(0, 100))
    jobs = [Job([layer], Budget(keep=keep)), Job([layer], Budget(percentile=percentile))]
    with np.errstate(all="ignore"):
        expected = [float(ranks[-keep]), float(np.percentile(ranks, percentile))]
    assert BACKEND.threshold(jobs).tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_every_pass_finds_the_same_bits(dtype: torch.dtype) -> None:
    # The coefficient at the threshold is kept only where pruning computes it as counting did.
    shapes = [(13, 11, 3, 3), (4, 9, 5, 5), (2, 7, 7, 7), (9, 5, 1, 1)]
    config = PruneConfig(wavelet="dct")
    layers = [layer_of(normal(*s, dtype=dtype, seed=i), config) for i, s in enumerate(shapes)]
    kept = [layer.weight.numel() // 3 for layer in layers]
    jobs = [Job([layer], Budget(keep)) for layer, keep in zip(layers, kept, strict=True)]
    rows = BACKEND.apply_(layers, BACKEND.threshold(jobs))
    assert rows[:, 0].tolist() == kept


def test_a_zero_is_never_kept() -> None:
    weight = torch.zeros(12, 12, 3, 3)
    weight[3, 4] = normal(3, 3)
    weight[7, 1] = normal(3, 3, seed=1)
    layer = Layer("conv", weight, named_basis("dct", (3, 3)))
    point = pointwise([0.0, -0.0, 2.0, 0.0])
    thresholds = BACKEND.threshold([Job([layer], Budget(keep=600)), Job([point], Budget(keep=3))])
    assert thresholds.tolist() == [0, 0]
    rows = BACKEND.apply_([layer, point], thresholds)
    assert rows[:, 0].tolist() == [18, 1]
    assert rows[:, 1].tolist() == [142 * 9, 3]


def test_structural_zeros_come_first_in_a_percentile() -> None:
    # Haar on 3x3 has 9 coefficients that can be non-zero among 16.
    weight = normal(6, 5, 3, 3)
    basis = named_basis("haar", (3, 3))
    layer = Layer("conv", weight, basis, by_importance=False)
    asked = [0.0, 43.0, 43.75, 43.9, 44.1, 50.0, 100.0]
    jobs = [Job([layer], Budget(percentile=p)) for p in asked]
    expected = EAGER.threshold(jobs)
    torch.testing.assert_close(BACKEND.threshold(jobs), expected, rtol=1e-6, atol=1e-7)
    assert (expected[1:4] == 0).any()
    assert (expected[1:5] > 0).any()


@pytest.mark.parametrize("bad", [NAN, INF, -INF])
def test_a_weight_that_is_not_finite_has_no_threshold_and_stops_all(bad: float) -> None:
    fine, broken = normal(5, 5, 3, 3), normal(40, 5, 3, 3)
    broken[39, 4, 2, 2] = bad
    point = pointwise([1.0, bad, 2.0])
    layers = [
        Layer("conv", fine, named_basis("uhaar", (3, 3))),
        Layer("conv", broken, named_basis("uhaar", (3, 3))),
        point,
        replace(point, seed=3),
    ]
    before = [bits(layer.weight) for layer in layers]
    thresholds = BACKEND.threshold([Job([layer], Budget(keep=2)) for layer in layers])
    assert thresholds.isnan().tolist() == [False, True, True, True]
    BACKEND.apply_(layers, thresholds)
    assert [bits(layer.weight) for layer in layers] == before
    BACKEND.apply_(layers[:1], thresholds[:1])
    assert bits(layers[0].weight) != before[0]


def test_coefficients_that_overflow_have_no_threshold() -> None:
    weight = torch.full((2, 2, 3, 3), 3e38)
    layer = Layer("conv", weight, named_basis("dct", (3, 3)))
    assert BACKEND.threshold([Job([layer], Budget(keep=3))]).isnan().all()


def test_nothing_to_keep_and_nothing_there() -> None:
    empty = replace(pointwise([]), weight=torch.empty(0, 3, 1, 1))
    layer = pointwise([1.0, 2.0])
    jobs = [
        Job([layer], Budget(keep=0)),
        Job([empty], Budget(keep=0)),
        Job([layer, empty], Budget(keep=1)),
    ]
    thresholds = BACKEND.threshold(jobs)
    assert thresholds.tolist() == [INF, INF, 2.0]
    rows = BACKEND.apply_([empty, layer], thresholds[1:])
    assert rows.tolist() == [[0, 0, 0, 0], [1, 1, 1, 5]]
    assert BACKEND.apply_([layer], thresholds[:1]).tolist() == [[0, 2, 4, 4]]
    assert bits(layer.weight) == bytes(8)


@pytest.mark.parametrize(
    ("dtype", "size"), [(torch.float16, 58000.0), (torch.bfloat16, 2.3e38)], ids=str
)
def test_what_passes_the_end_of_a_half_type_stays_finite(dtype: torch.dtype, size: float) -> None:
    # Three coefficients are size, and the one that is pruned took a weight down from 1.5 size.
    weight = (size * torch.tensor([[1.125, 0.875], [0.875, -0.875]])).to(dtype)[None, None]
    other = weight.clone()
    basis = named_basis("haar", (2, 2))
    threshold = torch.tensor([0.9 * size], dtype=torch.float64)
    rows = BACKEND.apply_([Layer("conv", weight, basis)], threshold)
    EAGER.apply_([Layer("conv", other, basis)], threshold)
    assert rows[0, 0] == 3
    assert weight.max() == torch.finfo(dtype).max
    assert torch.equal(weight, other)


def test_programs_of_several_tiles_and_a_last_one_cut_short(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(tables, "BUSY_PROGRAMS", 1)
    for config in (
        PruneConfig(backend="triton", wavelet="uhaar"),
        PruneConfig(backend="triton", method="min_weight", percentile=71.0),
    ):
        before = {"deep": normal(17, 31, 3, 3), "point": normal(1, 2777, 1, 1)}
        after = prune_weights({name: w.clone() for name, w in before.items()}, config)
        assert_pruned(before, after, config)


def test_layers_may_be_streamed() -> None:
    config = PruneConfig(wavelet="uhaar", sparsity=0.5, scope="global")
    layers = [layer_of(weight, config) for weight in weights().values()]

    def stream() -> Iterator[Layer]:
        for layer in layers:
            copy = layer.weight.clone()
            yield replace(layer, weight=copy)
            copy.fill_(NAN)

    cpu = torch.device("cpu")
    absent = [replace(layer, weight=layer.weight.to("meta"), destination=cpu) for layer in layers]
    budget = Budget(keep=500)
    together = BACKEND.threshold([Job(layers, budget)])
    assert torch.equal(BACKEND.threshold([Job(absent, budget, stream)]), together)


def test_devices_share_their_counts() -> None:
    first = torch.zeros(2, 16 + 3 * 2048, dtype=torch.int64)
    second = torch.zeros_like(first)
    first[0, 16 + 2048 + 5], second[0, 16 + 2048 + 5] = 3, 4
    second[1, 2], second[1, 15] = 77, 9
    second[1, 16] = 1
    subject.share_counts([first, second], 1)
    for state in (first, second):
        assert state[0, 16 + 2048 + 5] == 7
    assert first[1, 2] == 77
    assert first[1, 15] == 9
    assert first[1, 16] == 0


def test_offsets_beyond_32_bits() -> None:
    # 4 GiB of address space, of which two pages are ever touched.
    torch.use_deterministic_algorithms(False)
    memory = torch.empty((1 << 31) + 2048, dtype=torch.float16)
    far = memory.as_strided((2, 2, 3, 3), (1 << 31, 9, 3, 1))
    values = normal(2, 2, 3, 3, dtype=torch.float16)
    config = PruneConfig(wavelet="uhaar")
    reason = BACKEND.unsupported(layer_of(far, config))
    assert reason is not None
    assert "strides" in reason
    tail = memory[(1 << 31) + 64 : (1 << 31) + 64 + 36].view(2, 2, 3, 3)
    tail.copy_(values)
    after = prune_weights({"tail": tail}, PruneConfig(backend="triton", wavelet="uhaar"))
    assert_pruned({"tail": values}, after, PruneConfig(wavelet="uhaar"))


def test_the_same_bits_every_time() -> None:
    config = PruneConfig(backend="triton", wavelet="db2", mode="symmetric", percentile=60.0)
    first, second = weights(), dict(reversed(weights().items()))
    one, two = prune_weights(first, config), prune_weights(second, config)
    for name in first:
        assert bits(first[name]) == bits(second[name])
        assert one[name][1:] == two[name][1:]


def test_refuses_what_is_too_large_unless_it_is_the_identity() -> None:
    weight = normal(2, 2, 9, 9)
    reason = BACKEND.unsupported(layer_of(weight, PruneConfig(wavelet="haar")))
    assert reason is not None
    assert "9x9" in reason
    assert "eager" in reason
    assert BACKEND.unsupported(layer_of(weight, PruneConfig(method="min_weight"))) is None
    config = PruneConfig(backend="triton", method="min_weight")
    assert_pruned({"nine": weight}, prune_weights({"nine": weight.clone()}, config), config)


def test_autograd_sees_that_a_weight_changed() -> None:
    weight = normal(3, 3, 3, 3)
    version = weight._version
    BACKEND.apply_([layer_of(weight, PruneConfig())], torch.tensor([0.1], dtype=torch.float64))
    assert weight._version > version


def several_kinds(dtype: torch.dtype, layout: str, seed: int | None = None) -> list[Layer]:
    """Kernels of every kind, around the sizes of tiles and of words of masks, in one layout."""
    shapes = {
        "uhaar": [(9, 17, 3, 3), (40, 1, 3, 3)],
        "dct": [(3, 6, 7, 7)],
        "identity": [(6, 11, 3, 3), (35, 33, 1, 1)],
    }
    layers = []
    for wavelet, sizes in shapes.items():
        for i, shape in enumerate(sizes if seed is None or wavelet == "identity" else ()):
            inside, _ = embedded(laid_out(normal(*shape, dtype=dtype, seed=i), layout))
            layer = layer_of(inside, PruneConfig(wavelet=wavelet))
            layers.append(replace(layer, seed=None if seed is None else seed + i))
    return layers


def twins(layers: Sequence[Layer]) -> list[Layer]:
    """The same layers with their own weights, in the same layout."""
    return [replace(layer, weight=embedded(layer.weight)[0]) for layer in layers]


def kept_by(layer: Layer, mask: torch.Tensor) -> torch.Tensor:
    """The bits of a mask that mean something."""
    return unpack(mask, layer.num_kernels, layer.num_coefficients, flat=layer.is_flat)


@pytest.mark.parametrize(
    ("layout", "dtype"),
    [
        *((layout, torch.float32) for layout in LAYOUTS),
        *zip(LAYOUTS[1:], DTYPES[1:], strict=False),
    ],
    ids=str,
)
def test_masks_prune_as_thresholds_do_in_every_layout(
    layout: str, dtype: torch.dtype, launches: Launches
) -> None:
    layers = several_kinds(dtype, layout)
    dense = [replace(layer, weight=layer.weight.contiguous()) for layer in layers]
    budget = Budget(keep=2000)
    threshold = BACKEND.threshold([Job(layers, budget)])
    assert torch.equal(threshold, BACKEND.threshold([Job(dense, budget)]))
    thresholds = threshold.expand(len(layers)).contiguous()
    launches.kernels.clear()
    masks = BACKEND.masks(layers, thresholds)
    assert launches.kernels == ["mark_layers"]
    by_threshold, by_mask, projected = twins(layers), twins(layers), twins(layers)
    rows = BACKEND.apply_(by_threshold, thresholds)
    by_mask_rows = BACKEND.apply_(by_mask, masks)
    launches.kernels.clear()
    BACKEND.project_(projected, masks)
    assert launches.kernels == ["prune_by_masks"]
    assert [int(kept_by(*pair).sum()) for pair in zip(layers, masks, strict=True)] == rows[
        :, 0
    ].tolist()
    assert torch.equal(by_mask_rows, rows)
    for one, two, three in zip(by_threshold, by_mask, projected, strict=True):
        assert bits(one.weight) == bits(two.weight) == bits(three.weight)
    expected = BACKEND.apply_(dense, thresholds)
    assert torch.equal(rows[:, :2], expected[:, :2])
    for one, two in zip(by_threshold, dense, strict=True):
        assert bits(one.weight) == bits(two.weight)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [None, 5])
def test_masks_of_the_identity_are_those_of_the_cpu(layout: str, seed: int | None) -> None:
    layers = [
        layer for layer in several_kinds(torch.float32, layout, seed) if layer.operator.identity
    ]
    thresholds = torch.full((len(layers),), 0.6, dtype=torch.float64)
    found, expected = BACKEND.masks(layers, thresholds), EAGER.masks(layers, thresholds)
    for layer, ours, theirs in zip(layers, found, expected, strict=True):
        assert torch.equal(kept_by(layer, ours), kept_by(layer, theirs))


def test_at_a_threshold_of_nan_a_mask_keeps_nothing() -> None:
    layers = several_kinds(torch.float32, "contiguous")
    thresholds = torch.full((len(layers),), NAN, dtype=torch.float64)
    for layer, mask in zip(layers, BACKEND.masks(layers, thresholds), strict=True):
        assert not kept_by(layer, mask).any()


@pytest.mark.parametrize("wavelet", ["uhaar", "identity"])
def test_training_is_pruned_without_eager(
    wavelet: str, launches: Launches, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unexpected(*arguments: object) -> None:
        raise AssertionError("eager ran")

    for name in ("_threshold", "_mask", "_rewrite", "project_"):
        monkeypatch.setattr(type(EAGER), name, unexpected)
    config = PruneConfig(wavelet=wavelet, backend="triton", sparsity=0.75)
    model = model_of(conv=laid_out(normal(9, 8, 3, 3), "channels_last"))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    pruner = Pruner(model, config)
    pruner.attach(optimizer)
    weight = model.get_parameter("conv.weight")
    for step in range(2):
        weight.grad = normal(9, 8, 3, 3, seed=step)
        optimizer.step()
    report = pruner.finish()
    assert report.layers[0].backend == "triton"
    assert report.kept == 162
    assert launches.kernels.count("prune_by_masks") >= 2
    if wavelet == "identity":
        assert int((weight != 0).sum()) == 162


def test_a_repeated_call_packs_no_table(monkeypatch: pytest.MonkeyPatch) -> None:
    layers = several_kinds(torch.float32, "contiguous")
    jobs = [Job([layer], Budget(keep=5)) for layer in layers]
    masks = [torch.zeros(layer.mask_bytes, dtype=torch.uint8) for layer in layers]
    packed: list[int] = []

    def counted(*arguments: Any) -> tables.Table:
        packed.append(1)
        return tables.table_of(*arguments)

    monkeypatch.setattr(subject, "table_of", counted)
    monkeypatch.setattr(subject, "_run", lambda *arguments, **settings: None)
    for _ in range(2):
        BACKEND.apply_(layers, BACKEND.threshold(jobs))
        BACKEND.project_(layers, masks)
        # One that counts, one of the jobs, one that prunes at thresholds, and one with masks.
        assert len(packed) == 4
    BACKEND.project_(layers, [mask.clone() for mask in masks])
    assert len(packed) == 5
    BACKEND.project_(twins(layers), masks)
    assert len(packed) == 6


def resnet18(width: int) -> list[tuple[int, ...]]:
    """The shapes of ResNet-18's 20 convolutions, with ``width`` channels in place of 64."""
    shapes: list[tuple[int, ...]] = [(width, 3, 7, 7), *[(width, width, 3, 3)] * 4]
    for k in (2, 4, 8):
        outs, ins = k * width, k * width // 2
        shapes += [(outs, ins, 3, 3), (outs, ins, 1, 1), *[(outs, outs, 3, 3)] * 3]
    return shapes


class Recorded(TorchDispatchMode):  # type: ignore[no-untyped-call]  # torch has no types for it
    """Records every operator of torch that runs outside a Triton kernel."""

    def __init__(self, launches: Launches) -> None:
        super().__init__()  # type: ignore[no-untyped-call]  # nor for this
        self.launches = launches

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.launches.running:
            self.launches.operators.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


# These launch nothing: they allocate, or give another view of the same memory.
FREE = {"empty", "new_empty", "lift_fresh", "detach", "alias", "view", "slice", "select"}


@pytest.mark.parametrize("scope", ["layer", "global"])
def test_eight_launches_for_a_resnet18_and_nothing_waits(launches: Launches, scope: str) -> None:
    config = PruneConfig(wavelet="uhaar", sparsity=0.5)
    layers = [layer_of(normal(*s, seed=i), config) for i, s in enumerate(resnet18(2))]
    kept = [-(-layer.weight.numel() // 2) for layer in layers]
    jobs = [Job([layer], Budget(keep)) for layer, keep in zip(layers, kept, strict=True)]
    if scope == "global":
        jobs = [Job(layers, Budget(sum(kept)))]
    assert len(layers) == 20
    torch.use_deterministic_algorithms(False)
    with Recorded(launches):
        thresholds = BACKEND.threshold(jobs)
    thresholds = thresholds.expand(20).contiguous()
    with Recorded(launches):
        rows = BACKEND.apply_(layers, thresholds)
    assert launches.kernels == [
        *["count_digits"] * 3,
        "resolve_thresholds",
        "prune_layers",
        "sum_partials",
    ]
    others = [name for name in launches.operators if name not in FREE]
    # One operator sets the counts to 0. None makes the host wait (item, nonzero, a copy to it).
    assert others == ["zeros"]
    assert len(launches.kernels) + len(others) <= 8
    assert float(rows[:, 0].sum()) == pytest.approx(sum(kept), abs=20)
