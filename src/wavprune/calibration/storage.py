"""A calibration as a file: safetensors, with what is no tensor as JSON in its metadata."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from ..common.atomic import replaced
from ..engine.moments import Moments
from ..errors import WavpruneError
from .collected import Calibration
from .network import Site
from .rows import Rows
from .statistics import Statistics

FORMAT = "wavprune calibration"
VERSION = 1
# The parts of the inputs.
PARTS = ("statistics", "probe", "guard")


def save(calibration: Calibration, path: str | os.PathLike[str]) -> None:
    """Write a calibration, with its inputs; what was at the path is replaced."""
    tensors: dict[str, torch.Tensor] = {}
    for part in PARTS:
        for index, batch in enumerate(getattr(calibration, part)):
            tensors[f"{part}.{index:06}"] = batch
    for group in ("fitted", "held"):
        for name, statistics in getattr(calibration, group).items():
            tensors[f"{group}.mean.{name}"] = statistics.mean
            tensors[f"{group}.covariance.{name}"] = statistics.covariance
    for group in ("gradients", "gains"):
        for name, weights in (getattr(calibration, group) or {}).items():
            tensors[f"{group}.{name}"] = weights
    for name, moments in calibration.moments.items():
        tensors[f"moments.{name}"] = torch.stack([moments.mean, moments.var])
    content = {
        "version": VERSION,
        "layers": {
            name: {**site._asdict(), "rows": site.rows._asdict()}
            for name, site in calibration.layers.items()
        },
        "patches": {
            group: {n: s.patches for n, s in getattr(calibration, group).items()}
            for group in ("fitted", "held")
        },
        "values": {name: m.num_values for name, m in calibration.moments.items()},
        "blocks": dict(calibration.blocks),
        "gradients": calibration.gradients is not None,
        "capacity": calibration.capacity,
        "never_called": list(calibration.never_called),
        "checksums": dict(calibration.checksums),
        "samples": calibration.samples,
        "seed": calibration.seed,
        "max_memory": calibration.max_memory,
    }
    contiguous = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": FORMAT, "calibration": json.dumps(content)}
    with replaced(Path(path)) as new:
        save_file(contiguous, new, metadata)


def load(path: str | os.PathLike[str], device: str | torch.device | None = None) -> Calibration:
    """What ``save`` wrote.

    Args:
        path: of the file.
        device: where its inputs and statistics are put; None means the CPU.

    Raises:
        WavpruneError: it is another file, or one of a later version.
    """
    home = str(device or "cpu")
    try:
        with safe_open(path, "pt", device=home) as file:
            metadata: Mapping[str, str] = file.metadata() or {}
            content = json.loads(metadata["calibration"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if content["version"] > VERSION:
            raise WavpruneError(
                f"{path}: a calibration of version {content['version']}; this library reads up to "
                f"{VERSION}"
            )
        return _calibration(content, tensors)
    except (SafetensorError, KeyError, TypeError, json.JSONDecodeError) as error:
        raise WavpruneError(f"{path}: this is no calibration: {error}") from error


def _calibration(content: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> Calibration:
    layers = {
        name: Site(
            **{**site, "rows": Rows(**{**site["rows"], "shape": tuple(site["rows"]["shape"])})}
        )
        for name, site in content["layers"].items()
    }
    parts = {
        part: tuple(tensors[name] for name in sorted(tensors) if name.startswith(f"{part}."))
        for part in PARTS
    }
    statistics = {
        group: {
            name: Statistics(
                count, tensors[f"{group}.mean.{name}"], tensors[f"{group}.covariance.{name}"]
            )
            for name, count in counts.items()
        }
        for group, counts in content["patches"].items()
    }
    moments = {}
    for name, count in content["values"].items():
        mean, var = tensors[f"moments.{name}"].cpu()
        moments[name] = Moments(count, mean, var)
    gradients = None
    if content["gradients"]:
        gradients = {name: tensors[f"gradients.{name}"].cpu() for name in layers}
    return Calibration(
        **parts,
        layers=layers,
        fitted=statistics["fitted"],
        held=statistics["held"],
        blocks=content["blocks"],
        gradients=gradients,
        gains={name: tensors[f"gains.{name}"].cpu() for name in layers},
        moments=moments,
        capacity=content["capacity"],
        never_called=tuple(content["never_called"]),
        checksums=content["checksums"],
        samples=content["samples"],
        seed=content["seed"],
        max_memory=content["max_memory"],
    )
