"""What a sweep file says: models, data, and a grid of settings."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from ..calibration.run import Level
from ..common.optional import require
from ..errors import WavpruneError
from .grid import expand
from .sources import (
    KINDS,
    DataSource,
    Metric,
    MetricSource,
    ModelSource,
    Settings,
    Training,
    as_tuple,
)
from .yaml_file import read_yaml

try:
    from pydantic import AliasChoices, BeforeValidator, Field, ValidationError
except ImportError:
    require("pydantic", extra="sweep", purpose="a sweep")
    raise

Value = TypeVar("Value")


def _pattern_sets(value: object) -> object:
    """One set of patterns, or a list of sets."""
    if value is None:
        return (None,)
    sets = as_tuple(value)
    if not any(entry is None or isinstance(entry, list | tuple) for entry in sets):
        return (sets,)
    return tuple(None if entry is None else as_tuple(entry) for entry in sets)


def _off(value: object) -> object:
    """YAML reads a bare ``off`` as False."""
    return tuple("off" if entry is False else entry for entry in as_tuple(value))


Several = Annotated[tuple[Value, ...], BeforeValidator(as_tuple), Field(min_length=1)]
Patterns = Annotated[
    tuple[tuple[str, ...] | None, ...], BeforeValidator(_pattern_sets), Field(min_length=1)
]
BatchNorms = Annotated[
    tuple[Literal["off", "update", "match"], ...], BeforeValidator(_off), Field(min_length=1)
]


class Grid(Settings):
    """A block of settings: every combination of its values is a run.

    The keys up to ``ignore`` are those of ``PruneConfig``, with a value or a list of values;
    ``targets`` and ``ignore`` are patterns, or a list of lists of patterns. A setting that a method
    does not read does not multiply its runs.

    Attributes:
        matched: how much a run prunes. ``""``: what its own settings say. ``"kept"``: min_weight
            and random keep as many values as each dwt run of the block (min_weight in total,
            random in each layer). ``"bytes"``: each dwt run keeps as many values as fit into a
            file of min_weight's size. Or a list of these.
        calibrated: ``""``, or ``"refit"``, ``"select"``, ``"sequential"`` or ``"full"``: prune from
            the inputs of ``calibration`` at that level, as ``fast.prune`` does by
            ``calibration_level``. Or a list of these. Such a run repairs its batch norms itself;
            random and matched runs are not calibrated.
        epochs: passes over the data of ``training`` after pruning; 0 trains nothing.
        bits: of each stored value: 32 or 16 (floating point), 8, 6 or 4. The network is written as
            a compressed file, read again, and evaluated; ``file_bytes`` is the size of that file.
            None writes none. The values of ``bits`` and of the two below are alternatives.
        target_kl: the divergence of the outputs that quantising may cost, in nats: the file is
            written from the inputs of ``calibration``, as by ``checkpoint.save(calibration=...)``.
        target_bits_per_weight: the size of the file for each element of all tensors; written in the
            same way.
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
    calibrated: Several[Literal["", Level]] = ("",)
    epochs: Several[Annotated[int, Field(ge=0)]] = (0,)
    bits: Several[Literal[32, 16, 8, 6, 4] | None] = (None,)
    target_kl: Several[Annotated[float, Field(gt=0)] | None] = (None,)
    target_bits_per_weight: Several[Annotated[float, Field(gt=0)] | None] = (None,)


