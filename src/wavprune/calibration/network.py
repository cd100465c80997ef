"""A network run with other weights, without a change to the network.

Calls of layers and batch norms are caught (``calls.py``) and run with what is to be tried. The
model itself stays as it is, whatever happens meanwhile.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import nn

from ..common.outputs import are_probabilities, log_of
from ..engine.ambient import function_mode
from ..engine.layers import LayerRef, named_layers, unwrapped
from ..engine.matching import RunningStatistics
from ..engine.moments import Moments, batch_norms, moments_of
from ..errors import WavpruneError
from .calls import Call, NormCall, Tap, Watched
from .patches import num_positions
from .rows import Rows


@dataclass(slots=True)
class Values:
    """What of a network is replaced.

    Attributes:
        weights: by the name of the layer.
        biases: by the name of the layer.
        norms: running statistics, by the name of the batch norm.
    """

    weights: dict[str, torch.Tensor] = field(default_factory=dict)
    biases: dict[str, torch.Tensor] = field(default_factory=dict)
    norms: dict[str, RunningStatistics] = field(default_factory=dict)


class Site(NamedTuple):
    """Where a layer stands in its network.

    Attributes:
        rows: how its weight becomes matrices.
        calls: how often it is called in one forward pass.
        positions: of its output, of one sample, at the first call.
        norm: the batch norm that reads its outputs and nothing else, or None.
        follows_bias: True where its own bias can take up a shift of its outputs.
        centered: True where a shift of its outputs does not matter, because of one of these.
    """

    rows: Rows
    calls: int
    positions: int
    norm: str | None
    follows_bias: bool
    centered: bool


class Network:
    """A model with the layers that are looked at.

    Args:
        model: in evaluation mode, on the device that runs it.
        refs: the layers.
    """

    def __init__(self, model: nn.Module, refs: Sequence[LayerRef]) -> None:
        self.model = unwrapped(model)
        self.weights = {ref.name: ref.weight for ref in refs}
        self.norms = batch_norms(model)
        means = {name: norm.running_mean for name, norm in self.norms.items()}
        self.watched = Watched(self.weights, {n: m for n, m in means.items() if m is not None})
        self.biases = _own_biases(model, self.weights)
        self._returns_probabilities: bool | None = None
        self.running = {
            name: RunningStatistics(norm.running_mean.double(), norm.running_var.double(), norm.eps)
            for name, norm in self.norms.items()
            if norm.running_mean is not None and norm.running_var is not None
        }

    def run(self, tap: Tap, inputs: torch.Tensor) -> torch.Tensor:
        """The outputs of the model for a batch while a tap is active; probabilities as logits."""
        with _without_compiler(), function_mode(tap):
            outputs = tensor_of(self.model(inputs))
        if self._returns_probabilities is None:
            # Once, as what is no softmax may come close to it in some batches.
            self._returns_probabilities = are_probabilities(outputs.detach())
        return log_of(outputs) if self._returns_probabilities else outputs

    def outputs(self, batches: Sequence[torch.Tensor], values: Values | None = None) -> list[Any]:
        """The outputs of each batch, with these values in place of the model's."""
        return [self.run(Substituted(self, values or Values()), batch) for batch in batches]

    def sites(self, sample: torch.Tensor) -> dict[str, Site]:
        """The layers that are called, in the order of their first calls."""
        tap = _Survey(self)
        self.run(tap, sample)
        return tap.sites()


class Substituted(Tap):
    """Runs a network with other values."""

    def __init__(self, network: Network, values: Values) -> None:
        super().__init__(network.watched)
        self.network, self.values = network, values

    def layer(self, name: str, call: Call) -> torch.Tensor:
        """The call with the layer's other weight and bias."""
        weight = self.values.weights.get(name)
        if weight is None:
            return call.run()
        return call.run(weight=weight, bias=self.values.biases.get(name))

    def norm(self, name: str, call: NormCall) -> torch.Tensor:
        """The call with the batch norm's other statistics."""
        return run_norm(call, self.values.norms.get(name))


