"""What ``Pruner.state_dict()`` gives: numbers, strings and tensors, with a version.

Version 2 added the checksum of each weight. Older ones are read, too.
"""

from __future__ import annotations

import dataclasses
import types
import typing
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from ..backends import Layer
from ..backends.masks import unpack
from ..bases import Basis, family_of
from ..bases.basis import Request
from ..bases.matrices import frozen
from ..common.checks import integer
from ..config import PruneConfig, RunSettings
from ..engine.auto import bases_for
from ..engine.layers import LayerRef
from ..engine.projection import checksum, projection_plan
from ..engine.sharding import first_channel, local_part
from ..errors import WavpruneError
from ..report import LayerStats, Outcome, PruneReport

FORMAT = 2
READABLE = (1, 2)
# The settings that a mask means nothing without.
SETTINGS = ("method", "wavelet", "mode", "level", "force_level", "scope")
# How far the rows of a stored basis may be from orthonormal.
ORTHONORMAL = 1e-6


class Progress(NamedTuple):
    """How far a pruner is.

    Attributes:
        steps: optimizer steps so far.
        asked: the last step that the schedule was asked about; -1 before the first.
        bases: one per layer; empty before the first pruning, like all that follows.
        masks: one per layer.
        checksums: one per layer, of the weight when the state was written; None where unknown.
        report: of the last choice of masks.
    """

    steps: int
    asked: int
    bases: list[Basis]
    masks: list[torch.Tensor]
    checksums: list[int | None]
    report: PruneReport | None


def write(progress: Progress, refs: Sequence[LayerRef], config: PruneConfig) -> dict[str, Any]:
    """The state of a pruner; of sharded weights, that of this rank's parts."""
    layers = {
        ref.name: {**_part(ref), **_basis_state(basis), "mask": mask.clone()}
        for ref, basis, mask in zip(refs, progress.bases, progress.masks, strict=False)
    }
    for ref in refs[: len(layers)]:
        layers[ref.name]["checksum"] = int(checksum(ref.weight))
    report = progress.report
    return {
        "format": FORMAT,
        "settings": _settings(config),
        "steps": progress.steps,
        "asked": progress.asked,
        "layers": layers,
        "report": None
        if report is None
        else {
            "layers": [dataclasses.asdict(layer) for layer in report],
            "squared_norm": report.squared_norm,
            "squared_error": report.squared_error,
            "settings": report.settings.to_dict(),
        },
    }


def read(state: Any, refs: Sequence[LayerRef], config: PruneConfig) -> Progress:
    """What a state says, after a check of everything in it.

    Raises:
        WavpruneError: it is of another format, of other settings, layers, sizes or ranks, or not
            whole.
    """
    try:
        return _read(state, refs, config)
    except WavpruneError:
        raise
    except KeyError as error:
        raise WavpruneError(f"the state has no {error}; allowed: what state_dict() gave") from error
    # Whatever else a damaged state leads to.
    except Exception as error:
        raise WavpruneError(f"the state is not what state_dict() gave: {error}") from error


def _read(state: Any, refs: Sequence[LayerRef], config: PruneConfig) -> Progress:
    if state["format"] not in READABLE:
        allowed = ", ".join(map(str, READABLE))
        raise WavpruneError(f"the state has format {state['format']!r}; allowed: {allowed}")
    for key, here in _settings(config).items():
        if state["settings"][key] != here:
            raise WavpruneError(
                f"the state is of {key}={state['settings'][key]!r}, this pruner of {here!r}"
            )
    steps = integer("the state's 'steps'", state["steps"])
    asked = integer("the state's 'asked'", state["asked"], -1)
    if asked != steps and (steps, asked) != (0, -1):
        raise WavpruneError(f"the state has {steps} steps, and asked the schedule up to {asked}")
    layers = state["layers"]
    report = None if state["report"] is None else _report(state["report"])
    if bool(layers) != (report is not None):
        raise WavpruneError("the state has masks without a report, or a report without masks")
    if not layers:
        return Progress(steps, asked, [], [], [], None)
    names = [ref.name for ref in refs]
    for what, found in (("layers", list(layers)), ("a report of", [s.name for s in report or ()])):
        if found != names:
            raise WavpruneError(
                f"the state is of {what} {', '.join(map(str, found))}; this model's are "
                f"{', '.join(names)}"
            )
    bases = []
    for ref in refs:
        for key, here in _part(ref).items():
            if layers[ref.name][key] != here:
                raise WavpruneError(
                    f"layer {ref.name!r}: the state is of {key}={layers[ref.name][key]!r}, this "
                    f"pruner of {here!r}"
                )
        bases.append(_basis(layers[ref.name], ref, config))
    plan = projection_plan(refs, config, bases)
    masks = [_mask(layers[layer.name]["mask"], layer) for layer in plan.layers]
    for ref, layer, mask, stats in zip(refs, plan.layers, masks, report or (), strict=True):
        _check_stats(stats, ref, layer, mask)
    checksums = [layers[name].get("checksum") for name in names]
    if not all(value is None or type(value) is int for value in checksums):
        raise WavpruneError("the state's checksums are not integers")
    return Progress(
        steps=steps,
        asked=asked,
        bases=bases,
        masks=[
            mask.to(ref.weight.device, copy=True) for ref, mask in zip(refs, masks, strict=True)
        ],
        checksums=checksums,
        report=report,
    )


