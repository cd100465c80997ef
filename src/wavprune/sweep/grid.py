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
from typing import TYPE_CHECKING, Any

from ..backends.registry import check_name
from ..calibration.prune import check_config, takes_calibration
from ..config import PruneConfig
from ..errors import WavpruneError
from .sources import Data, Model
from .traits import reads_wavelet, unread_settings, uses_seed

if TYPE_CHECKING:
    from .settings import Grid, Sweep

# The namespace of the runs' ids. With another one, every run would get another id.
NAMESPACE = uuid.UUID("6f1f3f0e-5b0e-5c6f-9a53-7d1f6c1f7a11")
# What to prune, what it is matched to, what the two have in common, and the level of calibration.
Pruning = tuple[PruneConfig, PruneConfig | None, str, str]
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
            identities: hashes of the contents of ``model``, ``data`` and ``calibration``.
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
            # Runs without it keep the ids that they had before there was such a key.
            **({"calibrated": self.calibrated} if self.calibrated else {}),
        }


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
        )
        runs.append(unpruned)
        for config, match, matched, calibrated in prunings:
            # Calibrated pruning repairs the batch norms itself.
            for repair in ("off",) if calibrated else sweep.batchnorm:
                reads_nothing = repair == "off" and not calibrated
                runs.append(
                    dataclasses.replace(
                        unpruned,
                        config=config,
                        match=match,
                        matched=matched,
                        batchnorm=repair,
                        calibration=None if reads_nothing else sweep.calibration,
                        calibrated=calibrated,
                    )
                )
    return runs


def _prunings(block: Grid, sweep: Sweep) -> Iterator[Pruning]:
    """All combinations of a block of the grid."""
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
            yield _config(values, sweep), baseline, matched, ""
        elif matched == "kept" and not is_dwt:
            for leader in leaders:
                # Random pruning takes each layer's count, min-weight the sum in the same scope.
                scope = "layer" if values["method"] == "random" else leader.scope
                amount = {"sparsity": None, "percentile": None, "scope": scope}
                follower = _config({**values, **amount}, sweep)
                if (leader.targets, leader.ignore) == (follower.targets, follower.ignore):
                    yield follower, leader, matched, ""
        else:
            config = _config(values, sweep)
            for level in block.calibrated:
                calibrated = level if takes_calibration(config) else ""
                if calibrated:
                    check_config(config)
                yield config, None, "", calibrated


def _config(values: Mapping[str, Any], sweep: Sweep) -> PruneConfig:
    """The settings, with the default for each that has no effect on the result."""
    config = PruneConfig(**values, device=sweep.device, backend=sweep.backend)
    default = PruneConfig()
    unread = {name: getattr(default, name) for name in unread_settings(config)}
    return dataclasses.replace(config, **unread)
