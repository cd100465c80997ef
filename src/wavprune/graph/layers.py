"""Which tensors of a graph are weights of layers, by the operators that read them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..errors import WavpruneError
from .model import Model
from .tensors import FLOATS, GraphTensor

if TYPE_CHECKING:
    from onnx import GraphProto, NodeProto

STANDARD = ("", "ai.onnx")
SUFFIX = ".weight"
KERNELS = ("Conv", "ConvTranspose")
MATRICES = ("Gemm", "MatMul")
# Operators whose weights are integers; named, so that nobody believes that they were pruned.
INTEGERS = ("ConvInteger", "MatMulInteger", "QLinearConv", "QLinearMatMul")
# What a weight may pass on its way to its layer without becoming another.
PASSED = ("Identity", "Transpose", "Cast")
# Operators whose constant inputs are learned.
LEARNED = (
    *(*KERNELS, *MATRICES, "BatchNormalization", "LayerNormalization", "InstanceNormalization"),
    *("GroupNormalization", "RMSNormalization", "PRelu", "LSTM", "GRU", "RNN"),
)
# From this many values on, a constant is more than a setting of some operator.
LARGE = 1024


@dataclass(frozen=True, slots=True)
class GraphWeight:
    """The weight of a layer in a graph.

    Attributes:
        layer: the name of its tensor without ``".weight"``.
        tensor: the name of its tensor.
        operator: ``"Conv"``, ``"ConvTranspose"``, ``"Gemm"`` or ``"MatMul"``.
        order: the axes of the tensor in torch's order: ``(Cout, Cin/groups, ...)``, of a transposed
            convolution ``(Cin, Cout/groups, ...)``, of a matrix ``(out, in)``.
        shape: in that order.
        groups: of the convolution; 1 for a matrix.
    """

    layer: str
    tensor: str
    operator: str
    order: tuple[int, ...]
    shape: tuple[int, ...]
    groups: int

    @property
    def is_convolution(self) -> bool:
        """True for kernels."""
        return self.operator in KERNELS

    @property
    def transposed(self) -> bool:
        """True for a transposed convolution."""
        return self.operator == "ConvTranspose"

    @property
    def in_order(self) -> bool:
        """True where the tensor has torch's order itself."""
        return self.order == tuple(range(len(self.order)))

    def of(self, values: torch.Tensor) -> torch.Tensor:
        """The tensor in torch's order, a view."""
        return values.permute(self.order)

    def back(self, weight: torch.Tensor) -> torch.Tensor:
        """The inverse of ``of``."""
        return weight.permute(tuple(self.order.index(axis) for axis in range(len(self.order))))


class Traced(NamedTuple):
    """Where an input of an operator comes from.

    Attributes:
        tensor: the name of a constant, or None where it is computed.
        order: how its axes were permuted on the way; None for not at all.
        reason: why it is no constant, where it comes from one all the same.
    """

    tensor: str | None
    order: tuple[int, ...] | None = None
    reason: str | None = None


class Tracer:
    """Follows the inputs of operators back to constants.

    Args:
        graph: the main graph.
        tensors: its constants.
    """

    def __init__(self, graph: GraphProto, tensors: Mapping[str, GraphTensor]) -> None:
        self._tensors = tensors
        self._producers = {name: node for node in graph.node for name in node.output}
        self._sparse = {sparse.values.name for sparse in graph.sparse_initializer}

    def trace(self, name: str) -> Traced:
        """Where a value comes from."""
        order: tuple[int, ...] | None = None
        seen: set[str] = set()
        while name not in self._tensors:
            if name in self._sparse:
                return Traced(None, reason="is sparse")
            node = self._producers.get(name)
            if node is None or name in seen:
                return Traced(None)
            seen.add(name)
            if node.op_type not in PASSED or node.domain not in STANDARD:
                return Traced(None, reason=self._reason(node))
            if node.op_type == "Transpose":
                axes = attribute(node, "perm")
                if axes is None:
                    # Without perm, all axes are turned around; how many there are is known later.
                    axes = (-1,)
                order = tuple(axes) if order is None else _after(tuple(axes), order)
            name = node.input[0]
        tensor = self._tensors[name]
        if order == (-1,):
            order = tuple(reversed(range(len(tensor.shape))))
        if order is not None and sorted(order) != list(range(len(tensor.shape))):
            return Traced(None, reason=f"is {name!r}, whose axes are permuted in parts")
        return Traced(name, order)

    def _reason(self, node: NodeProto) -> str | None:
        constants = [name for name in node.input if name in self._tensors]
        if node.op_type == "DequantizeLinear" and constants:
            stored = self._tensors[constants[0]]
            return f"is dequantized from {stored.type_name} when the network runs"
        everything = bool(constants) and all(
            name in self._tensors or not name for name in node.input
        )
        return f"is computed by {node.op_type} when the network runs" if everything else None


def _after(first: tuple[int, ...], then: tuple[int, ...]) -> tuple[int, ...]:
    """One permutation for two, ``first`` being nearer to the constant."""
    if -1 in (*first, *then) or len(first) != len(then):
        return (-2,)
    return tuple(first[axis] for axis in then)


def attribute(node: NodeProto, name: str, default: Any = None) -> Any:
    """The value of an attribute that is a number, a string or a list of these."""
    for entry in node.attribute:
        if entry.name == name:
            value = _VALUES[entry.type](entry)
            return value.decode() if isinstance(value, bytes) else value
    return default


