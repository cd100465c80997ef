"""A checkpoint as a network that runs."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import WavpruneError
from .calibration import load

if TYPE_CHECKING:
    from torch import nn


def load_network(source: Path, factory: str | None) -> tuple[nn.Module, Path | None]:
    """The network whose weights a checkpoint has, and its directory where it is one.

    Args:
        source: a checkpoint; or, without a factory, what ``load`` takes.
        factory: ``package.module:function``, which returns the network.

    Raises:
        WavpruneError: there is no code for the network, or the weights are not its own.
        TypeError: the factory returns no module.
    """
    if factory is None:
        if source.is_file():
            raise WavpruneError(
                f"--calibration runs the network, and {source} has only its weights; give --model "
                "package.module:function, or leave --calibration out: without it the steps follow "
                "from the weights"
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
