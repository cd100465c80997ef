"""A checkpoint as a network that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from ..checkpoint.formats import ONNX
from ..checkpoint.sources import Source, tensors_of
from ..errors import WavpruneError
from ..pruned import KEY, to_text
from .calibration import load

if TYPE_CHECKING:
    from torch import nn


class Loaded(NamedTuple):
    """A network that runs.

    Attributes:
        network: in evaluation mode.
        place: the directory or graph that may say how images are prepared.
        metadata: what its checkpoint says was pruned.
    """

    network: nn.Module
    place: Path | None
    metadata: dict[str, str] | None


def check_factory(source: Path, factory: str | None) -> None:
    """Raise WavpruneError where a graph is given another code."""
    if factory is not None and source.suffix.lower() in ONNX:
        raise WavpruneError(f"--model {factory}: {source} is a graph, which runs by itself")


def load_network(source: Path, factory: str | None, why: str, otherwise: str = "") -> Loaded:
    """The network whose weights a checkpoint has.

    Args:
        source: a checkpoint; or, without a factory, what ``load`` takes.
        factory: ``package.module:function``, which returns the network.
        why: what runs the network, for messages.
        otherwise: what can be done without its code.

    Raises:
        WavpruneError: there is no code for the network, or a graph and another code, or the
            weights are not its own.
        TypeError: the factory returns no module.
    """
    check_factory(source, factory)
    if factory is None:
        if source.is_file() and source.suffix.lower() not in ONNX:
            raise WavpruneError(
                f"{why} runs the network, and {source} has only its weights; give --model "
                f"package.module:function{otherwise}"
            )
        network, place = load(source)
        stored = tensors_of(source) if source.is_dir() else None
        return Loaded(network, place, None if stored is None else _metadata(stored))
    network, _ = load(Path(factory))
    stored = tensors_of(source)
    state = {name: stored.tensors[stored.aliases.get(name, name)].read() for name in stored.names}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WavpruneError(f"{source} has not the weights of {factory}: {error}") from error
    return Loaded(network, source if source.is_dir() else None, _metadata(stored))


def _metadata(stored: Source) -> dict[str, str]:
    return {KEY: to_text(stored.pruned)}
