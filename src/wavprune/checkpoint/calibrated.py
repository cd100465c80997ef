"""Packed files whose steps and errors follow from what they do to the outputs of the network.

One number ``c`` for the whole network: the step of a layer is ``c`` over the root of the geometric
mean of its ``D``, which gives every layer the same trade of bits for divergence; errors are fed
back (``feedback.py``). The divergence that this predicts is then measured on inputs that were held
back, and ``c`` corrected.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn

from ..calibration.network import Network, Site, check_outputs
from ..calibration.output_sensitivity import Direction, Sensitivity, output_sensitivity
from ..common.loaders import batches, check_loader, inputs_of
from ..config import AUTO
from ..engine.layers import LayerRef
from ..engine.running import running
from ..errors import WavpruneError
from . import trellis_tables
from .feedback import Doubles, factor_of
from .folding import fold, same_outputs
from .formats.names import layer_name
from .items import Item, Quantised, coefficients_of, layout_of
from .layer import Layer
from .norms import MEAN_STEP, NormLink
from .packed_layout import Layout
from .packing import Norms, Packed, Search, file_size, finish, pack
from .plan import Plan, choose_tensors
from .quantisers import KEEP
from .records import DTYPES
from .report import SaveReport
from .sources import Source, Tensor, tensors_of

# Inputs that are held back to measure on, of those there are.
HELD, MOST_HELD = 0.25, 256
# Inputs that go forwards and backwards at once.
AT_ONCE = 16
# The squared error of a trellis of 8 states over that of rounding to half its step.
TRELLIS_ERROR = 1 / 30
# How far from its target a measured divergence may be, what is aimed at, and how often it is tried.
KL_TOLERANCE, KL_AIM, KL_ROUNDS = 0.1, 0.03, 10
# What a target of bytes comes to, about, to choose bases at.
USUAL_KL = 0.03
BASES = ("identity", "dct", "uhaar", "klt")


class Target(NamedTuple):
    """What to reach: one of two is not None.

    Attributes:
        kl: the divergence of the outputs.
        bytes: of the file.
    """

    kl: float | None
    bytes: float | None


def save_calibrated(
    model: nn.Module,
    calibration: Iterable[Any],
    plan: Plan,
    explicit: bool,
    target: Target,
    batchnorm: str,
    path: Path,
) -> SaveReport:
    """Write a packed file for what calibration inputs say of the network.

    Args:
        model: the network, which is not changed.
        calibration: batches of inputs.
        plan: what is pruned, and in which basis.
        explicit: True where the plan names the layers; else all that are called are compressed.
        target: what to reach.
        batchnorm: ``"fold"`` or ``"keep"``.
        path: the file.

    Raises:
        WavpruneError: see ``save``.
    """
    begin = time.perf_counter()
    check_loader(calibration, "calibration")
    samples = [inputs_of(batch).detach() for batch in batches(calibration)]
    # The copy is changed, and runs what was quantised.
    network_model = copy.deepcopy(model)
    with running(network_model, None) as device:
        fit, held = _parts([batch.to(device) for batch in samples])
        study = _study(model, network_model, fit, held, plan, explicit, batchnorm, target)
        found, packed = _search(study, target)
    return finish(
        study.source,
        packed,
        path,
        begin,
        step=found.c,
        predicted_kl=found.predicted,
        measured_kl=found.measured,
    )


def _parts(
    samples: Sequence[torch.Tensor],
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Inputs to learn from and inputs to measure on, in small batches."""
    total = sum(map(len, samples))
    if total < 2:
        raise WavpruneError("calibration: it has 1 input; allowed: 2 or more, to measure on others")
    wanted = max(1, min(MOST_HELD, round(HELD * total)))
    every = total / wanted
    held_at = {int(every * (i + 0.5)) for i in range(wanted)}
    fit, held = [], []
    at = 0
    for batch in samples:
        chosen = torch.tensor([at + i in held_at for i in range(len(batch))], device=batch.device)
        at += len(batch)
        held += [part for part in torch.split(batch[chosen], AT_ONCE) if len(part)]
        fit += [part for part in torch.split(batch[~chosen], AT_ONCE) if len(part)]
    return fit, held


