"""ONNX graphs: read and checked, the weights of their layers, and as a module that runs.

The operators of a graph say what a state dict leaves open: which weights are kernels, which are
transposed, and how many groups they have.
"""

from .layers import GraphWeight, find_weights, orders, parameters
from .model import Model, as_model, check_valid, read_model
from .module import GraphModule, as_module, obstacle

__all__ = [
    "GraphModule",
    "GraphWeight",
    "Model",
    "as_model",
    "as_module",
    "check_valid",
    "find_weights",
    "obstacle",
    "orders",
    "parameters",
    "read_model",
]
