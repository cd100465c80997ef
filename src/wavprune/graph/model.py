"""ONNX models, from a path or from memory, with everything in them checked."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..common.files import check_regular, describe_content
from ..common.optional import require
from ..errors import WavpruneError
from .tensors import (
    EXTRA,
    FLOATS,
    PURPOSE,
    GraphTensor,
    all_tensors,
    clear_values,
    is_external,
    tensor_of,
)

if TYPE_CHECKING:
    from onnx import ModelProto, NodeProto

# In the metadata of a graph whose weights are in a compressed file.
KEY = "wavprune"
# Operators of a graph whose local functions were written out.
MOST_OPERATORS = 1_000_000
# What a protocol buffer can have.
LARGEST_FILE = (1 << 31) - 1


def onnx() -> Any:
    """The ``onnx`` package."""
    return require("onnx", extra=EXTRA, purpose=PURPOSE)


@dataclass(frozen=True)
class Model:
    """A model whose tensors were checked.

    Attributes:
        proto: the message.
        folder: where its external data is; None for a model in memory.
    """

    proto: ModelProto
    folder: Path | None = None

    @cached_property
    def tensors(self) -> dict[str, GraphTensor]:
        """The initializers of the graph, and what its ``Constant`` nodes hold, by name.

        Raises:
            WavpruneError: two have one name.
        """
        found: dict[str, GraphTensor] = {}
        constants = [
            (node.output[0], attribute.t)
            for node in self.proto.graph.node
            if node.op_type == "Constant" and node.domain in ("", "ai.onnx") and node.output
            for attribute in node.attribute
            if attribute.name == "value"
        ]
        initializers = [(proto.name, proto) for proto in self.proto.graph.initializer]
        for name, proto in (*initializers, *constants):
            if name in found:
                raise WavpruneError(f"two tensors are called {name!r}")
            found[name] = tensor_of(proto, name, self.folder)
        return found

    def sizes(self) -> list[tuple[int, int]]:
        """Values and bytes of every tensor whose dtype torch has.

        Integers say how operators work, and do not count as values.
        """
        tensors = [(t.numel, t.dtype) for t in self.tensors.values()]
        return [
            (numel if dtype in FLOATS else 0, numel * dtype.itemsize)
            for numel, dtype in tensors
            if dtype is not None
        ]

    def input_shape(self) -> tuple[int | None, ...]:
        """The shape of the first input that is no initializer; None where it is not fixed.

        It is empty where the graph has no such input, or does not say.
        """
        known = {tensor.name for tensor in self.proto.graph.initializer}
        for entry in self.proto.graph.input:
            if entry.name not in known:
                sizes = entry.type.tensor_type.shape.dim
                return tuple(s.dim_value if s.dim_value > 0 else None for s in sizes)
        return ()

    @property
    def has_external(self) -> bool:
        """True where bytes lie in other files."""
        return any(map(is_external, all_tensors(self.proto)))

    def copy(self) -> Model:
        """The same model, in messages of its own."""
        proto: ModelProto = onnx().ModelProto()
        proto.CopyFrom(self.proto)
        return Model(proto, self.folder)

    def skeleton(self) -> ModelProto:
        """A copy without any values, with its local functions written out."""
        proto: ModelProto = onnx().ModelProto()
        # Values are copied only to be dropped; without functions nothing is copied.
        if not self.proto.functions:
            return self.proto
        _check_functions(self.proto)
        proto.CopyFrom(self.proto)
        for tensor in proto.graph.initializer:
            clear_values(tensor)
        inliner = require("onnx.inliner", extra=EXTRA, purpose=PURPOSE)
        inlined: ModelProto = inliner.inline_local_functions(proto)
        return inlined


def read_model(path: Path) -> Model:
    """The model of an ``.onnx`` file; its external data is not read.

    Raises:
        WavpruneError: the file is no valid model, or names bytes that it may not.
    """
    package = onnx()
    check_regular(path)
    known = describe_content(path)
    if known is not None:
        raise WavpruneError(f"{path} cannot be read as an ONNX model: it is {known}")
    size = path.stat().st_size
    if size > LARGEST_FILE:
        raise WavpruneError(
            f"{path} has {size:,} bytes; an .onnx file has at most 2 GB, and larger weights in "
            "external data"
        )
    decode_error = require("google.protobuf.message", extra=EXTRA, purpose=PURPOSE).DecodeError
    try:
        proto = package.load_model_from_string(path.read_bytes())
    except (decode_error, ValueError) as error:
        raise WavpruneError(f"{path} cannot be read as an ONNX model: {_line(error)}") from error
    model = Model(proto, path.parent)
    if stored_in(proto) is not None:
        raise WavpruneError(
            f"{path} is a graph whose weights are compressed in a file beside it; wavprune "
            "decompress makes an ordinary model of both"
        )
    try:
        # Before the checker opens any file that a tensor names.
        _check_tensors(model)
    except WavpruneError as error:
        raise WavpruneError(f"{path}: {error}") from error
    check_valid(path)
    return model


def stored_in(proto: ModelProto) -> str | None:
    """What the metadata of a graph say of the compressed file of its weights; None without one."""
    return metadata_of(proto).get(KEY)


def metadata_of(proto: ModelProto) -> dict[str, str]:
    """What a model says of itself."""
    return {entry.key: entry.value for entry in proto.metadata_props}


def set_metadata(proto: ModelProto, entries: Mapping[str, str | None]) -> None:
    """Put entries in place of those of the same keys in a model's metadata; None leaves none."""
    props = proto.metadata_props
    for number in reversed(range(len(props))):
        if props[number].key in entries:
            del props[number]
    for key, value in entries.items():
        if value is not None:
            props.add(key=key, value=value)


