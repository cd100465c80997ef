"""What layers and batch norms returned, so that those before a layer need not run once more.

Only watched calls are kept, by their number in the order of execution; whatever lies in between
runs again on what they return. A layer that a kept batch norm reads is not even kept: what it
returns counts for nothing.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from ..engine.moments import Moments
from .calls import Call, NormCall
from .network import Measuring, Network, Repairing, Site, Values


@dataclass(slots=True)
class Record:
    """One batch in the unpruned network.

    Attributes:
        outputs: of the network.
        moments: as ``Measuring`` has them.
        kept: by the number of the call, what it returned; on the device "meta" where a kept batch
            norm is all that looks at it.
        first: the number of the first call of each layer.
        calls: how many there were.
    """

    outputs: torch.Tensor
    moments: dict[str, Moments]
    kept: dict[int, torch.Tensor]
    first: dict[str, int]
    calls: int


def record(
    network: Network, sites: Mapping[str, Site], batch: torch.Tensor, most_bytes: int
) -> Record:
    """Run a batch and keep what its layers and batch norms return.

    Args:
        network: the unpruned network.
        sites: its layers.
        batch: of inputs.
        most_bytes: that are kept; calls after that run each time.
    """
    tap = _Recording(network, sites, most_bytes)
    outputs = network.run(tap, batch)
    found = Record(outputs, tap.moments, tap.kept, tap.first, tap.calls)
    # What has another reader, or other calls each time, cannot be resumed.
    check = _Checking(network, found, sites)
    if not torch.equal(network.run(check, batch), outputs) or not check.sound:
        found.kept.clear()
    return found


class _Recording(Measuring):
    def __init__(self, network: Network, sites: Mapping[str, Site], most_bytes: int) -> None:
        super().__init__(network, sites)
        self._left = most_bytes
        self._read: dict[str, tuple[int, torch.Tensor]] = {}
        self.kept: dict[int, torch.Tensor] = {}
        self.first: dict[str, int] = {}
        self.calls = 0

    def layer(self, name: str, call: Call) -> torch.Tensor:
        number = self._next()
        self.first.setdefault(name, number)
        out = super().layer(name, call)
        site = self._sites.get(name)
        if site is not None and site.norm is not None:
            self._read[site.norm] = number, torch.empty_like(out, device="meta")
        else:
            self._keep(number, out)
        return out

    def norm(self, name: str, call: NormCall) -> torch.Tensor:
        number = self._next()
        out = super().norm(name, call)
        if self._keep(number, out) and name in self._read:
            layer, nothing = self._read[name]
            self.kept[layer] = nothing
        return out

    def _next(self) -> int:
        self.calls += 1
        return self.calls - 1

    def _keep(self, number: int, out: torch.Tensor) -> bool:
        if out.nbytes > self._left:
            return False
        self._left -= out.nbytes
        self.kept[number] = out.clone()
        return True


class Resumed(Repairing):
    """Runs a recorded batch with another layer: calls before it return what they returned.

    Args:
        network: the network.
        values: with the weights that are tried.
        record: of the batch.
        sites: where the layers stand.
        norms: the batch norms to match; none of them stands before the layer.
    """

    def __init__(
        self,
        network: Network,
        values: Values,
        record: Record,
        sites: Mapping[str, Site],
        norms: frozenset[str] = frozenset(),
    ) -> None:
        super().__init__(network, values, record.moments, sites, norms)
        self._record, self._calls = record, 0
        self._end = min((record.first[name] for name in values.weights), default=record.calls)

    def layer(self, name: str, call: Call) -> torch.Tensor:
        """What the call returned, or the call."""
        kept = self._next()
        if kept is None:
            return super().layer(name, call)
        if kept.is_meta:
            return torch.full_like(kept, torch.nan, device=call.input.device)
        return kept.clone()

    def norm(self, name: str, call: NormCall) -> torch.Tensor:
        """What the call returned, or the call."""
        kept = self._next()
        return super().norm(name, call) if kept is None else kept.clone()

    def _next(self) -> torch.Tensor | None:
        """What the call returned, if it is kept."""
        self._calls += 1
        return self._record.kept.get(self._calls - 1) if self._calls <= self._end else None


class _Checking(Resumed):
    """Sees whether anything but its batch norm reads what a layer did not return.

    Attributes:
        sound: False if so.
    """

    def __init__(self, network: Network, record: Record, sites: Mapping[str, Site]) -> None:
        super().__init__(network, Values(), record, sites)
        self._readers = {site.norm for site in sites.values()} - {None}
        self.sound = True

    def layer(self, name: str, call: Call) -> torch.Tensor:
        self.sound &= bool(torch.isfinite(call.input).all())
        return super().layer(name, call)

    def norm(self, name: str, call: NormCall) -> torch.Tensor:
        self.sound &= name in self._readers or bool(torch.isfinite(call.input).all())
        return super().norm(name, call)
