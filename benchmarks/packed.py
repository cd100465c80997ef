"""Bytes of calibrated checkpoints against the change of outputs on inputs that nothing saw.

    python -m benchmarks.packed lite0 --data FOLDER --work WORK
    python -m benchmarks.packed --work WORK --output docs/findings

The first makes the files of a network in all settings (``packed_cases.py``) that ``WORK`` has not
measured yet, with ``--settings`` only those that are named. ``FOLDER`` has what
``calibrated_networks.py`` reads. The second replaces the rows of measured networks in
``packed.csv`` and ``packed_ratios.csv``, from which ``packed_page.py`` writes the page.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import math
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import numpy as np
import torch
from torch import nn

from wavprune import checkpoint
from wavprune.calibration.network import Network
from wavprune.calibration.output_sensitivity import (
    Direction,
    Sensitivity,
    _Sums,
    output_sensitivity,
)
from wavprune.calibration.sensitivity import Recorder
from wavprune.checkpoint import network_items, study
from wavprune.checkpoint.feedback import factor_of
from wavprune.checkpoint.folding import fold
from wavprune.checkpoint.twice import in_one_batch

from .packed_baselines import Linear, State, cerwu, nncodec
from .packed_cases import CASES, SETTINGS, Case, Setting
from .packed_page import Ratio, Row, read, write

SAMPLES = 2000


class File(NamedTuple):
    """A file that was measured.

    Attributes:
        row: for the results.
        divergence: of each test input's outputs.
        score: of each.
        dense_score: of each, of the network as it was.
    """

    row: Row
    divergence: torch.Tensor
    score: torch.Tensor
    dense_score: torch.Tensor


@torch.no_grad()
def outputs(network: nn.Module, case: Case) -> torch.Tensor:
    """Of all test inputs."""
    four = case.tests[0].ndim == 4
    layout = torch.channels_last if four else torch.preserve_format
    return torch.cat([network(batch.contiguous(memory_format=layout)) for batch in case.tests])


def measure(name: str, case: Case, settings: Sequence[Setting], work: Path, most: int) -> None:
    """Make the files that are not there, at most some, and measure them."""
    case.network.eval()
    work.mkdir(parents=True, exist_ok=True)
    before: torch.Tensor | None = None
    layers: dict[str, Linear] = {}
    for setting in settings:
        with shared_statistics(work / f"{setting.inputs}.statistics"), feedback(setting.feedback):
            for target in setting.targets:
                path = work / f"{setting.name} {target}.pt"
                if path.exists() or not most:
                    continue
                most -= 1
                if before is None:
                    before = outputs(case.network, case)
                if setting.baseline == "cerwu" and not layers:
                    layers.update(linear_layers(case))
                file = _file(name, case, setting, target, before, layers)
                torch.save({**file._asdict(), "row": file.row._asdict()}, path)
                print(file.row, flush=True)


def _file(
    name: str,
    case: Case,
    setting: Setting,
    target: Any,
    before: torch.Tensor,
    layers: Mapping[str, Linear],
) -> File:
    network = copy.deepcopy(case.network)
    saved: checkpoint.SaveReport | None = None
    start = time.process_time()
    encoded = decoded = math.nan
    if setting.baseline == "nncodec":
        size, state = nncodec(network.state_dict(), target)
        encoded = time.process_time() - start
        network.load_state_dict(state)
    elif setting.baseline == "cerwu":
        size, state = cerwu(layers, *target)
        encoded = time.process_time() - start
        size += fold_with(network, case.inputs["usual"][0][:1], state)
    else:
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "small.safetensors")
            inputs = case.inputs[setting.inputs]
            saved = checkpoint.save(
                *(network, path),
                calibration=inputs,
                held_out=case.held_out,
                target_kl=target,
                **setting.options,
            )
            encoded = time.process_time() - start
            start = time.process_time()
            network.load_state_dict(checkpoint.load(path))
            decoded = time.process_time() - start
        size = saved.bytes
    after = outputs(network, case)
    direction = Direction([before])
    divergence = direction.divergence([before], [after])
    dense_score, score = case.score(before), case.score(after)
    row = Row(
        network=name,
        setting=setting.name,
        calibration=sum(map(len, case.inputs[setting.inputs] + (case.held_out or []))),
        tests=len(before),
        target_kl=math.nan if saved is None else float(target),
        bytes=size,
        predicted_kl=math.nan if saved is None else saved.predicted_kl or math.nan,
        held_out_kl=math.nan if saved is None else saved.measured_kl or math.nan,
        test_kl=float(divergence.mean()),
        test_kl_error=float(divergence.std()) / math.sqrt(len(divergence)),
        score=float(score.mean()),
        dense_score=float(dense_score.mean()),
        measure=case.measure,
        encode_seconds=encoded,
        decode_seconds=decoded,
        weights=sum(p.numel() for p in network.parameters() if p.ndim > 1),
    )
    return File(row, divergence, score.double(), dense_score.double())


@contextmanager
def shared_statistics(path: Path) -> Iterator[None]:
    """Takes the sensitivities of a network once for all its files."""

    def once(*arguments: Any, **options: Any) -> dict[str, Sensitivity]:
        if path.exists():
            return {name: Sensitivity(*parts) for name, parts in torch.load(path).items()}
        known = original(*arguments, **options)
        torch.save({name: tuple(parts) for name, parts in known.items()}, path)
        return known

    original = output_sensitivity
    with patch.object(study, "output_sensitivity", once):
        yield


@contextmanager
def feedback(wanted: bool) -> Iterator[None]:
    """Without it, errors are not made up for by later weights, nor by later layers."""
    with (
        patch.object(network_items, "factor_of", partial(factor_of, feedback=wanted)),
        patch.object(study, "in_one_batch", in_one_batch if wanted else lambda *_: None),
    ):
        yield


def linear_layers(case: Case) -> dict[str, Linear]:
    """The layers of the folded network, with the second moments of their inputs."""
    model = copy.deepcopy(case.network)
    network = Network(model, study._refs(model))
    batches = case.inputs["usual"]
    with torch.no_grad():
        sites = network.sites(batches[0][:1])
        fold(network, sites)
        sums = {name: _Sums(site) for name, site in sites.items()}
        generator = torch.Generator().manual_seed(0)
        for batch in batches:
            tap = Recorder(network)
            network.run(tap, batch)
            for name, call, out in tap.outputs:
                sums[name].add(call, torch.zeros_like(out), generator)
    count = sum(map(len, batches))
    layers = {}
    for name, site in sites.items():
        weight = model.get_submodule(name).get_parameter("weight").detach().double()
        assert not site.rows.transposed
        hessian = (2 * sums[name]._second / count).numpy()
        layers[name] = Linear(weight.flatten(1).numpy(), hessian)
    return layers


def fold_with(network: nn.Module, sample: torch.Tensor, weights: State) -> int:
    """Fold a network and give it these weights; biases are float16, and their bytes returned."""
    wrapped = Network(network, study._refs(network))
    size = 0
    with torch.no_grad():
        norms = fold(wrapped, wrapped.sites(sample))
        for name, weight in weights.items():
            layer = network.get_submodule(name)
            own = layer.get_parameter("weight")
            own.copy_(weight.reshape(own.shape))
            owner = network.get_submodule(norms[name]) if name in norms else layer
            bias = owner._parameters.get("bias")
            if bias is not None:
                bias.copy_(bias.half())
                size += 2 * bias.numel()
    return size


def ratios(files: Sequence[File], case: Case) -> Iterator[Ratio]:
    """Bytes of every setting over those of every baseline and of the identity basis."""
    curves = {name: [f for f in files if f.row.setting == name] for name in _names(files)}
    others = [name for name in ("NNCodec", "CERWU", "identity basis") if name in curves]
    allowed = case.loss(files[0].row.dense_score)
    for other, name in itertools.product(others, curves):
        if name == other or name in ("NNCodec", "CERWU"):
            continue
        for at in (*case.divergences, None):
            found = _ratio(curves[name], curves[other], at, allowed)
            if found is not None:
                label = f"KL {at:g}" if at else f"{allowed:.2g} {case.measure} lost"
                yield Ratio(files[0].row.network, name, other, label, *found)


def _names(files: Sequence[File]) -> list[str]:
    return list(dict.fromkeys(file.row.setting for file in files))


def _ratio(
    ours: Sequence[File], theirs: Sequence[File], at: float | None, allowed: float
) -> tuple[int, int, float, float] | None:
    """Bytes of both at a divergence, or else a loss; their ratio, and its 95% upper bound."""
    generator = torch.Generator().manual_seed(0)
    count = len(ours[0].divergence)
    everything = torch.arange(count)
    sizes = [_bytes_at(files, at, allowed, everything) for files in (ours, theirs)]
    if sizes[0] is None or sizes[1] is None:
        return None
    drawn = []
    for _ in range(SAMPLES):
        sample = torch.randint(count, (count,), generator=generator)
        pair = [_bytes_at(files, at, allowed, sample, beyond=True) for files in (ours, theirs)]
        assert pair[0] is not None
        assert pair[1] is not None
        drawn.append(pair[0] / pair[1])
    own, other = sizes[0], sizes[1]
    return round(own), round(other), own / other, float(np.quantile(drawn, 0.95))


def _bytes_at(
    files: Sequence[File],
    at: float | None,
    allowed: float,
    sample: torch.Tensor,
    beyond: bool = False,
) -> float | None:
    """Between two files, linear in the logarithms of bytes and divergence, or in the loss.

    Of files that leave the front of few bytes and small changes, the front counts.
    """
    points: list[tuple[float, float]] = []
    for file in files:
        if at is None:
            change = float((file.dense_score[sample] - file.score[sample]).mean())
        else:
            change = math.log(max(float(file.divergence[sample].mean()), 1e-12))
        points.append((change, math.log(file.row.bytes)))
    wanted = allowed if at is None else math.log(at)
    front: list[tuple[float, float]] = []
    for point in sorted(points):
        if not front or point[1] < front[-1][1]:
            front.append(point)
    if len(front) < 2:
        return None if not beyond else math.exp(front[0][1])
    if not front[0][0] <= wanted <= front[-1][0] and not beyond:
        return None
    place = next((i for i, point in enumerate(front) if point[0] >= wanted), len(front) - 1)
    (low, more), (high, fewer) = front[max(place, 1) - 1], front[max(place, 1)]
    share = (wanted - low) / (high - low)
    return math.exp(more + share * (fewer - more))


def load_files(work: Path) -> list[File]:
    """What was measured of a network."""
    files = []
    for path in sorted(work.glob("*.pt")):
        parts = torch.load(path)
        files.append(File(**{**parts, "row": Row(**parts["row"])}))
    return files


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("networks", nargs="*", choices=[[], *CASES], default=[])
    parser.add_argument("--data", type=Path, default=Path())
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--settings", nargs="+")
    parser.add_argument("--most", type=int, default=sys.maxsize, help="files to make now")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    for name in arguments.networks:
        settings = [
            setting
            for setting in SETTINGS[name]
            if not arguments.settings or setting.name in arguments.settings
        ]
        measure(name, CASES[name](arguments.data), settings, arguments.work / name, arguments.most)
    if arguments.output is not None:
        rows_path, ratios_path = (
            arguments.output / name for name in ("packed.csv", "packed_ratios.csv")
        )
        rows, compared = read(rows_path, Row), read(ratios_path, Ratio)
        for name in CASES:
            files = load_files(arguments.work / name)
            if files:
                order = [setting.name for setting in SETTINGS[name]]
                files.sort(key=lambda f: (order.index(f.row.setting), -f.row.bytes))
                rows = [row for row in rows if row.network != name] + [f.row for f in files]
                compared = [row for row in compared if row.network != name]
                compared += ratios(files, CASES[name](arguments.data))
        places = list(CASES)
        rows.sort(key=lambda row: places.index(row.network))
        compared.sort(key=lambda row: places.index(row.network))
        write(rows_path, rows)
        write(ratios_path, compared)


if __name__ == "__main__":
    main()
