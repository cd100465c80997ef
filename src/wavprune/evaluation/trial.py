"""One setting tried on a copy of a model: prune, repair the batch norms, evaluate."""

from __future__ import annotations

import bisect
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from ..bases import LevelCollapsedWarning
from ..calibration.collected import Calibration
from ..calibration.prune import prune_calibrated
from ..calibration.run import LEVELS
from ..common.checks import choice
from ..common.clock import Clock, Part, timed
from ..common.loaders import check_loader, inputs_and_labels, inputs_of
from ..config import PruneConfig
from ..engine.ambient import autocast_enabled
from ..engine.coverage import coverage_of
from ..engine.device import compute_device
from ..engine.layers import LayerRef, select_layers
from ..engine.rules import rule_for
from ..engine.run import prune_layers, prune_model
from ..engine.running import copy_of
from ..errors import WavpruneError
from ..graph import GraphModule
from ..report import PruneReport
from .answers import Answers, answers_of
from .batchnorm import BatchnormStatistics, batchnorm_statistics, match_and_run, update_batchnorm
from .biases import match_biases
from .measure import measure_of
from .metrics import Evaluation, evaluate, measured
from .predictions import Predictions, batch_predictions
from .size import layer_bytes, stored_bytes

REPAIRS = ("off", "update", "match")
# Biases are matched on as many inputs, which run as one batch.
BIAS_INPUTS = 128


@dataclass(frozen=True)
class DenseReference:
    """The unpruned model, measured once for all trials on it.

    Attributes:
        predictions: its logits and the labels, or what it was measured at by another metric.
        statistics: the inputs of its batch norms; None where they are not matched.
    """

    predictions: Predictions | Answers
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
        metric: object = None,
    ) -> DenseReference:
        """Measure the unpruned model.

        Args:
            model: the unpruned model; it is not changed.
            loader: what the trials are evaluated on.
            batchnorm: how the trials repair their batch norms: ``"off"``, ``"update"`` or
                ``"match"``.
            calibration: what they repair them on; None means ``loader``.
            device: where to run; None means where the model lives.
            progress: show progress bars on standard error.
            metric: what the trials are measured by; see ``evaluate``.

        Raises:
            TypeError, WavpruneError: as ``evaluate`` and ``batchnorm_statistics``.
        """
        check_repair(batchnorm)
        measure = measure_of(metric)
        data = loader if calibration is None else calibration
        check_loader(data, "loader" if calibration is None else "calibration")
        predictions = answers_of(model, loader, measure, device, progress)
        if batchnorm != "match":
            return cls(predictions, None)
        return cls(predictions, batchnorm_statistics(model, data, device, progress))


