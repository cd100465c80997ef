"""What an error of a layer's weights does to the outputs of its network.

Let ``E`` be the error of a layer's matrix. The divergence of the outputs grows by about
``1/2 tr(E H E.T)``, summed over the layers, where ``H`` comes from the inputs of the layer and from
gradients of random directions ``v`` of the outputs with ``E v v.T`` the Fisher information of the
logits, ``diag(p) - p p.T`` (Martens 2020, "New Insights and Perspectives on the Natural Gradient
Method"). A Kronecker product of the two second moments (K-FAC) underestimates layers whose outputs
are averaged over positions several times: there an error that is the same at all positions adds up.
So the inputs are split into their mean over the positions of a sample and what varies around it,
and each part has the gradients that it meets: those summed over the positions, or each by itself.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch

from ..common.outputs import are_logits
from ..common.progress import progress_bar
from ..engine.ambient import with_gradients
from ..errors import WavpruneError
from .calls import Call
from .network import Network, Site
from .patches import num_positions, patches
from .sensitivity import Recorder
from .statistics import generator_of, sampled_positions

# Positions of a sample that are looked at; neighbors are alike.
POSITIONS = 512
# Of the mean diagonal, added to it: the errors of a few inputs, and inputs that are always 0.
FLOOR, FLOOR_DEPTHWISE, SHARE_OF_ALL = 0.003, 0.02, 0.1
# The part that varies has about this many independent positions for each that it has.
INDEPENDENT = 0.25
# Where outputs are this sure, they are softened: their Fisher information vanishes.
SATURATED, TEMPERATURE = 0.05, 8.0
# Errors of logits that a prediction is averaged over.
DRAWS = 8


class Sensitivity(NamedTuple):
    """Of one layer.

    Attributes:
        hessian: ``(groups, d, d)``, float64: ``H``, of the mean output channel of each group.
        bias: the same of an error of the bias, of the mean output channel.
        mean: ``(groups, d)``: of the inputs. An error that it is multiplied with is taken up by the
            bias where there is one, and is not in ``hessian``.
    """

    hessian: torch.Tensor
    bias: float
    mean: torch.Tensor


class Direction:
    """Random directions of outputs whose covariance is their information.

    Args:
        outputs: of the network for some batches.
        seed: of the directions.

    Attributes:
        logits: True where outputs are taken as logits (``are_logits``); others as values with
            normal errors, in units of their standard deviation.
    """

    def __init__(self, outputs: Sequence[torch.Tensor], seed: int = 0) -> None:
        self.logits = are_logits(outputs)
        self._generator = generator_of(seed, "output sensitivity")
        self.temperature = 1.0
        self.scale = 1.0
        values = torch.cat([out.detach().double().reshape(-1) for out in outputs])
        if not self.logits:
            self.scale = float(values.std()) if len(values) > 1 else 1.0
            self.scale = self.scale or 1.0
            return
        self._logits = torch.cat([out.detach().double() for out in outputs])
        if _trace(self._logits) < SATURATED:
            self.temperature = TEMPERATURE

    def predicted(self, quadratic: float) -> float:
        """The divergence of outputs whose quadratic form is this.

        Where outputs are softened, logits get normal errors of the variance that it comes to.
        """
        if self.temperature == 1:
            return quadratic
        variance = 2 * quadratic / _trace(self._logits / self.temperature)
        generator = generator_of(0, "predicted divergence")
        shape = (DRAWS, *self._logits.shape)
        noise = torch.randn(shape, generator=generator, dtype=torch.float64) * variance**0.5
        p = self._logits.log_softmax(1)
        q = (self._logits + noise.to(p.device)).log_softmax(2)
        return float((p.exp() * (p - q)).sum(2).mean())

    def quadratic(self, divergence: float) -> float:
        """The inverse of ``predicted``."""
        if self.temperature == 1:
            return divergence
        low, high = 1e-12, 1e4
        for _ in range(40):
            middle = (low * high) ** 0.5
            if self.predicted(middle) > divergence:
                high = middle
            else:
                low = middle
        return high

    def draw(self, outputs: torch.Tensor) -> torch.Tensor:
        """A direction for a batch of outputs, of their shape."""
        noise = torch.randn(outputs.shape, generator=self._generator, dtype=torch.float64)
        noise = noise.to(outputs.device)
        if not self.logits:
            per_sample = outputs[0].numel()
            scaled: torch.Tensor = (noise / (self.scale * per_sample**0.5)).to(outputs)
            return scaled
        shares = (outputs.detach().double() / self.temperature).softmax(1)
        weighted = shares.sqrt() * noise
        return (weighted - shares * weighted.sum(1, keepdim=True)).to(outputs)

    def divergence(
        self, before: Sequence[torch.Tensor], after: Sequence[torch.Tensor]
    ) -> torch.Tensor:
        """The divergence of each sample's outputs, ``(N,)``.

        Of logits, that of Kullback and Leibler in nats; of values, half their mean squared change
        in units of their variance.
        """
        parts = []
        for old, new in zip(before, after, strict=True):
            if self.logits:
                p, q = old.double().log_softmax(1), new.double().log_softmax(1)
                parts.append((p.exp() * (p - q)).sum(1))
            else:
                change = (new.double() - old.double()).flatten(1) / self.scale
                parts.append(change.square().mean(1) / 2)
        return torch.cat(parts)


def _trace(logits: torch.Tensor) -> float:
    """The mean trace of the information of logits."""
    return float((1 - logits.softmax(1).square().sum(1)).mean())


def output_sensitivity(
    network: Network,
    sites: Mapping[str, Site],
    batches: Sequence[torch.Tensor],
    direction: Direction,
    seed: int = 0,
    progress: bool = False,
) -> dict[str, Sensitivity]:
    """The sensitivity of every layer, from one pass forwards and backwards over some inputs.

    Args:
        network: in evaluation mode.
        sites: where its layers stand.
        batches: of inputs; no label is looked at.
        direction: of the outputs.
        seed: of the positions.
        progress: show a progress bar on standard error.

    Raises:
        WavpruneError: the outputs have no gradient, or one that is not finite.
    """
    generator = generator_of(seed, "positions of sensitivity")
    sums = {name: _Sums(site) for name, site in sites.items()}
    samples = 0
    with progress_bar("calibrate", sum(map(len, batches)), "inputs", progress) as advance:
        for batch in batches:
            tap = Recorder(network)
            with with_gradients():
                inputs = batch.clone()
                if inputs.is_floating_point():
                    inputs.requires_grad_(True)
                outputs = network.run(tap, inputs)
                if not outputs.requires_grad:
                    raise WavpruneError(
                        "calibration: the model's outputs have no gradient; allowed: models that "
                        "autograd can follow"
                    )
                tensors = [out for _, _, out in tap.outputs]
                gradients = torch.autograd.grad(
                    outputs, tensors, grad_outputs=direction.draw(outputs), allow_unused=True
                )
            with torch.no_grad():
                for (name, call, _), gradient in zip(tap.outputs, gradients, strict=True):
                    if gradient is not None:
                        sums[name].add(call, gradient, generator)
            samples += len(batch)
            advance(len(batch))
    known = {name: total.sensitivity(samples) for name, total in sums.items()}
    for name, one in known.items():
        if not bool(torch.isfinite(one.hessian).all()) or not math.isfinite(one.bias):
            raise WavpruneError(
                f"layer {name!r}: what its errors do to the outputs is not finite; allowed: "
                "weights and inputs whose gradients, squared, fit float64"
            )
    return known


class _Sums:
    """The moments of one layer."""

    def __init__(self, site: Site) -> None:
        rows = site.rows
        groups, d = rows.groups, rows.num_columns
        self._site = site
        self._second = torch.zeros(groups, d, d, dtype=torch.float64)
        self._of_means = torch.zeros(groups, d, d, dtype=torch.float64)
        self._mean = torch.zeros(groups, d, dtype=torch.float64)
        self._varying = torch.zeros(groups, rows.num_rows, dtype=torch.float64)
        self._summed = torch.zeros(groups, rows.num_rows, dtype=torch.float64)
        self._positions = 1
        self._rows = 0

    def add(self, call: Call, gradient: torch.Tensor, generator: torch.Generator) -> None:
        """Add a call's inputs and the gradients of its outputs."""
        samples, P = len(call.batched), num_positions(call)
        self._positions = P
        self._rows += samples
        chosen = sampled_positions(P, POSITIONS, generator, gradient.device)
        values = patches(call, chosen)
        groups, d, _ = values.shape
        values = values.reshape(groups, d, samples, -1)
        # The same positions for both, so that their difference is a covariance.
        means = values.mean(3)
        flat = values.flatten(2)
        scale = P / values.shape[3]
        self._second += scale * (flat @ flat.mT).double().cpu()
        self._of_means += (means @ means.mT).double().cpu()
        self._mean += means.double().sum(2).cpu()
        if call.spatial:
            # Of an input without a batch axis too.
            batched = gradient.reshape(samples, groups, self._site.rows.num_rows, P)
        else:
            batched = gradient.reshape(samples, P, 1, -1).permute(0, 2, 3, 1)
        batched = batched.double()
        self._summed += batched.sum(3).square().sum(0).cpu()
        self._varying += batched.square().mean(3).sum(0).cpu()

    def sensitivity(self, samples: int) -> Sensitivity:
        """Of some samples of the network, each of which may be several of the layer."""
        site, n = self._site, max(self._rows, 1)
        each = n / samples
        groups, d = self._mean.shape
        second, of_means, mean = self._second / n, self._of_means / n, self._mean / n
        summed, varying = self._summed / n, self._varying / n
        P = self._positions
        if site.centered:
            of_means = of_means - mean[:, :, None] * mean[:, None, :]
            second = second - P * mean[:, :, None] * mean[:, None, :]
        bias = each * float(summed.mean())
        if groups > 1:
            # Few weights read each input: what their means have in common the bias takes up.
            diagonal = second.diagonal(dim1=1, dim2=2).clamp_min(0).mean(1)
            floor = FLOOR * diagonal.mean() + FLOOR_DEPTHWISE * diagonal
            weight = varying.mean(1) + SHARE_OF_ALL * varying.mean()
            hessian = each * weight[:, None, None] * (second + _eyes(floor, d))
            return Sensitivity(_positive(hessian), bias, mean)
        together = _shrunk(of_means, d / (d + n)) * summed.mean()
        around = second - P * of_means
        if P > 1:
            share = d / (d + INDEPENDENT * n * P)
            together = together + _shrunk(around, share) * varying.mean()
        diagonal = together.diagonal(dim1=1, dim2=2).clamp_min(0).mean(1)
        hessian = each * (together + _eyes(FLOOR * diagonal, d))
        return Sensitivity(_positive(hessian), bias, mean)


def _eyes(values: torch.Tensor, d: int) -> torch.Tensor:
    return values[:, None, None] * torch.eye(d, dtype=torch.float64)


def _shrunk(matrix: torch.Tensor, share: float) -> torch.Tensor:
    """Towards its diagonal, by how few samples it comes from."""
    diagonal = torch.diag_embed(matrix.diagonal(dim1=1, dim2=2))
    return (1 - share) * matrix + share * diagonal


def _positive(matrix: torch.Tensor) -> torch.Tensor:
    """With a diagonal above 0: of inputs that always are 0 or alike it may be, or rounded below."""
    diagonal = matrix.diagonal(dim1=1, dim2=2)
    wanted = diagonal.clamp_min(0)
    least = float(wanted.mean()) * 1e-9 or 1e-30
    return matrix + torch.diag_embed(wanted - diagonal + least)
