"""Models whose weights stay compressed in memory and are decoded when a layer runs.

Where the device of a layer decodes itself, it holds the compressed weights: all are decoded once to
check them, and afterwards no layer waits for the device.
"""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.checks import integer
from ..engine.ambient import neutral, without_gradients
from ..engine.device import is_capturing
from ..engine.running import check_model
from ..errors import WavpruneError
from .loading import named, open_packed
from .norms import divisor_of, scale_of, unfolded
from .on_device import OnDevice, checked_on_device
from .unpacked import Unpacked


class _Kept:
    """A decoded weight that is kept; of a GPU, from when on it is there."""

    def __init__(self, weight: torch.Tensor) -> None:
        self._weight, self._ready = weight, None
        if weight.is_cuda:
            self._ready = torch.cuda.current_stream(weight.device).record_event()

    @property
    def nbytes(self) -> int:
        """What it takes."""
        return self._weight.nbytes

    def use(self) -> torch.Tensor:
        """The weight, for the stream that is current now, whichever decoded it."""
        # A capture begins after all work has ended, and may not wait for what came before it.
        if self._ready is not None and not is_capturing():
            stream = torch.cuda.current_stream(self._weight.device)
            stream.wait_event(self._ready)
            # Its memory is not given to another until that stream is done, if it is dropped.
            self._weight.record_stream(stream)
        return self._weight


class Attached:
    """What decodes the weights of a model.

    Args:
        data: the file's bytes.
        devices: of the layers' weights, by their names in the file.
        cache_bytes: how many bytes of decoded weights are kept at most, those used last.

    Attributes:
        compressed_bytes: what the compressed weights take on the devices that decode them, and the
            file in the host's memory where the CPU decodes any; with the divisors that take batch
            norms out of them.
        cached_bytes: what the decoded weights that are kept take now.

    Raises:
        WavpruneError: a weight is damaged, and a device was to decode it.
    """

    def __init__(
        self, data: Unpacked, devices: Mapping[str, torch.device], cache_bytes: int
    ) -> None:
        self._data, self._devices, self._most = data, devices, cache_bytes
        self._cache: OrderedDict[str, _Kept] = OrderedDict()
        self._placed: dict[torch.device, OnDevice] = {}
        for device in dict.fromkeys(devices.values()):
            own = [name for name, other in devices.items() if other == device]
            placed = checked_on_device(data, own, device)
            if placed is not None:
                self._placed[device] = placed
        # By names of weights that have a batch norm folded in, where they are decoded.
        self._divisors: dict[str, torch.Tensor] = {}
        for name in devices.keys() & data.records.links.keys():
            link = data.records.links[name]
            scale = scale_of(link, data.stored(link.gamma), data.stored(link.var))
            home = devices[name] if devices[name] in self._placed else "cpu"
            self._divisors[name] = divisor_of(scale).to(home)
        self.compressed_bytes = sum(placed.nbytes for placed in self._placed.values())
        self.compressed_bytes += sum(divisor.nbytes for divisor in self._divisors.values())
        if not devices or set(devices.values()) - self._placed.keys():
            self.compressed_bytes += data.size
        self.cached_bytes = 0

    def weight(self, name: str) -> torch.Tensor:
        """A decoded weight, for reading."""
        known = self._cache.get(name)
        if known is not None:
            self._cache.move_to_end(name)
            return known.use()
        with neutral():
            decoded = self._decoded(name)
        # What a capture decodes is there when its graph runs, and not before.
        if decoded.nbytes <= self._most and not is_capturing():
            self._cache[name] = _Kept(decoded)
            self.cached_bytes += decoded.nbytes
            while self.cached_bytes > self._most:
                _, dropped = self._cache.popitem(last=False)
                self.cached_bytes -= dropped.nbytes
        return decoded

    def _decoded(self, name: str) -> torch.Tensor:
        device = self._devices[name]
        placed = self._placed.get(device)
        # Checked when all of them were decoded once.
        weight = self._data.stored(name) if placed is None else placed.decode([name]).tensors[name]
        if name in self._divisors:
            weight = unfolded(weight, self._divisors[name])
        return weight.to(device)


