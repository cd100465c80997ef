"""Small ONNX models for the tests of graphs."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch

import onnx
from onnx import ModelProto, TensorProto, helper, numpy_helper

OPSET = 20


def parse(body: str, opset: int = OPSET, ir: int = 10) -> ModelProto:
    """A model of ONNX's own text format: what follows its versions."""
    header = f'<ir_version: {ir}, opset_import: ["": {opset}]>'
    model = onnx.parser.parse_model(f"{header}\n{textwrap.dedent(body)}")
    assert isinstance(model, ModelProto)
    return model


def inferred(model: ModelProto, rank: int = 4) -> ModelProto:
    """The model with the shape of its output as its operators have it, else of that many axes."""
    model.graph.output[0].type.tensor_type.ClearField("shape")
    model = onnx.shape_inference.infer_shapes(model, data_prop=True)
    output = model.graph.output[0].type.tensor_type
    if not output.HasField("shape"):
        for axis in range(rank):
            output.shape.dim.add().dim_param = f"axis{axis}"
    return model


def initializer(
    name: str, shape: Sequence[int], seed: int = 0, dtype: str = "float32"
) -> TensorProto:
    """A tensor of random values."""
    values = np.random.default_rng([seed, len(name)]).normal(0, 0.3, shape).astype(dtype)
    return numpy_helper.from_array(values, name)


def model_of(
    nodes: Sequence[onnx.NodeProto],
    tensors: Mapping[str, Sequence[int]],
    shape: Sequence[Any] = ("N", 3, 8, 8),
    opset: int = OPSET,
) -> ModelProto:
    """A model from ``x`` to ``y`` with random initializers of these shapes."""
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [initializer(name, size, seed) for seed, (name, size) in enumerate(tensors.items())],
    )
    opsets = [helper.make_opsetid("", opset)]
    return inferred(helper.make_model(graph, opset_imports=opsets, ir_version=10))


NODES = [
    helper.make_node("Conv", ["x", "first.weight", "first.bias"], ["a"], "c1", pads=[1] * 4),
    helper.make_node(
        "BatchNormalization",
        ["a", "norm.weight", "norm.bias", "norm.running_mean", "norm.running_var"],
        ["b"],
    ),
    helper.make_node("Relu", ["b"], ["c"]),
    helper.make_node("Conv", ["c", "second"], ["d"], "c2", group=4, strides=[2, 2]),
    helper.make_node("ConvTranspose", ["d", "up.weight"], ["e"], "t1", group=2),
    helper.make_node("GlobalAveragePool", ["e"], ["f"]),
    helper.make_node("Flatten", ["f"], ["g"]),
    helper.make_node("MatMul", ["g", "mat"], ["h"]),
    helper.make_node("Gemm", ["h", "fc.weight", "fc.bias"], ["y"], transB=1),
]
TENSORS = {
    "first.weight": (8, 3, 3, 3),
    "first.bias": (8,),
    "norm.weight": (8,),
    "norm.bias": (8,),
    "norm.running_mean": (8,),
    "second": (8, 2, 3, 3),
    "up.weight": (8, 4, 2, 2),
    "mat": (8, 6),
    "fc.weight": (5, 6),
    "fc.bias": (5,),
}


def network() -> ModelProto:
    """A model with one layer of each kind."""
    model = model_of(NODES, {**TENSORS, "norm.running_var": (8,)})
    var = np.linspace(0.5, 2, 8, dtype=np.float32)
    model.graph.initializer[-1].CopyFrom(numpy_helper.from_array(var, "norm.running_var"))
    return model


def external(model: ModelProto, path: Path, several: bool = False) -> Path:
    """Save a model with its tensors in another file, or in one file each."""
    copy = ModelProto()
    copy.CopyFrom(model)
    onnx.save_model(
        copy,
        path,
        save_as_external_data=True,
        all_tensors_to_one_file=not several,
        location=None if several else f"{path.stem}.weights",
        size_threshold=64,
    )
    return path


def run(model: ModelProto | Path | str, *inputs: torch.Tensor) -> npt.NDArray[Any]:
    """The first output in onnxruntime."""
    source = model.SerializeToString() if isinstance(model, ModelProto) else str(model)
    session = onnxruntime.InferenceSession(source, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    values = [x.numpy() for x in inputs]
    result: npt.NDArray[Any] = session.run(None, dict(zip(names, values, strict=True)))[0]
    return result


def arrays(model: ModelProto) -> dict[str, npt.NDArray[Any]]:
    """All initializers."""
    return {t.name: numpy_helper.to_array(t) for t in model.graph.initializer}
