"""The runs of a sweep: every combination of its grid, each with an id.

A run's id is a hash of everything that its result depends on. So a sweep that is started again, or
another sweep that contains the same run, finds the result that is there.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from ..backends.registry import check_name
from ..calibration.prune import check_config, takes_calibration
from ..config import PruneConfig
from ..errors import WavpruneError
from .sources import Data, MetricSource, Model, Training
from .traits import reads_wavelet, unread_settings, uses_seed

if TYPE_CHECKING:
    from .settings import Grid, Sweep

# The namespace of the runs' ids. With another one, every run would get another id.
NAMESPACE = uuid.UUID("6f1f3f0e-5b0e-5c6f-9a53-7d1f6c1f7a11")


class Storage(NamedTuple):
    """How a pruned network is stored: one of these, as ``checkpoint.save`` takes them."""

    bits: int | None = None
    target_kl: float | None = None
    target_bits_per_weight: float | None = None

    @property
    def label(self) -> str:
        """What it is, in a few words."""
        if self.bits is not None:
            return f"{self.bits} bits"
        if self.target_kl is not None:
            return f"KL {self.target_kl:g}"
        return f"{self.target_bits_per_weight:g} bits per weight"


class Pruning(NamedTuple):
    """What is done to a network; see ``Run``."""

    config: PruneConfig
    match: PruneConfig | None
    matched: str
    calibrated: str
    epochs: int = 0
    storage: Storage | None = None


# The keys of a grid that are settings of PruneConfig, in the order in which they vary: the last
# one fastest.
AXES = (
    "targets",
    "ignore",
    "scope",
    "sparsity",
    "percentile",
    "method",
    "wavelet",
    "mode",
    "level",
    "force_level",
    "seed",
)


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a sweep.

    Attributes:
        sweep: the name of the sweep.
        model: the model.
        data: what accuracy is measured on.
        calibration: what the batch norms are repaired with, and what calibrated runs are pruned
            from; None means the inputs of ``data``.
        batch_size: samples per batch.
        batchnorm: how the batch norms are repaired.
        timing: whether inference times are measured.
        device: where to prune and to evaluate.
        config: what to prune; None leaves the model unpruned.
        match: settings of another run, which this one is matched to; None means none.
        matched: what the two have in common: ``"kept"``, ``"bytes"``, or an empty string where
            ``match`` is None.
        calibrated: the level of ``fast.prune``'s ``calibration_level``, or an empty string.
        epochs: passes over the training data after pruning.
        storage: how it is stored before it is evaluated; None evaluates it as it was pruned.
        training: how it is trained; None where ``epochs`` is 0.
        metric: what it is measured by; None takes it for a classifier.
    """

    sweep: str
    model: Model
    data: Data
    calibration: Data | None
    batch_size: int
    batchnorm: str
    timing: bool
    device: str | None
    config: PruneConfig | None
    match: PruneConfig | None = None
    matched: str = ""
    calibrated: str = ""
    epochs: int = 0
    storage: Storage | None = None
    training: Training | None = None
    metric: MetricSource | None = None

    @property
    def label(self) -> str:
        """What the run is, in a few words."""
        if self.config is None:
            return f"{self.model.label}: unpruned"
        config = self.config
        basis = f" {config.wavelet}" if reads_wavelet(config) else ""
        amount = (
            f"percentile {config.percentile:g}"
            if config.percentile is not None
            else f"sparsity {config.sparsity:g}"
            if config.sparsity is not None
            else ""
        )
        marks = [
            f"calibrated {self.calibrated}" if self.calibrated else "",
            f"same {self.matched}" if self.matched else "",
            f"seed {config.seed}" if uses_seed(config) else "",
            f"{self.epochs} epochs" if self.epochs else "",
            self.storage.label if self.storage else "",
            f"batch norm {self.batchnorm}",
        ]
        parts = [f"{config.method}{basis}", amount, config.scope, *marks]
        return f"{self.model.label}: {', '.join(part for part in parts if part)}"

    def settings(self) -> dict[str, Any]:
        """All settings, ready for JSON."""
        sources = {
            name: source.model_dump(mode="json") if source else None
            for name, source in (
                ("model", self.model),
                ("data", self.data),
                ("calibration", self.calibration),
            )
        }
        return {**sources, **self._own_settings()}

    def guid(self, identities: Mapping[str, str], versions: Mapping[str, str]) -> str:
        """The run's id: the same for the same settings, contents and versions, and only for them.

        Args:
            identities: hashes of the contents of ``model``, ``data`` and ``calibration``, and of
                ``training`` and ``metric`` where the run has them.
            versions: what else the result depends on.

        Returns:
            A UUID of version 5.
        """
        content = {
            **self._own_settings(),
            "identities": dict(identities),
            "versions": dict(versions),
        }
        return str(uuid.uuid5(NAMESPACE, json.dumps(content, sort_keys=True)))

    def _own_settings(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "batchnorm": self.batchnorm,
            "timing": self.timing,
            "device": self.device,
            "config": dataclasses.asdict(self.config) if self.config else None,
            "match": dataclasses.asdict(self.match) if self.match else None,
            "matched": self.matched,
            # Runs without these keep the ids that they had before there were such keys.
            **({"calibrated": self.calibrated} if self.calibrated else {}),
            **({"epochs": self.epochs} if self.epochs else {}),
            **({"storage": self.storage._asdict()} if self.storage else {}),
            **({"training": _settings_of(self.training)} if self.training else {}),
            **({"metric": _settings_of(self.metric)} if self.metric else {}),
        }


