"""One setting tried on a copy of a model: prune, repair the batch norms, evaluate."""

from __future__ import annotations

import bisect
import copy
import dataclasses
import time
import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import nn

from ..bases.basis import LevelCollapsedWarning
from ..config import PruneConfig
from ..engine.layers import LayerRef, select_layers
from ..engine.run import compute_device, prune_layers, prune_model
from ..report import PruneReport
from .batchnorm import BatchnormStatistics, batchnorm_statistics, match_batchnorm, update_batchnorm
from .inference import check_loader
from .metrics import Evaluation, Predictions, evaluate, predict
from .size import layer_bytes, stored_bytes

REPAIRS = ("off", "update", "match")


@dataclass(frozen=True)
class Reference:
    """What is measured once on the unpruned model, for all trials on it.

    Attributes:
        predictions: its logits and the labels.
        statistics: what its batch norms see; None where they are not matched.
    """

    predictions: Predictions
    statistics: BatchnormStatistics | None

    @classmethod
    def measure(
        cls,
        model: nn.Module,
        loader: Iterable[Any],
        batchnorm: str = "match",
        calibration: Iterable[Any] | None = None,
        device: str | torch.device | None = None,
        progress: bool = False,
    ) -> Reference:
        """Measure the unpruned model.

        Args:
            model: the unpruned model; it is not changed.
            loader: what the trials are evaluated on.
            batchnorm: how the trials repair their batch norms: ``"off"``, ``"update"`` or
                ``"match"``.
            calibration: what they repair them on; None means ``loader``.
            device: where to run; None means where the model lives.
            progress: show progress bars on standard error.

        Raises:
            TypeError, ValueError: as ``predict`` and ``batchnorm_statistics``.
        """
        check_repair(batchnorm)
        data = loader if calibration is None else calibration
        check_loader(data, "loader" if calibration is None else "calibration")
        predictions = predict(model, loader, device, progress)
        if batchnorm != "match":
            return cls(predictions, None)
        return cls(predictions, batchnorm_statistics(model, data, device, progress))


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting tried on a copy of a model.

    Attributes:
        config: what was pruned, as it ran; None for the unpruned model.
        report: what the pruning did; None for the unpruned model.
        evaluation: what the pruned model is worth.
        batchnorm: how its batch norms were repaired: ``"off"``, ``"update"`` or ``"match"``.
        matched: what it shares with the others: ``"kept"``, the count that its sparsity or another
            trial's report asks for; ``"bytes"``, the size of a file; or an empty string.
        prune_seconds: wall time of pruning.
        repair_seconds: wall time of the repair of the batch norms.
        evaluate_seconds: wall time of the evaluation.
        model: the pruned copy; None where it was let go.
    """

    config: PruneConfig | None
    report: PruneReport | None
    evaluation: Evaluation
    batchnorm: str
    matched: str
    prune_seconds: float
    repair_seconds: float
    evaluate_seconds: float
    model: nn.Module | None = field(repr=False)

    @property
    def method(self) -> str:
        """``"dwt"``, ``"min_weight"``, ``"random"``, or ``"none"`` for the unpruned model."""
        return "none" if self.config is None else self.config.method

    @property
    def basis(self) -> str:
        """What a table calls it: the wavelet, or the method where there is none."""
        if self.config is None:
            return "unpruned"
        if self.config.method != "dwt":
            return self.config.method
        return self.config.wavelet

    def row(self) -> dict[str, Any]:
        """Settings, measures, totals and times by name: numbers, strings and None.

        Settings that the method does not read are None. ``sparsity_requested`` is what was asked
        for, ``sparsity`` what came of it.
        """
        config = self.config
        dwt = config is not None and config.method == "dwt"
        settings = {
            "method": self.method,
            "wavelet": config.wavelet if config and dwt else None,
            "mode": config.mode if config and dwt else None,
            "level": config.level if config and dwt else None,
            "sparsity_requested": config.sparsity if config else None,
            "percentile": config.percentile if config else None,
            "scope": config.scope if config else None,
            "seed": config.seed if config and config.method == "random" else None,
            "batchnorm": self.batchnorm,
            "matched": self.matched,
        }
        measures = self.evaluation.to_dict()
        del measures["confusion"]
        report = self.report
        totals = {
            "numel": report.numel if report else None,
            "kept": report.kept if report else None,
            "weight_zeros": report.weight_zeros if report else None,
            "relative_error": report.relative_error if report else None,
        }
        times = ("prune_seconds", "repair_seconds", "evaluate_seconds")
        return {**settings, **measures, **totals, **{name: getattr(self, name) for name in times}}


def run_trial(
    model: nn.Module,
    loader: Iterable[Any],
    config: PruneConfig | None,
    *,
    batchnorm: str = "match",
    calibration: Iterable[Any] | None = None,
    reference: Reference | None = None,
    match: PruneReport | int | None = None,
    timing: bool = True,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Trial:
    """Prune a copy of a model, repair its batch norms and evaluate it.

    Args:
        model: the unpruned model; it is not changed.
        loader: what to evaluate on; see ``evaluate``.
        config: what to prune; None tries the unpruned model, whose batch norms need no repair.
        batchnorm: ``"match"`` (``match_batchnorm``), ``"update"`` (``update_batchnorm``) or
            ``"off"``.
        calibration: batches to repair the batch norms on; None means those of ``loader``.
        reference: ``Reference.measure`` on the same model and loaders, so that many trials share
            it; None measures it here.
        match: in place of the config's sparsity: a report, to prune as much (min-weight, random),
            or a number of bytes, to keep as much as a file of that size can hold.
        timing: measure the time of the forward passes.
        device: where to run; None means where the model lives.
        progress: show progress bars on standard error.

    Returns:
        The trial, with the pruned copy.

    Raises:
        TypeError, ValueError: as ``fast.prune``, ``match_batchnorm`` and ``evaluate``; or no
            sparsity makes the file small enough.
        ImportError: torchmetrics is not installed.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        >>> data = [(torch.randn(64, 1, 4, 4), torch.arange(64) % 16)]
        >>> trial = run_trial(net, data, PruneConfig(sparsity=0.5), timing=False)
        >>> trial.report.kept, trial.evaluation.samples
        (18, 64)
    """
    check_repair(batchnorm)
    if config is None and match is not None:
        raise ValueError("match goes with a config; the unpruned model is pruned to match nothing")
    place = compute_device(device)
    if reference is None:
        reference = Reference.measure(model, loader, batchnorm, calibration, place, progress)
    if config is not None and batchnorm == "match" and reference.statistics is None:
        raise ValueError("reference: it was measured without statistics of batch norms to match")
    pruned = copy.deepcopy(model).to(place)
    budget, source = (match, None) if isinstance(match, int) else (None, match)
    if config is not None and budget is not None:
        fitted = fitting(pruned, config, budget)
        if fitted is None:
            raise ValueError(
                f"match: {config.method} {config.wavelet} does not fit into {budget} bytes at any "
                "sparsity: the masks alone are larger"
            )
        config = fitted
    report = None
    times = [time.perf_counter()]
    if config is not None:
        report = prune_model(pruned, config, source)
    times.append(time.perf_counter())
    if config is not None:
        _repair(pruned, batchnorm, reference, loader if calibration is None else calibration)
    times.append(time.perf_counter())
    found = evaluate(
        pruned, loader, reference.predictions, report, timing=timing, progress=progress
    )
    times.append(time.perf_counter())
    prune_seconds, repair_seconds, evaluate_seconds = (
        after - before for before, after in pairwise(times)
    )
    return Trial(
        config=config,
        report=report,
        evaluation=found,
        batchnorm="off" if config is None else batchnorm,
        matched=_matched(config, match),
        prune_seconds=prune_seconds,
        repair_seconds=repair_seconds,
        evaluate_seconds=evaluate_seconds,
        model=pruned,
    )


def check_repair(batchnorm: object) -> None:
    """Raise ValueError unless ``batchnorm`` is one of ``REPAIRS``."""
    if batchnorm not in REPAIRS:
        raise ValueError(f"unknown batchnorm {batchnorm!r}; allowed: {', '.join(REPAIRS)}")


def _repair(
    model: nn.Module, batchnorm: str, reference: Reference, calibration: Iterable[Any]
) -> None:
    if batchnorm == "update":
        update_batchnorm(model, calibration)
    elif batchnorm == "match":
        assert reference.statistics is not None
        match_batchnorm(model, reference.statistics, calibration)


def _matched(config: PruneConfig | None, match: PruneReport | int | None) -> str:
    if isinstance(match, int):
        return "bytes"
    return "kept" if match is not None or (config and config.sparsity is not None) else ""


def fitting(model: nn.Module, config: PruneConfig, budget: int) -> PruneConfig | None:
    """The settings with the smallest sparsity at which the model's file fits; None: there is none.

    Only copies of the weights are pruned.
    """
    refs = select_layers(model, config)
    sizes = {ref.name: ref.weight.element_size() for ref in refs}
    numel = sum(ref.weight.numel() for ref in refs)
    dense = sum(ref.weight.numel() * ref.weight.element_size() for ref in refs)
    others = stored_bytes(model) - dense

    def at(kept: int) -> PruneConfig:
        return dataclasses.replace(config, percentile=None, sparsity=(numel - kept) / numel)

    def size(kept: int) -> int:
        copies = [LayerRef(ref.name, ref.weight.detach().clone()) for ref in refs]
        report = prune_layers(copies, at(kept))
        return others + sum(layer_bytes(stats, sizes[stats.name]) for stats in report)

    with warnings.catch_warnings():
        # The trial itself says so.
        warnings.simplefilter("ignore", LevelCollapsedWarning)
        after = bisect.bisect_right(range(1, numel + 1), budget, key=size)
    return at(after) if after else None
