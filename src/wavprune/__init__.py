"""Prune convolutional networks in a wavelet basis.

``wavprune.fast.prune(model)`` prunes every ``Conv2d`` of a model in place and returns a report.
"""

from . import backends, fast, reference, schedule
from ._version import __version__
from .bases import Basis, LevelCollapsedWarning, basis_for
from .batchnorm import batchnorm_statistics, match_batchnorm, update_batchnorm
from .compare import Comparison, Reference, Trial, compare, run_trial
from .config import PruneConfig
from .evaluate import Evaluation, evaluate, predict
from .finetune import Pruner
from .layers import LayerRef
from .pipeline import prune_layers
from .report import LayerStats, PruneReport
from .size import stored_bytes

__all__ = [
    "Basis",
    "Comparison",
    "Evaluation",
    "LayerRef",
    "LayerStats",
    "LevelCollapsedWarning",
    "PruneConfig",
    "PruneReport",
    "Pruner",
    "Reference",
    "Trial",
    "__version__",
    "backends",
    "basis_for",
    "batchnorm_statistics",
    "compare",
    "evaluate",
    "fast",
    "match_batchnorm",
    "predict",
    "prune_layers",
    "reference",
    "run_trial",
    "schedule",
    "stored_bytes",
    "update_batchnorm",
]