class Sweep(Settings):
    """A sweep file.

    Attributes:
        name: its name in the results.
        models: a model or a list of them.
        data: what accuracy is measured on.
        metric: what to measure in place of accuracy: ``package.module:Class`` of a
            ``torchmetrics.Metric`` or ``package.module:function`` of outputs and targets, or a
            mapping with more settings (``MetricSource``).
        calibration: what the batch norms are repaired with, and what calibrated runs are pruned
            from; None means the inputs of ``data``.
        training: how networks are fine-tuned; needed where the grid has ``epochs``.
        batch_size: samples per batch.
        batchnorm: ``"off"``, ``"update"`` or ``"match"``, or a list of them; see
            ``wavprune.compare``.
        grid: a block or a list of blocks.
        device: where to prune and to evaluate; None means the CPU.
        backend: the backend that prunes.
        timing: measure inference times too. Runs that share the cores slow each other down, so
            run such a sweep with one job.
    """

    name: str = Field(default="sweep", min_length=1)
    models: Several[ModelSource] = Field(validation_alias=AliasChoices("models", "model"))
    data: DataSource
    metric: Metric | None = None
    calibration: DataSource | None = None
    training: Training | None = None
    batch_size: int = Field(default=256, ge=1)
    batchnorm: BatchNorms = ("match",)
    grid: Several[Grid]
    device: str | None = None
    backend: str = "auto"
    timing: bool = False


def read_sweep(path: str | os.PathLike[str]) -> Sweep:
    """The sweep that a YAML file describes; its paths are relative to the file's folder.

    Raises:
        WavpruneError: the file cannot be read, or says something that is not allowed; the message
            names each key, what was given and what is allowed.
    """
    path = Path(path)
    return parse_sweep(read_yaml(path), path.parent, str(path))


def parse_sweep(content: object, root: str | os.PathLike[str] = ".", where: str = "sweep") -> Sweep:
    """The sweep that nested mappings and lists describe; see ``examples/sweep.yaml``.

    Args:
        content: the parsed YAML or JSON.
        root: the folder that paths are relative to.
        where: what error messages call the file.

    Raises:
        WavpruneError: something is not allowed; the message names each key, what was given and
            what is allowed.

    Example:
        >>> grid = {"method": ["dwt", "min_weight"], "wavelet": ["haar", "dct"], "sparsity": 0.8}
        >>> sweep = parse_sweep({"model": "demo", "data": "demo", "grid": grid})
        >>> [(run.config.method, run.config.wavelet) for run in expand(sweep) if run.config]
        [('dwt', 'haar'), ('dwt', 'dct'), ('min_weight', 'uhaar')]
    """
    if isinstance(content, Mapping) and {"model", "models"} <= set(content):
        raise WavpruneError(f"{where}: model and models were both given; give one of them")
    try:
        sweep = Sweep.model_validate(content, context={"root": root})
    except ValidationError as error:
        raise WavpruneError(_explained(error, where)) from None
    labels = [model.label for model in sweep.models]
    for label in labels:
        if labels.count(label) > 1:
            raise WavpruneError(f"{where}: several models are called {label!r}; give each a name")
    expand(sweep, where)
    return sweep


def _section(path: list[Any]) -> type[Settings]:
    """The settings that a key is of."""
    if len(path) == 1:
        return Sweep
    sections: dict[Any, type[Settings]] = {"metric": MetricSource, "training": Training}
    return sections.get(path[0], Grid)


def _explained(error: ValidationError, where: str) -> str:
    lines = []
    for entry in error.errors(include_url=False):
        # pydantic puts the kind of a source after its key; the file has no such key.
        path = list(entry["loc"])
        owner: Any = path[1] if path[:1] == ["training"] and len(path) > 1 else next(iter(path), "")
        kinds = [part for part in path[1:4] if owner in KINDS and part in KINDS[owner]]
        if kinds:
            path.remove(kinds[0])
        key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in path)
        problem = entry["msg"]
        if entry["type"] == "extra_forbidden":
            model = KINDS[owner][kinds[0]] if kinds else _section(path)
            problem = f"unknown key; allowed: {', '.join(model.model_fields)}"
        given = (
            "" if entry["type"] in ("missing", "extra_forbidden") else f", not {entry['input']!r}"
        )
        lines.append(f"{key.removeprefix('.') or 'the file'}: {problem}{given}")
    return f"{where}: " + "; ".join(lines)
