"""Networks that run twice in one batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch

from ..calibration.calls import Call, Tap
from ..calibration.network import Network
from ..calibration.patches import num_positions
from ..calibration.sequential import apart
from ..errors import WavpruneError

# Positions of every input that are looked at, at least.
LEAST_POSITIONS = 24
# Bytes of what a layer returns, or reads as patches, for both networks.
MOST_BYTES = 1 << 30
# How far outputs may be apart: in units in the last place, and relatively at most.
ROUNDING, AT_MOST = 1 << 13, 0.1


def in_one_batch(
    network: Network, fit: Sequence[torch.Tensor], names: Collection[str]
) -> torch.Tensor | None:
    """As many inputs as two networks may run on at once, in one batch.

    Args:
        network: of the layers.
        fit: batches of inputs.
        names: of the layers that are quantised.

    Returns:
        None where inputs differ in shape, or the network mixes the samples of a batch: then what is
        behind the first half of it changes the outputs of that half.
    """
    if len({batch.shape[1:] for batch in fit}) > 1:
        return None
    few = fit[0][:2]
    tap = _Disturbing(network, names)
    try:
        outputs = network.run(tap, torch.cat([few, few]))
    except (WavpruneError, RuntimeError):
        return None
    (alone,) = network.outputs([few])
    error = float((outputs[: len(few)].double() - alone.double()).norm())
    allowed = min(ROUNDING * torch.finfo(alone.dtype).eps, AT_MOST)
    if not error <= allowed * float(alone.double().norm()):
        return None
    return torch.cat(list(fit))[: max(1, MOST_BYTES * len(few) // tap.largest)]


class _Disturbing(Tap):
    """Runs two networks in one batch, of which the second is far from the first."""

    def __init__(self, network: Network, names: Collection[str]) -> None:
        super().__init__(network.watched)
        self._names = names
        self.largest = 1

    def layer(self, name: str, call: Call) -> torch.Tensor:
        if name not in self._names:
            return call.run()
        plain, coarse = apart(call)
        out = torch.cat([plain.run(), 2 * coarse.run()])
        positions = min(num_positions(call), LEAST_POSITIONS)
        columns = call.weight[0].numel() * call.groups * positions * len(call.batched)
        self.largest = max(self.largest, out.numel() * out.element_size(), 4 * columns)
        return out
