"""``calibrate``: everything that pruning wants to know of a network and a few of its inputs."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..common.checks import integer
from ..common.loaders import batches, check_loader, inputs_of
from ..common.progress import progress_bar
from ..config import PruneConfig
from ..engine.ambient import neutral
from ..engine.layers import LayerRef, check_finite, select_layers
from ..engine.projection import checksum
from ..engine.running import running
from ..engine.sharding import as_sharded
from ..errors import WavpruneError
from ..graph import as_module
from .calls import Call, Tap
from .collected import MOST_MATCHED, Calibration
from .network import Measuring, Network, Site, check_outputs
from .patches import num_positions, patches
from .sensitivity import by_norm, gauss_newton
from .statistics import (
    Accumulator,
    Statistics,
    choose_blocks,
    generator_of,
    positions_per_sample,
    sampled_positions,
)

if TYPE_CHECKING:
    from onnx import ModelProto

# Below this many inputs there are none to spare for probes.
FEW = 64
# Parts of the inputs: for statistics, to probe layers one by one, to compare candidates.
SHARES, SHARES_OF_FEW = (0.6, 0.2, 0.2), (0.75, 0.0, 0.25)
# More inputs than this to probe and to compare make no difference and cost time.
MOST_PROBED, MOST_COMPARED, MOST_GRADIENTS = 128, 256, 128
# Patches for each column of a layer's matrix, and positions of each sample, at least.
PER_COLUMN, LEAST_POSITIONS = 100, 32
# The statistics of the inputs held back need less.
PER_COLUMN_HELD = 50


def calibrate(
    model: nn.Module | ModelProto,
    loader: Iterable[Any],
    *,
    samples: int = 2048,
    targets: str | Sequence[str] | None = None,
    ignore: str | Sequence[str] | None = None,
    max_memory: int = 4 << 30,
    device: str | torch.device | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Calibration:
    """Collect what pruning from data needs: once for any number of settings.

    The inputs are drawn into three parts: statistics of what each layer reads, probes of single
    layers, and a comparison of what came out. Labels are never looked at. The model is not changed.

    Args:
        model: the unpruned model, or an ``onnx.ModelProto``.
        loader: batches of inputs ``(N, ...)``, alone, first in a tuple, or as ``pixel_values``.
        samples: how many inputs are read at most.
        targets: as ``fast.prune`` takes it: the layers that may be pruned.
        ignore: as ``fast.prune`` takes it.
        max_memory: bytes for the second moments of all layers, and for the inputs that run at once
            in repairs. Layers with the largest matrices are kept block-diagonal where they do not
            fit.
        device: where to run; None means where the model lives.
        seed: of the parts, and of the positions that are looked at.
        progress: show a progress bar on standard error.

    Returns:
        The statistics, and the inputs.

    Raises:
        TypeError: an argument has the wrong type, or a batch has no input tensor.
        WavpruneError: the loader is empty, a layer cannot be pruned, or the model's outputs or what
            a layer reads are not finite.

    Example:
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
        >>> calibration = calibrate(net, [torch.randn(64, 1, 6, 6)])
        >>> calibration.fitted["0"].mean.shape
        torch.Size([1, 9])
    """
    config = PruneConfig(targets=targets, ignore=ignore)  # type: ignore[arg-type]
    model = as_module(model)
    refs = select_layers(model, config)
    integer("samples", samples, 2)
    integer("max_memory", max_memory, 1)
    integer("seed", seed)
    check_loader(loader, "calibration")
    for ref in refs:
        if as_sharded(ref.weight) is not None:
            raise WavpruneError(
                f"calibration: layer {ref.name!r} is sharded; allowed: layers with whole weights"
            )
        check_finite(ref)
    inputs = _read(loader, samples)
    with neutral(), running(model, device) as run_device:
        parts = _parts([batch.to(run_device) for batch in inputs], seed)
        total = sum(map(len, inputs))
        with progress_bar("calibrate", total, "inputs", progress) as advance:
            return _collect(model, refs, parts, max_memory, seed, advance)


def _read(loader: Iterable[Any], samples: int) -> list[torch.Tensor]:
    found: list[torch.Tensor] = []
    left = samples
    for batch in batches(loader):
        inputs = inputs_of(batch)[:left]
        found.append(inputs.detach())
        left -= len(inputs)
        if not left:
            break
    return found


def _parts(inputs: Sequence[torch.Tensor], seed: int) -> list[tuple[torch.Tensor, ...]]:
    """The inputs in random order, as three lists of batches."""
    total = sum(map(len, inputs))
    shares = SHARES if total >= FEW else SHARES_OF_FEW
    # At least one is held back, if there are two.
    ends = [min(round(share * total), max(total - 1, 1)) for share in (shares[0], sum(shares[:2]))]
    bounds = [0, *ends, total]
    generator = generator_of(seed, "parts")
    size = max(map(len, inputs))
    if len({batch.shape[1:] for batch in inputs}) == 1:
        order = torch.randperm(total, generator=generator, device="cpu")
        everything = torch.cat(list(inputs))[order.to(inputs[0].device)]
        return [
            torch.split(everything[low:high], size) if high > low else ()
            for low, high in itertools.pairwise(bounds)
        ]
    singles = [sample for batch in inputs for sample in torch.split(batch, 1)]
    chosen = torch.randperm(total, generator=generator, device="cpu").tolist()
    return [tuple(singles[i] for i in chosen[low:high]) for low, high in itertools.pairwise(bounds)]


def _collect(
    model: nn.Module,
    refs: Sequence[LayerRef],
    parts: Sequence[tuple[torch.Tensor, ...]],
    max_memory: int,
    seed: int,
    advance: Callable[[float], object] = lambda _: None,
) -> Calibration:
    fitting, probe, guard = parts
    network = Network(model, refs)
    survey = fitting[0][:2]
    sites = network.sites(survey)
    blocks = choose_blocks({n: site.rows for n, site in sites.items()}, max_memory, 2)
    tap = _Collector(network, sites, blocks, _wanted(sites, fitting, PER_COLUMN), seed)
    check_outputs(_outputs(network, tap, fitting, advance))
    fitted = tap.statistics()
    held_batches = [*probe, *guard]
    held_tap = _Collector(
        network, sites, blocks, _wanted(sites, held_batches, PER_COLUMN_HELD), seed
    )
    check_outputs(_outputs(network, held_tap, held_batches, advance))
    sizes = _Sizes(network)
    network.run(sizes, fitting[0][:1])
    one_shape = len({batch.shape[1:] for part in parts for batch in part}) == 1
    # Both networks at once, and as much again between two layers.
    capacity = max(1, max_memory // (4 * max(sizes.largest, 1))) if one_shape else 0
    measured = Measuring(network, sites)
    if capacity:
        network.run(measured, torch.cat(fitting)[: min(capacity, MOST_MATCHED)])
    # Backward, the outputs of all layers are held, and as much of what lies between.
    together = max(1, max_memory // (4 * max(sizes.total, 1)))
    differentiated = _first(fitting, MOST_GRADIENTS)
    smaller = [part for batch in differentiated for part in torch.split(batch, together)]
    return Calibration(
        statistics=fitting,
        probe=_first(probe, MOST_PROBED),
        # Of a single input there is no other to compare on.
        guard=_first(guard or fitting, MOST_COMPARED),
        layers=sites,
        fitted=fitted,
        held=held_tap.statistics() if held_batches else {},
        blocks=blocks,
        gradients=gauss_newton(network, sites, smaller, seed),
        gains=by_norm(network, sites),
        moments=measured.moments,
        capacity=capacity,
        never_called=tuple(ref.name for ref in refs if ref.name not in sites),
        checksums={ref.name: int(checksum(ref.weight)) for ref in refs},
        samples=sum(len(batch) for part in parts for batch in part),
        seed=seed,
        max_memory=max_memory,
    )


def _outputs(
    network: Network,
    tap: Tap,
    batches_: Sequence[torch.Tensor],
    advance: Callable[[float], object],
) -> Iterator[torch.Tensor]:
    for batch in batches_:
        yield network.run(tap, batch)
        advance(len(batch))


def rotations(
    model: nn.Module, refs: Sequence[LayerRef], calibration: Calibration
) -> list[Calibration]:
    """The same few inputs, others of them held back each time, until each has been once.

    Args:
        model: on the device that runs it, in evaluation mode.
        refs: the layers.
        calibration: of few inputs.
    """
    inputs = [*calibration.statistics, *calibration.guard]
    singles = [sample for batch in inputs for sample in torch.split(batch, 1)]
    size = sum(map(len, calibration.guard))
    one_shape = bool(calibration.capacity)
    found = []
    for low in range(0, len(singles) - 2 * size + 1, size):
        held = singles[low : low + size]
        rest = singles[:low] + singles[low + size :]
        parts = [(torch.cat(part),) if one_shape else tuple(part) for part in (rest, held)]
        found.append(
            _collect(
                model, refs, [parts[0], (), parts[1]], calibration.max_memory, calibration.seed
            )
        )
    return found


def _first(batches_: Sequence[torch.Tensor], most: int) -> tuple[torch.Tensor, ...]:
    return tuple(_limited(batches_, most))


def _limited(batches_: Sequence[torch.Tensor], most: int) -> Iterator[torch.Tensor]:
    for batch in batches_:
        if most <= 0:
            return
        yield batch[:most]
        most -= len(batch)


def _wanted(
    sites: Mapping[str, Site], batches_: Sequence[torch.Tensor], per_column: int
) -> dict[str, int]:
    samples = sum(map(len, batches_))
    return {
        name: positions_per_sample(site.rows, samples, per_column, LEAST_POSITIONS)
        for name, site in sites.items()
    }


class _Sizes(Tap):
    """The bytes that layers read and write: the most of one layer, and of all together."""

    def __init__(self, network: Network) -> None:
        super().__init__(network.watched)
        self.largest = self.total = 0

    def layer(self, name: str, call: Call) -> torch.Tensor:
        del name
        out = call.run()
        size = out.nbytes + call.input.nbytes
        self.largest, self.total = max(self.largest, size), self.total + size
        return out


class _Collector(Tap):
    """Adds up what every layer reads, one layer's patches at a time."""

    def __init__(
        self,
        network: Network,
        sites: Mapping[str, Site],
        blocks: Mapping[str, int],
        wanted: Mapping[str, int],
        seed: int,
    ) -> None:
        super().__init__(network.watched)
        self._wanted = wanted
        self._sums = {name: Accumulator(blocks[name]) for name in sites}
        # By number: wrappers of a model put something before each name.
        self._generators = {
            name: generator_of(seed, f"layer {number}") for number, name in enumerate(sites)
        }

    def layer(self, name: str, call: Call) -> torch.Tensor:
        positions = sampled_positions(
            num_positions(call), self._wanted[name], self._generators[name], call.input.device
        )
        self._sums[name].add(patches(call, positions))
        return call.run()

    def statistics(self) -> dict[str, Statistics]:
        found = {}
        for name, sums in self._sums.items():
            found[name] = sums.statistics()
            if not bool(torch.isfinite(found[name].covariance).all()):
                raise WavpruneError(f"calibration: what layer {name!r} reads is not finite")
        return found
