"""What is known of a network before a step is chosen."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import nn

from ..calibration.network import Network, Site, check_outputs
from ..calibration.output_sensitivity import Direction, output_sensitivity
from ..engine.layers import LayerRef
from ..errors import WavpruneError
from .folding import fold, same_outputs
from .formats.names import layer_name
from .items import Item
from .network_items import WeightItems, bias_item, mean_item, norm_link
from .packing import Norms
from .plan import Plan, choose_tensors
from .quantisers import KEEP
from .records import DTYPES
from .sources import Source, Tensor, tensors_of
from .twice import in_one_batch

# The squared error of a trellis of 8 states over that of rounding to half its step.
TRELLIS_ERROR = 1 / 30
# The share of weights that have a basis from which on it is tried whether they need one.
WORTH_A_TRY = 0.2


class Study(NamedTuple):
    """What is known of a network before a step is chosen.

    Attributes:
        network: a copy of the model, in which batch norms are folded.
        source: the tensors of that copy.
        sites: where its layers stand.
        items: weights and biases.
        choices: by name, weights whose basis was chosen.
        shifts: name of a weight -> name of what takes up the mean of its errors, the mean inputs
            that they are multiplied with, and which sign the shift has there.
        plain: what takes up a shift and is no item, as it was.
        norms: batch norms that are unfolded again when the file is read.
        direction: says how far outputs are apart.
        together: inputs to learn from, in one batch; None where two networks cannot run in one.
        held: inputs to measure on.
        dense: the outputs of the model for these.
        progress: show progress bars on standard error.
    """

    network: Network
    source: Source
    sites: dict[str, Site]
    items: list[Item]
    choices: dict[str, WeightItems]
    shifts: dict[str, tuple[str, torch.Tensor, int]]
    plain: dict[str, torch.Tensor]
    norms: Norms
    direction: Direction
    together: torch.Tensor | None
    held: list[torch.Tensor]
    dense: list[torch.Tensor]
    progress: bool = False

    @property
    def weights(self) -> int:
        """How many values follow the step."""
        return sum(item.matrix.size for item in self.items)

    def without_bases(self) -> Study | None:
        """The same with weights in no basis; None where that makes no difference worth a try."""
        has_basis = [i for i in self.items if i.name in self.choices and i.basis is not None]
        if sum(item.matrix.size for item in has_basis) < WORTH_A_TRY * self.weights:
            return None
        names = {item.name for item in has_basis}
        items = [self.choices[i.name].identity() if i.name in names else i for i in self.items]
        return self._replace(items=items, choices={})

    def without_feedback(self) -> Study:
        """The same with errors that no other weight makes up for."""
        return self._replace(items=[item.without_feedback() for item in self.items])

    def step_for(self, kl: float) -> float:
        """The number ``c`` at which the outputs have this divergence, about."""
        return _step_for(kl, self.direction, self.weights)


def study_of(
    model: nn.Module,
    network_model: nn.Module,
    fit: list[torch.Tensor],
    held: list[torch.Tensor],
    held_of: str,
    plan: Plan,
    explicit: bool,
    batchnorm: str,
    kl: float,
    progress: bool,
) -> Study:
    """Study a network.

    Args:
        model: the network, which is not changed.
        network_model: a copy, which is.
        fit: inputs to learn from.
        held: inputs to measure on.
        held_of: the parameter that they come from, for messages.
        plan: what is pruned, and in which basis.
        explicit: True where the plan names the layers; else all that are called are compressed.
        batchnorm: ``"fold"`` or ``"keep"``.
        kl: a divergence to choose bases at.
        progress: show progress bars on standard error.

    Raises:
        WavpruneError: see ``save``.
    """
    original = tensors_of(model)
    refs = _refs(network_model)
    network = Network(network_model, refs)
    dense = network.outputs(held)
    check_outputs(dense, held_of)
    sites = network.sites(fit[0][:1])
    chosen = _chosen(original, plan, explicit, sites)
    if not chosen:
        raise WavpruneError(
            "calibration: its inputs reach no layer with a weight; allowed: models of convolutions "
            "and linear maps"
        )
    names = {_module_of(tensor) for tensor in chosen}
    folded = fold(network, {name: site for name, site in sites.items() if name in names})
    if not same_outputs(dense, network.outputs(held)):
        raise WavpruneError(
            "batchnorm: the outputs are others when batch norms are folded into the layers before "
            "them; something else reads these layers' outputs"
        )
    direction = Direction(dense)
    known = output_sensitivity(network, sites, fit, direction, progress=progress)
    source = tensors_of(network_model)
    weights = sum(math.prod(tensor.shape) for tensor in chosen)
    c = _step_for(kl, direction, weights)
    items: list[Item] = []
    choices: dict[str, WeightItems] = {}
    shifts: dict[str, tuple[str, torch.Tensor, int]] = {}
    for tensor in chosen:
        name = _module_of(tensor)
        site, sensitivity = sites[name], known[name]
        options = WeightItems(tensor, source.tensors[tensor.name], plan, site, sensitivity)
        items.append(options.cheapest(c))
        if options.may_choose:
            choices[tensor.name] = options
        bias = _bias_of(name, site, folded, source)
        if bias is not None:
            shifts[tensor.name] = (bias, sensitivity.mean, 1)
            entry = source.tensors[bias]
            items.append(bias_item(entry, sensitivity))
        elif site.norm is not None:
            shifts[tensor.name] = (f"{site.norm}.running_mean", sensitivity.mean, -1)
    links = []
    if batchnorm == KEEP:
        for name, norm in folded.items():
            if f"{name}.weight" in shifts:
                links.append(norm_link(name, norm, network.norms[norm].eps))
                items.append(mean_item(original, links[-1]))
    coded = {item.name for item in items}
    plain = {
        bias: source.tensors[bias].read() for bias, _, _ in shifts.values() if bias not in coded
    }
    norms = Norms(original, links)
    together = in_one_batch(network, fit, names)
    return Study(
        *(network, source, sites, items, choices, shifts, plain),
        *(norms, direction, together, held, dense, progress),
    )


def _refs(model: nn.Module) -> list[LayerRef]:
    """The weights of layers that may be called, each once."""
    return [
        LayerRef(name, module.weight)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.ndim > 1
    ]


def _module_of(tensor: Tensor) -> str:
    """The name of the module whose weight it is; empty for the network itself."""
    return tensor.name.removesuffix("weight").removesuffix(".")


def _chosen(source: Source, plan: Plan, explicit: bool, sites: Mapping[str, Site]) -> list[Tensor]:
    if explicit:
        chosen = choose_tensors(source, plan)
        for tensor in chosen:
            if _module_of(tensor) not in sites:
                raise WavpruneError(
                    f"layer {layer_name(tensor.name)!r}: calibration inputs do not reach it; "
                    "ignore that layer"
                )
        return chosen
    keys = [source.aliases.get(weight.key, weight.key) for weight in source.weights]
    chosen = [source.tensors[key] for key in dict.fromkeys(keys)]
    return [tensor for tensor in chosen if _module_of(tensor) in sites and tensor.dtype in DTYPES]


def _bias_of(name: str, site: Site, folded: Mapping[str, str], source: Source) -> str | None:
    """The bias that takes up a shift of a layer's outputs."""
    bias = f"{folded[name]}.bias" if name in folded else f"{name}.bias".removeprefix(".")
    takes = name in folded or (site.follows_bias and site.norm is None)
    return bias if takes and bias in source.tensors else None


def _step_for(kl: float, direction: Direction, weights: int) -> float:
    # Every weight adds c squared times a constant, about.
    return math.sqrt(direction.quadratic(kl) / (weights * TRELLIS_ERROR))
