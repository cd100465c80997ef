"""A checkpoint as a network that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..checkpoint.formats import ONNX
from ..errors import WavpruneError
from .calibration import load

if TYPE_CHECKING:
    from torch import nn


def load_network(
    source: Path, factory: str | None, why: str, otherwise: str = ""
) -> tuple[nn.Module, Path | None]:
    """The network whose weights a checkpoint has, and its directory where it is one.

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
    is_graph = source.suffix.lower() in ONNX
    if is_graph and factory is not None:
        raise WavpruneError(f"--model {factory}: {source} is a graph, which runs by itself")
    if factory is None:
        if source.is_file() and not is_graph:
            raise WavpruneError(
                f"{why} runs the network, and {source} has only its weights; give --model "
                f"package.module:function{otherwise}"
            )
        return load(source)
    from ..checkpoint.sources import tensors_of

    network, _ = load(Path(factory))
    stored = tensors_of(source)
    state = {name: stored.tensors[stored.aliases.get(name, name)].read() for name in stored.names}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WavpruneError(f"{source} has not the weights of {factory}: {error}") from error
    return network, source if source.is_dir() else None
