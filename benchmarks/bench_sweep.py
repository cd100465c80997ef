"""Runs an hour of sweeps, and where their time goes.

The demo's network needs nothing. ``WAVPRUNE_DATA`` names a folder with ``cifar10_test.npz`` and
``cifar10_calibration.npz`` (images ``(N, 32, 32, 3)`` uint8, labels), weights
``resnet20_cifar10.safetensors`` and ``imagenet_sample/{test,calibration}/CLASS.jpg`` of 256x256;
without it the other networks are skipped. The share of the evaluation's forward passes should be
75%; where batch norms are matched on other data than is tested, at least 75% of what the numbers of
images allow.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
from pytest_benchmark.fixture import BenchmarkFixture

from wavprune.cli.sweep import parts_text
from wavprune.sweep.runner import run_sweep
from wavprune.sweep.settings import parse_sweep

from .conftest import SWEEPS

DATA = Path(os.environ["WAVPRUNE_DATA"]).absolute() if "WAVPRUNE_DATA" in os.environ else None
HERE = Path(__file__).parent
GRID = {"method": ["dwt", "min_weight", "random"], "wavelet": ["uhaar", "dct"], "scope": "global"}
SHARE = 0.75


def _demo() -> dict[str, Any]:
    return {
        "model": "demo",
        "data": "demo",
        "calibration": {"builtin": "demo", "split": "train"},
        "batch_size": 200,
        "grid": {**GRID, "sparsity": [0.5, 0.7, 0.8, 0.9, 0.95]},
    }


def _network(
    model: dict[str, Any], loader: str, sizes: tuple[int, int, int], sparsity: list[float]
) -> dict[str, Any]:
    test, calibration, batch_size = sizes
    sources = {
        key: {
            "factory": f"sweep_networks:{loader}",
            "arguments": {
                "folder": str(DATA),
                "part": part,
                "samples": samples,
                "batch_size": batch_size,
            },
        }
        for key, part, samples in (
            ("data", "test", test),
            ("calibration", "calibration", calibration),
        )
    }
    return {"model": model, **sources, "grid": {**GRID, "sparsity": sparsity}}


def _cifar() -> dict[str, Any]:
    weights = f"{DATA}/resnet20_cifar10.safetensors"
    arguments = {"depth": 20}
    model = {
        "factory": "sweep_networks:cifar_resnet",
        "arguments": arguments,
        "weights": weights,
    }
    return _network(model, "cifar", (1000, 500, 250), [0.5, 0.8])


def _lite0() -> dict[str, Any]:
    model = {"factory": "networks:efficientnet_lite0"}
    return _network(model, "photographs", (100, 50, 25), [0.3])


NETWORKS = {"demo": _demo, "CIFAR-10 ResNet-20": _cifar, "EfficientNet-Lite0": _lite0}
# Images of a run that are tested, and on which batch norms are matched besides.
IMAGES = {"demo": (600, 1197), "CIFAR-10 ResNet-20": (1000, 500), "EfficientNet-Lite0": (100, 50)}
REPAIRS = ("off", "match", "match, calibration")


@pytest.mark.parametrize("repair", REPAIRS)
@pytest.mark.parametrize("network", NETWORKS)
def test_sweep(benchmark: BenchmarkFixture, tmp_path: Path, network: str, repair: str) -> None:
    if network != "demo" and DATA is None:
        pytest.skip("WAVPRUNE_DATA names no folder with data")
    content = NETWORKS[network]()
    if repair != "match, calibration":
        content["calibration"] = None
    sweep = parse_sweep({**content, "batchnorm": repair.partition(",")[0]}, HERE)
    benchmark.group, benchmark.extra_info["row"] = SWEEPS, f"{network}, {repair}"
    summary = benchmark.pedantic(  # type: ignore[no-untyped-call]
        run_sweep, (sweep, tmp_path / "results.db"), {"jobs": 1}, rounds=1
    )
    assert summary.failed == 0
    spent = {part: seconds for part, seconds in summary.parts.items() if part != "waiting"}
    tested, matched = IMAGES[network]
    possible = tested / (tested + matched) if repair == "match, calibration" else 1.0
    share = spent["forward"] / sum(spent.values())
    verdict = "ok" if share >= SHARE * possible else "missed"
    benchmark.extra_info["line"] = (
        f"{parts_text(summary)}. Forward passes of the evaluation: {share:.1%} of the runs' time, "
        f"at most {possible:.0%} for these images; target {SHARE * possible:.0%}: {verdict}"
    )