class _Study(NamedTuple):
    """What is known of a network before a step is chosen.

    Attributes:
        network: a copy of the model, in which batch norms are folded.
        source: the tensors of that copy.
        items: weights and biases.
        shifts: name of a weight -> name of what takes up the mean of its errors, the mean inputs
            that they are multiplied with, and which sign the shift has there.
        plain: what takes up a shift and is no item, as it was: running the copy changes it.
        norms: batch norms that are unfolded again when the file is read.
        direction: says how far outputs are apart.
        held: inputs to measure on.
        dense: the outputs of the model for these.
    """

    network: Network
    source: Source
    items: list[Item]
    shifts: dict[str, tuple[str, torch.Tensor, int]]
    plain: dict[str, torch.Tensor]
    norms: Norms
    direction: Direction
    held: list[torch.Tensor]
    dense: list[torch.Tensor]


def _study(
    model: nn.Module,
    network_model: nn.Module,
    fit: list[torch.Tensor],
    held: list[torch.Tensor],
    plan: Plan,
    explicit: bool,
    batchnorm: str,
    target: Target,
) -> _Study:
    original = tensors_of(model)
    refs = _refs(network_model)
    network = Network(network_model, refs)
    dense = network.outputs(held)
    check_outputs(dense)
    sites = network.sites(fit[0][:1])
    chosen = _chosen(original, plan, explicit, sites)
    if not chosen:
        raise WavpruneError(
            "calibration: its inputs reach no layer with a weight; allowed: models of convolutions "
            "and linear maps"
        )
    names = {layer_name(tensor.name) for tensor in chosen}
    folded = fold(network, {name: site for name, site in sites.items() if name in names})
    if not same_outputs(dense, network.outputs(held)):
        raise WavpruneError(
            "batchnorm: the outputs are others when batch norms are folded into the layers before "
            "them; something else reads these layers' outputs"
        )
    direction = Direction(dense)
    known = output_sensitivity(network, sites, fit, direction)
    source = tensors_of(network_model)
    weights = sum(math.prod(tensor.shape) for tensor in chosen)
    c = _first(direction.quadratic(target.kl or USUAL_KL), weights)
    items: list[Item] = []
    shifts: dict[str, tuple[str, torch.Tensor, int]] = {}
    for tensor in chosen:
        name = layer_name(tensor.name)
        site, sensitivity = sites[name], known[name]
        item = _weight_item(tensor, source.tensors[tensor.name], plan, site, sensitivity, c)
        items.append(item)
        bias = _bias_of(name, site, folded, source)
        if bias is not None:
            shifts[tensor.name] = (bias, sensitivity.mean, 1)
            entry = source.tensors[bias]
            items.append(_bias_item(entry, sensitivity))
        elif site.norm is not None:
            shifts[tensor.name] = (f"{site.norm}.running_mean", sensitivity.mean, -1)
    links = []
    if batchnorm == KEEP:
        for name, norm in folded.items():
            if f"{name}.weight" in shifts:
                links.append(_link(name, norm, network.norms[norm].eps))
                items.append(_mean_item(original, links[-1]))
    coded = {item.name for item in items}
    plain = {
        bias: source.tensors[bias].read() for bias, _, _ in shifts.values() if bias not in coded
    }
    norms = Norms(original, links)
    return _Study(network, source, items, shifts, plain, norms, direction, held, dense)


def _refs(model: nn.Module) -> list[LayerRef]:
    """The weights of layers that may be called, each once."""
    return [
        LayerRef(name, module.weight)
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), torch.Tensor) and module.weight.ndim > 1
    ]


def _chosen(source: Source, plan: Plan, explicit: bool, sites: Mapping[str, Site]) -> list[Tensor]:
    if explicit:
        chosen = choose_tensors(source, plan)
        for tensor in chosen:
            if layer_name(tensor.name) not in sites:
                raise WavpruneError(
                    f"layer {layer_name(tensor.name)!r}: calibration inputs do not reach it; "
                    "ignore that layer"
                )
        return chosen
    keys = [source.aliases.get(weight.key, weight.key) for weight in source.weights]
    chosen = [source.tensors[key] for key in dict.fromkeys(keys)]
    return [
        tensor for tensor in chosen if layer_name(tensor.name) in sites and tensor.dtype in DTYPES
    ]


def _bias_of(name: str, site: Site, folded: Mapping[str, str], source: Source) -> str | None:
    """The bias that takes up a shift of a layer's outputs."""
    bias = f"{folded[name]}.bias" if name in folded else f"{name}.bias"
    takes = name in folded or (site.follows_bias and site.norm is None)
    return bias if takes and bias in source.tensors else None