_VALUES: dict[int, Any] = {
    1: lambda entry: entry.f,
    2: lambda entry: entry.i,
    3: lambda entry: entry.s,
    6: lambda entry: tuple(entry.floats),
    7: lambda entry: tuple(entry.ints),
    8: lambda entry: tuple(text.decode() for text in entry.strings),
}


def find_weights(model: Model) -> tuple[list[GraphWeight], dict[str, str]]:
    """The weights of a graph, shared ones once, and the layers that cannot be pruned, with reasons.

    Raises:
        WavpruneError: a weight does not fit its operator.
    """
    graph = model.skeleton().graph
    tracer = Tracer(graph, model.tensors)
    weights: dict[str, GraphWeight] = {}
    skipped: dict[str, str] = {}
    layers: set[str] = set()
    for number, node in enumerate(graph.node):
        name = node.name or f"{node.op_type}_{number}"
        for inner in _inside(node):
            if inner.op_type in (*KERNELS, *INTEGERS):
                where = f"{name}/{inner.name or inner.op_type}"
                skipped[where] = f"is in a subgraph of {node.op_type}"
        if node.domain not in STANDARD:
            if any(kind in node.op_type for kind in ("Conv", "Gemm", "MatMul")):
                skipped[name] = f"is {node.domain}.{node.op_type}, no operator of ONNX"
            continue
        if node.op_type in INTEGERS:
            skipped[name] = f"is {node.op_type}, whose weight is of integers"
            continue
        for entry in _weight_inputs(node):
            traced = tracer.trace(entry)
            if traced.tensor is None:
                if traced.reason is not None or node.op_type in KERNELS:
                    reason = traced.reason or "is computed when the network runs"
                    skipped[name] = f"its weight {reason}"
                continue
            if traced.tensor in weights:
                continue
            tensor = model.tensors[traced.tensor]
            fault = _unusable(node, tensor)
            if fault is not None:
                skipped[name] = f"its weight {traced.tensor!r} {fault}"
                continue
            layer = traced.tensor.removesuffix(SUFFIX)
            layer = traced.tensor if layer in layers or not layer else layer
            layers.add(layer)
            weights[traced.tensor] = _weight(node, entry, layer, tensor, traced.order)
    return list(weights.values()), skipped


def orders(model: Model) -> dict[str, tuple[int, ...]]:
    """The ``order`` of each weight that is not in torch's order itself, by its tensor's name."""
    return {w.tensor: w.order for w in find_weights(model)[0] if not w.in_order}


def _inside(node: NodeProto) -> Iterator[NodeProto]:
    """The nodes of a node's subgraphs."""
    graphs = [g for entry in node.attribute for g in (entry.g, *entry.graphs)]
    while graphs:
        for inner in graphs.pop().node:
            yield inner
            graphs += [g for entry in inner.attribute for g in (entry.g, *entry.graphs)]


def _weight_inputs(node: NodeProto) -> Sequence[str]:
    """The inputs of an operator that may be its weight."""
    if node.op_type in (*KERNELS, "Gemm"):
        return [node.input[1]]
    return [node.input[1], node.input[0]] if node.op_type == "MatMul" else []


def _unusable(node: NodeProto, tensor: GraphTensor) -> str | None:
    axes = len(tensor.shape)
    if tensor.dtype not in FLOATS:
        return f"is {tensor.type_name}"
    if axes not in (range(3, 6) if node.op_type in KERNELS else (2,)):
        return f"has {axes} axes" if node.op_type in KERNELS or axes > 2 else "is a vector"
    return "is empty" if 0 in tensor.shape else None


def _weight(
    node: NodeProto, entry: str, layer: str, tensor: GraphTensor, order: tuple[int, ...] | None
) -> GraphWeight:
    order = tuple(range(len(tensor.shape))) if order is None else order
    groups = 1
    if node.op_type in KERNELS:
        groups = int(attribute(node, "group", 1))
    elif entry == node.input[1] and not (node.op_type == "Gemm" and attribute(node, "transB", 0)):
        # It is multiplied from the right: (in, out).
        order = (order[1], order[0])
    shape = tuple(tensor.shape[axis] for axis in order)
    if groups < 1 or shape[0] % groups:
        raise WavpruneError(
            f"layer {layer!r}: {shape[0]} channels cannot be divided into {groups} groups"
        )
    return GraphWeight(layer, tensor.name, node.op_type, order, shape, groups)


def parameters(model: Model) -> list[str]:
    """The floating-point tensors that are learned, or large: what a compressed file holds.

    All others, such as the shapes and scales that operators are set by, are needed before a
    network runs, and stay in the graph.
    """
    graph = model.skeleton().graph
    tracer = Tracer(graph, model.tensors)
    learned = {
        tracer.trace(name).tensor
        for node in graph.node
        if node.domain in STANDARD and node.op_type in LEARNED
        for name in node.input
    }
    initializers = {proto.name for proto in model.proto.graph.initializer}
    return [
        name
        for name, tensor in model.tensors.items()
        if name in initializers
        and tensor.dtype in FLOATS
        and tensor.numel
        and (tensor.numel >= LARGE or (name in learned and tensor.shape))
    ]
