"""The compiled operators alone: ``dwt2`` with ``idwt2``, and how pruning scales with size.

Every result is checked before it is timed.
"""

from __future__ import annotations

import numpy as np
import ptwt
import pytest
import pywt
import torch
from pytest_benchmark.fixture import BenchmarkFixture

import wavprune
from wavprune.bases import named_basis

ops = pytest.importorskip("wavprune.ops", reason="the compiled extension is not built here")

KERNELS = torch.randn(1_000_000, 3, 3, generator=torch.Generator().manual_seed(0))
HAAR = named_basis("haar", (3, 3))
SYMMETRIC = named_basis("haar", (3, 3), "symmetric")


def native() -> torch.Tensor:
    result: torch.Tensor = ops.idwt2(ops.dwt2(KERNELS, HAAR), HAAR)
    return result


def pywavelets() -> torch.Tensor:
    coeffs = pywt.wavedec2(KERNELS.numpy(), "haar", "periodization", level=1, axes=(-2, -1))
    whole = pywt.waverec2(coeffs, "haar", "periodization", axes=(-2, -1))
    return torch.from_numpy(whole[:, :3, :3])


def ptwt_symmetric() -> torch.Tensor:
    return ptwt.waverec2(ptwt.wavedec2(KERNELS, "haar", mode="symmetric", level=1), "haar")[
        :, :3, :3
    ]


@pytest.mark.parametrize(
    ("row", "run"),
    [("native", native), ("PyWavelets", pywavelets), ("ptwt", ptwt_symmetric)],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_round_trip(benchmark: BenchmarkFixture, row: str, run: object) -> None:
    assert callable(run)
    assert torch.allclose(run(), KERNELS, atol=1e-5)
    benchmark.group, benchmark.name = "dwt2 + idwt2 of 1M 3x3 kernels", row
    benchmark.extra_info["row"] = row
    benchmark.pedantic(run, rounds=7 if row == "native" else 3)  # type: ignore[no-untyped-call]


@pytest.mark.parametrize("millions", [1, 4, 16, 64, 256])
def test_time_per_weight(benchmark: BenchmarkFixture, millions: int) -> None:
    outs = millions * 1_000_000 // (512 * 9)
    conv = torch.nn.Conv2d(512, outs, 3, bias=False)
    weight = conv.weight.detach()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        # Drawing all values anew before each round would take longer than the round itself.
        weight.view(-1)[: 1 << 20].normal_()
        torch.manual_seed(1)
    tile = weight.view(-1)[: 1 << 20].clone()
    values = weight.view(-1)

    def restore() -> None:
        for part in torch.split(values, 1 << 20):
            part.copy_(tile[: len(part)])

    restore()
    report = wavprune.fast.prune(conv, wavelet="haar", backend="native")
    keep = (weight.numel() + 1) // 2
    # The tile repeats, so there are ties at the threshold, and ties are kept.
    assert keep <= report.kept <= keep + weight.numel() // len(tile) + 1
    assert np.isclose(report.sparsity, 0.5, atol=1e-3)
    benchmark.group, benchmark.name = "haar, time per 1M weights", f"{millions}M"
    benchmark.extra_info |= {"row": f"{millions}M", "weights": weight.numel()}
    benchmark.pedantic(  # type: ignore[no-untyped-call]
        wavprune.fast.prune,
        args=(conv,),
        kwargs={"wavelet": "haar", "backend": "native"},
        setup=restore,
        rounds=15 if millions < 64 else 5,
    )
