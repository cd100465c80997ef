from __future__ import annotations

from typing import Any

import pytest

from onnx import ModelProto, NodeProto, TensorProto, helper
from tests.support import graphs
from wavprune.graph import Model, as_model, find_weights, parameters


def found(model: ModelProto) -> tuple[dict[str, tuple[object, ...]], dict[str, str]]:
    weights, skipped = find_weights(as_model(model))
    return {w.layer: (w.operator, w.shape, w.order, w.groups) for w in weights}, skipped


def test_the_operators_say_what_a_weight_is() -> None:
    weights, skipped = found(graphs.network())
    natural = (0, 1, 2, 3)
    assert weights == {
        "first": ("Conv", (8, 3, 3, 3), natural, 1),
        "second": ("Conv", (8, 2, 3, 3), natural, 4),
        "up": ("ConvTranspose", (8, 4, 2, 2), natural, 2),
        "mat": ("MatMul", (6, 8), (1, 0), 1),
        "fc": ("Gemm", (5, 6), (0, 1), 1),
    }
    assert skipped == {}


def conv(weight: str, output: str = "y", **attributes: Any) -> NodeProto:
    return helper.make_node("Conv", ["x", weight], [output], "conv", **attributes)


def test_a_weight_is_found_behind_operators_that_only_move_it() -> None:
    nodes = [
        helper.make_node("Identity", ["w"], ["w1"]),
        helper.make_node("Transpose", ["w1"], ["w2"], perm=[3, 2, 0, 1]),
        helper.make_node("Cast", ["w2"], ["w3"], to=TensorProto.FLOAT),
        conv("w3"),
    ]
    weights, _ = found(graphs.model_of(nodes, {"w": (3, 2, 3, 4)}))
    assert weights == {"w": ("Conv", (4, 3, 3, 2), (3, 2, 0, 1), 1)}


def test_permutations_that_follow_each_other_are_one() -> None:
    nodes = [
        helper.make_node("Transpose", ["w"], ["w1"], perm=[1, 2, 3, 0]),
        helper.make_node("Transpose", ["w1"], ["w2"], perm=[1, 0, 2, 3]),
        conv("w2"),
    ]
    weights, _ = found(graphs.model_of(nodes, {"w": (2, 3, 4, 2)}))
    assert weights["w"][1:3] == ((4, 3, 2, 2), (2, 1, 3, 0))


def test_a_constant_node_is_a_weight() -> None:
    nodes = [
        helper.make_node("Constant", [], ["w"], value=graphs.initializer("", (4, 3, 3, 3))),
        conv("w"),
    ]
    assert found(graphs.model_of(nodes, {}))[0].keys() == {"w"}


def test_a_shared_weight_is_found_once() -> None:
    nodes = [conv("w", "a", pads=[1] * 4), helper.make_node("Conv", ["a", "w"], ["y"], "again")]
    weights, _ = found(graphs.model_of(nodes, {"w": (3, 3, 3, 3)}))
    assert list(weights) == ["w"]


QUANTIZED = """
net (float[N, 3, 8, 8] x) => (float[N, 2, 8, 8] y)
<int8[2, 3, 1, 1] q = {1, 2, 3, 4, 5, 6}, float s = {0.5}, int8 z = {0}>
{ w = DequantizeLinear(q, s, z)
  y = Conv(x, w) }
"""
COMPUTED = """
net (float[N, 1, 8, 8] x) => (float[N, 1, 7, 7] y)
<float[1, 1, 2, 2] v = {1, 2, 3, 4}, float g = {2}>
{ w = Mul(v, g)
  y = Conv(x, w) }
"""
SUBGRAPH = """
net (float[N, 1, 8, 8] x, bool c) => (float[N, 1, 7, 7] y)
<float[1, 1, 2, 2] w = {1, 2, 3, 4}>
{ y = If (c) <
    then_branch = one () => (float[N, 1, 7, 7] a) { a = Conv(x, w) },
    else_branch = two () => (float[N, 1, 7, 7] b) { b = Conv(x, w) }
  > }
"""


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (QUANTIZED, "its weight is dequantized from INT8 when the network runs"),
        (COMPUTED, "its weight is computed by Mul when the network runs"),
        (SUBGRAPH, "is in a subgraph of If"),
    ],
    ids=["DequantizeLinear", "Mul", "If"],
)
def test_what_cannot_be_pruned_is_named_with_its_reason(text: str, reason: str) -> None:
    weights, skipped = found(graphs.parse(text))
    assert weights == {}
    assert reason in skipped.values()


def test_layers_in_local_functions_are_found() -> None:
    model = graphs.parse(
        """
        net (float[N, 1, 8, 8] x) => (float[N, 1, 7, 7] y)
        <float[1, 1, 2, 2] w = {1, 2, 3, 4}>
        { y = own.block(x, w) }
        <domain: "own", opset_import: ["": 20]>
        block (a, b) => (c) { c = Conv(a, b) }
        """.replace("{ y", "{ y"),
    )
    model.opset_import.append(helper.make_opsetid("own", 1))
    assert found(model)[0]["w"][0] == "Conv"


def functions(*bodies: list[str]) -> ModelProto:
    """A model that calls the function f0, each of which calls others."""
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("own", 1)]
    model = graphs.model_of([helper.make_node("Relu", ["x"], ["y"])], {})
    model.graph.node[0].CopyFrom(helper.make_node("f0", ["x"], ["y"], domain="own"))
    model.opset_import.append(opsets[1])
    for number, called in enumerate(bodies):
        names = ["a", *(f"t{i}" for i in range(len(called) - 1)), "b"]
        nodes = [
            helper.make_node(name, [names[i]], [names[i + 1]], domain="own" if "f" in name else "")
            for i, name in enumerate(called)
        ]
        model.functions.append(
            helper.make_function("own", f"f{number}", ["a"], ["b"], nodes, opsets)
        )
    return model


def test_functions_without_an_end_are_refused() -> None:
    with pytest.raises(ValueError, match="no valid ONNX model: Cycle detected"):
        found(functions(["f1"], ["Relu", "f0"]))
    doubling = [[f"f{i + 1}", f"f{i + 1}"] for i in range(40)]
    with pytest.raises(ValueError, match=r"its functions come to [\d,]+ operators; allowed"):
        found(functions(*doubling, ["Relu", "Relu"]))


def test_what_a_compressed_file_holds_is_learned_or_large() -> None:
    nodes = [
        helper.make_node("Mul", ["x", "scale"], ["a"]),
        helper.make_node("Add", ["a", "position"], ["b"]),
        helper.make_node("Conv", ["b", "w", "bias"], ["y"]),
    ]
    tensors = {"scale": (1, 3, 1, 1), "position": (3, 32, 32), "w": (2, 3, 3, 3), "bias": (2,)}
    model = graphs.model_of(nodes, tensors, ("N", 3, 32, 32))
    assert parameters(Model(model)) == ["position", "w", "bias"]
