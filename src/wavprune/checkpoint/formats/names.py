"""Which tensors of a state dict are weights of layers, and how layers are chosen by name.

Every command asks here, so that a layer has one name and one answer in all of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

from ...common.skipped import SkippedLayerWarning as SkippedLayerWarning
from ...common.skipped import describe_skipped as describe_skipped
from ...common.skipped import warn_skipped as warn_skipped
from ...config import PruneConfig
from ...engine.layers import select_names
from ...errors import WavpruneError

WEIGHT = "weight"
SUFFIX = f".{WEIGHT}"
# What stands for a weight that is computed when the network runs.
COMPUTED = {
    "weight_v": "is computed from weight_g and weight_v",
    "weight_orig": "is computed from weight_orig and a mask",
    "parametrizations.weight.original": "is computed by a parametrization",
    "parametrizations.weight.original1": "is computed by a parametrization",
}


class Weight(NamedTuple):
    """The weight of a layer.

    Attributes:
        layer: the layer's name: that of its tensor without ``".weight"``.
        key: the tensor's name.
        shape: of the tensor, of 2 to 5 axes.
    """

    layer: str
    key: str
    shape: tuple[int, ...]

    @property
    def is_convolution(self) -> bool:
        """True for what a file alone shows to be kernels: a weight of three to five axes."""
        return len(self.shape) > 2


def layer_name(key: str) -> str:
    """The name of the layer whose weight is the tensor of this name.

    Example:
        >>> layer_name("stage1.conv.weight"), layer_name("weight")
        ('stage1.conv', 'weight')
    """
    return key.removesuffix(SUFFIX)


def weights_of(shapes: Mapping[str, Sequence[int]]) -> tuple[list[Weight], dict[str, str]]:
    """The weights among some tensors, and the layers that look like one but cannot be pruned.

    Args:
        shapes: name and shape of every tensor.

    Returns:
        The ``*.weight`` tensors of 2 to 5 axes, or a bare ``weight``, in their order; and, by
        layer, why it is skipped.
    """
    weights: dict[str, Weight] = {}
    skipped: dict[str, str] = {}
    for key, size in shapes.items():
        if WEIGHT not in key:
            continue
        shape = tuple(size)
        if 0 in shape:
            continue
        if key == WEIGHT or key.endswith(SUFFIX):
            layer = layer_name(key)
            layer = key if layer in weights else layer
            if len(shape) in range(2, 6):
                weights[layer] = Weight(layer, key, shape)
            continue
        for ending, reason in COMPUTED.items():
            if len(shape) in (3, 4, 5) and (key == ending or key.endswith(f".{ending}")):
                layer = key.removesuffix(ending).removesuffix(".") or WEIGHT
                skipped[layer] = f"its weight {reason}"
    return list(weights.values()), skipped


def select(
    weights: Sequence[Weight], config: PruneConfig, prefix: str = "", also: Collection[str] = ()
) -> list[Weight]:
    """The weights that ``targets`` and ``ignore`` select.

    Args:
        weights: of the whole checkpoint.
        config: without ``targets`` the weights of all convolutions are selected, which are those
            of three to five axes; 2-D ones only where they are named.
        prefix: what stands before every name in a nested file, such as ``"state_dict."``; patterns
            may have it or not, whether the layers' names here do or not.
        also: layers that are selected like convolutions.

    Raises:
        WavpruneError: a pattern matches nothing, or nothing is left.
    """
    named = config.targets is not None
    allowed = [w for w in weights if named or w.is_convolution or w.layer in also]
    if not allowed:
        return []
    # Each layer under its name and, where the file nests, with and without the common prefix.
    spellings = {w.layer: w for w in allowed}
    if prefix:
        bare = {w.layer.removeprefix(prefix): w for w in allowed}
        spellings |= bare | {prefix + name: w for name, w in bare.items()}
    names = list(spellings)
    chosen = {spellings[name].key for name in select_names(names, replace(config, ignore=None))}
    if config.ignore is not None:
        # Only its check of the patterns counts here: it names the parameter.
        _check_ignore(names, config)
        by_pattern = replace(config, targets=config.ignore, ignore=None)
        chosen -= {spellings[name].key for name in select_names(names, by_pattern)}
    if not chosen:
        raise WavpruneError(
            f"no layer is left to prune: ignore={list(config.ignore or ())} drops all that "
            f"targets={list(config.targets or ['*'])} selects"
        )
    return [w for w in allowed if w.key in chosen]


def _check_ignore(names: Sequence[str], config: PruneConfig) -> None:
    # A name that is no layer's is never dropped, so that the patterns alone can be at fault.
    select_names([*names, "\0"], replace(config, targets=None, ignore=config.ignore))
