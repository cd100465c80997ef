"""Bytes of calibrated checkpoints against the divergence of outputs on images that nothing saw.

    python -m benchmarks.packed lite0 --data FOLDER --output docs/findings/packed.csv
    python -m benchmarks.packed --page docs/findings/checkpoints.md --output ...

The first measures networks (``demo``, ``resnet20``, ``resnet56``, ``lite0``) and replaces their
rows of the results; ``FOLDER`` has what ``sweep_networks.py`` reads. The second writes the tables
of the page from the results, and runs nothing.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
import math
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_type_hints

import torch
from safetensors.torch import load_file
from torch import nn

from wavprune import checkpoint

from .networks import efficientnet_lite0
from .sweep_networks import cifar, cifar_resnet, photographs

# Bytes of NNCodec 2.1.3 with dependent quantisation at these divergences of EfficientNet-Lite0.
NNCODEC = {0.031: 2_804_839, 0.042: 2_657_665, 0.055: 2_579_647, 0.085: 2_458_505}
BEGIN, END = "<!-- packed -->\n", "<!-- /packed -->\n"


class Case(NamedTuple):
    """A network, and inputs to calibrate with and to measure on."""

    network: nn.Module
    inputs: list[torch.Tensor]
    tests: list[tuple[torch.Tensor, torch.Tensor]]
    targets: Sequence[float]
    settings: Sequence[dict[str, Any]]


class Row(NamedTuple):
    """One file."""

    network: str
    setting: str
    calibration: int
    tests: int
    target_kl: float
    bytes: int
    predicted_kl: float
    held_out_kl: float
    test_kl: float
    test_kl_error: float
    accuracy: float
    dense_accuracy: float
    encode_seconds: float
    decode_seconds: float
    weights: int


def demo(folder: Path) -> Case:
    from wavprune.demo import digits, resnet

    del folder
    inputs = [images for images, _ in digits("train")]
    settings = [{}, {"wavelet": "identity"}, {"wavelet": "dct"}, {"batchnorm": "keep"}]
    targets = (0.0002, 0.0005, 0.001, 0.0025)
    return Case(resnet(seed=0), inputs, list(digits("test")), targets, settings)


def resnet(depth: int) -> Callable[[Path], Case]:
    def case(folder: Path) -> Case:
        network = cifar_resnet(depth)
        network.load_state_dict(load_file(folder / f"resnet{depth}_cifar10.safetensors"))
        inputs = [images for images, _ in cifar(str(folder), "calibration", 500, 50)]
        settings = [{}, {"wavelet": "identity"}, {"batchnorm": "keep"}]
        tests = cifar(str(folder), "test", 2000, 200)
        return Case(network, inputs, tests, (0.003, 0.01, 0.03, 0.1), settings)

    return case


def lite0(folder: Path) -> Case:
    inputs = [images for images, _ in photographs(str(folder), "calibration", 200, 25)]
    tests = photographs(str(folder), "test", 400, 25)
    settings = [{}, {"batchnorm": "keep"}]
    return Case(efficientnet_lite0(), inputs, tests, (0.02, 0.03, 0.06), settings)


CASES: dict[str, Callable[[Path], Case]] = {
    "demo": demo,
    "resnet20": resnet(20),
    "resnet56": resnet(56),
    "lite0": lite0,
}


def outputs(network: nn.Module, case: Case) -> torch.Tensor:
    with torch.no_grad():
        return torch.cat([network(images) for images, _ in case.tests]).double()


def measure(name: str, case: Case) -> Iterator[Row]:
    case.network.eval()
    labels = torch.cat([labels for _, labels in case.tests])
    dense = outputs(case.network, case)
    p = dense.log_softmax(1)
    middle = case.targets[len(case.targets) // 2]
    for setting in case.settings:
        for target in (middle,) if setting else case.targets:
            with tempfile.TemporaryDirectory() as folder:
                path = Path(folder, "small.safetensors")
                start = time.process_time()
                saved = checkpoint.save(
                    case.network, path, calibration=case.inputs, target_kl=target, **setting
                )
                encoded = time.process_time() - start
                start = time.process_time()
                state = checkpoint.load(path)
                decoded = time.process_time() - start
            network = copy.deepcopy(case.network)
            network.load_state_dict(state)
            after = outputs(network, case)
            divergence = (p.exp() * (p - after.log_softmax(1))).sum(1)
            accuracy, before = (
                float((out.argmax(1) == labels).double().mean()) for out in (after, dense)
            )
            assert saved.predicted_kl is not None
            assert saved.measured_kl is not None
            yield (
                Row(
                    name,
                    ", ".join(f"{k}={v}" for k, v in setting.items()) or "default",
                    sum(map(len, case.inputs)),
                    len(labels),
                    target,
                    saved.bytes,
                    saved.predicted_kl,
                    saved.measured_kl,
                    float(divergence.mean()),
                    float(divergence.std()) / math.sqrt(len(labels)),
                    accuracy,
                    before,
                    encoded,
                    decoded,
                    saved.numel,
                )
            )


def read(path: Path) -> list[Row]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        kinds = get_type_hints(Row)
        return [
            Row(*(kinds[name](row[name]) for name in Row._fields)) for row in csv.DictReader(file)
        ]


def write(path: Path, rows: Sequence[Row]) -> None:
    with path.open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(Row._fields)
        for row in rows:
            writer.writerow([f"{v:.6g}" if isinstance(v, float) else v for v in row])


def bytes_at(rows: Sequence[Row], kl: float) -> float | None:
    """Between two files, linear in the logarithms; None beyond them."""
    points = sorted((row.test_kl, row.bytes) for row in rows)
    for (low, more), (high, fewer) in itertools.pairwise(points):
        if low <= kl <= high:
            share = math.log(kl / low) / math.log(high / low)
            return float(more * (fewer / more) ** share)
    return None


def page(rows: Sequence[Row]) -> str:
    lines = []
    for name in dict.fromkeys(row.network for row in rows):
        of_network = [row for row in rows if row.network == name]
        first = of_network[0]
        lines += [
            f"### {name}: {first.calibration} inputs to calibrate, {first.tests} others to test",
            "",
            f"Dense accuracy {first.dense_accuracy:.1%}; {first.weights:,} values are coded.",
            "",
            "| setting | target | bytes | predicted KL | held-out KL | test KL | accuracy |",
            "|---|---:|---:|---:|---:|---:|---:|",
        ]
        lines += [
            f"| {row.setting} | {row.target_kl:g} | {row.bytes:,} | {row.predicted_kl:.3g} "
            f"| {row.held_out_kl:.3g} | {row.test_kl:.3g} ± {row.test_kl_error:.2g} "
            f"| {row.accuracy:.1%} |"
            for row in of_network
        ]
        lines.append("")
        if name == "lite0":
            lines += against_nncodec(of_network)
    return "\n".join(lines)


def against_nncodec(rows: Sequence[Row]) -> list[str]:
    lines = ["| setting | test KL | NNCodec | bytes | ratio |", "|---|---:|---:|---:|---:|"]
    for setting in dict.fromkeys(row.setting for row in rows):
        for kl, theirs in NNCODEC.items():
            ours = bytes_at([row for row in rows if row.setting == setting], kl)
            if ours is not None:
                lines.append(
                    f"| {setting} | {kl} | {theirs:,} | {ours:,.0f} | {ours / theirs:.3f} |"
                )
    return [*lines, ""] if len(lines) > 2 else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", choices=[[], *CASES], default=[])
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--page", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.networks:
        rows = [row for row in read(arguments.output) if row.network != name]
        for row in measure(name, CASES[name](arguments.data)):
            rows.append(row)
            print(row, flush=True)
            write(arguments.output, rows)
    if arguments.page is not None:
        text = arguments.page.read_text()
        before, rest = text.split(BEGIN)
        _, after = rest.split(END)
        tables = page(read(arguments.output))
        arguments.page.write_text(f"{before}{BEGIN}\n{tables}\n{END}{after}")


if __name__ == "__main__":
    main()
