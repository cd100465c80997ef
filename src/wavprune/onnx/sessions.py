"""Sessions of stock onnxruntime whose weights come from a compressed file."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..common.optional import require
from ..graph.tensors import EXTRA
from .stored import open_stored

# TensorProto.BFLOAT16, which numpy lacks.
BFLOAT16 = 16


def session(
    path: str | os.PathLike[str],
    *,
    options: Any = None,
    providers: Sequence[Any] | None = None,
    max_bytes: int | None = None,
) -> Any:
    """An ``onnxruntime.InferenceSession`` of what ``save`` stored.

    The weights are decoded in memory and passed as they are; no file is written. Outputs have the
    bits of a session of the decompressed model.

    Args:
        path: the ``.onnx`` file of the graph, its compressed weights beside it.
        options: an ``onnxruntime.SessionOptions``, which gets the weights.
        providers: as ``InferenceSession`` takes them; None means the CPU.
        max_bytes: as for ``wavprune.checkpoint.load``.

    Raises:
        WavpruneError: there is no such graph, or the file of its weights is broken.
        ImportError: the extra ``onnx`` is not installed.

    Example:
        >>> import onnx
        >>> model = onnx.parser.parse_model(
        ...     '<ir_version: 8, opset_import: ["": 17]> net (float[N, 1, 4, 4] x) => '
        ...     "(float[N, 1, 3, 3] y)"
        ...     "<float[1, 1, 2, 2] w = {1, 2, 3, 4}> { y = Conv(x, w) }"
        ... )
        >>> import tempfile, wavprune
        >>> path = tempfile.mkdtemp() + "/small.onnx"
        >>> saved = wavprune.onnx.save(model, path, values="float32")
        >>> session(path).run(None, {"x": torch.ones(1, 1, 4, 4).numpy()})[0].shape
        (1, 1, 3, 3)
    """
    runtime = require("onnxruntime", extra=EXTRA, purpose="a session")
    stored = open_stored(Path(path))
    options = runtime.SessionOptions() if options is None else options
    names, values = [], []
    for name, tensor in stored.tensors(max_bytes):
        names.append(name)
        values.append(_value(runtime.OrtValue, tensor))
    options.add_external_initializers(names, values)
    return runtime.InferenceSession(
        stored.proto.SerializeToString(),
        options,
        providers=["CPUExecutionProvider"] if providers is None else list(providers),
    )


class SessionModule(nn.Module):
    """A session as a module, for ``evaluate`` and ``predict``.

    It has no parameters: what runs is the session.

    Args:
        session: of ``session``, or any ``onnxruntime.InferenceSession``.

    Example:
        >>> import onnx, onnxruntime
        >>> model = onnx.parser.parse_model(
        ...     '<ir_version: 8, opset_import: ["": 17]> net (float[N, 1, 4, 4] x) => '
        ...     "(float[N, 1, 3, 3] y)"
        ...     "<float[1, 1, 2, 2] w = {1, 2, 3, 4}> { y = Conv(x, w) }"
        ... )
        >>> network = SessionModule(onnxruntime.InferenceSession(model.SerializeToString()))
        >>> network(torch.ones(2, 1, 4, 4)).shape
        torch.Size([2, 1, 3, 3])
    """

    def __init__(self, session: Any) -> None:
        super().__init__()
        self._session = session
        self._names = [entry.name for entry in session.get_inputs()]

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The output of the session, or a tuple of several, on the CPU."""
        arrays = [values.detach().cpu().numpy() for values in inputs]
        feed = dict(zip(self._names, arrays, strict=True))
        outputs = tuple(torch.from_numpy(values) for values in self._session.run(None, feed))
        return outputs[0] if len(outputs) == 1 else outputs


def _value(kind: Any, tensor: torch.Tensor) -> Any:
    if tensor.dtype == torch.bfloat16:
        return kind.ortvalue_from_numpy_with_onnx_type(tensor.view(torch.uint16).numpy(), BFLOAT16)
    return kind.ortvalue_from_numpy(tensor.numpy())
