"""ONNX operators as functions of torch: ``OPERATORS[name](attributes, *inputs)``.

Those that networks of convolutions are made of, at opset 9 to 25: https://onnx.ai/onnx/operators.
Optional inputs that are left out are None.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch.nn import functional

from ..errors import WavpruneError
from .tensors import TYPES

Attributes = Mapping[str, Any]
Operator = Callable[..., Any]
Function = TypeVar("Function", bound=Operator)

OPERATORS: dict[str, Operator] = {}


def operator(*names: str) -> Callable[[Function], Function]:
    """Register a function for operators."""

    def add(function: Function) -> Function:
        OPERATORS.update(dict.fromkeys(names, function))
        return function

    return add


def register(names: Mapping[str, Operator]) -> None:
    """Register functions of the inputs alone."""
    for name, function in names.items():
        OPERATORS[name] = _plain(function)


def _plain(function: Operator) -> Operator:
    return lambda attributes, *inputs: function(*inputs)


register(
    {
        **{name.capitalize(): getattr(torch, name) for name in ("abs", "ceil", "cos", "exp")},
        **{name.capitalize(): getattr(torch, name) for name in ("floor", "log", "neg", "round")},
        **{name.capitalize(): getattr(torch, name) for name in ("sign", "sin", "sqrt", "tanh")},
        **{name.capitalize(): getattr(torch, name) for name in ("erf", "reciprocal", "sigmoid")},
        "Add": torch.add,
        "And": torch.logical_and,
        "Equal": torch.eq,
        "Expand": lambda x, shape: x * torch.ones(shape.tolist(), dtype=x.dtype, device=x.device),
        "Greater": torch.gt,
        "GreaterOrEqual": torch.ge,
        "HardSwish": functional.hardswish,
        "Identity": lambda x: x,
        "Less": torch.lt,
        "LessOrEqual": torch.le,
        "MatMul": torch.matmul,
        "Mish": functional.mish,
        "Mul": torch.mul,
        "Not": torch.logical_not,
        "Or": torch.logical_or,
        "Pow": lambda x, y: torch.pow(x, y).to(x.dtype),
        "Relu": functional.relu,
        "Size": lambda x: torch.tensor(x.numel()),
        "Softplus": functional.softplus,
        "Softsign": functional.softsign,
        "Sub": torch.sub,
        "Tile": lambda x, repeats: x.repeat(repeats.tolist()),
        "Where": torch.where,
        "GlobalAveragePool": lambda x: x.mean(tuple(range(2, x.ndim)), keepdim=True),
        "GlobalMaxPool": lambda x: x.amax(tuple(range(2, x.ndim)), keepdim=True),
        "Range": lambda start, stop, step: torch.arange(start.item(), stop.item(), step.item()),
    }
)


@operator("Gelu")
def _gelu(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return functional.gelu(x, approximate=attributes.get("approximate", "none"))


@operator("Div")
def _div(attributes: Attributes, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    del attributes
    whole = not x.is_floating_point() and not y.is_floating_point()
    return torch.div(x, y, rounding_mode="trunc" if whole else None)


def _of_many(name: str) -> Operator:
    combine: Operator = {"Max": torch.maximum, "Min": torch.minimum}.get(name, torch.add)

    def run(*inputs: torch.Tensor) -> torch.Tensor:
        total = inputs[0]
        for other in inputs[1:]:
            total = combine(total, other)
        return total / len(inputs) if name == "Mean" else total

    return run


register({name: _of_many(name) for name in ("Max", "Min", "Sum", "Mean")})


@operator("Clip")
def _clip(
    attributes: Attributes,
    x: torch.Tensor,
    low: torch.Tensor | None = None,
    high: torch.Tensor | None = None,
) -> torch.Tensor:
    bounds = (attributes.get("min", low), attributes.get("max", high))
    if bounds == (None, None):
        return x
    return torch.clamp(x, *[b.to(x.device) if isinstance(b, torch.Tensor) else b for b in bounds])


@operator("LeakyRelu")
def _leaky_relu(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return functional.leaky_relu(x, attributes.get("alpha", 0.01))


@operator("PRelu")
def _prelu(attributes: Attributes, x: torch.Tensor, slope: torch.Tensor) -> torch.Tensor:
    del attributes
    return torch.where(x < 0, x * slope, x)


@operator("Elu")
def _elu(attributes: Attributes, x: torch.Tensor) -> Any:
    return functional.elu(x, attributes.get("alpha", 1.0))


@operator("Selu")
def _selu(attributes: Attributes, x: torch.Tensor) -> Any:
    alpha = attributes.get("alpha", 1.6732632423543772)
    return attributes.get("gamma", 1.0507009873554805) * functional.elu(x, alpha)


@operator("HardSigmoid")
def _hard_sigmoid(attributes: Attributes, x: torch.Tensor) -> Any:
    return (attributes.get("alpha", 0.2) * x + attributes.get("beta", 0.5)).clamp(0, 1)


def _softmax_of(function: Operator) -> Operator:
    def run(attributes: Attributes, x: torch.Tensor) -> Any:
        if attributes["opset"] >= 13:
            return function(x, attributes.get("axis", -1))
        # Before opset 13, of all axes from this one on together.
        axis = attributes.get("axis", 1)
        return function(x.flatten(axis), -1).reshape(x.shape)

    return run


OPERATORS["Softmax"] = _softmax_of(torch.softmax)
OPERATORS["LogSoftmax"] = _softmax_of(torch.log_softmax)


@operator("Gemm")
def _gemm(
    attributes: Attributes, a: torch.Tensor, b: torch.Tensor, c: torch.Tensor | None = None
) -> Any:
    a = a.mT if attributes.get("transA", 0) else a
    b = b.mT if attributes.get("transB", 0) else b
    product = attributes.get("alpha", 1.0) * (a @ b)
    return product if c is None else product + attributes.get("beta", 1.0) * c


def axes_of(attributes: Attributes, axes: torch.Tensor | None) -> list[int] | None:
    """Axes, which are an input in later opsets and an attribute in earlier ones."""
    if axes is not None:
        return [int(axis) for axis in axes.tolist()]
    given = attributes.get("axes")
    return None if given is None else list(given)


def _reduce(function: Operator) -> Operator:
    def run(attributes: Attributes, x: torch.Tensor, axes: torch.Tensor | None = None) -> Any:
        chosen = axes_of(attributes, axes)
        if not chosen:
            if attributes.get("noop_with_empty_axes", 0):
                return x
            chosen = list(range(x.ndim))
        return function(x, chosen, keepdim=bool(attributes.get("keepdims", 1)))

    return run


def _norm(order: int) -> Operator:
    return lambda x, axes, keepdim: torch.linalg.vector_norm(x, order, dim=axes, keepdim=keepdim)


OPERATORS |= {
    "ReduceMean": _reduce(torch.mean),
    "ReduceSum": _reduce(torch.sum),
    "ReduceMax": _reduce(torch.amax),
    "ReduceMin": _reduce(torch.amin),
    "ReduceL1": _reduce(_norm(1)),
    "ReduceL2": _reduce(_norm(2)),
    "ReduceSumSquare": _reduce(lambda x, axes, keepdim: x.square().sum(axes, keepdim=keepdim)),
}


@operator("ArgMax")
def _arg_max(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    return x.argmax(attributes.get("axis", 0), keepdim=bool(attributes.get("keepdims", 1)))


@operator("Cast")
def _cast(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    dtype = TYPES[attributes["to"]][2]
    if dtype is None:
        raise WavpruneError(f"Cast to {TYPES[attributes['to']][0]}, which torch lacks")
    return x.to(dtype)


@operator("CastLike")
def _cast_like(attributes: Attributes, x: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    del attributes
    return x.to(like.dtype)


@operator("DequantizeLinear")
def _dequantize(
    attributes: Attributes,
    x: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor | None = None,
) -> torch.Tensor:
    if attributes.get("block_size", 0):
        raise WavpruneError("DequantizeLinear with block_size")
    if scale.ndim:
        shape = [1] * x.ndim
        shape[attributes.get("axis", 1)] = -1
        scale = scale.reshape(shape)
        zero = None if zero is None else zero.reshape(shape)
    values = x.to(torch.int32) if zero is None else x.to(torch.int32) - zero.to(torch.int32)
    return values.to(scale.dtype) * scale


@operator("Dropout")
def _dropout(attributes: Attributes, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    del attributes, others
    return x


@operator("BatchNormalization")
def _batch_norm(attributes: Attributes, x: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    weight, bias, mean, var = others
    return functional.batch_norm(
        x, mean, var, weight, bias, training=False, eps=attributes.get("epsilon", 1e-5)
    )


@operator("InstanceNormalization")
def _instance_norm(
    attributes: Attributes, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    return functional.instance_norm(
        x, weight=weight, bias=bias, eps=attributes.get("epsilon", 1e-5)
    )


@operator("GroupNormalization")
def _group_norm(
    attributes: Attributes, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor
) -> torch.Tensor:
    eps = attributes.get("epsilon", 1e-5)
    return functional.group_norm(x, attributes["num_groups"], weight, bias, eps)


@operator("LayerNormalization")
def _layer_norm(
    attributes: Attributes,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
) -> torch.Tensor:
    shape = x.shape[attributes.get("axis", -1) :]
    return functional.layer_norm(
        x,
        shape,
        weight.expand(shape),
        None if bias is None else bias.expand(shape),
        attributes.get("epsilon", 1e-5),
    )


def pads_of(attributes: Attributes, sizes: Sequence[int], kernel: Sequence[int]) -> list[int]:
    """Begins and ends of the padding of a convolution or a pool, as ONNX orders them."""
    axes = len(kernel)
    mode = attributes.get("auto_pad", "NOTSET")
    if mode == "NOTSET":
        return list(attributes.get("pads") or [0] * (2 * axes))
    if mode == "VALID":
        return [0] * (2 * axes)
    strides = attributes.get("strides") or [1] * axes
    dilations = attributes.get("dilations") or [1] * axes
    begins, ends = [], []
    for size, k, stride, dilation in zip(sizes, kernel, strides, dilations, strict=True):
        out = -(-size // stride)
        total = max((out - 1) * stride + dilation * (k - 1) + 1 - size, 0)
        small, large = total // 2, total - total // 2
        begins.append(small if mode == "SAME_UPPER" else large)
        ends.append(large if mode == "SAME_UPPER" else small)
    return begins + ends


def torch_pads(pads: Sequence[int]) -> list[int]:
    """ONNX's pads as ``functional.pad`` takes them: the last axis first, begin and end together."""
    axes = len(pads) // 2
    return [pads[axis + side * axes] for axis in reversed(range(axes)) for side in (0, 1)]