def _weight_item(
    tensor: Tensor, changed: Tensor, plan: Plan, site: Site, sensitivity: Sensitivity, c: float
) -> Item:
    """A weight in the basis of the fewest bytes; all of them have about the same divergence."""
    try:
        options = [
            _option(layer, tensor, changed, site, sensitivity)
            for layer in _layers(tensor, plan, site)
        ]
    except WavpruneError as error:
        raise WavpruneError(f"layer {layer_name(tensor.name)!r}: {error}") from error
    if len(options) == 1:
        return options[0]
    return min(options, key=lambda item: _bits(item, c))


def _bits(item: Item, c: float) -> float:
    indices = item.quantised(c).indices
    classes = trellis_tables.classify(indices)
    tally = trellis_tables.counts(indices, classes)
    _, frequencies = trellis_tables.choose(tally)
    bits = trellis_tables.bits_of(frequencies)
    return float(bits[tally > 0] @ tally[tally > 0]) + 8 * len(item.payload)


def _layers(tensor: Tensor, plan: Plan, site: Site) -> list[Layer]:
    """The layer in each basis that may be taken."""
    if plan.quantised is None or plan.quantised.wavelet != AUTO:
        return [plan.layer(tensor)]
    names = BASES if site.rows.kernel_values > 1 else BASES[:1]
    return [
        replace(plan, quantised=replace(plan.quantised, wavelet=name)).layer(tensor)
        for name in names
    ]


