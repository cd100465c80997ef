"""ONNX models as torch modules, and back."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from ..graph import GraphModule, Model, as_model, read_model
from ..graph.prune import check, record_in, same, write
from ..graph.writing import rewrite

if TYPE_CHECKING:
    from onnx import ModelProto

    from ..report import PruneReport


def checked(model: ModelProto | Model | str | os.PathLike[str]) -> Model:
    """A model of a path or in memory, after its check.

    Raises:
        WavpruneError: it is not valid, or names files that it may not.
    """
    if isinstance(model, str | os.PathLike):
        return read_model(Path(model))
    return as_model(model)


def to_torch(model: ModelProto | str | os.PathLike[str]) -> GraphModule:
    """The network of an ONNX model as a torch module.

    Its layers are ``nn.Conv2d``, ``nn.Linear`` and so on, with the names that pruning the model
    reports; so everything that takes a module takes it: ``calibrate``, ``compare``, ``evaluate``,
    ``match_batchnorm``, ``Pruner``. It runs batches of any size, also where the graph was exported
    for one.

    Args:
        model: an ``.onnx`` file, or a model in memory.

    Raises:
        WavpruneError: the model is not valid, or has operators that cannot be computed by torch,
            which are named.
        ImportError: the extra ``onnx`` is not installed.

    Example:
        >>> import onnx, torch
        >>> model = onnx.parser.parse_model(
        ...     '<ir_version: 8, opset_import: ["": 17]> net (float[N, 1, 4, 4] x) => '
        ...     "(float[N, 1, 3, 3] y)"
        ...     "<float[1, 1, 2, 2] w = {1, 2, 3, 4}> { y = Conv(x, w) }"
        ... )
        >>> network = to_torch(model)
        >>> network.w, network(torch.ones(3, 1, 4, 4)).shape
        (Conv2d(1, 1, kernel_size=(2, 2), stride=(1, 1), bias=False), torch.Size([3, 1, 3, 3]))
    """
    return GraphModule(checked(model))


def rewrite_changed(
    source: Path, target: Path, module: GraphModule, report: PruneReport, *, force: bool
) -> None:
    """Write a model again, with what has changed in the module that was made of it.

    Args:
        source: the ``.onnx`` file of which ``to_torch`` made the module.
        target: the ``.onnx`` file to write; it may be ``source``, with ``force``.
        module: pruned since.
        report: what pruning it reported; the metadata then say it.
        force: replace what is there.

    Raises:
        WavpruneError: the model is another one, or its external data would replace a file.
        OSError: reading or writing failed.
    """
    model = read_model(source)
    after = module.tensors()
    check(model, after)
    changed = {
        name: values
        for name, values in after.items()
        if not same(values, model.tensors[name].read())
    }
    rewrite(model, target, changed, record_in(model, report), force=force)


def update(model: ModelProto, module: GraphModule) -> None:
    """Write the tensors of a module into the model that it was made of.

    Args:
        model: changes in place.
        module: what ``to_torch`` gave, pruned or trained since.

    Raises:
        WavpruneError: it is another model; nothing has changed.

    Example:
        >>> import onnx, torch
        >>> model = onnx.parser.parse_model(
        ...     '<ir_version: 8, opset_import: ["": 17]> net (float[N, 1, 4, 4] x) => '
        ...     "(float[N, 1, 3, 3] y)"
        ...     "<float[1, 1, 2, 2] w = {1, 2, 3, 4}> { y = Conv(x, w) }"
        ... )
        >>> network = to_torch(model)
        >>> with torch.no_grad():
        ...     _ = network.w.weight.mul_(2)
        >>> update(model, network)
        >>> onnx.numpy_helper.to_array(model.graph.initializer[0]).ravel()
        array([2., 4., 6., 8.], dtype=float32)
    """
    write(as_model(model), module.tensors())
