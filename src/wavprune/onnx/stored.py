"""A graph without weights, and a compressed file that has them.

The graph is an ordinary ``.onnx`` file that says that its weights are external data; stock runtimes
take them from memory. Its metadata say in which file they are, under which names::

    "wavprune": {"version": 1, "weights": "small.safetensors",
                 "names": {initializer: [name in the file, order of the axes or null]}}

``names`` has only those whose name or order differs: matrices are stored as torch has them, and a
network that went through torch to be compressed from inputs has names of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch

from ..checkpoint import load as load_tensors
from ..checkpoint import save as save_tensors
from ..checkpoint.report import SaveReport
from ..checkpoint.saving import output_path
from ..common.atomic import replaced
from ..common.files import check_regular
from ..common.optional import require
from ..errors import WavpruneError
from ..graph import GraphModule, Model, orders, parameters
from ..graph.building import Place
from ..graph.model import KEY, metadata_of, onnx, set_metadata, stored_in
from ..graph.tensors import (
    EXTRA,
    PURPOSE,
    TYPES,
    inner_tensors,
    is_external,
    location,
    set_location,
    set_values,
    take_in,
)
from ..graph.writing import INLINE, DataFile, data_name, serialized, write_model
from .models import checked

if TYPE_CHECKING:
    from onnx import ModelProto, TensorProto

VERSION = 1
# Initializers need not be inputs from this version of the IR on.
FREE_INITIALIZERS = 4


def save(
    model: ModelProto | str | os.PathLike[str],
    path: str | os.PathLike[str],
    *,
    calibration: Iterable[Any] | None = None,
    **settings: Any,
) -> SaveReport:
    """Store an ONNX model in few bytes: a graph without weights, and one compressed file with them.

    Args:
        model: an ``.onnx`` file, or a model in memory; it is not changed.
        path: the ``.onnx`` file of the graph. The weights are beside it, ``.safetensors`` in place
            of ``.onnx``.
        calibration: batches of inputs without labels; the network then runs in torch. See
            ``wavprune.checkpoint.save``.
        settings: as ``wavprune.checkpoint.save`` takes them: ``config``, ``bits``,
            ``target_bytes``, ``target_kl`` and so on. A ``report`` is that of a model which was
            pruned before.

    Returns:
        What was done with the weights; ``bytes`` and ``path`` are those of their file.

    Raises:
        WavpruneError: the model is not valid, or as ``wavprune.checkpoint.save``.
        ImportError: the extras ``onnx`` and ``checkpoint`` are not installed.

    Example:
        >>> import onnx
        >>> model = onnx.parser.parse_model(
        ...     '<ir_version: 8, opset_import: ["": 17]> net (float[N, 1, 4, 4] x) => '
        ...     "(float[N, 1, 3, 3] y)"
        ...     "<float[1, 1, 2, 2] w = {1, 2, 3, 4}> { y = Conv(x, w) }"
        ... )
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/small.onnx"
        >>> save(model, path, values="float32").path.name
        'small.safetensors'
    """
    graph_path, weights_path = paths_of(path)
    graph = _hoisted(checked(model))
    module: GraphModule | None = None
    if calibration is None:
        order_of = orders(graph)
        places = {name: Place(name, order_of.get(name)) for name in parameters(graph)}
    else:
        module = GraphModule(graph)
        places = module.places
        settings["calibration"] = calibration
        settings.setdefault("metadata", metadata_of(graph.proto))
    # Both are complete before one of them takes its place: neither is of use without the other.
    with replaced(graph_path) as new, replaced(weights_path) as new_weights:
        staged = new_weights.with_name(f"{new_weights.name}{weights_path.suffix}")
        try:
            report = save_tensors(graph if module is None else module, staged, **settings)
            new.write_bytes(serialized(_weightless(graph, places, weights_path.name)))
            staged.rename(new_weights)
        finally:
            staged.unlink(missing_ok=True)
    return replace(report, path=weights_path)


def decompress(
    path: str | os.PathLike[str],
    output: str | os.PathLike[str],
    *,
    max_bytes: int | None = None,
) -> int:
    """Write what ``save`` stored as an ordinary ONNX model.

    Args:
        path: the ``.onnx`` file of the graph.
        output: the ``.onnx`` file to write; of more than 1 GB, with its weights as external data
            beside it.
        max_bytes: as for ``wavprune.checkpoint.load``.

    Returns:
        The bytes of the new model, with its external data.

    Raises:
        WavpruneError: there is no such graph, its file is broken, or as
            ``wavprune.checkpoint.load``.

    Example:
        >>> import onnx
        >>> model = onnx.parser.parse_model(
        ...     '<ir_version: 8, opset_import: ["": 17]> net (float[N, 1, 4, 4] x) => '
        ...     "(float[N, 1, 3, 3] y)"
        ...     "<float[1, 1, 2, 2] w = {1, 2, 3, 4}> { y = Conv(x, w) }"
        ... )
        >>> import tempfile
        >>> path = tempfile.mkdtemp() + "/small.onnx"
        >>> saved = save(model, path, values="float32")
        >>> size = decompress(path, path.replace("small", "large"))
    """
    target = Path(output)
    if target.suffix.lower() != ".onnx" or target.is_dir() or not target.parent.is_dir():
        raise WavpruneError(
            f"output must be a file that ends in .onnx, in a directory that exists, not {target}"
        )
    stored = open_stored(Path(path))
    tensors = {proto.name: proto for proto in stored.proto.graph.initializer}
    set_metadata(stored.proto, {KEY: None})
    values = dict(stored.tensors(max_bytes))
    if sum(tensor.nbytes for tensor in values.values()) <= INLINE:
        for name, tensor in values.items():
            set_values(tensors[name], tensor)
        with replaced(target) as new:
            write_model(stored.proto, new)
        return target.stat().st_size
    with replaced(target) as new, replaced(target.parent / data_name(target)) as data_path:
        data = DataFile(data_path, data_name(target))
        data.put((tensors[name], tensor) for name, tensor in values.items())
        write_model(stored.proto, new, data)
    return target.stat().st_size + (target.parent / data_name(target)).stat().st_size


def paths_of(path: str | os.PathLike[str]) -> tuple[Path, Path]:
    """The graph and its weights.

    Raises:
        WavpruneError: the path is that of no ``.onnx`` file, or its weights cannot be beside it.
    """
    graph = Path(path)
    if graph.suffix.lower() != ".onnx" or graph.is_dir():
        raise WavpruneError(f"path must be a file that ends in .onnx, not {str(path)!r}")
    if not graph.parent.is_dir():
        raise WavpruneError(f"{graph}: there is no directory {graph.parent}")
    return graph, output_path("path", graph.with_suffix(".safetensors"))


class Stored(NamedTuple):
    """A graph whose weights are in a compressed file.

    Attributes:
        proto: the graph.
        weights: the file.
        places: for each initializer, its name and order in the file.
    """

    proto: ModelProto
    weights: Path
    places: dict[str, Place]

    def tensors(self, max_bytes: int | None = None) -> Iterator[tuple[str, torch.Tensor]]:
        """The decoded initializers, in the order of their axes in the graph.

        Raises:
            WavpruneError: the file is broken, or not that of this graph.
        """
        decoded = load_tensors(self.weights, max_bytes=max_bytes)
        for proto in self.proto.graph.initializer:
            place = self.places.get(proto.name)
            if place is None:
                continue
            values = decoded.get(place.tensor)
            if values is not None:
                values = place.back(values).contiguous()
            if values is None or not _fits(proto, values):
                found = "is missing" if values is None else f"is {tuple(values.shape)}"
                raise WavpruneError(
                    f"{self.weights} is not the file of this graph: {place.tensor!r} {found}, and "
                    f"the graph needs {tuple(proto.dims)} for {proto.name!r}"
                )
            yield proto.name, values


def open_stored(path: Path) -> Stored:
    """What ``save`` wrote; the weights are not read.

    Raises:
        WavpruneError: it is no such graph, or names a file that it may not.
    """
    check_regular(path)
    error_type = require("google.protobuf.message", extra=EXTRA, purpose=PURPOSE).DecodeError
    try:
        proto = onnx().load_model_from_string(path.read_bytes())
    except (error_type, ValueError) as error:
        raise WavpruneError(f"{path} cannot be read as an ONNX model: {error}") from error
    text = stored_in(proto)
    if text is None:
        raise WavpruneError(f"{path} is no graph of wavprune.onnx.save: it has its own weights")
    try:
        said = json.loads(text)
        if said["version"] != VERSION:
            raise WavpruneError(
                f"{path} is of version {said['version']!r}; this wavprune reads {VERSION}"
            )
        name, others = said["weights"], said["names"]
        places = {
            proto.name: _place(proto, others.get(proto.name))
            for proto in proto.graph.initializer
            if proto.data_location == 1
        }
        plain = Path(name).name == name and name.endswith(".safetensors") and "\\" not in name
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
        if isinstance(error, WavpruneError):
            raise
        raise WavpruneError(f"{path}: its metadata {KEY!r} cannot be read: {text[:80]}") from error
    if not plain:
        raise WavpruneError(f"{path} names {name!r}; allowed: a .safetensors file beside it")
    for tensor in inner_tensors(proto):
        if is_external(tensor):
            # A runtime would look for it in the folder that the program happens to run in.
            raise WavpruneError(
                f"{path}: tensor {tensor.name!r} is in {location(tensor).get('location', '')!r}; "
                "allowed: initializers in the compressed file, all else in the graph"
            )
    weights = path.parent / name
    if weights.is_symlink():
        raise WavpruneError(f"{weights} is a link; allowed: a file")
    check_regular(weights)
    return Stored(proto, weights, places)


def _place(proto: TensorProto, said: Any) -> Place:
    if said is None:
        return Place(proto.name)
    name, order = said
    if not isinstance(name, str):
        raise TypeError(name)
    if order is None:
        return Place(name)
    if sorted(order) != list(range(len(proto.dims))):
        raise ValueError(order)
    return Place(name, tuple(order))


def _fits(proto: TensorProto, values: torch.Tensor) -> bool:
    known = TYPES.get(proto.data_type)
    return known is not None and known[2] == values.dtype and tuple(proto.dims) == values.shape


def _hoisted(model: Model) -> Model:
    """A copy of the model with its ``Constant`` nodes of float32 and float16 as initializers."""
    copy = model.copy()
    proto = copy.proto
    if proto.ir_version < FREE_INITIALIZERS:
        return copy
    graph = proto.graph
    initializers = {tensor.name for tensor in graph.initializer}
    moved = {name for name in copy.tensors if name not in initializers}
    moved &= {name for name in moved if copy.tensors[name].dtype in (torch.float32, torch.float16)}
    if not moved:
        return copy
    for name in sorted(moved):
        tensor = graph.initializer.add()
        tensor.CopyFrom(copy.tensors[name].proto)
        tensor.name = name
    for number in reversed(range(len(graph.node))):
        if graph.node[number].op_type == "Constant" and graph.node[number].output[0] in moved:
            del graph.node[number]
    return Model(proto, model.folder)


def _weightless(model: Model, places: Mapping[str, Place], weights: str) -> ModelProto:
    """The graph that ``save`` writes.

    Args:
        model: changes in place.
        places: names in the compressed file -> tensors of the graph.
        weights: the name of that file.
    """
    proto = model.proto
    stored: dict[str, tuple[str, tuple[int, ...] | None]] = {}
    for name, place in places.items():
        stored.setdefault(place.tensor, (name, place.order))
    names = {}
    for tensor in filter(is_external, inner_tensors(proto)):
        take_in(tensor, model.folder)
    for tensor in proto.graph.initializer:
        found = stored.get(tensor.name)
        if found is not None:
            set_location(tensor, weights, None, None)
            if found != (tensor.name, None):
                names[tensor.name] = found
        elif is_external(tensor):
            # Too small or of another kind than what is compressed; it stays in the graph.
            take_in(tensor, model.folder)
    # What exporters note for debugging is several times as large as the graph.
    for noted in (proto.graph, *proto.graph.node, *proto.graph.value_info):
        noted.ClearField("metadata_props")
        noted.ClearField("doc_string")
    said = {"version": VERSION, "weights": weights, "names": names}
    set_metadata(proto, {KEY: json.dumps(said, separators=(",", ":"))})
    return proto