def _option(
    layer: Layer, tensor: Tensor, changed: Tensor, site: Site, sensitivity: Sensitivity
) -> Item:
    weight = changed.read()
    peak = float(weight.abs().max())
    moved = layer._replace(
        kernels=weight.reshape(layer.kernels.shape), peak=peak, norm=float(weight.double().norm())
    )
    layout = layout_of(moved, site.rows.groups, site.rows.transposed)
    matrix, zeros = coefficients_of(moved, layout)
    hessian = _in_basis(sensitivity.hessian.numpy(), layer, layout)
    factor = factor_of(hessian * 4.0**layer.exponent)
    return Item(
        name=tensor.name,
        dtype=layer.dtype,
        layout=layout,
        matrix=matrix,
        zeros=zeros,
        unit=0.5 / math.sqrt(factor.scale),
        factor=factor,
        exponent=layer.exponent,
        original=weight,
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


def _bias_item(entry: Tensor, sensitivity: Sensitivity) -> Item:
    values = entry.read()
    factor = factor_of(np.array([[[max(sensitivity.bias, 1e-30)]]]))
    return Item(
        name=entry.name,
        dtype=entry.dtype,
        layout=Layout(entry.shape),
        matrix=values.double().reshape(-1, 1).numpy(),
        zeros=None,
        unit=0.5 / math.sqrt(factor.scale),
        factor=factor,
        exponent=0,
        original=values,
    )


def _link(name: str, norm: str, eps: float) -> NormLink:
    return NormLink(
        weight=f"{name}.weight",
        gamma=f"{norm}.weight",
        var=f"{norm}.running_var",
        mean=f"{norm}.running_mean",
        bias=f"{norm}.bias",
        eps=eps,
    )


def _mean_item(original: Source, link: NormLink) -> Item:
    """Means of a batch norm, whose exact values inference does not need."""
    entry = original.tensors[link.mean]
    values, var = entry.read(), original.tensors[link.var].read()
    step = MEAN_STEP * max(float(var.double().mean()) ** 0.5, 1e-30)
    return Item(
        name=entry.name,
        dtype=entry.dtype,
        layout=Layout(entry.shape),
        matrix=values.double().reshape(-1, 1).numpy(),
        zeros=None,
        unit=0.0,
        factor=None,
        exponent=0,
        original=values,
        least_step=step,
    )


class _Tried(NamedTuple):
    c: float
    predicted: float
    measured: float


def _search(study: _Study, target: Target) -> tuple[_Tried, Packed]:
    weights = sum(item.matrix.size for item in study.items)
    if target.bytes is not None:
        search = Search(target.bytes, weights, _first(study.direction.quadratic(USUAL_KL), weights))
        while search.c is not None:
            c = search.c
            packed = _packed(study, *_quantised(study, c)[:2])
            search.report(file_size(packed.data))
        return _measured_at(study, c), packed
    assert target.kl is not None
    c = _first(study.direction.quadratic(target.kl), weights)
    tried: list[_Tried] = []
    for _ in range(KL_ROUNDS):
        tried.append(_measured_at(study, c))
        if abs(math.log(max(tried[-1].measured, 1e-12) / target.kl)) <= KL_AIM:
            break
        c = _next(tried, target.kl)
    # Of a small network the divergence jumps from step to step: the coarsest that is good enough.
    good = [one for one in tried if one.measured <= (1 + KL_TOLERANCE) * target.kl]
    if not good:
        best = min(tried, key=lambda one: one.measured)
        raise WavpruneError(
            f"no step brings the divergence to target_kl={target.kl:g}; the nearest has "
            f"{best.measured:g}"
        )
    best = max(good, key=lambda one: one.c)
    return best, _packed(study, *_quantised(study, best.c)[:2])


def _first(kl: float, weights: int) -> float:
    """Every weight adds ``c * c`` times a constant, about."""
    return math.sqrt(kl / (weights * TRELLIS_ERROR))


def _next(tried: Sequence[_Tried], kl: float) -> float:
    below = max((t.c for t in tried if t.measured <= kl), default=None)
    above = min((t.c for t in tried if t.measured > kl), default=None)
    last = tried[-1]
    if below is None or above is None or above <= below:
        move = math.log(kl / max(last.measured, 1e-12)) / 2
        return last.c * math.exp(min(max(move, -2.0), 2.0))
    known = {t.c: math.log(max(t.measured, 1e-12)) for t in tried}
    share = (math.log(kl) - known[below]) / (known[above] - known[below])
    between = min(max(share, 0.1), 0.9)
    return below * math.exp(between * math.log(above / below))


def _measured_at(study: _Study, c: float) -> _Tried:
    quantised, changed, predicted = _quantised(study, c)
    return _Tried(c, predicted, _measured(study, _stored(study, quantised) | changed))


def _packed(
    study: _Study, quantised: Mapping[str, Quantised], changed: Mapping[str, torch.Tensor]
) -> Packed:
    return pack(study.source, quantised, changed, study.norms)


def _stored(study: _Study, quantised: Mapping[str, Quantised]) -> dict[str, torch.Tensor]:
    """What the copy of the model gets: not the means that only unfolding needs."""
    means = {link.mean for link in study.norms.links}
    return {name: found.tensor() for name, found in quantised.items() if name not in means}


def _quantised(
    study: _Study, c: float
) -> tuple[dict[str, Quantised], dict[str, torch.Tensor], float]:
    """Everything at one ``c``, and the divergence that it should have."""
    items = {item.name: item for item in study.items}
    quantised = {name: item.quantised(c) for name, item in items.items() if name in study.shifts}
    changed: dict[str, torch.Tensor] = {}
    for name, (bias, mean, sign) in study.shifts.items():
        shift = sign * _shift(quantised[name], mean)
        if bias in items:
            moved = items[bias].matrix - shift[:, None]
            quantised[bias] = replace(items[bias], matrix=moved).quantised(c)
        else:
            before = study.plain[bias]
            changed[bias] = (before.double() - torch.from_numpy(shift)).to(before.dtype)
    for name, item in items.items():
        if name not in quantised:
            quantised[name] = item.quantised(c)
    predicted = math.fsum(found.divergence() for found in quantised.values())
    return quantised, changed, study.direction.predicted(predicted)


def _shift(found: Quantised, mean: torch.Tensor) -> Doubles:
    """How the errors of a weight move the mean of each output."""
    item = found.item
    after = found.tensor().double().numpy()
    before = item.original.double().numpy()
    plain = replace(item.layout, coefficients=item.layout.kernel)
    error = plain.split((after - before).reshape(-1, item.layout.kernel))
    groups = len(mean)
    moved = error.reshape(groups, -1, error.shape[1]) @ mean.numpy()[:, :, None]
    return np.asarray(moved.reshape(-1))


def _measured(study: _Study, tensors: Mapping[str, torch.Tensor]) -> float:
    """The divergence of the outputs with these tensors."""
    state = study.network.model.state_dict()
    for name, tensor in tensors.items():
        state[name].copy_(tensor)
    after = study.network.outputs(study.held)
    return float(study.direction.divergence(study.dense, after).mean())