@dataclass(frozen=True, slots=True)
class Trial:
    """One setting tried on a copy of a model.

    Attributes:
        config: what was pruned, as it ran; None for the unpruned model.
        report: the report of the pruning; None for the unpruned model.
        evaluation: the measures of the pruned model.
        batchnorm: how its batch norms were repaired: ``"off"``, ``"update"`` or ``"match"``.
        matched: what it has in common with other trials: ``"kept"``, the kept count that its
            sparsity or another trial's report asks for; ``"bytes"``, the size of a file; or an
            empty string.
        prune_seconds: wall time of pruning.
        repair_seconds: wall time of the repair of the batch norms.
        finish_seconds: wall time of what was done between repair and evaluation, such as training
            and storing.
        evaluate_seconds: wall time of the evaluation. A forward pass that serves both, on data that
            is calibration and test at once, counts here.
        model: the pruned copy; None where it was not kept.
        calibrated: the level of ``fast.prune``'s ``calibration_level``, where it was pruned from
            calibration data; else an empty string. Batch norms were then repaired by that.
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
    calibrated: str = ""
    finish_seconds: float = 0.0

    @property
    def method(self) -> str:
        """``"dwt"``, ``"min_weight"``, ``"random"``, or ``"none"`` for the unpruned model."""
        return "none" if self.config is None else self.config.method

    @property
    def basis(self) -> str:
        """Its name in a table: the wavelet of ``"dwt"``, else the method, and the calibration."""
        config = self.config
        if config is None:
            return "unpruned"
        name = config.method
        if _uses_wavelet(config):
            name = config.wavelet if name == "dwt" else f"{name} {config.wavelet}"
        return f"{name}, calibrated: {self.calibrated}" if self.calibrated else name

    def row(self) -> dict[str, Any]:
        """Settings, measures, totals and times by name: numbers, strings and None.

        Settings that do not apply to the method are None. ``sparsity_requested`` is what was asked
        for, ``sparsity`` what was reached.
        """
        measures = self.evaluation.to_dict()
        del measures["confusion"]
        totals = ("numel", "kept", "weight_zeros", "relative_error")
        times = ("prune_seconds", "repair_seconds", "finish_seconds", "evaluate_seconds")
        return {
            **_settings(self.config),
            "batchnorm": self.batchnorm,
            "calibrated": self.calibrated,
            "matched": self.matched,
            **measures,
            **{name: getattr(self.report, name) if self.report else None for name in totals},
            **{name: getattr(self, name) for name in times},
        }


def run_trial(
    model: nn.Module,
    loader: Iterable[Any],
    config: PruneConfig | None,
    *,
    batchnorm: str = "match",
    calibration: Iterable[Any] | None = None,
    reference: DenseReference | None = None,
    match: PruneReport | int | None = None,
    calibrated: str = "",
    collected: Calibration | None = None,
    timing: bool = True,
    device: str | torch.device | None = None,
    progress: bool = False,
    metric: object = None,
    finish: Callable[[nn.Module, PruneReport], None] | None = None,
) -> Trial:
    """Prune a copy of a model, repair its batch norms and evaluate it.

    Args:
        model: the unpruned model; it is not changed.
        loader: what to evaluate on; see ``evaluate``.
        config: what to prune; None tries the unpruned model, whose batch norms need no repair.
        batchnorm: ``"match"`` (``match_batchnorm``, and ``match_biases`` of an ONNX graph, into
            whose layers batch norms are folded), ``"update"`` (``update_batchnorm``) or ``"off"``.
        calibration: batches to repair the batch norms on; None means those of ``loader``.
        reference: ``DenseReference.measure`` on the same model and loaders, shared by many trials;
            None measures it here. What it predicted is what the unpruned model predicts.
        match: in place of the config's sparsity: a report, to prune as much (min-weight, random),
            or a number of bytes, to keep as much as a file of that size can hold.
        calibrated: a level of ``fast.prune``'s ``calibration_level``, to prune from calibration
            data, which repairs the batch norms too.
        collected: ``wavprune.calibrate`` of this model, shared by many trials; None collects it
            here, from ``calibration`` or ``loader``.
        timing: measure the time of the forward passes.
        device: where to run; None means where the model lives.
        progress: show progress bars on standard error.
        metric: what to measure it by; see ``evaluate``. A ``reference`` must have the same.
        finish: called with the pruned copy and its report after the repair, to train or to store
            it; what it leaves is evaluated.

    Returns:
        The trial, with the pruned copy.

    Raises:
        TypeError, WavpruneError: as ``fast.prune``, ``match_batchnorm`` and ``evaluate``; or no
            sparsity makes the file small enough.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        >>> data = [(torch.randn(64, 1, 4, 4), torch.arange(64) % 16)]
        >>> trial = run_trial(net, data, PruneConfig(sparsity=0.5), timing=False)
        >>> trial.report.kept, trial.evaluation.samples
        (18, 64)
    """
    check_repair(batchnorm)
    if config is None and match is not None:
        raise WavpruneError("match needs a config; the unpruned model has nothing to match")
    if calibrated:
        choice("calibrated", calibrated, LEVELS)
        if config is None or match is not None:
            raise WavpruneError(
                f"calibrated={calibrated!r} needs a config, and does not go with match"
            )
    measure = measure_of(metric)
    run_device = compute_device(device)
    if reference is None:
        reference = DenseReference.measure(
            model, loader, batchnorm, calibration, run_device, progress, measure
        )
    if config is not None and batchnorm == "match" and reference.statistics is None:
        raise WavpruneError(
            "reference: it was measured without the statistics that batchnorm='match' needs"
        )
    data = loader if calibration is None else calibration
    copied = copy_of(model, run_device)
    report: PruneReport | None = None
    with timed("pruning"):
        if config is not None and isinstance(match, int):
            config = _fitted(copied, config, match)
        start = time.perf_counter()
        if config is not None and calibrated:
            report = prune_calibrated(copied, config, collected or data, calibrated)
        elif config is not None:
            source = None if isinstance(match, int) else match
            if finish is None:
                report = prune_model(copied, config, source).wait()
            else:
                layers = select_layers(copied, config)
                report = prune_layers(layers, config, source, masks=True).wait()
                report.coverage = coverage_of(copied, layers)
    pruned = time.perf_counter()
    # The unpruned model has answered already.
    answers = reference.predictions if config is None and not timing else None
    with Clock.running() as clock:
        if config is not None and not calibrated:
            wanted = data is loader and not timing and measure is None and finish is None
            answers = _repair(copied, model, batchnorm, reference, data, wanted)
    repaired = time.perf_counter()
    if finish is not None and report is not None:
        finish(copied, report.wait())
    finished = time.perf_counter()
    if answers is None:
        evaluation = evaluate(
            *(copied, loader, reference.predictions, report),
            timing=timing,
            progress=progress,
            metric=measure,
        )
    else:
        num_bytes = stored_bytes(copied, report)
        evaluation = measured(copied, answers, reference.predictions, report, num_bytes)
    evaluated = time.perf_counter()
    # Forward passes that served both count as the evaluation's.
    shared = clock.seconds.get("forward", 0.0)
    return Trial(
        config=config,
        report=report,
        evaluation=evaluation,
        batchnorm="off" if config is None or calibrated else batchnorm,
        matched=_matched(config, match),
        prune_seconds=pruned - start,
        repair_seconds=repaired - pruned - shared,
        evaluate_seconds=evaluated - finished + shared,
        model=copied,
        calibrated=calibrated,
        finish_seconds=finished - repaired,
    )


def check_repair(batchnorm: object) -> None:
    """Raise unless ``batchnorm`` is one of ``REPAIRS``.

    Raises:
        TypeError: it is not a string.
        WavpruneError: it is another string.
    """
    choice("batchnorm", batchnorm, REPAIRS)


def fitting(model: nn.Module, config: PruneConfig, budget: int) -> PruneConfig | None:
    """The settings with the smallest sparsity at which the model's file fits.

    Only copies of the weights are pruned.

    Args:
        model: the unpruned model.
        config: what to prune; its sparsity or percentile is replaced.
        budget: bytes.

    Returns:
        The settings; None where the file does not fit at any sparsity.
    """
    refs = select_layers(model, config)
    itemsizes = {ref.name: ref.weight.element_size() for ref in refs}
    numel = sum(ref.weight.numel() for ref in refs)
    dense_bytes = sum(ref.weight.numel() * ref.weight.element_size() for ref in refs)
    other_bytes = stored_bytes(model) - dense_bytes

    def keeping(kept: int) -> PruneConfig:
        return dataclasses.replace(config, percentile=None, sparsity=(numel - kept) / numel)

    def size(kept: int) -> int:
        copies = [LayerRef(ref.name, ref.weight.detach().clone()) for ref in refs]
        report = prune_layers(copies, keeping(kept))
        return other_bytes + sum(
            layer_bytes(report, stats, itemsizes[stats.name]) for stats in report
        )

    with warnings.catch_warnings():
        # The trial itself warns.
        warnings.simplefilter("ignore", LevelCollapsedWarning)
        kept = bisect.bisect_right(range(1, numel + 1), budget, key=size)
    return keeping(kept) if kept else None


def _fitted(model: nn.Module, config: PruneConfig, budget: int) -> PruneConfig:
    fitted = fitting(model, config, budget)
    if fitted is None:
        raise WavpruneError(
            f"match: {config.method} {config.wavelet} does not fit into {budget} bytes at any "
            "sparsity: the masks alone are larger"
        )
    return fitted


def _repair(
    model: nn.Module,
    unpruned: nn.Module,
    batchnorm: str,
    reference: DenseReference,
    calibration: Iterable[Any],
    wanted: bool,
) -> Predictions | None:
    """Repair the batch norms; what the model predicts then, if it is wanted and known already."""
    if batchnorm == "update":
        with timed("matching"):
            update_batchnorm(model, calibration)
    elif batchnorm == "match":
        statistics = reference.statistics
        assert statistics is not None
        if isinstance(model, GraphModule):
            # Exporters fold batch norms into layers, whose biases then take up what pruning shifts.
            with timed("matching"):
                match_biases(model, unpruned, _first(calibration, BIAS_INPUTS))
        # The repair does not see autocast, which the evaluation does.
        at_once = wanted and len(statistics.batches) == 1 and not autocast_enabled()
        part: Part = "forward" if at_once else "matching"
        with timed("moments"):
            result = match_and_run(model, statistics, calibration, part=part)
        if at_once and result is not None:
            output, batches = result
            with timed("forward"):
                labels = [inputs_and_labels(batch)[1] for batch in batches]
                return batch_predictions(output, torch.cat(labels))
    return None


def _first(loader: Iterable[Any], count: int) -> list[torch.Tensor]:
    """The first inputs of a loader, in batches."""
    inputs: list[torch.Tensor] = []
    for batch in loader:
        inputs.append(inputs_of(batch)[:count])
        count -= len(inputs[-1])
        if count == 0:
            break
    return inputs


def _matched(config: PruneConfig | None, match: PruneReport | int | None) -> str:
    if isinstance(match, int):
        return "bytes"
    return "kept" if match is not None or (config and config.sparsity is not None) else ""


def _uses_wavelet(config: PruneConfig) -> bool:
    return rule_for(config).basis is None


def _settings(config: PruneConfig | None) -> dict[str, Any]:
    """The settings of a row; None for those that do not apply."""
    if config is None:
        names = ("wavelet", "mode", "level", "sparsity_requested", "percentile", "scope", "seed")
        return {"method": "none", **dict.fromkeys(names)}
    transform = _uses_wavelet(config)
    return {
        "method": config.method,
        "wavelet": config.wavelet if transform else None,
        "mode": config.mode if transform else None,
        "level": config.level if transform else None,
        "sparsity_requested": config.sparsity,
        "percentile": config.percentile,
        "scope": config.scope,
        "seed": config.seed if rule_for(config).uses_seed else None,
    }