def _settings_of(source: Training | MetricSource) -> dict[str, Any]:
    """Its settings; what its files and data hold is a part of a run's id by their hashes."""
    return source.model_dump(mode="json", exclude={"root": True, "data": {"root"}})


def expand(sweep: Sweep, where: str = "sweep") -> list[Run]:
    """The runs of a sweep, each once, always in the same order, each model's unpruned run first.

    Raises:
        WavpruneError: a combination of the grid is not allowed.
    """
    prunings: dict[Pruning, None] = {}
    for i, block in enumerate(sweep.grid):
        try:
            check_name(sweep.backend)
            prunings |= dict.fromkeys(_prunings(block, sweep))
        except (ValueError, TypeError) as error:
            raise WavpruneError(f"{where}: grid[{i}]: {error}") from error
    # A worker holds one model at a time, so the runs of a model follow each other.
    runs = []
    for model in sweep.models:
        unpruned = Run(
            sweep=sweep.name,
            model=model,
            data=sweep.data,
            calibration=None,
            batch_size=sweep.batch_size,
            batchnorm="off",
            timing=sweep.timing,
            device=sweep.device,
            config=None,
            metric=sweep.metric,
        )
        runs.append(unpruned)
        for pruning in prunings:
            # Calibrated pruning repairs the batch norms itself.
            for repair in ("off",) if pruning.calibrated else sweep.batchnorm:
                by_outputs = pruning.storage is not None and pruning.storage.bits is None
                reads_nothing = repair == "off" and not pruning.calibrated and not by_outputs
                runs.append(
                    dataclasses.replace(
                        unpruned,
                        **pruning._asdict(),
                        batchnorm=repair,
                        calibration=None if reads_nothing else sweep.calibration,
                        training=sweep.training if pruning.epochs else None,
                    )
                )
    return runs


def _prunings(block: Grid, sweep: Sweep) -> Iterator[Pruning]:
    """All combinations of a block of the grid."""
    if any(block.epochs) and sweep.training is None:
        raise WavpruneError(
            f"epochs={max(block.epochs)} needs data to train on; give training: {{data: ...}}"
        )
    storages = _storages(block)
    for pruning in _selections(block, sweep):
        for epochs, storage in itertools.product(block.epochs, storages):
            yield pruning._replace(epochs=epochs, storage=storage)


def _storages(block: Grid) -> list[Storage | None]:
    """The ways to store that a block names; None, to store nothing, where it names that or none."""
    given = {name: getattr(block, name) for name in Storage._fields}
    named = [
        Storage(**{name: value})
        for name, values in given.items()
        for value in values
        if value is not None
    ]
    # The default of a key that was not given names nothing.
    nothing = not named or any(None in values and len(values) > 1 for values in given.values())
    return [*([None] if nothing else []), *named]


def _selections(block: Grid, sweep: Sweep) -> Iterator[Pruning]:
    """What is pruned, in all combinations of a block."""
    combinations = [
        dict(zip(AXES, values, strict=True))
        for values in itertools.product(*(getattr(block, axis) for axis in AXES))
    ]
    leaders = [_config(values, sweep) for values in combinations if values["method"] == "dwt"]
    for values, matched in itertools.product(combinations, block.matched):
        if matched and not leaders:
            raise WavpruneError(
                f"matched={matched!r} needs a dwt run to match; add 'dwt' to method"
            )
        is_dwt = values["method"] == "dwt"
        if matched == "bytes" and is_dwt:
            baseline = _config({**values, "method": "min_weight"}, sweep)
            yield Pruning(_config(values, sweep), baseline, matched, "")
        elif matched == "kept" and not is_dwt:
            for leader in leaders:
                # Random pruning takes each layer's count, min-weight the sum in the same scope.
                scope = "layer" if values["method"] == "random" else leader.scope
                amount = {"sparsity": None, "percentile": None, "scope": scope}
                follower = _config({**values, **amount}, sweep)
                if (leader.targets, leader.ignore) == (follower.targets, follower.ignore):
                    yield Pruning(follower, leader, matched, "")
        else:
            config = _config(values, sweep)
            for level in block.calibrated:
                calibrated = level if takes_calibration(config) else ""
                if calibrated:
                    check_config(config)
                yield Pruning(config, None, "", calibrated)


def _config(values: Mapping[str, Any], sweep: Sweep) -> PruneConfig:
    """The settings, with the default for each that has no effect on the result."""
    config = PruneConfig(**values, device=sweep.device, backend=sweep.backend)
    default = PruneConfig()
    unread = {name: getattr(default, name) for name in unread_settings(config)}
    return dataclasses.replace(config, **unread)
