"""Methods and bases side by side, on copies of one model: the same data, kept counts and repair."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .._version import versions
from ..backends import check_name
from ..calibration.collect import calibrate
from ..calibration.prune import takes_calibration
from ..calibration.run import LEVELS
from ..common.checks import choice, fraction
from ..common.clock import timed
from ..common.memory import kept_memory
from ..common.progress import progress_bar
from ..config import METHODS, PruneConfig
from ..engine.device import compute_device
from ..engine.layers import select_layers
from ..engine.rules import rule_for
from ..engine.running import copy_of
from ..errors import WavpruneError
from ..graph import as_module
from .comparison import Comparison
from .measure import measure_of
from .size import basis_values
from .trial import DenseReference, Trial, check_repair, fitting, run_trial
from .unlabelled import answered, has_labels

if TYPE_CHECKING:
    from onnx import ModelProto


def compare(
    model: nn.Module | ModelProto,
    loader: Iterable[Any],
    *,
    sparsities: Sequence[float] = (0.5, 0.7, 0.8, 0.9, 0.95),
    wavelets: Sequence[str] = ("uhaar", "haar", "dct", "auto"),
    methods: Sequence[str] = METHODS,
    level: int | None = None,
    mode: str = "periodization",
    force_level: bool = False,
    scope: str = "global",
    batchnorm: str = "match",
    calibration: Iterable[Any] | None = None,
    calibrated: Sequence[str] = (),
    seeds: Sequence[int] = (0, 1, 2),
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    device: str | torch.device | None = None,
    backend: str = "auto",
    timing: bool = False,
    progress: bool = False,
    metric: object = None,
) -> Comparison:
    """Prune copies of a model by every method and basis, and evaluate each.

    At each sparsity all methods keep the same count of values, except that values which tie at the
    threshold are all kept. A basis that is expansive, or that a file must store, needs more bytes
    for this count: it is tried once more with as many values as fit into the bytes of min-weight.

    Args:
        model: the unpruned model, or an ``onnx.ModelProto``; it is not changed.
        loader: what to evaluate on; see ``evaluate``. The same batches in the same order every
            time. Without labels, how far the copies agree with the model is measured in place of
            accuracy: of a classifier the share of inputs that get the same class, of any other
            network the relative change of its output.
        sparsities: pruned fractions relative to the weights, each in [0, 1).
        wavelets: the bases for ``"dwt"``: any that ``fast.prune`` takes as ``wavelet``.
        methods: any of ``"dwt"``, ``"min_weight"``, ``"random"``.
        level: levels of the transforms; None means the deepest that exists.
        mode: PyWavelets' boundary mode.
        force_level: use ``level`` even where PyWavelets calls it too deep for a kernel.
        scope: ``"global"`` ranks all layers together, ``"layer"`` each by itself.
        batchnorm: the repair of the copies: ``"match"`` (``match_batchnorm``, and of an ONNX graph
            ``match_biases``), ``"update"`` (``update_batchnorm``) or ``"off"``.
        calibration: batches to repair them on, and to prune from where ``calibrated`` says so;
            None means those of ``loader``, without labels.
        calibrated: any of ``"refit"``, ``"select"`` and ``"full"``: a row more for each basis and
            for min-weight, pruned from the calibration data at that level.
        seeds: the seeds of random pruning; the table shows their mean and range.
        targets: names, globs or ``"re:..."`` patterns of the layers to prune.
        ignore: names, globs or patterns of layers to leave as they are.
        device: where to prune and run; None means where the model lives.
        backend: ``"auto"`` or a name from ``wavprune.backends.names()``.
        timing: measure the time of the forward passes of every trial.
        progress: show a progress bar on standard error.
        metric: what to measure them by; see ``evaluate``. None takes the model for a classifier.

    Returns:
        All trials, without their pruned copies.

    Raises:
        TypeError, WavpruneError: an argument is not allowed, before anything has run; or as
            ``fast.prune`` and ``evaluate``.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        >>> data = [(torch.randn(64, 1, 4, 4), torch.arange(64) % 16)]
        >>> result = compare(net, data, sparsities=[0.5], wavelets=["uhaar", "dct"], seeds=[0])
        >>> [(trial.basis, trial.report.kept) for trial in result]
        [('uhaar', 18), ('dct', 18), ('min_weight', 18), ('random', 18)]
    """
    check_repair(batchnorm)
    check_name(backend)
    measure = measure_of(metric)
    levels = tuple(choice("calibrated", level_, LEVELS) for level_ in calibrated)
    grid = _Grid(
        sparsities=tuple(
            fraction("sparsity", value) for value in _checked_list("sparsities", sparsities)
        ),
        wavelets=_checked_list("wavelets", wavelets),
        methods=_checked_list("methods", methods),
        seeds=_checked_list("seeds", seeds),
        shared={
            "level": level,
            "mode": mode,
            "force_level": force_level,
            "scope": scope,
            "targets": targets,
            "ignore": ignore,
            "backend": backend,
        },
    )
    plan = grid.plan()
    model = as_module(model)
    select_layers(model, plan[0][0])
    run_device = compute_device(device)
    with kept_memory():
        base = model if run_device is None else copy_of(model, run_device)
        labels = measure is not None or has_labels(loader)
        if not labels:
            loader, measure = answered(base, loader, progress=progress)
        reference = DenseReference.measure(
            base, loader, batchnorm, calibration, progress=progress, metric=measure
        )
        trial = partial(
            run_trial,
            base,
            loader,
            batchnorm=batchnorm,
            calibration=calibration,
            reference=reference,
            timing=timing,
            metric=measure,
        )
        unpruned = trial(None).evaluation
        if levels:
            data = loader if calibration is None else calibration
            collected = calibrate(base, data, targets=targets, ignore=ignore)
            trial = partial(trial, collected=collected)
        trials, notes = _run(base, plan, trial, levels, progress)
    settings = {
        **grid.settings(),
        "batchnorm": batchnorm,
        "calibrated": list(levels),
        "labels": labels,
        "device": None if device is None else str(device),
        "versions": dict(versions()),
    }
    return Comparison(unpruned, tuple(trials), settings, tuple(notes))


@dataclass(frozen=True, slots=True)
class _Grid:
    """All settings to try.

    Attributes:
        sparsities, wavelets, methods, seeds: as ``compare`` takes them.
        shared: the settings of ``PruneConfig`` that all trials have in common.
    """

    sparsities: tuple[float, ...]
    wavelets: tuple[str, ...]
    methods: tuple[str, ...]
    seeds: tuple[int, ...]
    shared: dict[str, Any]

    def plan(self) -> list[list[PruneConfig]]:
        """The configs of each sparsity, ascending, every one checked."""
        return [
            [
                PruneConfig(method=method, sparsity=sparsity, **variant, **self.shared)
                for method in self.methods
                for variant in self._variants(method)
            ]
            for sparsity in sorted(set(self.sparsities))
        ]

    def settings(self) -> dict[str, Any]:
        """What was asked for, ready for JSON."""
        lists = ("sparsities", "wavelets", "methods", "seeds")
        return {**{name: list(getattr(self, name)) for name in lists}, **self.shared}

    def _variants(self, method: str) -> list[dict[str, Any]]:
        rule = rule_for(PruneConfig(method=method))
        bases = [{"wavelet": name} for name in self.wavelets] if rule.basis is None else [{}]
        draws = [{"seed": seed} for seed in self.seeds] if rule.uses_seed else [{}]
        return [{**basis, **draw} for basis in bases for draw in draws]


def _run(
    model: nn.Module,
    plan: Sequence[Sequence[PruneConfig]],
    trial: Callable[..., Trial],
    levels: Sequence[str],
    progress: bool,
) -> tuple[list[Trial], list[str]]:
    """Every trial of a plan, those at equal bytes after the others of their sparsity, and notes."""
    trials: list[Trial] = []
    notes: list[str] = []
    with progress_bar("compare", sum(map(len, plan)), "trials", progress) as advance:
        for configs in plan:
            equal_kept = []
            for config in configs:
                equal_kept.append(dataclasses.replace(trial(config), model=None))
                advance(1)
            trials += equal_kept
            for config in configs:
                for level in levels if takes_calibration(config) else ():
                    done = trial(config, calibrated=level)
                    trials.append(dataclasses.replace(done, model=None))
            budget = next(
                (t.evaluation.stored_bytes for t in equal_kept if t.method == "min_weight"), None
            )
            for config, done in zip(configs, equal_kept, strict=True):
                if budget is None or not _needs_more_bytes(done):
                    continue
                with timed("pruning"):
                    fitted = fitting(model, config, budget)
                if fitted is None:
                    notes.append(
                        f"At {config.sparsity:.2%}, the masks of {done.basis} alone are larger "
                        "than min-weight's file."
                    )
                    continue
                trials.append(dataclasses.replace(trial(fitted), model=None, matched="bytes"))
    return trials, notes


def _needs_more_bytes(trial: Trial) -> bool:
    """Whether its basis needs more bytes than min-weight for the same kept count."""
    report = trial.report
    return report is not None and any(
        layer.coefficients > layer.numel or basis_values(report, layer) > 0 for layer in report
    )


def _checked_list(name: str, values: object) -> tuple[Any, ...]:
    if isinstance(values, str) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a list, not {values!r}")
    result = tuple(values)
    if not result:
        raise WavpruneError(f"{name} is empty; it must hold at least one")
    return result
