"""The CUDA operators on the host, in fibers, and through nvcc.

The shim (``cuda_shim``) compiles the same CUDA kernels and the same host code for the CPU; what it
cannot show is in ``docs/gpu.md``, and tested in ``test_cuda_on_gpu.py``.
"""

from __future__ import annotations

import importlib.util
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from rich.table import Table

from tests.support.cases import any_level, bits, normal, quick
from tests.support.cuda_cases import (
    DTYPES,
    LAYOUTS,
    Case,
    Pruned,
    assert_equal,
    assert_masked,
    assert_same,
    case,
    every_layout,
    laid_out,
    mask,
    mixed,
    prune,
    resnet_18,
)
from tests.tools import cuda_shim
from wavprune.bases import named_basis

ops = pytest.importorskip("wavprune.ops", reason="the compiled extension is not built here")
cpu = torch.ops.wavprune
emulated = torch.ops.wavprune_shim

ROOT = Path(__file__).resolve().parents[2]
SEEDS = [1, 2, 3]


def setup_module_of_the_project() -> Any:
    """``setup.py``, whose functions find the toolkit."""
    spec = importlib.util.spec_from_file_location("wavprune_setup", ROOT / "setup.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


building = setup_module_of_the_project()
needs_nvcc = pytest.mark.skipif(
    building.toolkit() is None, reason="there is no nvcc of CUDA 12.0 or later here"
)


@pytest.mark.usefixtures("shim")
class TestOnTheHost:
    """The CUDA kernels in fibers against the CPU operators and numpy."""

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("together", [False, True])
    def test_same_bits_as_the_cpu_for_any_order_of_threads(
        self, dtype: torch.dtype, together: bool
    ) -> None:
        cases, compute_float64 = mixed(dtype), dtype == torch.float64
        jobs = [0] * len(cases) if together else list(range(len(cases)))
        keep = [sum(c.keep for c in cases)] if together else [c.keep for c in cases]
        expected = prune(cpu, cases, jobs, keep, compute_float64)
        runs = []
        for seed in SEEDS if dtype == torch.float32 else SEEDS[:1]:
            emulated.reseed(seed)
            runs.append(prune(emulated, cases, jobs, keep, compute_float64))
            assert_same(runs[-1], expected)
        for run in runs[1:]:
            assert bits(run.rows) == bits(runs[0].rows)

    @pytest.mark.parametrize("compute_float64", [False, True])
    def test_float64_weights_in_float32_and_the_other_way_round(
        self, compute_float64: bool
    ) -> None:
        dtype = torch.float32 if compute_float64 else torch.float64
        cases = [case(normal(19, 5, 3, 3, dtype=dtype), name) for name in ("uhaar", "identity")]
        keep = [c.keep for c in cases]
        assert_same(
            prune(emulated, cases, [0, 1], keep, compute_float64),
            prune(cpu, cases, [0, 1], keep, compute_float64),
        )

    def test_random_ranks_are_those_of_the_cpu(self) -> None:
        last = normal(40, 33, 3, 3).to(memory_format=torch.channels_last)
        cases = [case(normal(23, 29, 3, 3), "identity"), case(last, "identity")]
        cases[0].weight[:3] = 0
        seeds, keep = [-(2**63), 12345], [5000, 900]
        for jobs, kept in (([0, 1], keep), ([0, 0], keep[:1])):
            expected = prune(cpu, cases, jobs, kept, True, seeds)
            assert_same(prune(emulated, cases, jobs, kept, True, seeds), expected)
            own = expected.thresholds[torch.tensor(jobs)]
            assert_masked(cases, mask(emulated, cases, own, True, seeds), expected)

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_adversarial_selections_are_numpys(self, dtype: torch.dtype) -> None:
        # Two blocks a weight.
        n = 18_500
        values = {
            "all equal": torch.full((n,), 0.25),
            "all zero": torch.zeros(n),
            "two values": torch.tensor([1.0, -2.0]).repeat(n // 2),
            "one outlier": torch.cat([torch.full((n,), 1e-3), torch.tensor([1e30])]),
            "99% zeros": torch.where(torch.arange(n) % 100 == 0, normal(n), 0),
            "denormals": normal(n) * 1e-40,
            "heavy tails": normal(n) ** 9,
            "neighbours": (torch.arange(n, dtype=torch.int32) + 2**29).view(torch.float32),
            "one value": torch.tensor([3.0]),
        }
        weights: list[Case] = []
        keep: list[int] = []
        expected: list[float] = []
        for value in values.values():
            sizes = np.sort(np.abs(value.to(dtype).numpy()))[::-1]
            for some in sorted({1, len(sizes) // 3 + 1, len(sizes)}):
                weights.append(case(value.to(dtype).reshape(-1, 1, 1, 1), "identity"))
                keep.append(some)
                expected.append(float(sizes[some - 1]))
        found = prune(emulated, weights, range(len(weights)), keep, dtype == torch.float64)
        assert found.thresholds.tolist() == expected
        for entry, weight, row, threshold in zip(
            weights, found.weights, found.rows.tolist(), expected, strict=True
        ):
            kept = (entry.weight.abs() >= threshold) & (entry.weight != 0)
            assert torch.equal(weight, torch.where(kept, entry.weight, 0))
            assert row[:2] == [int(kept.sum()), int((~kept).sum())]

    @pytest.mark.parametrize("percentile", [0.0, 0.1, 37.5, 50.0, 99.99, 100.0])
    def test_percentiles_are_numpys(self, percentile: float) -> None:
        values = [normal(18_500), normal(300) ** 9, torch.ones(1000), torch.arange(5.0)]
        flat = [case(v.reshape(-1, 1, 1, 1), "identity") for v in values for _ in range(3)]
        dropped = [d for value in values for d in (0, 1, 3 * len(value))]
        weights, plans = [c.weight for c in flat], [c.plan for c in flat]
        found = emulated.percentile_threshold(weights, plans, dropped, percentile, False)
        for weight, zeros, threshold in zip(weights, dropped, found.tolist(), strict=True):
            sizes = np.concatenate([np.zeros(zeros, np.float32), weight.abs().numpy().ravel()])
            assert threshold == float(np.percentile(sizes, percentile))

    @pytest.mark.parametrize("dtype", DTYPES)
    def test_percentiles_of_coefficients_are_those_of_the_cpu(self, dtype: torch.dtype) -> None:
        cases, compute_float64 = mixed(dtype), dtype == torch.float64
        weights, plans = [c.weight for c in cases], [c.plan for c in cases]
        dropped = [c.dropped for c in cases]
        found = emulated.percentile_threshold(weights, plans, dropped, 60.0, compute_float64)
        expected = cpu.percentile_threshold(weights, plans, dropped, 60.0, compute_float64)
        assert bits(found) == bits(expected)

    @given(
        shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
        kernel=st.tuples(st.integers(1, 8), st.integers(1, 8)),
        dtype=st.sampled_from(DTYPES),
        order=st.permutations(range(4)),
        step=st.integers(1, 2),
        wavelet=st.sampled_from(["haar", "uhaar", "dct", "identity", "bior1.3"]),
        kept=st.floats(0, 1),
        seed=st.integers(0, 99),
    )
    @quick
    def test_any_shape_dtype_and_strides(
        self,
        shape: tuple[int, int],
        kernel: tuple[int, int],
        dtype: torch.dtype,
        order: list[int],
        step: int,
        wavelet: str,
        kept: float,
        seed: int,
    ) -> None:
        dense = normal(*shape, *kernel, dtype=dtype, seed=seed)
        # Memory in another order of the axes, with gaps that nothing may touch.
        stored = torch.full([dense.shape[a] * step for a in order], torch.nan, dtype=dtype)
        view = stored[::step, ::step, ::step, ::step].permute([order.index(a) for a in range(4)])
        view.copy_(dense)
        one = case(view, wavelet, "symmetric")
        keep, compute_float64 = [int(kept * dense.numel())], dtype == torch.float64
        expected = prune(cpu, [one._replace(weight=dense)], [0], keep, compute_float64)
        emulated.reseed(seed)
        threshold = emulated.topk_threshold([view], [one.plan], [], [0], keep, compute_float64)
        assert_masked([one], mask(emulated, [one], threshold, compute_float64), expected)
        masks = [one.empty_mask()]
        emulated.mark_([view], [one.plan], [], threshold, masks, compute_float64)
        rows = emulated.prune_([view], [one.plan], [], threshold, compute_float64)
        assert_same(Pruned(threshold, [view], rows), expected)
        view.copy_(dense)
        emulated.project_([view], [one.plan], masks, compute_float64)
        assert_equal([view], expected.weights)
        view.fill_(torch.nan)
        assert stored.isnan().all()

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("layout", LAYOUTS)
    def test_masks_prune_as_thresholds_do_in_every_layout(
        self, layout: str, dtype: torch.dtype
    ) -> None:
        cases, compute_float64 = every_layout(dtype, layout), dtype == torch.float64
        dense = [entry._replace(weight=laid_out(entry.weight, "contiguous")) for entry in cases]
        jobs, keep = range(len(cases)), [entry.keep for entry in cases]
        expected = prune(cpu, dense, jobs, keep, compute_float64)
        on_cpu = mask(cpu, dense, expected.thresholds, compute_float64)
        for seed in SEEDS[:2] if dtype == torch.float32 else SEEDS[:1]:
            emulated.reseed(seed)
            assert_same(prune(emulated, cases, jobs, keep, compute_float64), expected)
            found = mask(emulated, cases, expected.thresholds, compute_float64)
            assert_masked(cases, found, expected)
            for entry, ours, theirs in zip(cases, found.masks, on_cpu.masks, strict=True):
                assert torch.equal(entry.kept(ours), entry.kept(theirs))

    def test_a_mask_of_other_weights_keeps_what_it_says(self) -> None:
        # Coefficients of 0 that are kept, and halves that end at their largest.
        cases = [case(normal(9, 33, 3, 3, dtype=d), "dct") for d in (torch.float32, torch.float16)]
        cases[0].weight[2] = 0
        cases[1].weight[3] = 65504
        masks = [entry.empty_mask().random_(generator=torch.Generator()) for entry in cases]
        plans = [entry.plan for entry in cases]
        results = []
        for operators in (cpu, emulated):
            weights = [entry.weight.clone() for entry in cases]
            rows = operators.prune_by_mask_(weights, plans, masks, False)
            results.append(Pruned(rows[:, 0].clone(), weights, rows))
        assert_same(results[1], results[0])

    def test_masks_take_a_launch_for_the_table_and_one_each(self) -> None:
        cases = [case(normal(64, 48, 3, 3, seed=s), "uhaar") for s in range(3)]
        thresholds = torch.full((3,), 0.7, dtype=torch.float64)
        before = emulated.launches()
        mask(emulated, cases, thresholds, False)
        assert emulated.launches() - before == 6
        # Tiles of unaligned rectangles share words of the mask, which are cleared first.
        odd = [case(laid_out(normal(64, 50, 3, 3), "tensorflow"), "uhaar")]
        mask(emulated, odd, thresholds[:1], False)
        assert emulated.launches() - before == 13

    def test_at_a_threshold_of_nan_a_mask_keeps_nothing(self) -> None:
        cases = [case(normal(20, 20, 3, 3, seed=s)) for s in range(2)]
        found = mask(emulated, cases, torch.tensor([torch.nan, 0.5], dtype=torch.float64), False)
        kept = [bool(c.kept(m).any()) for c, m in zip(cases, found.masks, strict=True)]
        assert kept == [False, True]

    @pytest.mark.parametrize("layout", ["contiguous", "channels_last", "tensorflow"])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    def test_every_sector_is_used_as_a_whole(self, layout: str, dtype: torch.dtype) -> None:
        for wavelet, shape in (("uhaar", (64, 64, 3, 3)), ("identity", (64, 64, 3, 3))):
            entry = case(laid_out(normal(*shape, dtype=dtype), layout), wavelet)
            assert sector_efficiency(entry) == dict.fromkeys(("count", "prune", "project"), 1.0)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_what_is_not_finite_gives_nan_and_stops_all(
        self, bad: float, dtype: torch.dtype
    ) -> None:
        cases = [case(normal(20, 20, 3, 3, dtype=dtype, seed=s)) for s in range(2)]
        cases[0].weight[17, 3, 1, 2] = bad
        found = prune(emulated, cases, [0, 1], [300, 300], dtype == torch.float64)
        assert found.thresholds.isnan().tolist() == [True, False]
        for weight, member in zip(found.weights, cases, strict=True):
            assert bits(weight) == bits(member.weight)
        assert found.rows.isnan().all()
        fine = prune(emulated, cases[1:], [0], [300], dtype == torch.float64)
        assert bits(fine.weights[0]) != bits(cases[1].weight)

    def test_nine_values_in_a_row_are_no_3x3_kernel_in_memory(self) -> None:
        weight = laid_out(normal(8, 8, 1, 9), "channels_last")
        plan = case(normal(8, 8, 3, 3), "uhaar", level=None).plan
        found, expected = (
            operators.topk_threshold([weight], [plan], [], [0], [300], False)
            for operators in (emulated, cpu)
        )
        assert torch.equal(found, expected)

    def test_coefficients_beyond_float16_end_at_its_largest(self) -> None:
        weight = torch.full((4, 4, 3, 3), 65504.0, dtype=torch.float16)
        weight[0, 0, 0, 0] = -65504
        cases = [case(weight, "dct")]
        expected = prune(cpu, cases, [0], [20], False)
        assert_same(prune(emulated, cases, [0], [20], False), expected)
        assert expected.weights[0].isfinite().all()

    @pytest.mark.parametrize("wavelet", ["haar", "uhaar", "dct", "db2", "identity"])
    def test_a_resnet_18_takes_six_launches(self, wavelet: str) -> None:
        cases = [case(normal(*shape), wavelet, "symmetric", None) for shape in resnet_18(1 / 16)]
        before = emulated.launches()
        layers = prune(emulated, cases, range(len(cases)), [c.keep for c in cases], False)
        assert emulated.launches() - before == 6
        whole = prune(emulated, cases, [0] * len(cases), [sum(c.keep for c in cases)], False)
        assert emulated.launches() - before == 12
        assert (layers.rows[:, 0] > 0).all()
        assert whole.rows[:, 0].sum() >= sum(c.keep for c in cases)

    def test_a_table_of_any_length(self) -> None:
        cases = [case(normal(2, 2, 3, 3, seed=s), "uhaar") for s in range(310)]
        jobs, keep = [0] * 310, [3000]
        before = emulated.launches()
        found = prune(emulated, cases, jobs, keep, False)
        # The tables, of more than 32 KB, take two each.
        assert emulated.launches() - before == 8
        assert_same(found, prune(cpu, cases, jobs, keep, False))

    def test_nothing_to_keep_and_nothing_to_prune(self) -> None:
        cases = [case(normal(5, 5, 3, 3)), case(torch.empty(4, 0, 3, 3)), case(normal(5, 5, 3, 3))]
        keep = [0, 10, 10**6]
        found = prune(emulated, cases, [0, 1, 2], keep, False)
        assert_same(found, prune(cpu, cases, [0, 1, 2], keep, False))
        assert found.thresholds.isinf().tolist() == [True, True, False]

    def test_no_weights_give_empty_results(self) -> None:
        none = torch.zeros(0, dtype=torch.float64)
        assert emulated.topk_threshold([], [], [], [], [], False).shape == (0,)
        assert emulated.topk_threshold([], [], [], [], [3], False).tolist() == [float("inf")]
        assert emulated.percentile_threshold([], [], [], 50.0, False).shape == (0,)
        assert emulated.prune_([], [], [], none, False).shape == (0, 4)
        emulated.mark_([], [], [], none, [], False)

    @pytest.mark.parametrize("dtype", DTYPES)
    @pytest.mark.parametrize("count", [0, 1, 7, 8, 2305, 20_000])
    def test_percentile_masks(self, dtype: torch.dtype, count: int) -> None:
        x = normal(count, dtype=dtype)
        for packed in (False, True):
            found = emulated.percentile_mask(x, 70.0, packed)
            assert torch.equal(found, cpu.percentile_mask(x, 70.0, packed))
        if count:
            x[0] = torch.nan
            assert not emulated.percentile_mask(x, 70.0, False).any()

    @pytest.mark.parametrize("wavelet", ["haar", "db2", "sym4", "uhaar", "dct", "identity"])
    @pytest.mark.parametrize("kernel", [(3, 3), (5, 5), (1, 7), (4, 6), (31, 31)])
    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
    def test_transforms(self, wavelet: str, kernel: tuple[int, int], dtype: torch.dtype) -> None:
        with any_level():
            basis = named_basis(wavelet, kernel, "symmetric", 1, True)
        plan = basis.whole_operator.plan
        values, outputs = kernel[0] * kernel[1], basis.grid[0] * basis.grid[1]
        rows = normal(300 if values < 100 else 3, values, dtype=dtype)
        coefficients = emulated.dwt2(rows, plan, outputs)
        assert torch.equal(coefficients, cpu.dwt2(rows, plan, outputs))
        back = emulated.idwt2(coefficients, plan, values)
        assert torch.equal(back, cpu.idwt2(coefficients, plan, values))

    @pytest.mark.parametrize(
        ("wrong", "message"),
        [
            (lambda w, p: emulated.topk_threshold([w[0]], [p], [], [0], [1], False), "not 3-D"),
            (lambda w, p: emulated.topk_threshold([w.int()], [p], [], [0], [1], False), "bfloat16"),
            (lambda w, p: emulated.topk_threshold([w], [], [], [0], [1], False), "with 0 plans"),
            (lambda w, p: emulated.topk_threshold([w], [p], [], [7], [1], False), "job 7 of 1"),
            (lambda w, p: emulated.topk_threshold([w], [p], [], [0], [-1], False), "keep -1"),
            (lambda w, p: emulated.topk_threshold([w], [p], [3], [0], [1], True), "identity"),
            (
                lambda w, p: emulated.topk_threshold([w], [p], [3], [0], [1], False),
                "needs compute_float64",
            ),
            (lambda w, p: emulated.percentile_threshold([w], [p], [0], 101.0, False), "not 101"),
            (lambda w, p: emulated.percentile_threshold([w], [p], [-2], 50.0, False), "-2 dropped"),
            (
                lambda w, p: emulated.percentile_threshold([w], [p], [2**63 - 1], 50.0, False),
                "9223372036854775807 dropped",
            ),
            (lambda w, p: emulated.prune_([w], [p], [], torch.zeros(2), False), "1 contiguous"),
            (
                lambda w, p: emulated.project_([w], [p], [torch.zeros(17).byte()], False),
                "mask of weight 0 must be 18 contiguous bytes",
            ),
            (lambda w, p: emulated.prune_by_mask_([w], [p], [], False), "with 0 masks"),
            (
                lambda w, p: emulated.mark_(
                    [w], [p], [], torch.zeros(1).double(), [torch.zeros(18)], False
                ),
                "mask of weight 0 must be 18 contiguous bytes",
            ),
            (
                lambda w, p: emulated.mark_(
                    *([w], [p], [], torch.zeros(1).double(), [torch.zeros(19).byte()[1:]], False)
                ),
                "even address",
            ),
            (lambda w, p: emulated.dwt2(w, p, 9), "matrix"),
            (lambda w, p: emulated.dwt2(w.view(-1, 9), p, 8), "rows of 8"),
            (lambda w, p: emulated.percentile_mask(w.int(), 50.0, False), "bfloat16"),
            (
                lambda w, p: emulated.topk_threshold(
                    [torch.zeros(1, 1, 99, 99)], [separable_identity(99)], [], [0], [1], False
                ),
                "bytes each; on CUDA at most",
            ),
        ],
    )
    def test_bad_arguments_are_errors_and_change_nothing(self, wrong: Any, message: str) -> None:
        weight = normal(4, 4, 3, 3)
        before = weight.clone()
        with pytest.raises(RuntimeError, match=message):
            wrong(weight, case(weight).plan)
        assert torch.equal(weight, before)


def sector_efficiency(entry: Case) -> dict[str, float]:
    """Bytes of the weights that each CUDA kernel accesses over those of the sectors it moves."""
    double = entry.weight.dtype == torch.float64
    weights, plans, masks = [entry.weight.clone()], [entry.plan], [entry.empty_mask()]
    cuts = torch.tensor([0.5], dtype=torch.float64)
    calls: dict[str, tuple[Any, tuple[Any, ...]]] = {
        "count": (emulated.topk_threshold, (weights, plans, [], [0], [entry.keep], double)),
        "prune": (emulated.prune_, (weights, plans, [], cuts, double)),
        "project": (emulated.project_, (weights, plans, masks, double)),
    }
    found = {}
    for name, (operator, arguments) in calls.items():
        emulated.count_accesses(True)
        operator(*arguments)
        accessed, sectors = emulated.count_accesses(False)
        found[name] = accessed / (32 * sectors)
    return found


def separable_identity(side: int) -> torch.Tensor:
    """The identity as two axes of a separable transform."""
    axis = torch.eye(side, dtype=torch.float64).flatten()
    head = torch.tensor([1.0, side, side, side, side], dtype=torch.float64)
    return torch.cat([head, axis, axis, axis, axis])


def test_resnet_18_has_eleven_million_weights() -> None:
    shapes = resnet_18()
    assert len(shapes) == 20
    assert sum(int(np.prod(shape)) for shape in shapes) == 11_166_912


RESOURCES = re.compile(
    r"Compiling entry function '_ZN8wavprune4cuda\d+(?P<name>[a-z_]+)"
    r"(?:I(?P<type>\w+?)EEv|E[A-Z]).*?"
    r"(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers"
    r"(?:[^\n]*?(?P<shared>\d+) bytes smem)?",
    re.DOTALL,
)
TYPES = {"f": "float", "d": "double"}


@needs_nvcc
def test_no_kernel_spills_or_takes_more_than_128_registers(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = ROOT / "csrc" / "cuda" / "launch.cu"
    table = Table("kernel", "for", "registers", "stack", "spilled", "shared memory")
    compilers = {
        capability: subprocess.Popen(
            [
                *(str(building.toolkit() / "bin" / "nvcc"), "-cubin", f"-arch=sm_{capability}"),
                *("-std=c++20", "-O3", "-fmad=false", "-Xptxas=-v", *building.TARGETS),
                "--expt-relaxed-constexpr",
                *cuda_shim.header_flags(),
                *("-o", str(tmp_path / f"{capability}.cubin"), str(source)),
            ],
            stderr=subprocess.PIPE,
            text=True,
        )
        for capability in building.CAPABILITIES
    }
    for capability, compiler in compilers.items():
        said = compiler.communicate()[1]
        assert compiler.returncode == 0, said
        kernels = list(RESOURCES.finditer(said))
        assert len(kernels) == said.count("Compiling entry function") == 24
        for kernel in kernels:
            argument = kernel["type"]
            name = kernel["name"]
            if argument is not None:
                name += f"<{TYPES.get(argument) or argument.strip('LiE')}>"
            shared = int(kernel["shared"] or 0)
            spilled = int(kernel["stores"]) + int(kernel["loads"])
            table.add_row(
                name,
                f"sm_{capability}",
                kernel["registers"],
                kernel["stack"],
                str(spilled),
                str(shared),
            )
            assert int(kernel["stack"]) == spilled == 0, name
            assert int(kernel["registers"]) <= 128, name
            # What every device has without asking for more.
            assert shared + tile_bytes() <= 48 * 1024, name
    with capsys.disabled():
        Console(width=100).print("\n", table)


def tile_bytes() -> int:
    """The most dynamic shared memory that a launch asks for."""
    header = (ROOT / "csrc" / "cuda" / "table.h").read_text()
    found = re.search(r"kTileBytes = (\d+) \* 1024;", header)
    assert found is not None
    return int(found[1]) * 1024


@needs_nvcc
def test_the_extension_has_its_cuda_part_where_there_is_nvcc() -> None:
    # For all of them, or for the card of ``make gpu``.
    assert cpu.cuda_capabilities()
    for name in (
        *("topk_threshold", "percentile_threshold", "prune_", "mark_", "project_"),
        *("prune_by_mask_", "dwt2", "idwt2", "percentile_mask", "trellis_load_"),
    ):
        assert torch._C._dispatch_has_kernel_for_dispatch_key(f"wavprune::{name}", "CUDA")


@pytest.mark.parametrize(
    ("release", "found"),
    [("12.0", True), ("13.0", True), ("100.1", True), ("11.8", False), ("9.2", False)],
)
def test_a_toolkit_is_found_by_its_release_as_numbers(
    release: str,
    found: bool,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nvcc = tmp_path / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.1"\n'
        f'[ "$1" = --dryrun ] && echo "#\\$ TOP={tmp_path}/bin/.." >&2\n'
        "exit 0\n"
    )
    nvcc.chmod(0o755)
    monkeypatch.delenv("WAVPRUNE_NO_CUDA", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert building.toolkit() == (tmp_path.resolve() if found else None)
    assert found or f"release {release}" in capsys.readouterr().out
    monkeypatch.setenv("WAVPRUNE_NO_CUDA", "1")
    assert building.toolkit() is None
