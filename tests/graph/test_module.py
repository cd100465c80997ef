from __future__ import annotations

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import wavprune
from onnx import helper, numpy_helper
from tests.support import graphs
from wavprune.graph import GraphModule, as_model, obstacle


def assert_runs_like_onnxruntime(
    model: Any, *inputs: torch.Tensor, tolerance: float = 2e-5
) -> GraphModule:
    network = GraphModule(model)
    expected = graphs.run(model, *inputs)
    with torch.no_grad():
        found = network(*inputs).numpy()
    assert found.shape == expected.shape
    np.testing.assert_allclose(found, expected, rtol=tolerance, atol=tolerance)
    return network


def images(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def test_layers_are_torchs_own_under_the_names_of_the_graph() -> None:
    network = assert_runs_like_onnxruntime(graphs.network(), images(4, 3, 8, 8))
    kinds = {name: type(module) for name, module in network.named_modules()}
    assert kinds["first"] is kinds["second"] is nn.Conv2d
    assert kinds["up"] is nn.ConvTranspose2d
    assert kinds["mat"] is kinds["fc"] is nn.Linear
    assert isinstance(network.norm, nn.modules.batchnorm._BatchNorm)
    assert {place.tensor for place in network.places.values()} == graphs.arrays(
        graphs.network()
    ).keys()


# The text after the arrow's names: nodes, and the shape of x.
CASES = {
    "asymmetric pads": ("y = Conv <pads = [0, 1, 2, 0]> (x, w)", (2, 3, 7, 9)),
    "same upper": ('y = Conv <auto_pad = "SAME_UPPER", strides = [2, 2]> (x, w)', (2, 3, 7, 9)),
    "same lower": ('y = Conv <auto_pad = "SAME_LOWER", strides = [2, 1]> (x, w)', (2, 3, 7, 8)),
    "transposed": (
        "y = ConvTranspose <pads = [0, 1, 1, 0], strides = [2, 3], output_padding = [1, 2]> (x, u)",
        (2, 3, 4, 5),
    ),
    "activations": (
        "a = HardSwish(x) b = HardSigmoid(a) c = LeakyRelu <alpha = 0.2> (b) d = Elu(c) "
        "e = Sigmoid(d) f = Selu(e) g = Softplus(f) y = Mish(g)",
        (2, 3, 4, 4),
    ),
    "gelu": ('a = Gelu <approximate = "tanh"> (x) b = Gelu(a) y = Erf(b)', (2, 3, 4)),
    "clip": ("y = Clip(x, low, high)", (2, 3, 4)),
    "max pool": (
        "y = MaxPool <kernel_shape = [3, 2], pads = [1, 0, 1, 1], strides = [2, 2]> (x)",
        (2, 3, 7, 8),
    ),
    "max pool, ceil": (
        "y = MaxPool <kernel_shape = [2, 2], strides = [2, 2], ceil_mode = 1> (x)",
        (2, 3, 7, 5),
    ),
    "average pool": (
        "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], strides = [2, 2]> (x)",
        (2, 3, 7, 8),
    ),
    "average pool, padding counted": (
        "y = AveragePool <kernel_shape = [3, 3], pads = [1, 1, 1, 1], count_include_pad = 1> (x)",
        (2, 3, 5, 6),
    ),
    "reductions": (
        "a = ReduceMean <keepdims = 0> (x, last) b = ReduceMax(a) c = ReduceL2(b) y = Neg(c)",
        (2, 3, 4, 4),
    ),
    "squeeze": (
        "a = ReduceSum(x, last) b = Squeeze(a, last) c = Unsqueeze(b, first) y = Flatten(c)",
        (2, 3, 4),
    ),
    "split and concat": (
        "a, b = Split <axis = 1, num_outputs = 2> (x) c = Mul(a, b) y = Concat <axis = 1> (c, b)",
        (2, 4, 3),
    ),
    "slices": ("y = Slice(x, starts, ends, axes, steps)", (2, 3, 8, 9)),
    "shapes": (
        "s = Shape(x) n = Gather(s, first) m = Div(n, two) y0 = ConstantOfShape(s) "
        "y1 = Add(x, y0) k = Concat <axis = 0> (first1, minus) y = Reshape(y1, k)",
        (2, 3, 4),
    ),
    "gather": ("y = Gather <axis = 2> (x, some)", (2, 3, 5)),
    "pads": ('a = Pad <mode = "reflect"> (x, pads) y = Pad(a, pads, low)', (2, 3, 5, 6)),
    "shuffles": (
        'a = DepthToSpace <blocksize = 2, mode = "DCR"> (x) b = SpaceToDepth <blocksize = 2> (a) '
        'y = DepthToSpace <blocksize = 2, mode = "CRD"> (b)',
        (2, 8, 4, 4),
    ),
    "nearest": (
        'y = Resize <coordinate_transformation_mode = "asymmetric", mode = "nearest", '
        'nearest_mode = "floor"> (x, none, scales)',
        (2, 3, 5, 6),
    ),
    "bilinear": ('y = Resize <mode = "linear"> (x, none, none, sizes)', (2, 3, 5, 6)),
    "bicubic": ('y = Resize <mode = "cubic"> (x, none, none, sizes)', (2, 3, 5, 6)),
    "align corners": (
        'y = Resize <mode = "linear", coordinate_transformation_mode = "align_corners"> '
        "(x, none, none, sizes)",
        (2, 3, 5, 6),
    ),
    "norms": (
        "a = InstanceNormalization(x, three, three) "
        "b = GroupNormalization <num_groups = 3> (a, three, three) "
        "y = LayerNormalization <axis = -1> (b, four, four)",
        (2, 3, 5, 4),
    ),
    "softmax": ("a = Softmax <axis = 1> (x) y = LogSoftmax <axis = 2> (a)", (2, 3, 4)),
    "attention": (
        "t = Transpose <perm = [0, 2, 1]> (x) a = MatMul(x, t) b = Softmax(a) y = MatMul(b, x)",
        (2, 3, 4),
    ),
    "prelu": ("y = PRelu(x, slope)", (2, 3, 4)),
    "select": ("c = Greater(x, low) d = Not(c) y = Where(d, x, high)", (2, 3, 4)),
    "sums": ("a = Max(x, low, high) b = Min(a, x) y = Mean(a, b, x)", (2, 3, 4)),
}
CONSTANTS = {
    "w": images(4, 3, 3, 2),
    "u": images(3, 4, 3, 2),
    "low": torch.tensor(-0.5),
    "high": torch.tensor(0.75),
    "slope": images(3, 1),
    "three": images(3),
    "four": images(4),
    "scales": torch.tensor([1.0, 1.0, 2.0, 3.0]),
    "none": torch.zeros(0),
    "last": torch.tensor([-1]),
    "first": torch.tensor(0),
    "first1": torch.tensor([2]),
    "two": torch.tensor(2),
    "minus": torch.tensor([-1]),
    "some": torch.tensor([[0, -1], [2, 2]]),
    "pads": torch.tensor([0, 0, 1, 2, 0, 0, 2, 1]),
    "sizes": torch.tensor([2, 3, 10, 12]),
    "starts": torch.tensor([1, -1]),
    "ends": torch.tensor([7, -100]),
    "axes": torch.tensor([2, 3]),
    "steps": torch.tensor([2, -3]),
}


@pytest.mark.parametrize("case", CASES)
def test_operators_compute_what_onnxruntime_computes(case: str) -> None:
    nodes, shape = CASES[case]
    sizes = ", ".join(map(str, shape))
    if case == "squeeze":
        nodes = nodes.replace("first", "first1")
    model = graphs.parse(f"net (float[{sizes}] x) => (float y) {{ {nodes} }}", opset=21)
    for name in {name for node in model.graph.node for name in node.input} & CONSTANTS.keys():
        model.graph.initializer.append(numpy_helper.from_array(CONSTANTS[name].numpy(), name))
    assert_runs_like_onnxruntime(graphs.inferred(model), images(*shape))


def test_earlier_opsets_have_attributes_where_later_ones_have_inputs() -> None:
    model = graphs.parse(
        """
        net (float[2, 3, 8, 8] x) => (float y)
        { a = Pad <pads = [0, 0, 1, 0, 0, 0, 0, 2]> (x)
          b = Clip <min = -0.5, max = 0.5> (a)
          c = Slice <axes = [2], starts = [1], ends = [7]> (b)
          d = ReduceMean <axes = [3], keepdims = 0> (c)
          e = Unsqueeze <axes = [3]> (d)
          f = Squeeze <axes = [3]> (e)
          g, h = Split <axis = 1, split = [1, 2]> (f)
          y = Softmax <axis = 1> (h) }
        """,
        opset=9,
        ir=7,
    )
    assert_runs_like_onnxruntime(graphs.inferred(model, rank=3), images(2, 3, 8, 8))


def test_a_graph_for_one_size_of_batches_runs_any() -> None:
    model = graphs.parse(
        """
        net (float[1, 3, 4, 4] x) => (float[1, 48] y)
        <int64[2] s = {1, -1}>
        { y = Reshape(x, s) }
        """
    )
    assert GraphModule(model)(images(5, 3, 4, 4)).shape == (5, 48)


@pytest.mark.parametrize("count", [1, 3, 8])
def test_only_the_samples_of_a_graph_for_one_are_more(count: int) -> None:
    # The bias has as many values as the last batch has samples.
    model = graphs.parse(
        """
        net (float[1, 8, 4, 4] x) => (float[1, 8, 4, 4] y)
        <float[8] b = {1, 2, 3, 4, 5, 6, 7, 8}, int64[4] s = {1, -1, 1, 1}>
        { a = Relu(x) c = Reshape(b, s) y = Add(a, c) }
        """
    )
    x = images(count, 8, 4, 4)
    expected = np.concatenate([graphs.run(model, sample) for sample in torch.split(x, 1)])
    np.testing.assert_array_equal(GraphModule(model)(x).numpy(), expected)


def test_samples_that_are_on_another_axis_are_not_mixed() -> None:
    model = graphs.parse(
        """
        net (float[1, 3, 4, 4] x) => (float[1, 12, 4] y)
        <int64[2] s = {-1, 4}, int64[3] t = {1, -1, 4}>
        { a = Reshape(x, s) y = Reshape(a, t) }
        """
    )
    assert GraphModule(model)(images(1, 3, 4, 4)).shape == (1, 12, 4)
    with pytest.raises(ValueError, match=r"for batches of 1, and got 2 samples, .* \(24, 4\)"):
        GraphModule(model)(images(2, 3, 4, 4))


def test_operators_without_a_form_in_torch_are_named() -> None:
    model = graphs.parse(
        "net (float[2, 3] x) => (float[2, 3] y) { a = Hardmax(x) y = Det(a) }", opset=20
    )
    with pytest.raises(ValueError, match=r"cannot be computed by torch: Hardmax.*Det.*allowed: "):
        GraphModule(model)


def test_what_keeps_a_graph_from_running_is_said_without_its_weights() -> None:
    assert obstacle(as_model(graphs.network())) is None
    body = "net (float[2, 3] x) => (float[2, 3] y) { a = Hardmax(x) y = Det(a) }"
    reason = "it has operators that cannot be computed by torch: Hardmax (Hardmax), Det (Det)"
    assert obstacle(as_model(graphs.parse(body))) == reason
    body = "net (float[2, 3] x, float[2, 3] z) => (float[2, 3] y) { y = Add(x, z) }"
    assert obstacle(as_model(graphs.parse(body))) == "it has 2 inputs (x, z), not one"


def test_an_operator_that_fails_is_named() -> None:
    model = graphs.model_of(
        [helper.make_node("MatMul", ["x", "w"], ["y"])], {"w": (3, 4)}, ("N", "M")
    )
    with pytest.raises(ValueError, match=r"MatMul_0 \(MatMul\) cannot be computed by torch"):
        GraphModule(model)(images(2, 5))
    with pytest.raises(ValueError, match="the graph has 1 inputs"):
        GraphModule(model)(images(2, 3), images(2, 3))


def test_a_copy_is_a_network_of_its_own() -> None:
    network = GraphModule(graphs.network())
    other = copy.deepcopy(network)
    with torch.no_grad():
        next(other.parameters()).zero_()
    x = images(2, 3, 8, 8)
    assert not torch.equal(network(x), other(x))
    # Sweeps tell networks of equal layers apart by it.
    assert repr(network) == repr(other)
    wired = graphs.network()
    wired.graph.node[2].op_type = "Sigmoid"
    assert repr(network) != repr(GraphModule(wired))


def test_tied_weights_stay_one_whichever_way_they_are_read() -> None:
    nodes = [
        helper.make_node("MatMul", ["x", "w"], ["a"]),
        helper.make_node("Transpose", ["w"], ["wt"], perm=[1, 0]),
        helper.make_node("MatMul", ["a", "wt"], ["b"]),
        helper.make_node("MatMul", ["b", "w"], ["y"]),
    ]
    network = assert_runs_like_onnxruntime(
        graphs.model_of(nodes, {"w": (6, 4)}, ("N", 6)), images(3, 6)
    )
    assert len(list(network.parameters())) == 1


def test_calibration_matches_biases_where_batch_norms_are_folded() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "a", "a_bias"], ["h"], pads=[1] * 4),
        helper.make_node("Relu", ["h"], ["r"]),
        helper.make_node("Conv", ["r", "b", "b_bias"], ["o"], pads=[1] * 4),
        helper.make_node("GlobalAveragePool", ["o"], ["p"]),
        helper.make_node("Flatten", ["p"], ["y"]),
    ]
    tensors = {"a": (8, 3, 3, 3), "a_bias": (8,), "b": (6, 8, 3, 3), "b_bias": (6,)}
    model, batch = graphs.model_of(nodes, tensors), images(96, 3, 8, 8)
    pruned = type(model)()
    pruned.CopyFrom(model)
    report = wavprune.fast.prune(
        pruned, sparsity=0.7, calibration=[batch], calibration_level="refit"
    )
    assert report.decision is not None
    assert report.decision.biases == ("a", "b")
    before, after = (graphs.run(m, batch) for m in (model, pruned))
    plain = type(model)()
    plain.CopyFrom(model)
    wavprune.fast.prune(plain, sparsity=0.7)
    worse = graphs.run(plain, batch)
    assert np.abs(after - before).mean() < 0.5 * np.abs(worse - before).mean()
