"""Pruning from calibration data, from settings to a report."""

from __future__ import annotations

import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import nn

from ..backends.masks import pack
from ..common.checks import choice
from ..common.progress import progress_bar
from ..config import RULES, PruneConfig
from ..engine.ambient import neutral
from ..engine.layers import LayerRef
from ..engine.patterns import Pattern
from ..engine.plan import Plan, plan_model
from ..engine.running import running, write_all
from ..errors import WavpruneError
from ..report import PruneReport
from .collect import calibrate
from .collected import Calibration
from .outcome import BACKEND, report_of
from .problem import Problem, is_solvable
from .run import LEVELS, Run

DEFAULT_LEVEL = "full"


def prune_calibrated(
    model: nn.Module,
    config: PruneConfig,
    calibration: Calibration | Iterable[Any],
    level: str = DEFAULT_LEVEL,
    progress: bool = False,
) -> PruneReport:
    """Prune a model's selected layers in place, from data; see ``wavprune.fast.prune``."""
    choice("calibration_level", level, LEVELS)
    check_config(config)
    if not isinstance(calibration, Calibration):
        calibration = calibrate(
            model,
            calibration,
            targets=config.targets,
            ignore=config.ignore,
            device=config.device,
            seed=config.seed,
            progress=progress,
        )
    refs, plan = plan_model(model, config)
    _check_bases(plan, refs)
    calibration.check(refs)
    plan.warn()
    start = time.perf_counter()
    homes = [ref.weight.device for ref in refs]
    with neutral(ref.weight for ref in refs), running(model, config.device) as home:
        run = Run(model, refs, plan, calibration.to(home), level)
        with progress_bar("prune", run.steps, "candidates", progress) as advance:
            chosen, verdict = run.choose(advance)
        report = report_of(
            plan,
            refs,
            run.choices,
            [int(chosen.masks[ref.name].sum()) for ref in refs],
            [
                pack_mask(run.problems[ref.name], chosen.masks[ref.name]).to(device)
                for ref, device in zip(refs, homes, strict=True)
            ],
            [chosen.values.weights[ref.name] for ref in refs],
            time.perf_counter() - start,
            run.decision(chosen, verdict),
        )
        changes = run.changes(chosen)
    write_all(changes)
    return report


def pack_mask(problem: Problem, mask: torch.Tensor) -> torch.Tensor:
    """A mask as a report holds it."""
    return pack(problem.mask(mask), flat=problem.layer.is_flat)


def takes_calibration(config: PruneConfig) -> bool:
    """True where what is kept can follow from data: by a basis, by values, or in a pattern."""
    return config.method in ("dwt", "min_weight") or isinstance(RULES[config.method], Pattern)


def check_config(config: PruneConfig) -> None:
    """Raise WavpruneError where settings do not go with calibration data."""
    if not takes_calibration(config):
        raise WavpruneError(
            f"calibration does not go with method={config.method!r}; allowed: 'dwt', "
            "'min_weight', or a pattern"
        )
    if config.backend not in ("auto", BACKEND):
        raise WavpruneError(
            f"backend={config.backend!r} does not prune from calibration data; allowed: 'auto', "
            f"{BACKEND!r}"
        )
    if config.percentile is not None:
        raise WavpruneError(
            f"percentile={config.percentile!r} ranks magnitudes, which calibration does not; give "
            "sparsity"
        )


def _check_bases(plan: Plan, refs: Sequence[LayerRef]) -> None:
    """Raise where the coefficients of a layer cannot be solved for row by row."""
    for ref, options in zip(refs, plan.options, strict=True):
        if any(is_solvable(ref, layer) for layer in options):
            continue
        basis = options[0].basis
        size = "x".join(map(str, basis.kernel))
        raise WavpruneError(
            f"layer {ref.name!r}: its weight has kernels of {size} in the basis {basis.name!r}, "
            "whose coefficients cannot be solved for row by row; allowed with calibration: "
            "convolutions with kernels of at most 1024 values, Linear layers in "
            f"wavelet='identity' or 'auto'; or leave it out by ignore={[ref.name]!r}"
        )