class Repairing(Substituted):
    """Runs a network with other weights, and matches its batch norms and biases as it goes.

    One batch is exact: each is matched to the inputs that the ones before it give. ``values`` then
    holds what was set.

    Args:
        network: the network.
        values: whose ``weights`` are tried; ``biases`` and ``norms`` are set.
        dense: the moments of the unpruned network on the same batch.
        sites: where the layers stand.
        norms: the batch norms to match; None means all.
    """

    def __init__(
        self,
        network: Network,
        values: Values,
        dense: Mapping[str, Moments],
        sites: Mapping[str, Site],
        norms: frozenset[str] | None = None,
    ) -> None:
        super().__init__(network, values)
        self._dense, self._sites, self._only = dense, sites, norms

    def layer(self, name: str, call: Call) -> torch.Tensor:
        """The call, after its bias took up the shift of its outputs."""
        out = super().layer(name, call)
        site = self._sites.get(name)
        if site is None or not shifts_bias(site) or name not in self.values.weights:
            return out
        if name in self.values.biases:
            return out
        shift = self._dense[name].mean - channel_moments(name, call, out).mean
        assert call.bias is not None
        self.values.biases[name] = call.bias + shift.to(call.bias)
        return super().layer(name, call)

    def norm(self, name: str, call: NormCall) -> torch.Tensor:
        """The call, matched."""
        wanted = name in self._dense and (self._only is None or name in self._only)
        if wanted and name not in self.values.norms and not call.uses_batch:
            self.values.norms[name] = matched(
                self.network.running[name], self._dense[name], moments_of(name, call.input)
            )
        return run_norm(call, self.values.norms.get(name))


class Measuring(Substituted):
    """Measures the inputs of batch norms, and the outputs of layers whose bias can shift them."""

    def __init__(
        self, network: Network, sites: Mapping[str, Site], values: Values | None = None
    ) -> None:
        super().__init__(network, values or Values())
        self._sites = sites
        self.moments: dict[str, Moments] = {}

    def layer(self, name: str, call: Call) -> torch.Tensor:
        """The call; its outputs are measured where that is needed."""
        out = super().layer(name, call)
        site = self._sites.get(name)
        if site is not None and shifts_bias(site) and name not in self.moments:
            self.moments[name] = channel_moments(name, call, out)
        return out

    def norm(self, name: str, call: NormCall) -> torch.Tensor:
        """The call; its inputs are measured."""
        if name and name not in self.moments and not call.uses_batch:
            self.moments[name] = moments_of(name, call.input)
        return super().norm(name, call)


def _without_compiler() -> AbstractContextManager[object]:
    """Compiled modules run as they were written; importing the compiler takes seconds."""
    if "torch._dynamo" not in sys.modules:
        return nullcontext()
    stance: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return stance


def shifts_bias(site: Site) -> bool:
    """True where the bias, and not a batch norm, takes up a shift."""
    return site.follows_bias and site.norm is None


def matched(running: RunningStatistics, target: Moments, actual: Moments) -> RunningStatistics:
    """The statistics that undo a change of a batch norm's inputs, where the network is."""
    home = running.mean.device
    on_cpu = RunningStatistics(running.mean.cpu(), running.var.cpu(), running.eps)
    new = on_cpu.matched(target, actual)
    return RunningStatistics(new.mean.to(home), new.var.to(home), new.eps)


def run_norm(call: NormCall, statistics: RunningStatistics | None) -> torch.Tensor:
    """The call of a batch norm with other running statistics; None means its own."""
    if statistics is None or call.uses_batch:
        return call.run()
    like = call.arguments["running_mean"]
    return call.run(running_mean=statistics.mean.to(like), running_var=statistics.var.to(like))


