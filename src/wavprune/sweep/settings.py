"""What a sweep file says: models, data and a grid of settings -> a list of runs, with their ids.

A run's id is a hash of all that its result depends on, so a sweep that is started again, or another
sweep with the same run in it, finds what is there.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from ..backends.protocol import check_name
from ..config import AUTO, WAVELETS, PruneConfig

try:
    import yaml
    from pydantic import AliasChoices, BeforeValidator, Field, ValidationError
except ImportError as error:
    raise ImportError(f"sweeps need {error.name}; pip install 'wavprune[sweep]'") from error

from .sources import KINDS, Data, DataSource, Model, ModelSource, Settings, listed

# The namespace of the runs' ids; another one would be another set of ids for the same runs.
NAMESPACE = uuid.UUID("6f1f3f0e-5b0e-5c6f-9a53-7d1f6c1f7a11")
# The grid's keys that are PruneConfig's, in the order in which they vary: the last one fastest.
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
# What to prune, what it is matched to, and in what.
Pair = tuple[PruneConfig, PruneConfig | None, str]
Value = TypeVar("Value")


def _pattern_sets(value: object) -> object:
    """One set of patterns, or a list of sets."""
    if value is None:
        return (None,)
    sets = listed(value)
    if not any(entry is None or isinstance(entry, list | tuple) for entry in sets):
        return (sets,)
    return tuple(None if entry is None else listed(entry) for entry in sets)


def _off(value: object) -> object:
    """YAML reads a bare ``off`` as False."""
    return tuple("off" if entry is False else entry for entry in listed(value))


Several = Annotated[tuple[Value, ...], BeforeValidator(listed), Field(min_length=1)]
Patterns = Annotated[
    tuple[tuple[str, ...] | None, ...], BeforeValidator(_pattern_sets), Field(min_length=1)
]
BatchNorms = Annotated[
    tuple[Literal["off", "update", "match"], ...], BeforeValidator(_off), Field(min_length=1)
]


class Grid(Settings):
    """A block of settings: every combination of its values is a run.

    Each key but ``matched`` is one of ``PruneConfig``'s, with a value or a list of values;
    ``targets`` and ``ignore`` are patterns, or a list of lists of patterns. A setting that a method
    does not read does not multiply its runs.

    Attributes:
        matched: ``""``: each run prunes as much as it says. ``"kept"``: min_weight and random prune
            what each dwt run of the block pruned (min-weight its overall kept count, random each
            layer's). ``"bytes"``: each dwt run keeps what a file as large as min-weight's can
            hold. Or a list of these.
    """

    method: Several[Any] = ("dwt",)
    wavelet: Several[Any] = ("uhaar",)
    mode: Several[Any] = ("periodization",)
    level: Several[Any] = (None,)
    force_level: Several[Any] = (False,)
    sparsity: Several[Any] = (None,)
    percentile: Several[Any] = (None,)
    scope: Several[Any] = ("layer",)
    seed: Several[Any] = (0,)
    targets: Patterns = (None,)
    ignore: Patterns = (None,)
    matched: Several[Literal["", "kept", "bytes"]] = ("",)


class Sweep(Settings):
    """A sweep file.

    Attributes:
        name: what the results call it.
        models: a model or a list of them.
        data: what accuracy is measured on.
        calibration: what the batch norms are repaired with; None means the inputs of ``data``.
        batch_size: samples a batch.
        batchnorm: ``"off"``, ``"update"`` or ``"match"``, or a list of them; see
            ``wavprune.compare``.
        grid: a block or a list of blocks.
        device: where to prune and to evaluate; None means the CPU.
        backend: what prunes.
        timing: measure inference times too. Runs that share the cores slow each other down, so
            give a sweep that times one job.
    """

    name: str = Field(default="sweep", min_length=1)
    models: Several[ModelSource] = Field(validation_alias=AliasChoices("models", "model"))
    data: DataSource
    calibration: DataSource | None = None
    batch_size: int = Field(default=256, ge=1)
    batchnorm: BatchNorms = ("match",)
    grid: Several[Grid]
    device: str | None = None
    backend: str = "auto"
    timing: bool = False


@dataclass(frozen=True, slots=True)
class Run:
    """One run of a sweep.

    Attributes:
        sweep: the sweep's name.
        model: the network.
        data: what accuracy is measured on.
        calibration: what the batch norms are repaired with; None means the inputs of ``data``.
        batch_size: samples a batch.
        batchnorm: how the batch norms are repaired.
        timing: whether inference times are measured.
        device: where to prune and to evaluate.
        config: what to prune; None leaves the network as it is.
        match: another run's settings, which this one is matched to.
        matched: in what: ``"kept"``, ``"bytes"``, or an empty string where ``match`` is None.
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
        return {**sources, **self._rest()}

    def columns(self) -> dict[str, Any]:
        """What the results' columns say of the settings; None where the method reads none."""
        config = self.config
        dwt = config is not None and config.method == "dwt"
        asked = config is not None and self.matched != "kept"
        return {
            "model": self.model.label,
            "data": self.data.label,
            "method": config.method if config else "none",
            "wavelet": config.wavelet if config and dwt else None,
            "mode": config.mode if config and dwt else None,
            "level": config.level if config and dwt else None,
            "force_level": config.force_level if config and dwt else None,
            "sparsity_requested": config.sparsity if config and asked else None,
            "percentile": config.percentile if config else None,
            "scope": config.scope if config else None,
            "seed": config.seed if config and config.method == "random" else None,
            "targets": " ".join(config.targets or ()) if config else None,
            "ignore": " ".join(config.ignore or ()) if config else None,
            "batchnorm": self.batchnorm,
            "matched": self.matched,
        }

    def guid(self, identities: Mapping[str, str], versions: Mapping[str, str]) -> str:
        """The run's id: the same for the same settings, contents and versions, and only for them.

        Args:
            identities: what stands for the contents of ``model``, ``data`` and ``calibration``.
            versions: what else the result depends on.

        Returns:
            A UUID of version 5.
        """
        content = {**self._rest(), "identities": dict(identities), "versions": dict(versions)}
        return str(uuid.uuid5(NAMESPACE, json.dumps(content, sort_keys=True)))

    def _rest(self) -> dict[str, Any]:
        return {
            "batch_size": self.batch_size,
            "batchnorm": self.batchnorm,
            "timing": self.timing,
            "device": self.device,
            "config": dataclasses.asdict(self.config) if self.config else None,
            "match": dataclasses.asdict(self.match) if self.match else None,
            "matched": self.matched,
        }


def read_sweep(path: str | os.PathLike[str]) -> Sweep:
    """The sweep that a YAML file describes; its paths are relative to the file's folder.

    Raises:
        ValueError: the file cannot be read, or says something that is not allowed; the message
            names each key, what was given and what is allowed.
    """
    path = Path(path)
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror}; allowed: a sweep file in YAML") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is not YAML: {error}") from error
    return parse_sweep(content, path.parent, str(path))


