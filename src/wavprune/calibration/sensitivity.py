"""How much the outputs of a network depend on each output channel of a layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..engine.ambient import with_gradients
from .calls import Call, Tap
from .network import Network, Site
from .statistics import generator_of

# A channel without any influence still has a place in the order of all.
FLOOR = 1e-12


def gauss_newton(
    network: Network, sites: Mapping[str, Site], batches: Sequence[torch.Tensor], seed: int = 0
) -> dict[str, torch.Tensor] | None:
    """For each output channel i, ``E over samples of the sum over positions of (d(z.eps)/dy_i)^2``.

    ``z`` are the outputs of the network and ``eps`` is drawn from a normal distribution, so that
    the expectation is the trace of the Gauss-Newton matrix of a squared error of the outputs. No
    label is looked at.

    Args:
        network: the unpruned network.
        sites: the layers.
        batches: of inputs.
        seed: of ``eps``.

    Returns:
        By the name of the layer, ``(groups, r)`` in float64; None where the outputs have no
        gradient, or the weights none as they were made in inference mode.
    """
    if any(weight.is_inference() for weight in network.model.parameters()):
        return None
    sums: dict[str, torch.Tensor] = {}
    samples = 0
    generator = generator_of(seed, "gauss-newton")
    for batch in batches:
        tap = Recorder(network)
        # Modules such as those of Hugging Face may hold inference tensors from an earlier run.
        with with_gradients():
            outputs = network.run(tap, batch)
            if not outputs.requires_grad:
                return None
            noise = torch.randn(outputs.shape, generator=generator, device="cpu")
            scalar = (outputs.double() * noise.to(outputs.device).double()).sum()
            tensors = [out for _, _, out in tap.outputs]
            gradients = torch.autograd.grad(scalar, tensors, allow_unused=True)
        for (name, call, _), gradient in zip(tap.outputs, gradients, strict=True):
            if gradient is not None:
                squares = _per_channel(call, gradient)
                sums[name] = sums[name] + squares if name in sums else squares
        samples += len(batch)
    return {
        name: (sums[name] / samples + FLOOR).reshape(site.rows.groups, -1)
        if name in sums
        else torch.full((site.rows.groups, site.rows.num_rows), FLOOR, dtype=torch.float64)
        for name, site in sites.items()
    }


def by_norm(network: Network, sites: Mapping[str, Site]) -> dict[str, torch.Tensor]:
    """The squared gain of the batch norm behind each output channel; 1 where there is none."""
    gains = {}
    for name, site in sites.items():
        weight = torch.ones(site.rows.groups * site.rows.num_rows, dtype=torch.float64)
        if site.norm is not None:
            running, scale = network.running[site.norm], network.norms[site.norm].weight
            weight = (1 / (running.var + running.eps)).cpu()
            if scale is not None:
                weight = weight * scale.detach().double().cpu() ** 2
        gains[name] = (weight + FLOOR).reshape(site.rows.groups, -1)
    return gains


class Recorder(Tap):
    """Keeps the outputs of layers as they were before anything changes them in place."""

    def __init__(self, network: Network) -> None:
        super().__init__(network.watched)
        self.outputs: list[tuple[str, Call, torch.Tensor]] = []

    def layer(self, name: str, call: Call) -> torch.Tensor:
        """The call; what follows gets a copy, which functions in place may change."""
        out = call.run()
        if not out.requires_grad:
            out.requires_grad_()
        self.outputs.append((name, call, out))
        return out.clone()


def _per_channel(call: Call, gradient: torch.Tensor) -> torch.Tensor:
    """The sum of squares of each output channel, float64, on the CPU."""
    squares = gradient.double().square()
    if not call.spatial:
        return squares.reshape(-1, squares.shape[-1]).sum(0).cpu()
    batched = squares if squares.ndim == call.spatial + 2 else squares[None]
    return batched.flatten(2).sum((0, 2)).cpu()