@operator("MaxPool", "AveragePool", "LpPool")
def _pool(attributes: Attributes, x: torch.Tensor) -> torch.Tensor:
    kernel = list(attributes["kernel_shape"])
    axes = len(kernel)
    strides = list(attributes.get("strides") or [1] * axes)
    dilations = list(attributes.get("dilations") or [1] * axes)
    pads = pads_of(attributes, x.shape[2:], kernel)
    if attributes.get("ceil_mode", 0):
        for axis in range(axes):
            reach = dilations[axis] * (kernel[axis] - 1) + 1
            span = x.shape[2 + axis] + pads[axis] + pads[axes + axis] - reach
            more = -span % strides[axis]
            # A window that begins in the padding at the end is left out.
            begins = -(-span // strides[axis]) * strides[axis]
            pads[axes + axis] += more if begins < x.shape[2 + axis] + pads[axis] else 0
    if attributes["op"] == "MaxPool":
        padded = functional.pad(x, torch_pads(pads), value=-math.inf)
        pool = (functional.max_pool1d, functional.max_pool2d, functional.max_pool3d)[axes - 1]
        return pool(padded, kernel, strides, 0, dilations)
    if attributes["op"] == "LpPool" or any(d != 1 for d in dilations):
        raise WavpruneError(f"{attributes['op']} with dilations={dilations}")
    mean = (functional.avg_pool1d, functional.avg_pool2d, functional.avg_pool3d)[axes - 1]
    total = mean(functional.pad(x, torch_pads(pads)), kernel, strides)
    said = attributes.get("pads") or [0] * (2 * axes)
    if not any(pads) or (attributes.get("count_include_pad", 0) and list(said) == pads):
        return total
    ones = torch.ones_like(x[:1, :1])
    if attributes.get("count_include_pad", 0):
        ones = functional.pad(ones, torch_pads(said), value=1.0)
        pads = [now - before for now, before in zip(pads, said, strict=True)]
    counted = mean(functional.pad(ones, torch_pads(pads)), kernel, strides)
    return total / counted
