"""A checkpoint as a network that runs, and inputs for it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import WavpruneError

if TYPE_CHECKING:
    from torch import nn

BATCH = 32
FACTORY = r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*"


def load_network(source: Path, factory: str | None) -> nn.Module:
    """The network whose weights a checkpoint has.

    Args:
        source: a checkpoint; a Hugging Face directory of an image classifier needs no factory.
        factory: ``package.module:function``, which returns the network.

    Raises:
        WavpruneError: there is no code for the network, or the weights are not its own.
        TypeError: the factory returns no module.
    """
    from ..checkpoint.sources import tensors_of
    from ..sweep.models import load_model
    from ..sweep.sources import DirectoryModel, FactoryModel

    if factory is None:
        if not (source / "config.json").is_file():
            raise WavpruneError(
                f"--calibration runs the network, and {source} has only its weights; give --model "
                "package.module:function, or leave --calibration out: without it the steps follow "
                "from the weights"
            )
        return load_model(DirectoryModel.model_validate({"directory": source}))
    if not re.fullmatch(FACTORY, factory):
        raise WavpruneError(f"--model is {factory!r}; allowed: package.module:function")
    network = load_model(FactoryModel(factory=factory))
    stored = tensors_of(source)
    state = {name: stored.tensors[stored.aliases.get(name, name)].read() for name in stored.names}
    try:
        network.load_state_dict(state)
    except RuntimeError as error:
        raise WavpruneError(f"{source} has not the weights of {factory}: {error}") from error
    return network


def load_inputs(source: str) -> Iterable[Any]:
    """Batches of inputs.

    Args:
        source: an ``.npz`` file as sweeps read it, or ``package.module:function``, which returns a
            loader of batches or a dataset.

    Raises:
        WavpruneError: it is neither, or cannot be loaded.
    """
    from ..sweep.data import load_data
    from ..sweep.sources import FactoryData, NpzData

    path = Path(source).expanduser()
    if path.suffix.lower() == ".npz":
        if not path.is_file():
            raise WavpruneError(f"--calibration: there is no file {path}")
        return load_data(NpzData.model_validate({"npz": path}), BATCH)
    if re.fullmatch(FACTORY, source):
        return load_data(FactoryData(factory=source), BATCH)
    raise WavpruneError(
        f"--calibration is {source!r}; allowed: an .npz file, or package.module:function"
    )