def channel_moments(name: str, call: Call, outputs: torch.Tensor) -> Moments:
    """The moments of a layer's outputs, by channel."""
    if not call.spatial:
        return moments_of(name, outputs.reshape(-1, outputs.shape[-1]))
    batched = outputs if outputs.ndim == call.spatial + 2 else outputs[None]
    return moments_of(name, batched)


def tensor_of(output: Any) -> torch.Tensor:
    """The tensor in what a model returns: itself, ``.logits``, or the first of several.

    Raises:
        TypeError: there is none.
    """
    value = getattr(output, "logits", output)
    if isinstance(value, Mapping):
        value = next(iter(value.values()), None)
    elif isinstance(value, tuple | list) and value:
        value = value[0]
    if not isinstance(value, torch.Tensor) or not value.is_floating_point():
        raise TypeError(
            f"the model returned a {type(output).__name__}; allowed: a floating-point tensor, "
            "alone, first of several, or as .logits"
        )
    return value


def _own_biases(model: nn.Module, weights: Mapping[str, torch.Tensor]) -> dict[str, nn.Parameter]:
    """The bias of each layer, where it is a parameter that no other module has."""
    owners: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            owners[id(parameter)] = owners.get(id(parameter), 0) + 1
    found = {}
    modules = named_layers(model)
    for name in weights:
        bias = modules[name]._parameters.get("bias")
        if isinstance(bias, nn.Parameter) and owners[id(bias)] == 1:
            found[name] = bias
    return found


class _Survey(Tap):
    """Finds out in which order layers are called, and what reads their outputs."""

    def __init__(self, network: Network) -> None:
        super().__init__(network.watched)
        self._biases = network.biases
        self._calls: dict[str, list[Call]] = {}
        # The tensors are held, so that no other can have their identity.
        self._outputs: dict[int, tuple[str, torch.Tensor]] = {}
        self._readers: dict[str, list[str]] = {}
        self._sources: dict[str, list[str]] = {}
        self._by_batch: set[str] = set()

    def layer(self, name: str, call: Call) -> torch.Tensor:
        out = call.run()
        self._calls.setdefault(name, []).append(call)
        self._outputs[id(out)] = name, out
        return out

    def norm(self, name: str, call: NormCall) -> torch.Tensor:
        source = self._outputs.get(id(call.input))
        if source is not None and call.uses_batch:
            self._by_batch.add(source[0])
        elif source is not None and name:
            self._readers.setdefault(source[0], []).append(name)
        self._sources.setdefault(name, []).append("" if source is None else source[0])
        return call.run()

    def sites(self) -> dict[str, Site]:
        """What was found out."""
        return {name: self._site(name, calls) for name, calls in self._calls.items()}

    def _site(self, name: str, calls: list[Call]) -> Site:
        first = calls[0]
        rows = Rows(tuple(first.weight.shape), first.groups, first.transposed)
        readers = self._readers.get(name, [])
        norm = None
        # Of a layer that several batch norms read, or the other way round, none can be matched.
        if len(calls) == 1 and len(readers) == 1 and self._sources[readers[0]] == [name]:
            norm = readers[0]
        bias = self._biases.get(name)
        own_bias = bias is not None and len(calls) == 1 and first.bias is bias
        centered = norm is not None or name in self._by_batch or own_bias
        return Site(rows, len(calls), num_positions(first), norm, own_bias, centered)


def check_outputs(outputs: Iterable[torch.Tensor], name: str = "calibration") -> None:
    """Raise WavpruneError where an output of the unpruned model is not finite.

    Args:
        outputs: for the batches of a loader.
        name: of the parameter that was the loader, for the message.
    """
    for index, out in enumerate(outputs):
        bad = int(out.numel() - torch.isfinite(out).sum())
        if bad:
            raise WavpruneError(
                f"{name}: {bad} of {out.numel()} outputs of the unpruned model for batch "
                f"{index} are NaN or infinite"
            )