def parse_sweep(content: object, root: str | os.PathLike[str] = ".", where: str = "sweep") -> Sweep:
    """The sweep that nested mappings and lists describe; see ``examples/sweep.yaml``.

    Args:
        content: what YAML or JSON gave.
        root: the folder that paths are relative to.
        where: what an error message calls the whole.

    Raises:
        ValueError: something is not allowed; the message names each key, what was given and what
            is allowed.

    Example:
        >>> grid = {"method": ["dwt", "min_weight"], "wavelet": ["haar", "dct"], "sparsity": 0.8}
        >>> sweep = parse_sweep({"model": "demo", "data": "demo", "grid": grid})
        >>> [(run.config.method, run.config.wavelet) for run in expand(sweep) if run.config]
        [('dwt', 'haar'), ('dwt', 'dct'), ('min_weight', 'uhaar')]
    """
    if isinstance(content, Mapping) and {"model", "models"} <= set(content):
        raise ValueError(f"{where}: model and models were both given; give one of them")
    try:
        sweep = Sweep.model_validate(content, context={"root": root})
    except ValidationError as error:
        raise ValueError(_explained(error, where)) from None
    labels = [model.label for model in sweep.models]
    for label in labels:
        if labels.count(label) > 1:
            raise ValueError(f"{where}: several models are called {label!r}; give each a name")
    expand(sweep, where)
    return sweep


