"""What a network's tensors are quantised as: errors weigh as they do at its outputs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from ..calibration.network import Site
from ..calibration.output_sensitivity import Sensitivity
from ..config import AUTO
from . import trellis_tables
from .feedback import Doubles, factor_of
from .formats.names import layer_name
from .items import Item, coefficients_of, layout_of, unit_of
from .layer import Layer
from .norms import MEAN_STEP, NormLink
from .packed_layout import Layout
from .plan import Plan
from .sources import Source, Tensor

BASES = ("identity", "dct", "uhaar", "klt")


class WeightItems(NamedTuple):
    """A weight in the bases that it may have.

    Attributes:
        tensor: as it was.
        changed: as it is when batch norms are folded.
        plan: what is pruned, and in which basis.
        site: where its layer stands.
        sensitivity: of the layer.
    """

    tensor: Tensor
    changed: Tensor
    plan: Plan
    site: Site
    sensitivity: Sensitivity

    def cheapest(self, c: float) -> Item:
        """In the basis of the fewest bytes; all of them have about the same divergence."""
        names = BASES if self.site.rows.kernel_values > 1 else BASES[:1]
        options = [self._option(layer) for layer in self._layers(names)]
        return options[0] if len(options) == 1 else min(options, key=lambda item: _bits(item, c))

    def identity(self) -> Item:
        """In no basis, where it may choose."""
        (layer,) = self._layers(BASES[:1])
        return self._option(layer)

    @property
    def may_choose(self) -> bool:
        """True where nothing says in which basis it is."""
        quantised = self.plan.quantised
        recorded = layer_name(self.tensor.name) in self.plan.recorded
        return not recorded and quantised is not None and quantised.wavelet == AUTO

    def _layers(self, names: Sequence[str]) -> list[Layer]:
        plan = self.plan
        if not self.may_choose:
            return [plan.layer(self.tensor)]
        assert plan.quantised is not None
        return [
            replace(plan, quantised=replace(plan.quantised, wavelet=name)).layer(self.tensor)
            for name in names
        ]

    def _option(self, layer: Layer) -> Item:
        return _option(layer, self.tensor, self.changed, self.site, self.sensitivity)


def _bits(item: Item, c: float) -> float:
    indices = item.quantised(c).indices
    classes = trellis_tables.classify([lambda: indices])
    tally = trellis_tables.counts(indices, classes)
    _, frequencies = trellis_tables.choose(tally)
    bits = trellis_tables.bits_of(frequencies)
    return float(bits[tally > 0] @ tally[tally > 0]) + 8 * len(item.payload)


def _option(
    layer: Layer, tensor: Tensor, changed: Tensor, site: Site, sensitivity: Sensitivity
) -> Item:
    weight = changed.read()
    peak = float(weight.abs().max())
    moved = layer._replace(
        kernels=weight.reshape(layer.kernels.shape), peak=peak, norm=float(weight.double().norm())
    )
    layout = layout_of(moved, tensor.name, site.rows.groups, site.rows.transposed)
    matrix, zeros = coefficients_of(moved, layout)
    hessian = _in_basis(sensitivity.hessian.numpy(), layer, layout)
    factor = factor_of(hessian * 4.0**layer.exponent)
    return Item(
        name=tensor.name,
        dtype=layer.dtype,
        layout=layout,
        matrix=matrix,
        zeros=zeros,
        unit=unit_of(factor),
        factor=factor,
        exponent=layer.exponent,
        original=weight,
        layer=moved,
        basis=layer.basis,
        payload=layer.basis_bytes,
        synthesis=layer.synthesis,
    )


def _in_basis(hessian: Doubles, layer: Layer, layout: Layout) -> Doubles:
    """``H`` of the coefficients: an error ``E`` of these is ``E S.T`` of the weights."""
    if layer.synthesis is None:
        return hessian
    S = torch.from_numpy(layer.synthesis.astype(np.float64))
    K, M = S.shape
    groups, d, _ = hessian.shape
    channels = d // K
    grid = torch.from_numpy(hessian).reshape(groups, channels, K, channels, K)
    # Right and left, as S.T H S of each pair of channels.
    right = grid @ S
    both = S.T @ right.permute(0, 1, 3, 2, 4)
    turned: Doubles = both.permute(0, 1, 3, 2, 4).reshape(groups, channels * M, -1).numpy()
    return (turned + turned.transpose(0, 2, 1)) / 2


def bias_item(entry: Tensor, sensitivity: Sensitivity) -> Item:
    """A bias, one column whose errors add up over all positions."""
    factor = factor_of(np.array([[[sensitivity.bias or 1e-30]]]))
    return replace(_column(entry), unit=unit_of(factor), factor=factor)


def mean_item(original: Source, link: NormLink) -> Item:
    """Means of a batch norm, whose exact values inference does not need."""
    var = original.tensors[link.var].read()
    step = MEAN_STEP * max(float(var.double().mean()) ** 0.5, 1e-30)
    return replace(_column(original.tensors[link.mean]), least_step=step)


def _column(entry: Tensor) -> Item:
    """A vector as one column of a step of its own."""
    values = entry.read()
    return Item(
        name=entry.name,
        dtype=entry.dtype,
        layout=Layout(entry.shape),
        matrix=values.float().reshape(-1, 1).numpy(),
        zeros=None,
        unit=0.0,
        factor=None,
        exponent=0,
        original=values,
    )


def norm_link(name: str, norm: str, eps: float) -> NormLink:
    """A layer and the batch norm that is folded into it, by their names."""
    return NormLink(
        weight=f"{name}.weight",
        gamma=f"{norm}.weight",
        var=f"{norm}.running_var",
        mean=f"{norm}.running_mean",
        bias=f"{norm}.bias",
        eps=eps,
    )
