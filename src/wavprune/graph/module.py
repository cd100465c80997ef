"""A graph as a module: its layers are torch's own, everything else are calls of functions.

Calibration, batch norms, evaluation and training then go the way they go for any other module. The
names of the layers are those that pruning the graph itself reports.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn import functional

from ..common.optional import is_onnx
from ..errors import WavpruneError
from .building import Builder, Place, Step
from .model import Model, as_model
from .operators import OPERATORS, pads_of, torch_pads

if TYPE_CHECKING:
    from onnx import ModelProto


def as_module(model: nn.Module | ModelProto) -> nn.Module:
    """The network of an ONNX model; anything else as it is.

    Raises:
        WavpruneError: as for ``GraphModule``.
    """
    return GraphModule(model) if is_onnx(model) else model


def obstacle(model: Model) -> str | None:
    """Why a graph cannot be run on batches of one kind of input, as far as no weight is read.

    Args:
        model: the graph.

    Returns:
        The reason, or None; other ones ``GraphModule`` finds.
    """
    builder = Builder(nn.Module(), model)
    if missing := builder.missing_operators():
        return f"it has operators that cannot be computed by torch: {missing}"
    if len(builder.inputs) != 1:
        return f"it has {len(builder.inputs)} inputs ({', '.join(builder.inputs)}), not one"
    return None


class GraphModule(nn.Module):
    """The network of an ONNX graph.

    Args:
        model: the graph. Its tensors are copied.

    Attributes:
        places: for each name of the state dict, the tensor of the graph.

    Raises:
        WavpruneError: the graph is not valid, or an operator has no form in torch.

    Example:
        >>> import onnx
        >>> from onnx import helper, numpy_helper
        >>> weight = numpy_helper.from_array(torch.ones(2, 1, 3, 3).numpy(), "conv.weight")
        >>> shape = [None, 1, 8, 8]
        >>> graph = helper.make_graph(
        ...     [helper.make_node("Conv", ["x", "conv.weight"], ["y"])],
        ...     "net",
        ...     [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, shape)],
        ...     [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, [None, 2, 6, 6])],
        ...     [weight],
        ... )
        >>> network = GraphModule(helper.make_model(graph))
        >>> network(torch.ones(4, 1, 8, 8)).shape, list(network.state_dict())
        (torch.Size([4, 2, 6, 6]), ['conv.weight'])
    """

    def __init__(self, model: ModelProto | Model) -> None:
        super().__init__()
        checked = as_model(model)
        builder = Builder(self, checked)
        builder.check_operators()
        self.places: dict[str, Place] = builder.places
        self._fixed: dict[str, torch.Tensor] = {}
        self._named: dict[str, tuple[str, Place]] = {}
        self._steps: list[Step] = builder.steps(self._fixed, self._named)
        self._inputs, self._outputs = builder.inputs, builder.outputs
        # As the graph is: for inference.
        self.eval()

    def extra_repr(self) -> str:
        """The graph, which two networks of equal layers may still differ in."""
        told = [
            (step.operator, step.inputs, step.outputs, sorted(step.attributes.items(), key=str))
            for step in self._steps
        ]
        digest = hashlib.sha256(repr((told, sorted(self._fixed.items()))).encode()).hexdigest()
        return f"{len(self._steps)} operators, {digest[:16]}"

    def forward(self, *inputs: torch.Tensor) -> Any:
        """The output of the graph, or a tuple of several.

        Args:
            inputs: of the graph, in its order.

        Raises:
            WavpruneError: there are more or fewer, or an operator cannot be computed.
        """
        if len(inputs) != len(self._inputs):
            raise WavpruneError(
                f"the graph has {len(self._inputs)} inputs ({', '.join(self._inputs)}), and got "
                f"{len(inputs)}"
            )
        values: dict[str, Any] = {"": None, **self._fixed}
        for name, (own, place) in self._named.items():
            path, _, attribute_name = own.rpartition(".")
            values[name] = place.back(getattr(self.get_submodule(path), attribute_name))
        values |= dict(zip(self._inputs, inputs, strict=True))
        samples = inputs[0].shape[0] if inputs and inputs[0].ndim else None
        for step in self._steps:
            found = self._run(step, [values[name] for name in step.inputs], samples)
            outputs = found if isinstance(found, tuple) else (found,)
            values.update(zip(step.outputs, outputs, strict=False))
            values[""] = None
            for name in step.dropped:
                values.pop(name, None)
        results = tuple(values[name] for name in self._outputs)
        return results[0] if len(results) == 1 else results

    def _run(self, step: Step, inputs: Sequence[Any], samples: int | None) -> Any:
        try:
            if step.module is None:
                attributes = step.attributes
                if "batch" in attributes:
                    attributes = {**attributes, "samples": samples}
                return OPERATORS[step.operator](attributes, *inputs)
            layer = self.get_submodule(step.module)
            return _run_layer(step, layer, inputs[0])
        except (RuntimeError, IndexError, TypeError, WavpruneError) as error:
            raise WavpruneError(
                f"{step.label} ({step.operator}) cannot be computed by torch: {error}"
            ) from error

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors of the graph as the module has them now, by their names there."""
        state = self.state_dict()
        return {
            place.tensor: place.back(state[name]).contiguous()
            for name, place in self.places.items()
        }


def _run_layer(step: Step, layer: nn.Module, x: torch.Tensor) -> Any:
    if step.operator == "Conv":
        pads = pads_of(step.attributes, x.shape[2:], step.attributes["kernel_shape"])
        return layer(functional.pad(x, torch_pads(pads)) if any(pads) else x)
    if step.operator == "ConvTranspose":
        axes = x.ndim - 2
        pads = list(step.attributes.get("pads") or [0] * (2 * axes))
        whole = layer(x)
        ends = [size - pads[axes + axis] for axis, size in enumerate(whole.shape[2:])]
        index = tuple(slice(pads[axis], ends[axis]) for axis in range(axes))
        return whole[(..., *index)]
    return layer(x)
