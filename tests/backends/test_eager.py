from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from tests.support.cases import (
    BASES,
    Array,
    Outcome,
    assert_pruned,
    bits,
    layer_of,
    layer_weights,
    normal,
)
from wavprune import PruneConfig
from wavprune.backends import Budget, Job, Layer
from wavprune.backends.eager import EagerBackend, _indices, chunks, lerp, percentile_rank

IDENTITY = PruneConfig(method="min_weight")


class TinyChunks(EagerBackend):
    chunk = 7


class OddChunks(EagerBackend):
    chunk = 101


BACKENDS = [EagerBackend(), OddChunks(), TinyChunks()]


def column(values: Array) -> Layer:
    """A layer of 1x1 kernels that holds these values."""
    return layer_of(torch.from_numpy(values.copy()).view(-1, 1, 1, 1), IDENTITY)


def adversarial(dtype: type[np.floating]) -> dict[str, Array]:
    info = np.finfo(dtype)
    rng = np.random.default_rng(0)
    some = rng.standard_normal(301).astype(dtype)
    exponents = np.linspace(np.log2(info.smallest_subnormal), np.log2(info.max) - 1, 301)
    return {
        "normal": some,
        "sorted": np.sort(np.abs(some)),
        "reversed": np.sort(np.abs(some))[::-1],
        "equal": np.full(301, 0.1, dtype),
        "two values": np.where(some > 0, dtype(0.5), dtype(2)),
        "zeros": np.zeros(301, dtype),
        "both zeros": np.where(some > 0, dtype(0.0), dtype(-0.0)),
        "few": np.where(rng.random(301) < 0.01, some, 0),
        "outlier": np.concatenate([np.full(300, 1e-3, dtype), [dtype(1e30)]]).astype(dtype),
        "denormal": (some.astype(np.float64) * info.smallest_subnormal * 99).astype(dtype),
        "all exponents": np.exp2(exponents).astype(dtype),
        "neighbours": np.nextafter(dtype(1), rng.integers(0, 3, 301).astype(dtype)),
        "low bits": (np.arange(301) + 2.0**20).astype(dtype),
        "extremes": np.array([info.max, info.tiny, -info.max, info.smallest_subnormal], dtype),
        "one": np.array([-3], dtype),
    }


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", adversarial(np.float32))
def test_the_threshold_is_the_order_statistic(dtype: type[np.floating], name: str) -> None:
    values = adversarial(dtype)[name]
    largest_first = np.sort(np.abs(values))[::-1]
    keeps = sorted({1, 2, 3, len(values) // 2, len(values) - 1, len(values)} - {0})
    keeps = [keep for keep in keeps if keep <= len(values)]
    for backend in BACKENDS:
        jobs = [Job([column(values)], Budget(keep=keep)) for keep in keeps]
        assert backend.threshold(jobs).tolist() == [
            float(largest_first[keep - 1]) for keep in keeps
        ]


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", adversarial(np.float32))
def test_the_percentile_is_numpys(dtype: type[np.floating], name: str) -> None:
    values = adversarial(dtype)[name]
    for percentile in (0.0, 0.1, 33.3, 50.0, 99.99, 100.0):
        expected = float(np.percentile(np.abs(values), percentile))
        for backend in BACKENDS:
            found = backend.threshold([Job([column(values)], Budget(percentile=percentile))])
            assert float(found) == expected


def test_several_layers_are_ranked_as_one() -> None:
    parts = [normal(n, 1, 1, 1, seed=n) for n in (1, 7, 40)]
    together = torch.cat(parts).abs().flatten().sort(descending=True).values
    for keep in (1, 5, 48):
        job = Job([layer_of(part, IDENTITY) for part in parts], Budget(keep=keep))
        for backend in BACKENDS:
            assert float(backend.threshold([job])) == float(together[keep - 1])


def run(backend: EagerBackend, weight: torch.Tensor, config: PruneConfig) -> Outcome:
    keep = -(-3 * weight.numel() // 10)
    budget = Budget(keep) if config.percentile is None else Budget(percentile=config.percentile)
    layer = layer_of(weight, config)
    thresholds = backend.threshold([Job([layer], budget)])
    kept = backend.apply_([layer], thresholds)[0, 0]
    return Outcome(weight, float(thresholds[0]), int(kept))


@pytest.mark.parametrize("settings", BASES.values(), ids=BASES)
@pytest.mark.parametrize("amount", [{"sparsity": 0.7}, {"percentile": 30.0}], ids=str)
@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_any_chunk_size_gives_the_same_result(
    settings: dict[str, object], amount: dict[str, object], backend: EagerBackend
) -> None:
    config = PruneConfig(**settings, **amount)  # type: ignore[arg-type]
    before, whole, parts = (
        {name: layer_weights()[name] for name in ("grouped", "oblong", "channels_last", "strided")}
        for _ in range(3)
    )
    expected = {name: run(EagerBackend(), weight, config) for name, weight in whole.items()}
    found = {name: run(backend, weight, config) for name, weight in parts.items()}
    assert_pruned(before, expected, config)
    assert_pruned(before, found, config)
    if "identity" in settings.values() or config.method == "min_weight":
        assert [bits(o.weight) for o in found.values()] == [
            bits(o.weight) for o in expected.values()
        ]


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_any_chunk_size_draws_the_same_mask(backend: EagerBackend) -> None:
    found = []
    for each in (EagerBackend(), backend):
        weight = normal(6, 5, 3, 3)
        layer = dataclasses.replace(layer_of(weight, IDENTITY), seed=-7)
        done = each.apply_([layer], each.threshold([Job((layer,), Budget(keep=100))]))
        assert int(done[0, 0]) == int(torch.count_nonzero(weight)) == 100
        found.append(bits(weight))
    assert found[0] == found[1]


@pytest.fixture
def threads() -> Iterator[None]:
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("threads")
@pytest.mark.parametrize("wavelet", ["identity", "haar", "uhaar"])
def test_any_number_of_threads_gives_the_same_result(wavelet: str) -> None:
    config = PruneConfig(wavelet=wavelet, sparsity=0.7)
    before = {"conv": normal(96, 64, 3, 3)}
    found = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        outcome = run(EagerBackend(), before["conv"].clone(), config)
        assert_pruned(before, {"conv": outcome}, config)
        found.append(outcome)
    assert len({outcome.kept for outcome in found}) == 1
    if wavelet == "identity":
        assert len({bits(outcome.weight) for outcome in found}) == 1


@pytest.mark.parametrize("size", [1, 9, 20, 100, 10**6])
@pytest.mark.parametrize("shape", [(5, 3, 3, 3), (1, 7, 2, 2), (6, 1, 1, 1), (4, 4, 5, 1)])
def test_chunks_cover_the_weight_once_and_know_their_indices(
    shape: tuple[int, int, int, int], size: int
) -> None:
    weight = torch.arange(int(np.prod(shape))).view(shape)
    layer = layer_of(weight, IDENTITY)
    K = shape[2] * shape[3]
    seen = []
    for chunk in chunks(weight, size):
        assert chunk.view.numel() <= max(size, K)
        indices = _indices(layer, chunk)
        assert torch.equal(indices, chunk.view.flatten(0, 1).flatten(1))
        seen += chunk.view.flatten().tolist()
    assert sorted(seen) == list(range(weight.numel()))


def test_percentile_rank_and_lerp_interpolate_as_numpy_does() -> None:
    rng = np.random.default_rng(0)
    for count in (1, 2, 3, 10, 101, 4096):
        values = np.sort(rng.standard_normal(count).astype(np.float32))
        for percentile in (0.0, 100.0, 50.0, 99.999, *map(float, rng.uniform(0, 100, 50))):
            rank, fraction = percentile_rank(count, percentile)
            pair = torch.from_numpy(values[[rank, min(rank + 1, count - 1)]])
            found = float(lerp(pair[0], pair[1], fraction))
            assert found == float(np.percentile(values, percentile))


PEAK = """
import re, sys
from pathlib import Path
import torch
from wavprune import LayerRef, PruneConfig, prune_layers

def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1]) / 1024

torch.set_num_threads(1)
config = PruneConfig(backend="eager", {settings})
prune_layers([LayerRef("warm", torch.ones(1024, 64, 3, 3))], config)
layer = LayerRef("large", torch.empty({MiB} * 16, 1821, 3, 3).normal_())
before = peak()
prune_layers([layer], config)
print(peak() - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("settings", "mib"), [("sparsity=0.9", 128), ("method='random'", 64)])
def test_the_extra_memory_is_less_than_64_mib_however_large_the_layer(
    settings: str, mib: int
) -> None:
    script = PEAK.replace("{settings}", settings).replace("{MiB}", str(mib))
    run = subprocess.run(
        [sys.executable, "-c", script], check=True, capture_output=True, text=True, timeout=120
    )
    assert float(run.stdout) < 64