def as_model(value: ModelProto | Model) -> Model:
    """A checked model in memory.

    Raises:
        WavpruneError: it is not valid.
    """
    if isinstance(value, Model):
        return value
    model = Model(value)
    _check_tensors(model)
    check_valid(value)
    return model


def check_valid(model: ModelProto | Path) -> None:
    """What ``onnx.checker`` finds wrong, as an error.

    Raises:
        WavpruneError: the model is not valid ONNX.
    """
    checker = require("onnx.checker", extra=EXTRA, purpose=PURPOSE)
    name = str(model) if isinstance(model, Path) else "the model"
    try:
        checker.check_model(str(model) if isinstance(model, Path) else model)
    except (checker.ValidationError, ValueError, RuntimeError) as error:
        raise WavpruneError(f"{name} is no valid ONNX model: {_line(error)}") from error


def _check_tensors(model: Model) -> None:
    known = {id(tensor.proto) for tensor in model.tensors.values()}
    for proto in all_tensors(model.proto):
        if id(proto) not in known:
            tensor_of(proto, proto.name, model.folder)


def _check_functions(proto: ModelProto) -> None:
    """Raise WavpruneError where local functions are more operators than fit any memory.

    The checker refuses those that call themselves; one that calls another twice, which does so too,
    only doubles what is written out.
    """
    functions = {(f.domain, f.name): _calls(f.node) for f in proto.functions}
    sizes: dict[tuple[str, str], int] = {}
    stack = list(functions)
    while stack:
        called = functions[stack[-1]]
        waiting = {call for call in called if call in functions and call not in sizes}
        if waiting:
            stack += waiting
        else:
            sizes[stack.pop()] = sum(sizes.get(call, 1) for call in called)
    total = sum(sizes.get(call, 1) for call in _calls(proto.graph.node))
    if total > MOST_OPERATORS:
        raise WavpruneError(
            f"its functions come to {total:,} operators; allowed: up to {MOST_OPERATORS:,}"
        )


def _calls(nodes: Iterable[NodeProto]) -> list[tuple[str, str]]:
    """What operators call, those of subgraphs among them."""
    found, left = [], list(nodes)
    while left:
        node = left.pop()
        found.append((node.domain, node.op_type))
        for entry in node.attribute:
            for graph in (entry.g, *entry.graphs):
                left += graph.node
    return found


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300] or type(error).__name__