def expand(sweep: Sweep, where: str = "sweep") -> list[Run]:
    """The runs of a sweep, each once, always in the same order, each model's unpruned run first.

    Raises:
        ValueError: a combination of the grid is not allowed.
    """
    pairs: dict[Pair, None] = {}
    for i, block in enumerate(sweep.grid):
        try:
            check_name(sweep.backend)
            pairs |= dict.fromkeys(_pairs(block, sweep))
        except (ValueError, TypeError) as error:
            raise ValueError(f"{where}: grid[{i}]: {error}") from error

    def run(
        model: Any,
        batchnorm: str,
        config: PruneConfig | None,
        match: PruneConfig | None = None,
        matched: str = "",
    ) -> Run:
        return Run(
            sweep=sweep.name,
            model=model,
            data=sweep.data,
            # Without a repair nothing is calibrated.
            calibration=None if batchnorm == "off" else sweep.calibration,
            batch_size=sweep.batch_size,
            batchnorm=batchnorm,
            timing=sweep.timing,
            device=sweep.device,
            config=config,
            match=match,
            matched=matched,
        )

    # A worker holds one model at a time, so a model's runs stand together.
    return [
        each
        for model in sweep.models
        for each in (
            run(model, "off", None),
            *(run(model, repair, *pair) for pair in pairs for repair in sweep.batchnorm),
        )
    ]


def _pairs(block: Grid, sweep: Sweep) -> Iterator[Pair]:
    """The block's settings, what each is matched to, and in what."""
    combinations = [
        dict(zip(AXES, values, strict=True))
        for values in itertools.product(*(getattr(block, axis) for axis in AXES))
    ]
    leaders = [_config(each, sweep) for each in combinations if each["method"] == "dwt"]
    for each, matched in itertools.product(combinations, block.matched):
        if matched and not leaders:
            raise ValueError(f"matched={matched!r} needs a dwt run to match; add 'dwt' to method")
        dwt = each["method"] == "dwt"
        if matched == "bytes" and dwt:
            yield _config(each, sweep), _config({**each, "method": "min_weight"}, sweep), matched
        elif matched == "kept" and not dwt:
            for leader in leaders:
                # Random pruning takes each layer's count, min-weight the sum in the same scope.
                scope = "layer" if each["method"] == "random" else leader.scope
                amount = {"sparsity": None, "percentile": None, "scope": scope}
                follower = _config({**each, **amount}, sweep)
                if (leader.targets, leader.ignore) == (follower.targets, follower.ignore):
                    yield follower, leader, matched
        else:
            yield _config(each, sweep), None, ""


def _config(values: Mapping[str, Any], sweep: Sweep) -> PruneConfig:
    """The settings, with the default for each that has no effect on the result."""
    config = PruneConfig(**values, device=sweep.device, backend=sweep.backend)
    idle = set()
    if config.method != "random":
        idle |= {"seed"}
    if config.method != "dwt":
        idle |= {"wavelet", "mode", "level", "force_level"}
    elif config.wavelet not in (AUTO, *WAVELETS):
        # Only PyWavelets' transforms have a boundary, and only their level can be forced.
        idle |= {"mode", "force_level"} | ({"level"} if config.wavelet != "uhaar" else set())
    elif config.level is None:
        idle |= {"force_level"}
    default = PruneConfig()
    return dataclasses.replace(config, **{name: getattr(default, name) for name in idle})


def _explained(error: ValidationError, where: str) -> str:
    lines = []
    for entry in error.errors(include_url=False):
        # The kind that a source was told by stands after its key, and is no key of the file.
        path = list(entry["loc"])
        kinds = [part for part in path[1:3] if path[0] in KINDS and part in KINDS[path[0]]]
        if kinds:
            path.remove(kinds[0])
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
        problem = entry["msg"]
        if entry["type"] == "extra_forbidden":
            model = KINDS[path[0]][kinds[0]] if kinds else Grid if len(path) > 1 else Sweep
            problem = f"unknown key; allowed: {', '.join(model.model_fields)}"
        given = (
            "" if entry["type"] in ("missing", "extra_forbidden") else f", not {entry['input']!r}"
        )
        lines.append(f"{key.removeprefix('.') or 'the file'}: {problem}{given}")
    return f"{where}: " + "; ".join(lines)


class _Loader(yaml.SafeLoader):
    """A key that is there twice is a mistake, not the second one's value."""

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                mark = node.start_mark
                raise yaml.constructor.ConstructorError(
                    None, None, f"the key {key!r} is there twice", mark
                )
        return super().construct_mapping(node, deep)
