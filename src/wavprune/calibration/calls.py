"""Convolutions and linear maps as they are called: what they really read, and how.

Layers are found by their weights in the calls of torch's functions, not by hooks on modules: a
module may pad its input itself before it calls the convolution, and only the call sees that.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

Function = Callable[..., torch.Tensor]

_CONVOLUTION = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_TRANSPOSED = (
    *("input", "weight", "bias", "stride", "padding"),
    *("output_padding", "groups", "dilation"),
)
_LINEAR = ("input", "weight", "bias")
# The parameters of each function in their order, and the spatial axes that it has.
_LAYERS: dict[Any, tuple[tuple[str, ...], int]] = {
    functional.conv1d: (_CONVOLUTION, 1),
    functional.conv2d: (_CONVOLUTION, 2),
    functional.conv3d: (_CONVOLUTION, 3),
    functional.conv_transpose1d: (_TRANSPOSED, 1),
    functional.conv_transpose2d: (_TRANSPOSED, 2),
    functional.conv_transpose3d: (_TRANSPOSED, 3),
    functional.linear: (_LINEAR, 0),
}
_NORMS: dict[Any, tuple[str, ...]] = {
    functional.batch_norm: (
        *("input", "running_mean", "running_var", "weight", "bias"),
        *("training", "momentum", "eps"),
    ),
    torch.batch_norm: (
        *("input", "weight", "bias", "running_mean", "running_var"),
        *("training", "momentum", "eps", "cudnn_enabled"),
    ),
}


@dataclass(frozen=True, slots=True)
class Call:
    """One call of a convolution or a linear map.

    Attributes:
        function: what was called.
        input: ``(N, C, ...)``; of a linear map ``(..., in)``.
        weight: of the layer.
        bias: of the layer, or None.
        options: all other arguments, by name.
        spatial: how many spatial axes a kernel has; 0 for a linear map.
    """

    function: Function
    input: torch.Tensor
    weight: torch.Tensor
    bias: torch.Tensor | None
    options: Mapping[str, Any]
    spatial: int

    @property
    def transposed(self) -> bool:
        """True for a transposed convolution."""
        return _LAYERS[self.function][0] is _TRANSPOSED

    @property
    def groups(self) -> int:
        """Of the convolution; 1 for a linear map."""
        return int(self.options.get("groups", 1))

    def axes(self, name: str, default: int) -> tuple[int, ...]:
        """An option that has a value for each spatial axis, such as ``"stride"``."""
        value = self.options.get(name, default)
        if isinstance(value, int):
            return (value,) * self.spatial
        values = tuple(int(entry) for entry in value)
        return values * self.spatial if len(values) == 1 else values

    def run(
        self,
        input: torch.Tensor | None = None,
        weight: torch.Tensor | None = None,
        bias: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Call it, with what is given in place of what it was called with."""
        return self.function(
            self.input if input is None else input,
            self.weight if weight is None else weight,
            self.bias if bias is None else bias,
            **self.options,
        )

    @property
    def batched(self) -> torch.Tensor:
        """The input ``(N, C, ...)``, of a linear map ``(N, positions, in)``."""
        if self.spatial:
            return self.input if self.input.ndim == self.spatial + 2 else self.input[None]
        values = self.input if self.input.ndim > 1 else self.input[None]
        return values.reshape(len(values), -1, values.shape[-1])


@dataclass(frozen=True, slots=True)
class NormCall:
    """One call of a batch norm.

    Attributes:
        function: what was called.
        arguments: by name.
    """

    function: Function
    arguments: Mapping[str, Any]

    @property
    def input(self) -> torch.Tensor:
        """``(N, C, ...)``."""
        value: torch.Tensor = self.arguments["input"]
        return value

    @property
    def uses_batch(self) -> bool:
        """True where it takes the statistics of its batch and not running ones."""
        return bool(self.arguments.get("training")) or self.arguments["running_mean"] is None

    def run(self, **replaced: Any) -> torch.Tensor:
        """Call it, with these arguments in place of those that it was called with."""
        return self.function(**{**self.arguments, **replaced})


class Watched(NamedTuple):
    """The tensors by which calls are recognized.

    Attributes:
        weights: the name of each layer -> its weight.
        norms: the name of each batch norm -> its running mean.
    """

    weights: Mapping[str, torch.Tensor]
    norms: Mapping[str, torch.Tensor]


class Tap(TorchFunctionMode):
    """While it is active, every call of a watched layer or batch norm goes through a method.

    Args:
        watched: what to look for. Of tensors that are one and the same object, the first counts.
    """

    def __init__(self, watched: Watched) -> None:
        super().__init__()
        self._layers = _by_identity(watched.weights.items())
        self._norms = _by_identity(watched.norms.items())

    def layer(self, name: str, call: Call) -> torch.Tensor:
        """What the call of a layer returns."""
        del name
        return call.run()

    def norm(self, name: str, call: NormCall) -> torch.Tensor:
        """What the call of a batch norm returns; its name is empty where it is not watched."""
        del name
        return call.run()

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        del types
        kwargs = kwargs or {}
        if func in _LAYERS:
            names, spatial = _LAYERS[func]
            given = _named(names, args, kwargs)
            weight = given.pop("weight")
            name = self._layers.get(id(weight))
            if name is not None:
                tensors = given.pop("input"), weight, given.pop("bias", None)
                return self.layer(name[0], Call(func, *tensors, given, spatial))
        elif func in _NORMS:
            given = _named(_NORMS[func], args, kwargs)
            known = self._norms.get(id(given["running_mean"]))
            return self.norm("" if known is None else known[0], NormCall(func, given))
        return func(*args, **kwargs)


class Counting(Tap):
    """Counts what all convolutions and linear maps of a network do, watched or not.

    Attributes:
        multiplications: of inputs by weights.
        outputs: values that they return.
    """

    def __init__(self) -> None:
        super().__init__(Watched({}, {}))
        self.multiplications = self.outputs = 0

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        out = super().__torch_function__(func, types, args, kwargs)
        if func in _LAYERS:
            names, _ = _LAYERS[func]
            given = _named(names, args, kwargs or {})
            # Each input of a transposed convolution meets as many weights as elsewhere each output.
            values = given["input"] if names is _TRANSPOSED else out
            self.multiplications += values.numel() * given["weight"].shape[1:].numel()
            self.outputs += out.numel()
        return out


def _named(
    names: Sequence[str], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> dict[str, Any]:
    """The arguments of a call by their names."""
    return {**dict(zip(names, args, strict=False)), **kwargs}


def _by_identity(
    named: Iterable[tuple[str, torch.Tensor]],
) -> dict[int, tuple[str, torch.Tensor]]:
    found: dict[int, tuple[str, torch.Tensor]] = {}
    for name, tensor in named:
        found.setdefault(id(tensor), (name, tensor))
    return found
