"""Torch models to ONNX, by torch's own exporter."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from ..common.atomic import replaced
from ..common.optional import require
from ..engine.running import running
from ..errors import WavpruneError
from ..graph import Model
from ..graph.tensors import EXTRA
from ..graph.writing import INLINE, DataFile, data_name, write_model

# Of the largest output: what other sums of the same products come to.
TOLERANCE = 1e-4


def export(
    model: nn.Module,
    path: str | os.PathLike[str],
    example: torch.Tensor | tuple[torch.Tensor, ...],
    *,
    batch: bool = True,
    check: bool = True,
) -> float:
    """Write a torch model as ONNX: a pruned, fine-tuned or decompressed one as it is.

    Torch's exporter (``torch.onnx.export(dynamo=True)``) does it, in evaluation mode; it folds
    batch norms into the layers before them.

    Args:
        model: any module that ``torch.export`` takes.
        path: the ``.onnx`` file; of more than 1 GB, its weights are external data beside it.
        example: its inputs, ``(N, ...)``.
        batch: let the model run batches of any size; ``example`` should have at least two samples.
        check: run the example in onnxruntime too.

    Returns:
        The largest difference of the outputs over the largest output; NaN without ``check``.

    Raises:
        WavpruneError: it cannot be exported, or its outputs are others in onnxruntime; nothing is
            written.
        ImportError: the extra ``onnx`` is not installed.

    Example:
        >>> import tempfile
        >>> net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
        >>> export(net, tempfile.mkdtemp() + "/net.onnx", torch.randn(2, 1, 8, 8)) < 1e-5
        True
    """
    require("onnx", "onnxscript", extra=EXTRA, purpose="exporting to ONNX")
    target = Path(path)
    if target.suffix.lower() != ".onnx" or target.is_dir() or not target.parent.is_dir():
        raise WavpruneError(
            f"path must be a file that ends in .onnx, in a directory that exists, not {target}"
        )
    inputs = (example,) if isinstance(example, torch.Tensor) else tuple(example)
    with running(model, None):
        with _quiet():
            program = _program(model, inputs, batch)
        expected = model(*inputs)
    with replaced(target) as new, contextlib.ExitStack() as stack:
        proto = program.model_proto
        data = None
        if proto.ByteSize() > INLINE:
            data_path = stack.enter_context(replaced(target.parent / data_name(target)))
            data = DataFile(data_path, data_name(target))
            tensors = Model(proto).tensors
            data.put((proto, tensors[proto.name].read()) for proto in proto.graph.initializer)
        found = [float("nan")]

        def run(path: Path) -> None:
            found.append(_difference(path, inputs, expected))

        write_model(proto, new, data, run if check else None)
        return found[-1]


def _program(model: nn.Module, inputs: tuple[torch.Tensor, ...], batch: bool) -> Any:
    dynamic = None
    if batch:
        size = torch.export.Dim("batch")
        dynamic = tuple({0: size} for _ in inputs)
    try:
        return torch.onnx.export(model, inputs, dynamo=True, verbose=False, dynamic_shapes=dynamic)
    except torch.onnx.errors.OnnxExporterError as error:
        cause: BaseException = error.__cause__ or error
        hint = "; batch=False exports it for this size of batches alone" if batch else ""
        raise WavpruneError(
            f"{type(model).__name__} cannot be exported: {str(cause).splitlines()[0][:300]}{hint}"
        ) from error


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without what the exporter says of packages that are not needed, and of its own calls."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        logger.setLevel(logging.ERROR)
        try:
            yield
        finally:
            logger.setLevel(level)


def _difference(path: Path, inputs: tuple[torch.Tensor, ...], expected: Any) -> float:
    """The outputs in onnxruntime against those in torch."""
    runtime = require("onnxruntime", extra=EXTRA, purpose="the check of an exported model")
    session = runtime.InferenceSession(path, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    feed = {name: x.detach().cpu().numpy() for name, x in zip(names, inputs, strict=True)}
    leaves = [leaf for leaf in tree_leaves(expected) if isinstance(leaf, torch.Tensor)]
    worst = 0.0
    for value, before in zip(session.run(None, feed), leaves, strict=True):
        dense = before.detach().cpu().double()
        change = (torch.from_numpy(value).double() - dense).abs().max()
        worst = max(worst, float(change / dense.abs().max().clamp_min(1e-30)))
    if not worst <= TOLERANCE:
        raise WavpruneError(
            f"the exported model has other outputs in onnxruntime: they differ by {worst:.2g} of "
            f"the largest; allowed: {TOLERANCE:g}"
        )
    return worst
