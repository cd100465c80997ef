"""Inputs of networks on the command line: which options name them, and pruning from them."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import click

from ..calibration.run import LEVELS
from ..common.atomic import replaced
from ..config import PruneConfig
from ..errors import WavpruneError
from ..report import PruneReport
from .output import check_replaceable

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..sweep.data import Loader


class Inputs(NamedTuple):
    """What ``--calibration``, or ``--data``, and its companions say.

    Attributes:
        source: a folder, an ``.npz`` file, or ``package.module:function``.
        level: of ``fast.prune``'s ``calibration_level``.
        samples: how many inputs are read at most.
        size: of the images of a folder.
        mean: of each channel, or one for all.
        std: of each channel, or one for all.
    """

    source: str
    level: str
    samples: int
    size: tuple[int, ...] | None
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def load(
        self, model: Path | None, *, labels: bool = False, class_folders: bool = False
    ) -> Loader:
        """The batches, as ``load_inputs`` gives them.

        Args:
            model: the directory or graph of the network, which may say how images are prepared.
            labels: with their labels, where they have some.
            class_folders: the subfolders of a folder are its classes.
        """
        from ..sweep.inputs import load_inputs

        return load_inputs(
            self.source,
            model=model,
            size=self.size,
            mean=self.mean,
            std=self.std,
            limit=self.samples,
            labels=labels,
            class_folders=class_folders,
        )


def _size(
    context: click.Context, parameter: click.Parameter, text: str | None
) -> tuple[int, ...] | None:
    if text is None:
        return None
    if not re.fullmatch(r"[1-9]\d{0,4}(x[1-9]\d{0,4})?", text, re.ASCII):
        raise click.BadParameter(f"{text!r} is not a size; write it as 224 or 224x320.")
    return tuple(map(int, text.split("x")))


def _numbers(context: click.Context, parameter: click.Parameter, text: str) -> tuple[float, ...]:
    try:
        values = tuple(map(float, text.split(",")))
    except ValueError as error:
        raise click.BadParameter(f"{text!r}; write one number, or 0.5,0.5,0.5.") from error
    if parameter.name == "std" and min(values) <= 0:
        raise click.BadParameter(f"{text!r}; allowed: numbers above 0.")
    return values


def calibration_options(*, levels: bool) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add ``--calibration`` and what belongs to it; the command gets all of it as ``inputs``.

    Args:
        levels: True adds ``--calibration-level``.
    """

    def add(command: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(command)
        def run(**options: Any) -> None:
            own = {name: options.pop(name) for name in _OPTIONS if name in options}
            command(inputs=_inputs_of(own), **options)

        added: Callable[..., None] = run
        for name, option in reversed(_OPTIONS.items()):
            if levels or name != "calibration_level":
                added = option(added)
        return added

    return add


_OPTIONS = {
    "calibration": click.option(
        "--calibration",
        metavar="INPUTS",
        help="Learn from a few unlabelled inputs: a folder of images, an .npz file with images or "
        "inputs, or package.module:function that returns a loader.",
    ),
    "calibration_level": click.option(
        "--calibration-level",
        type=click.Choice(LEVELS),
        default="full",
        help="Solve for the values alone, choose what is kept too, or also layer after layer.",
    ),
    "samples": click.option(
        "--samples",
        type=click.IntRange(min=2),
        default=2048,
        help="How many inputs are read at most.",
    ),
    "image_size": click.option(
        "--image-size",
        metavar="SIZE",
        callback=_size,
        help="Of the images of a folder.  [default: what the model directory or the graph says]",
    ),
    "mean": click.option(
        "--mean",
        default="0",
        metavar="NUMBERS",
        callback=_numbers,
        help="Of the channels of images whose values are from 0 to 1, such as .48,.46,.41.",
    ),
    "std": click.option(
        "--std", default="1", metavar="NUMBERS", callback=_numbers, help="Likewise: (x-mean)/std."
    ),
}


def data_options(command: Callable[..., None]) -> Callable[..., None]:
    """Add ``--data``, ``--calibration`` and how their images are prepared.

    The command gets ``data``, and ``calibration`` or None.
    """

    @functools.wraps(command)
    def run(**options: Any) -> None:
        own = {name: options.pop(name) for name in (*_PREPARATION, "calibration", "data")}
        calibration = None if own["calibration"] is None else _inputs(own["calibration"], own)
        command(data=_inputs(own["data"], own), calibration=calibration, **options)

    added: Callable[..., None] = run
    data = click.option(
        "--data",
        metavar="INPUTS",
        required=True,
        help="What to measure on: a folder of images, an .npz file with images or inputs and "
        "perhaps labels, or package.module:function that returns a loader.",
    )
    calibration = click.option(
        "--calibration",
        metavar="INPUTS",
        help="Likewise, to repair and to learn from.  [default: those of --data, without labels]",
    )
    for option in (*(_OPTIONS[name] for name in reversed(_PREPARATION)), calibration, data):
        added = option(added)
    return added


def _inputs(source: str, options: Mapping[str, Any]) -> Inputs:
    return Inputs(
        source=source,
        level=options.get("calibration_level", "full"),
        samples=options["samples"],
        size=options["image_size"],
        mean=options["mean"],
        std=options["std"],
    )


def _inputs_of(options: Mapping[str, Any]) -> Inputs | None:
    """What the options say; None without ``--calibration``.

    Raises:
        click.UsageError: others were given without it.
    """
    if options["calibration"] is not None:
        return _inputs(options["calibration"], options)
    context = click.get_current_context()
    for name in options:
        if context.get_parameter_source(name) == click.core.ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--{name.replace('_', '-')} goes with --calibration.")
    return None


_PREPARATION = ("samples", "image_size", "mean", "std")


def load(source: Path) -> tuple[nn.Module, Path | None]:
    """The network that IN names, and the directory or graph that may say how images are prepared.

    Raises:
        WavpruneError: it is neither a graph, nor a model directory, nor a function.
    """
    from ..checkpoint.formats import ONNX
    from ..onnx import to_torch
    from ..sweep.models import load_model
    from ..sweep.sources import FACTORY, DirectoryModel, FactoryModel

    if source.suffix.lower() in ONNX:
        return to_torch(source), source
    if source.is_dir():
        return load_model(DirectoryModel.model_validate({"directory": source})), source
    if re.fullmatch(FACTORY, str(source)):
        return load_model(FactoryModel(factory=str(source))), None
    raise WavpruneError(
        f"{source}: calibration runs the network, so its code is needed; allowed: a Hugging Face "
        "directory, an .onnx model, or package.module:function that returns the network"
    )


def prune_calibrated(
    source: Path,
    output: Path | None,
    config: PruneConfig,
    inputs: Inputs,
    *,
    force: bool,
    progress: bool,
) -> PruneReport:
    """Prune a network from inputs and write it; see ``fast.prune``.

    Args:
        source: an ``.onnx`` model, a model directory or ``package.module:function``.
        output: of the same kind, or for a function a ``.safetensors`` file; None writes nothing.
        config: what to do.
        inputs: what to prune from.
        force: replace what is at ``output``.
        progress: show progress bars on standard error.

    Raises:
        WavpruneError: the network, the inputs or the output are not allowed.
        OSError: writing failed. Nothing is left behind.
    """
    from ..calibration.prune import prune_calibrated as prune
    from ..checkpoint.update import changed_since, snapshot, update_directory
    from ..graph import GraphModule
    from ..onnx.models import rewrite_changed
    from ..pruned import pruned_metadata

    if output is not None:
        _check_output(source, output, force)
    model, place = load(source)
    loader = inputs.load(place)
    directory = source if source.is_dir() else None
    before: dict[str, torch.Tensor] = {}
    if output is not None and directory is not None:
        before = snapshot(model)
    report = prune(model, config, loader, inputs.level, progress)
    if output is None:
        return report
    if directory is not None:
        changed = changed_since(model, before)
        update_directory(directory, output, changed, report=report, force=force)
        return report
    if isinstance(model, GraphModule):
        rewrite_changed(source, output, model, report, force=force)
        return report
    from safetensors.torch import save_model

    with replaced(output, overwrite=force) as new:
        save_model(model, str(new), metadata={"format": "pt", **pruned_metadata(report)})
    return report


def _check_output(source: Path, output: Path, force: bool) -> None:
    from ..checkpoint.formats import ONNX
    from ..checkpoint.prune import check_target

    if source.is_dir() or source.suffix.lower() in ONNX:
        check_target(source, output, force)
    elif output.suffix.lower() != ".safetensors":
        raise WavpruneError(f"{output} must end in .safetensors, for {source} is a function")
    elif output.is_dir() or not output.parent.is_dir():
        raise WavpruneError(f"{output} is not a file in a directory that exists")
    else:
        check_replaceable(output, force)
