"""The rows of the benchmarks: every backend of this library, and the alternatives.

Each row prunes half of every ``Conv2d`` of a network in place and names the settings with which
``wavprune.reference.prune`` must give the same result.

``python -m benchmarks.pipelines NETWORK ROW`` prints the extra memory of a row at its peak, in
bytes.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pywt
import torch
from torch import nn
from torch.nn.utils import prune

import wavprune

from .networks import NETWORKS, convolutions, one_of_each_kernel

# ptwt has no periodization; every other backend is timed in the default mode.
MODES = {"ptwt": "symmetric"}

PROCESS = Path("/proc/self")


@dataclass(frozen=True)
class Row:
    """One line of the benchmark.

    Attributes:
        name: its label in the tables.
        run: prunes a network in place.
        settings: those with which ``wavprune.reference.prune`` gives the same result.
        same_mask: False where only the counts agree: the random numbers are others.
        memory: whether its extra memory is measured too.
    """

    name: str
    run: Callable[[nn.Module], object]
    settings: dict[str, Any]
    same_mask: bool = True
    memory: bool = False


def wavelet_transforms(network: nn.Module, wavelet: str) -> None:
    """WaveletTransforms: PyWavelets per layer, the smaller half of the coefficients set to 0."""
    for weight in _weights(network):
        h, w = weight.shape[-2:]
        coeffs = pywt.wavedec2(weight.numpy(), wavelet, "periodization", axes=(-2, -1))
        packed, slices = pywt.coeffs_to_array(coeffs, axes=(-2, -1))
        threshold = np.percentile(np.abs(packed), 50)
        packed = np.where(np.abs(packed) < threshold, 0, packed)
        coeffs = pywt.array_to_coeffs(packed, slices, output_format="wavedec2")
        pruned = pywt.waverec2(coeffs, wavelet, "periodization", axes=(-2, -1))[..., :h, :w]
        weight.copy_(torch.from_numpy(np.ascontiguousarray(pruned)))


def wavelet_transforms_min_weight(network: nn.Module) -> None:
    """WaveletTransforms' minimum-weight pruning."""
    for weight in _weights(network):
        values = weight.view(-1)
        _, smallest = torch.topk(values.abs(), values.numel() // 2, largest=False)
        values[smallest] = 0


def ptwt_haar(network: nn.Module) -> None:
    """Haar pruning written with ptwt, with a threshold from ``torch.kthvalue``."""
    import ptwt  # the other rows do without it

    for weight in _weights(network):
        h, w = weight.shape[-2:]
        approximation, *details = ptwt.wavedec2(weight, "haar", mode="symmetric")
        bands = [approximation, *(band for level in details for band in level)]
        magnitudes = torch.cat([band.abs().flatten() for band in bands])
        threshold = magnitudes.kthvalue(magnitudes.numel() // 2).values
        for band in bands:
            band.mul_(band.abs() > threshold)
        weight.copy_(ptwt.waverec2((approximation, *details), "haar")[..., :h, :w])


def l1_unstructured(network: nn.Module) -> None:
    """PyTorch's minimum-weight pruning, its parametrization removed afterwards."""
    for conv in convolutions(network):
        prune.l1_unstructured(conv, "weight", amount=0.5)  # type: ignore[no-untyped-call]
        prune.remove(conv, "weight")  # type: ignore[no-untyped-call]


def global_unstructured(network: nn.Module) -> None:
    """PyTorch's minimum-weight pruning of all layers at once."""
    convs = convolutions(network)
    prune.global_unstructured(
        [(conv, "weight") for conv in convs], prune.L1Unstructured, amount=0.5
    )
    for conv in convs:
        prune.remove(conv, "weight")  # type: ignore[no-untyped-call]


def random_unstructured(network: nn.Module) -> None:
    """PyTorch's random pruning."""
    for conv in convolutions(network):
        prune.random_unstructured(conv, "weight", amount=0.5)  # type: ignore[no-untyped-call]
        prune.remove(conv, "weight")  # type: ignore[no-untyped-call]


def kthvalue(network: nn.Module) -> None:
    """Minimum-weight pruning written with ``torch.kthvalue``."""
    for weight in _weights(network):
        magnitudes = weight.abs()
        weight.mul_(magnitudes > magnitudes.flatten().kthvalue(weight.numel() // 2).values)


def numpy_percentile(network: nn.Module) -> None:
    """Minimum-weight pruning written with numpy."""
    for weight in _weights(network):
        values: npt.NDArray[np.float32] = weight.numpy()
        magnitudes = np.abs(values)
        values[magnitudes < np.percentile(magnitudes, 50)] = 0


def quantile(network: nn.Module) -> None:
    """Minimum-weight pruning with ``torch.quantile``, which takes up to 2**24 values."""
    for weight in _weights(network):
        magnitudes = weight.abs()
        weight.mul_(magnitudes >= torch.quantile(magnitudes, 0.5))


def multiply(network: nn.Module) -> None:
    """Read and write every weight once: a lower bound for any pruning."""
    for weight in _weights(network):
        weight.mul_(1.0)


def peak_bytes(network: str, row: str) -> int | None:
    """Extra memory of a row at its peak, in a fresh process; None where it cannot be measured."""
    if not (PROCESS / "clear_refs").exists():
        return None
    # Fixed thresholds make malloc return freed tensors to the system. Otherwise a row could reuse
    # memory that building the network had freed, and its own allocations would not show.
    environment = os.environ | {
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
        "NUMPY_MADVISE_HUGEPAGE": "0",
    }
    child = subprocess.run(
        [sys.executable, "-m", __name__, network, row],
        cwd=Path(__file__).parents[1],
        env=environment,
        check=True,
        stdout=subprocess.PIPE,
        text=True,
    )
    return int(child.stdout)


def _weights(network: nn.Module) -> Iterator[torch.Tensor]:
    return (conv.weight.detach() for conv in convolutions(network))


def _ours(backend: str) -> list[Row]:
    haar = {"wavelet": "haar", "mode": MODES.get(backend, "periodization"), "sparsity": 0.5}
    cases: dict[str, dict[str, Any]] = {
        "haar": haar,
        "haar global": haar | {"scope": "global"},
        "uhaar": {"wavelet": "uhaar", "sparsity": 0.5},
        "min-weight": {"method": "min_weight", "sparsity": 0.5},
        "random": {"method": "random", "sparsity": 0.5},
    }
    if backend == "native":
        cases |= {
            "dct": {"wavelet": "dct", "sparsity": 0.5},
            "klt": {"wavelet": "klt", "sparsity": 0.5},
            "auto": {"wavelet": "auto", "sparsity": 0.5},
            "auto global": {"wavelet": "auto", "sparsity": 0.5, "scope": "global"},
        }
    return [
        Row(
            f"{backend} {case}",
            partial(wavprune.fast.prune, backend=backend, **settings),
            settings,
            memory=case == "haar",
        )
        for case, settings in cases.items()
    ]


def _peers() -> list[Row]:
    layers = {"method": "min_weight", "sparsity": 0.5}
    haar = {"wavelet": "haar", "percentile": 50}
    return [
        Row(
            "WaveletTransforms haar",
            partial(wavelet_transforms, wavelet="haar"),
            haar,
            memory=True,
        ),
        Row(
            "WaveletTransforms bior4.4",
            partial(wavelet_transforms, wavelet="bior4.4"),
            haar | {"wavelet": "bior4.4"},
        ),
        Row("WaveletTransforms topk", wavelet_transforms_min_weight, layers, memory=True),
        Row("ptwt haar + kthvalue", ptwt_haar, haar | {"mode": "symmetric"}),
        Row("l1_unstructured", l1_unstructured, layers, memory=True),
        Row("global_unstructured", global_unstructured, layers | {"scope": "global"}),
        Row("random_unstructured", random_unstructured, layers, same_mask=False),
        Row("abs + kthvalue + mul_", kthvalue, layers),
        Row("np.percentile + store", numpy_percentile, layers),
        Row("torch.quantile + mul_", quantile, layers),
    ]


OURS = [row for backend in wavprune.backends.names() for row in _ours(backend)]
PEERS = _peers()
FLOOR = Row("mul_", multiply, {"method": "min_weight", "sparsity": 0.0})
ROWS = {row.name: row for row in (*OURS, *PEERS, FLOOR)}


def _status(field: str) -> int:
    for line in (PROCESS / "status").read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise AssertionError(f"the kernel reports no {field}")


def _measure(network: str, row: str) -> int:
    run = ROWS[row].run
    run(one_of_each_kernel())  # loads libraries and starts threads, which must not count
    model = NETWORKS[network]()
    gc.collect()
    # Not ru_maxrss: a child inherits its parent's peak, and it cannot be reset.
    (PROCESS / "clear_refs").write_text("5")
    before = _status("VmRSS")
    run(model)
    return max(_status("VmHWM") - before, 0)


if __name__ == "__main__":
    print(_measure(*sys.argv[1:]))