def _settings(config: PruneConfig) -> dict[str, Any]:
    settings = {name: getattr(config, name) for name in SETTINGS}
    return {**settings, "by_importance": config.percentile is None}


def _part(ref: LayerRef) -> dict[str, Any]:
    """What a mask is of: the shape of this rank's part, and the output channel it begins with."""
    return {"shape": list(local_part(ref.weight).shape), "channel": first_channel(ref.weight)}


def _basis_state(basis: Basis) -> dict[str, Any]:
    matrix = {"matrix": torch.tensor(basis.analysis)} if basis.data_driven else {}
    return {"basis": basis.name, **matrix}


def _basis(state: dict[str, Any], ref: LayerRef, config: PruneConfig) -> Basis:
    name = state["basis"]
    kernel = (int(ref.weight.shape[-2]), int(ref.weight.shape[-1]))
    if "matrix" in state and name == config.basis_name and family_of(name).data_driven:
        matrix = state["matrix"].detach().cpu().double().numpy()
        request = Request(name, kernel, config.mode, config.level, config.force_level)
        try:
            basis = family_of(name).restore(request, frozen(matrix))
        except WavpruneError as error:
            raise WavpruneError(f"layer {ref.name!r}: {error}") from error
        if not np.abs(matrix @ matrix.T - np.eye(len(matrix))).max() < ORTHONORMAL:
            raise WavpruneError(f"layer {ref.name!r}: the matrix of its basis is not orthonormal")
        return basis
    options = {basis.name: basis for basis in bases_for(config, ref.weight)}
    if name not in options or options[name].data_driven:
        raise WavpruneError(
            f"layer {ref.name!r}: the state is of basis {name!r}"
            f"{'' if name not in options else ' without its matrix'}; allowed: "
            f"{', '.join(options)}"
        )
    return options[name]


def _mask(mask: torch.Tensor, layer: Layer) -> torch.Tensor:
    expected = layer.mask_bytes
    if mask.dtype != torch.uint8 or mask.shape != (expected,) or mask.is_meta:
        raise WavpruneError(
            f"layer {layer.name!r}: its mask has {mask.numel()} values of {mask.dtype} where "
            f"{expected} bytes are due"
        )
    return mask.contiguous()


def _check_stats(stats: LayerStats, ref: LayerRef, layer: Layer, mask: torch.Tensor) -> None:
    if stats.shape != tuple(ref.weight.shape) or not 0 <= stats.kept <= stats.coefficients:
        raise WavpruneError(
            f"layer {ref.name!r}: the report of the state has shape {stats.shape} and "
            f"{stats.kept} of {stats.coefficients} coefficients kept"
        )
    if layer.group is None:
        bits = unpack(mask, layer.num_kernels, layer.num_coefficients, flat=layer.is_flat)
        kept = int(bits.sum())
        if kept != stats.kept:
            raise WavpruneError(
                f"layer {ref.name!r}: its mask keeps {kept} coefficients, and the report of the "
                f"state says {stats.kept}"
            )


def _report(state: dict[str, Any]) -> PruneReport:
    rows = []
    for row in state["layers"]:
        rows.append(_typed(LayerStats, {**row, "shape": tuple(row["shape"])}))
    sums = [state["squared_norm"], state["squared_error"]]
    if not all(type(value) in (int, float) and value >= 0 for value in sums):
        raise WavpruneError(f"the report of the state has sums {sums}; allowed: numbers from 0 on")
    settings = RunSettings.from_dict(state["settings"])
    settings = _typed(RunSettings, dataclasses.asdict(settings))
    return PruneReport(Outcome(tuple(rows), *sums), settings)


def _typed(cls: Any, values: dict[str, Any]) -> Any:
    """A dataclass of these values, each of the type that its field has.

    Raises:
        WavpruneError: one is not.
    """
    for name, expected in typing.get_type_hints(cls).items():
        if name in values and not _fits(values[name], expected):
            raise WavpruneError(
                f"the state is not what state_dict() gave: {name}={values[name]!r} is no {expected}"
            )
    return cls(**values)


def _fits(value: Any, expected: Any) -> bool:
    origin, inner = typing.get_origin(expected), typing.get_args(expected)
    if origin in (typing.Union, types.UnionType):
        return any(_fits(value, option) for option in inner)
    if origin is tuple:
        return isinstance(value, tuple) and all(_fits(entry, inner[0]) for entry in value)
    if origin is dict:
        return isinstance(value, dict) and all(
            _fits(key, inner[0]) and _fits(entry, inner[1]) for key, entry in value.items()
        )
    if expected is float:
        return type(value) in (int, float)
    return type(value) is expected or (expected is type(None) and value is None)
