"""Prune convolutional networks in a wavelet basis.

``wavprune.fast.prune(model)`` prunes every ``Conv2d`` of a model in place and returns a report.
"""

from . import backends, fast, reference
from ._version import __version__
from .bases import Basis, LevelCollapsedWarning, basis_for
from .config import PruneConfig
from .layers import LayerRef
from .pipeline import prune_layers
from .report import LayerStats, PruneReport

__all__ = [
    "Basis",
    "LayerRef",
    "LayerStats",
    "LevelCollapsedWarning",
    "PruneConfig",
    "PruneReport",
    "__version__",
    "backends",
    "basis_for",
    "fast",
    "prune_layers",
    "reference",
]