def attach(model: nn.Module, path: str | os.PathLike[str], *, cache_bytes: int = 0) -> Attached:
    """Give a model the weights of a compressed file, which stay compressed in memory.

    A layer's weight is decoded when the layer runs, and dropped afterwards unless it fits the
    cache. Until then the layer has no ``weight``: the model can be run, and neither trained nor
    saved. Everything that is not stored as indices is loaded as usual.

    Args:
        model: on the devices where it will run, with the tensors that the file has. CUDA decodes by
            itself, where the compiled operators have their CUDA part; else the CPU does.
        path: a file that ``save`` wrote with ``calibration`` or ``coder="trellis"``.
        cache_bytes: how many bytes of decoded weights are kept at most, those used last.

    Returns:
        What decodes them.

    Raises:
        TypeError: ``model`` is no module.
        WavpruneError: the file is of an earlier version, broken, or of another model; the model is
            unchanged.

    Example:
        >>> import tempfile
        >>> from wavprune import checkpoint
        >>> net = nn.Sequential(nn.Conv2d(16, 16, 3))
        >>> path = tempfile.mkdtemp() + "/small.safetensors"
        >>> saved = checkpoint.save(net, path, coder="trellis", step=0.01)
        >>> attached = checkpoint.attach(net, path)
        >>> net(torch.ones(1, 16, 4, 4)).shape, attached.compressed_bytes < 2000
        (torch.Size([1, 16, 2, 2]), True)
    """
    check_model(model)
    integer("cache_bytes", cache_bytes, 0)
    path = Path(path)
    data = open_packed(path, None, in_memory=True)
    if data is None:
        raise WavpruneError(
            f"{path} is of an earlier version; allowed: files of calibration= or coder='trellis'"
        )
    own = model.state_dict(keep_vars=True)
    for name in data.names:
        shape = None if name not in own else tuple(own[name].shape)
        if shape != data.kind(name)[1]:
            raise WavpruneError(
                f"{path} holds {name!r} of {data.kind(name)[1]}; the model has {shape}"
            )
    missing = own.keys() - set(data.names)
    if missing:
        raise WavpruneError(f"{path} has not {min(missing)!r} of the model")
    layers = {}
    devices = {}
    for module_name, module in model.named_modules():
        name = f"{module_name}.weight" if module_name else "weight"
        stored = data.aliases.get(name, name)
        weight = module._parameters.get("weight")
        if weight is not None and weight.ndim > 1 and data.is_matrix(stored):
            layers[name] = module, stored
            devices[stored] = weight.device
    with neutral(), named(path):
        plain = _plain(data, [name for name in data.names if name not in layers])
        attached = Attached(data, devices, cache_bytes)
    for module, stored in layers.values():
        _Hooks(attached, stored).install(module)
    with without_gradients():
        model.load_state_dict(plain, strict=False)
    return attached


def _plain(data: Unpacked, names: Sequence[str]) -> dict[str, torch.Tensor]:
    """Tensors that are loaded as usual; each layer with a batch norm is decoded once for them."""
    norms: dict[str, torch.Tensor] = {}
    for link in data.links:
        norms |= data.unfolded(link)
        del norms[link.weight]
    stored = {name: data.aliases.get(name, name) for name in names}
    return {name: norms[own] if own in norms else data.tensor(own) for name, own in stored.items()}


class _Hooks:
    """Gives a layer its weight while it runs."""

    def __init__(self, attached: Attached, name: str) -> None:
        self._attached, self._name = attached, name

    def install(self, module: nn.Module) -> None:
        del module._parameters["weight"]
        module.register_forward_pre_hook(self._before)
        module.register_forward_hook(self._after, always_call=True)

    def _before(self, module: nn.Module, args: Any) -> None:
        del args
        object.__setattr__(module, "weight", self._attached.weight(self._name))

    def _after(self, module: nn.Module, args: Any, output: Any) -> None:
        del args, output
        vars(module).pop("weight", None)
