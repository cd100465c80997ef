"""Pictures of what pruning did: accuracy, layers, coefficients, kernels and confusion.

Each function returns a matplotlib figure of its own and leaves pyplot's state alone;
``figure.savefig("picture.svg")`` writes it. A method or basis has the same colour and marker in
every picture.
"""

try:
    from .accuracy import accuracy_by_bytes, accuracy_by_sparsity
    from .layers import error_by_layer, sparsity_by_layer
    from .run import coefficient_histogram, confusion_matrix, kernels_before_after
except ImportError as error:
    raise ImportError(
        f"pictures need {error.name}; pip install 'wavprune[report]'", name=error.name
    ) from error

__all__ = [
    "accuracy_by_bytes",
    "accuracy_by_sparsity",
    "coefficient_histogram",
    "confusion_matrix",
    "error_by_layer",
    "kernels_before_after",
    "sparsity_by_layer",
]
