"""Pictures of what pruning did: accuracy, layers, coefficients, kernels and confusion.

Each function returns a new matplotlib figure and leaves pyplot's state alone;
``figure.savefig("picture.svg")`` writes it. A method or basis has the same color and marker in
every picture.
"""

from ...common.optional import require

try:
    from .accuracy import accuracy_by_bytes, accuracy_by_sparsity
    from .layers import error_by_layer, sparsity_by_layer
    from .run import coefficient_histogram, confusion_matrix, kernels_before_after
except ImportError:
    require("pandas", "matplotlib", "seaborn", extra="report", purpose="a picture")
    raise

__all__ = [
    "accuracy_by_bytes",
    "accuracy_by_sparsity",
    "coefficient_histogram",
    "confusion_matrix",
    "error_by_layer",
    "kernels_before_after",
    "sparsity_by_layer",
]
