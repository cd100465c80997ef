"""The steps of a graph, and torch's layers for those that have weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from ..errors import WavpruneError
from . import shapes
from .layers import STANDARD, GraphWeight, Tracer, attribute, find_weights, parameters
from .model import Model
from .operators import OPERATORS
from .tensors import FLOATS, tensor_of

if TYPE_CHECKING:
    from onnx import NodeProto

CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
# Operators that are no functions.
LAYERS = ("Conv", "ConvTranspose", "Constant")
# The module of the tensors that are no layer's.
CONSTANTS = "graph_constants"
assert shapes  # It registers operators.


class Place(NamedTuple):
    """Which tensor of a graph a tensor of the module is.

    Attributes:
        tensor: its name.
        order: its axes in the module's order; None where that is its own.
    """

    tensor: str
    order: tuple[int, ...] | None = None

    def back(self, values: torch.Tensor) -> torch.Tensor:
        """The module's values in the order of the graph's tensor."""
        if self.order is None:
            return values
        return values.permute(tuple(self.order.index(axis) for axis in range(len(self.order))))


@dataclass(frozen=True, slots=True)
class Step:
    """One operator.

    Attributes:
        operator: its name.
        label: of the node, for errors.
        inputs: the names of what it reads; empty for what is left out.
        outputs: the names of what it gives.
        attributes: of the operator.
        module: the name of the module that computes it; None for a function.
        dropped: what nothing reads any more afterwards.
    """

    operator: str
    label: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    attributes: dict[str, Any]
    module: str | None
    dropped: tuple[str, ...]


class _Holder(nn.Module):
    """A part of a dotted name."""


class _Norm(_BatchNorm):
    """A batch norm of any number of axes."""

    def _check_input_dim(self, input: torch.Tensor) -> None:
        del input


class Builder:
    """Makes the steps of a graph.

    Args:
        module: gets the layers.
        model: the graph.

    Attributes:
        places: see ``GraphModule``.
        inputs: names of the graph's inputs that are no initializers.
        outputs: names of its outputs.
    """

    def __init__(self, module: nn.Module, model: Model) -> None:
        self._module, self._model = module, model
        skeleton = model.skeleton()
        self._graph = skeleton.graph
        self._opset = max(
            (entry.version for entry in skeleton.opset_import if entry.domain in STANDARD),
            default=1,
        )
        self._tensors = model.tensors
        self._tracer = Tracer(self._graph, self._tensors)
        self._weights = {weight.tensor: weight for weight in find_weights(model)[0]}
        self._readers = _count_readers(self._graph)
        self.places: dict[str, Place] = {}
        self._parameters: dict[str, nn.Parameter] = {}
        known = set(self._tensors)
        self.inputs = [entry.name for entry in self._graph.input if entry.name not in known]
        self.outputs = [entry.name for entry in self._graph.output]
        self._batch = _fixed_batch(self._graph, self.inputs)
        self._computed = _computed(self._graph, self.inputs)

    def missing_operators(self) -> str:
        """The operators that have no form in torch, each with one of its nodes, or nothing."""
        missing: dict[str, str] = {}
        for node in self._graph.node:
            name = node.op_type
            if node.domain not in STANDARD:
                name = f"{node.domain}.{name}"
            if name not in OPERATORS and name not in LAYERS:
                missing.setdefault(name, node.name or name)
        return ", ".join(f"{name} ({node})" for name, node in missing.items())

    def check_operators(self) -> None:
        """Raise WavpruneError for operators that have no form in torch, naming all of them."""
        if missing := self.missing_operators():
            raise WavpruneError(
                f"the graph has operators that cannot be computed by torch: {missing}; allowed: "
                f"{', '.join(sorted({*OPERATORS, *LAYERS}))}; pruning and compression without "
                "calibration need none of them"
            )

    def steps(
        self, fixed: dict[str, torch.Tensor], named: dict[str, tuple[str, Place]]
    ) -> list[Step]:
        """The operators in their order.

        Args:
            fixed: gets the tensors that operators are set by, which stay on the CPU.
            named: gets the others that functions read, with their names in the module.
        """
        steps = []
        for number, node in enumerate(self._graph.node):
            if node.op_type == "Constant":
                self._constant(node, fixed)
                continue
            label = node.name or f"{node.op_type}_{number}"
            steps.append(self._step(node, label))
        self._add_constants(steps, fixed, named)
        return list(_with_drops(steps, self.outputs))

    def _constant(self, node: NodeProto, fixed: dict[str, torch.Tensor]) -> None:
        if node.output[0] in self._tensors:
            return
        (entry,) = node.attribute
        if not entry.name.startswith(("value_int", "value_float")):
            raise WavpruneError(f"the constant {node.output[0]!r} has a {entry.name}")
        dtype = torch.int64 if "int" in entry.name else torch.float32
        fixed[node.output[0]] = torch.tensor(attribute(node, entry.name), dtype=dtype)

    def _step(self, node: NodeProto, label: str) -> Step:
        inputs = tuple(node.input)
        attributes = self._attributes(node)
        module = self._layer(node, label, attributes)
        if module is not None:
            inputs = (node.input[0],)
        return Step(node.op_type, label, inputs, tuple(node.output), attributes, module, ())

    def _attributes(self, node: NodeProto) -> dict[str, Any]:
        found: dict[str, Any] = {"opset": self._opset, "op": node.op_type}
        found["outputs"] = len(node.output)
        if self._batch is not None and not self._computed.isdisjoint(node.input[:1]):
            found["batch"] = self._batch
        for entry in node.attribute:
            if entry.HasField("t"):
                found[entry.name] = tensor_of(entry.t, entry.name, self._model.folder).read()
            else:
                found[entry.name] = attribute(node, entry.name)
        return found

    def _layer(self, node: NodeProto, label: str, attributes: dict[str, Any]) -> str | None:
        """The name of the module for a node; None where a function computes it."""
        if node.op_type == "BatchNormalization":
            return self._norm(node, attributes)
        if node.op_type not in ("Conv", "ConvTranspose", "Gemm", "MatMul"):
            return None
        weight = self._weights.get(self._tracer.trace(node.input[1]).tensor or "")
        bias = node.input[2] if len(node.input) > 2 else ""
        if node.op_type in ("Conv", "ConvTranspose"):
            return self._convolution(node, label, weight, bias, attributes)
        if weight is None or not self._is_linear(node, weight, bias, attributes):
            return None
        out, read = weight.shape
        linear = nn.Linear(read, out, bias=bool(bias), device="meta")
        return self._add(weight, linear, bias)

    def _is_linear(
        self, node: NodeProto, weight: GraphWeight, bias: str, attributes: Mapping[str, Any]
    ) -> bool:
        if bias and (bias not in self._tensors or self._tensors[bias].shape != weight.shape[:1]):
            return False
        # As another layer reads it, it may be turned around.
        own = _matrix_order(node, self._tracer.trace(node.input[1]).order)
        plain = attributes.get("alpha", 1.0) == attributes.get("beta", 1.0) == 1.0
        return own == weight.order and plain and not attributes.get("transA", 0)

    def _convolution(
        self,
        node: NodeProto,
        label: str,
        weight: GraphWeight | None,
        bias: str,
        attributes: dict[str, Any],
    ) -> str:
        axes = 0 if weight is None else len(weight.shape) - 2
        order = self._tracer.trace(node.input[1]).order
        if (
            weight is None
            or weight.operator != node.op_type
            or weight.order != (order or tuple(range(len(weight.shape))))
            or (bias and bias not in self._tensors)
        ):
            raise WavpruneError(
                f"{label} ({node.op_type}) has a weight or a bias that is no floating-point "
                "constant of its own, and cannot be computed by torch here"
            )
        transposed = node.op_type == "ConvTranspose"
        padded = attributes.get("auto_pad", "NOTSET") != "NOTSET"
        if transposed and ("output_shape" in attributes or padded):
            raise WavpruneError(f"{label} (ConvTranspose) with output_shape or auto_pad")
        attributes["kernel_shape"] = weight.shape[2:]
        kind = (TRANSPOSED if transposed else CONVOLUTIONS)[axes - 1]
        groups = int(attributes.get("group", 1))
        first, second = weight.shape[0], weight.shape[1] * groups
        settings: dict[str, Any] = {
            "kernel_size": weight.shape[2:],
            "stride": tuple(attributes.get("strides") or [1] * axes),
            "dilation": tuple(attributes.get("dilations") or [1] * axes),
            "groups": groups,
            "bias": bool(bias),
        }
        _pad_inside(attributes, settings, axes)
        if transposed:
            settings["output_padding"] = tuple(attributes.get("output_padding") or [0] * axes)
            layer = kind(first, second, device="meta", **settings)
        else:
            layer = kind(second, first, device="meta", **settings)
        return self._add(weight, layer, bias)

    def _add(self, weight: GraphWeight, layer: nn.Module, bias: str) -> str:
        name = _register(self._module, weight.layer, layer)
        order = None if weight.in_order else weight.order
        layer.weight = self._parameter(name, "weight", weight.tensor, order)
        if bias:
            layer.bias = self._parameter(name, "bias", bias, None)
        return name

    def _parameter(
        self, module: str, name: str, tensor: str, order: tuple[int, ...] | None
    ) -> nn.Parameter:
        self.places[f"{module}.{name}"] = Place(tensor, order)
        if tensor not in self._parameters:
            values = self._tensors[tensor].read()
            values = values if order is None else values.permute(order).contiguous()
            self._parameters[tensor] = nn.Parameter(values)
        return self._parameters[tensor]

    def _norm(self, node: NodeProto, attributes: dict[str, Any]) -> str | None:
        if attributes.get("training_mode", 0) or len([name for name in node.output if name]) > 1:
            raise WavpruneError(f"{node.name or 'BatchNormalization'} is in training mode")
        names = list(node.input[1:])
        if any(name not in self._tensors or self._readers[name] > 1 for name in names):
            return None
        (channels,) = self._tensors[names[0]].shape
        norm = _Norm(channels, eps=attributes.get("epsilon", 1e-5), device="meta")
        name = _register(self._module, names[0].removesuffix(".weight"), norm)
        norm.weight = self._parameter(name, "weight", names[0], None)
        norm.bias = self._parameter(name, "bias", names[1], None)
        for own, tensor in zip(("running_mean", "running_var"), names[2:], strict=True):
            norm.register_buffer(own, self._tensors[tensor].read())
            self.places[f"{name}.{own}"] = Place(tensor)
        # A counter that inference does not read, and the graph does not have.
        norm.num_batches_tracked = None
        return name

    def _add_constants(
        self,
        steps: Sequence[Step],
        fixed: dict[str, torch.Tensor],
        named: dict[str, tuple[str, Place]],
    ) -> None:
        learned = set(parameters(self._model))
        owned = {place.tensor: (own, place) for own, place in self.places.items()}
        constants = nn.Module()
        wanted = dict.fromkeys(
            [name for step in steps for name in step.inputs if name in self._tensors]
            + [name for name in self.outputs if name in self._tensors]
        )
        for name in wanted:
            tensor = self._tensors[name]
            if tensor.dtype is None:
                raise WavpruneError(f"tensor {name!r} is {tensor.type_name}, which torch lacks")
            if name not in learned and (tensor.dtype not in FLOATS or _sets(steps, name)):
                fixed[name] = tensor.read()
                continue
            if name in owned:
                named[name] = owned[name]
                continue
            own = f"tensor{len(named)}"
            if name in learned:
                constants.register_parameter(own, nn.Parameter(tensor.read()))
            else:
                constants.register_buffer(own, tensor.read())
            named[name] = f"{CONSTANTS}.{own}", Place(name)
            self.places[named[name][0]] = Place(name)
        self._module.add_module(CONSTANTS, constants)


def _sets(steps: Sequence[Step], name: str) -> bool:
    """True for what an operator is set by, such as the scales of a Resize."""
    settings = ("Resize", "Upsample", "Clip", "Pad")
    readers = [step for step in steps if name in step.inputs]
    return all(step.operator in settings and step.inputs[0] != name for step in readers)


def _matrix_order(node: NodeProto, order: tuple[int, ...] | None) -> tuple[int, ...]:
    order = (0, 1) if order is None else order
    turned = not (node.op_type == "Gemm" and attribute(node, "transB", 0))
    return (order[1], order[0]) if turned else order


def _pad_inside(attributes: dict[str, Any], settings: dict[str, Any], axes: int) -> None:
    """Leave the padding to the convolution where that can do it."""
    pads = list(attributes.get("pads") or [0] * (2 * axes))
    if attributes.get("auto_pad", "NOTSET") == "NOTSET" and pads[:axes] == pads[axes:]:
        settings["padding"] = tuple(pads[:axes])
        attributes["pads"] = [0] * (2 * axes)


def _register(module: nn.Module, name: str, child: nn.Module) -> str:
    """Add a module under a dotted name, or one like it where that cannot be."""
    parent, path = module, []
    *parts, last = [part or "_" for part in name.split(".")]
    for part in parts:
        while part not in parent._modules and hasattr(parent, part):
            part += "_"
        if part not in parent._modules:
            parent.add_module(part, _Holder())
        parent = parent.get_submodule(part)
        path.append(part)
    holder = parent._modules.get(last)
    if isinstance(holder, _Holder):
        # It holds layers whose names begin with this one's.
        del parent._modules[last]
        child._modules.update(holder._modules)
    while hasattr(parent, last):
        last += "_"
    parent.add_module(last, child)
    return ".".join([*path, last])


def _count_readers(graph: Any) -> dict[str, int]:
    counts: dict[str, int] = {}
    for node in graph.node:
        for name in node.input:
            counts[name] = counts.get(name, 0) + 1
    return counts


def _fixed_batch(graph: Any, inputs: Sequence[str]) -> int | None:
    """How many samples the graph was written for, where it says a number."""
    for entry in graph.input:
        if entry.name in inputs[:1] and entry.type.tensor_type.shape.dim:
            size = entry.type.tensor_type.shape.dim[0]
            return int(size.dim_value) if size.HasField("dim_value") else None
    return None


def _computed(graph: Any, inputs: Sequence[str]) -> set[str]:
    """What comes from the inputs, but for their sizes: all that may have samples on an axis."""
    found = set(inputs)
    for node in graph.node:
        if node.op_type not in ("Shape", "Size") and not found.isdisjoint(node.input):
            found |= set(node.output)
    return found


def _with_drops(steps: Sequence[Step], outputs: Sequence[str]) -> Iterator[Step]:
    """The steps, each with what is read for the last time there."""
    kept = {"", *outputs}
    found: list[Step] = []
    for step in reversed(steps):
        last = {*step.inputs, *step.outputs} - kept
        kept |= last
        found.append(replace(step, dropped=tuple(sorted(last))))
    yield from reversed(found)
