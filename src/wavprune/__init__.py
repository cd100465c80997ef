"""Prune convolutional networks in a wavelet basis.

``wavprune.fast.prune(model)`` prunes the convolutions of a model in place and returns a report.
"""

import importlib
from typing import TYPE_CHECKING, Any

from ._version import __version__

if TYPE_CHECKING:
    from . import backends, bases, checkpoint, demo, errors, fast, onnx, ops, reference
    from .bases import Basis, LevelCollapsedWarning, basis_for
    from .calibration.collect import calibrate
    from .calibration.collected import Calibration
    from .checkpoint.huggingface import from_pretrained, push_to_hub
    from .config import PruneConfig
    from .decision import Decision
    from .engine.layers import LayerRef
    from .engine.run import prune_layers
    from .errors import WavpruneError
    from .evaluation.batchnorm import batchnorm_statistics, match_batchnorm, update_batchnorm
    from .evaluation.biases import match_biases
    from .evaluation.compare import compare
    from .evaluation.comparison import Comparison
    from .evaluation.measure import Measure
    from .evaluation.metrics import Evaluation, evaluate
    from .evaluation.predictions import predict
    from .evaluation.size import stored_bytes
    from .evaluation.trial import DenseReference, Trial, run_trial
    from .report import LayerStats, PruneReport
    from .reporting import plots
    from .training import schedules as schedule
    from .training.pruner import Pruner

# Where each public name is: a module, or a module and what it holds. Loaded when first asked for,
# so that importing the package costs what is used.
_PUBLIC = {
    "Basis": "bases:Basis",
    "Calibration": "calibration.collected:Calibration",
    "Comparison": "evaluation.comparison:Comparison",
    "Decision": "decision:Decision",
    "DenseReference": "evaluation.trial:DenseReference",
    "Evaluation": "evaluation.metrics:Evaluation",
    "LayerRef": "engine.layers:LayerRef",
    "LayerStats": "report:LayerStats",
    "LevelCollapsedWarning": "bases:LevelCollapsedWarning",
    "Measure": "evaluation.measure:Measure",
    "PruneConfig": "config:PruneConfig",
    "PruneReport": "report:PruneReport",
    "Pruner": "training.pruner:Pruner",
    "Trial": "evaluation.trial:Trial",
    "WavpruneError": "errors:WavpruneError",
    "backends": "backends",
    "bases": "bases",
    "basis_for": "bases:basis_for",
    "batchnorm_statistics": "evaluation.batchnorm:batchnorm_statistics",
    "calibrate": "calibration.collect:calibrate",
    "checkpoint": "checkpoint",
    "compare": "evaluation.compare:compare",
    "demo": "demo",
    "errors": "errors",
    "evaluate": "evaluation.metrics:evaluate",
    "fast": "fast",
    "from_pretrained": "checkpoint.huggingface:from_pretrained",
    "match_batchnorm": "evaluation.batchnorm:match_batchnorm",
    "match_biases": "evaluation.biases:match_biases",
    "onnx": "onnx",
    "ops": "ops",
    "plots": "reporting.plots",
    "predict": "evaluation.predictions:predict",
    "prune_layers": "engine.run:prune_layers",
    "push_to_hub": "checkpoint.huggingface:push_to_hub",
    "reference": "reference",
    "run_trial": "evaluation.trial:run_trial",
    "schedule": "training.schedules",
    "stored_bytes": "evaluation.size:stored_bytes",
    "update_batchnorm": "evaluation.batchnorm:update_batchnorm",
}
__all__ = [
    "Basis",
    "Calibration",
    "Comparison",
    "Decision",
    "DenseReference",
    "Evaluation",
    "LayerRef",
    "LayerStats",
    "LevelCollapsedWarning",
    "Measure",
    "PruneConfig",
    "PruneReport",
    "Pruner",
    "Trial",
    "WavpruneError",
    "__version__",
    "backends",
    "bases",
    "basis_for",
    "batchnorm_statistics",
    "calibrate",
    "checkpoint",
    "compare",
    "demo",
    "errors",
    "evaluate",
    "fast",
    "from_pretrained",
    "match_batchnorm",
    "match_biases",
    "onnx",
    "ops",
    "plots",
    "predict",
    "prune_layers",
    "push_to_hub",
    "reference",
    "run_trial",
    "schedule",
    "stored_bytes",
    "update_batchnorm",
]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module, _, member = _PUBLIC[name].partition(":")
    value: Any = importlib.import_module(f".{module}", __name__)
    if member:
        value = getattr(value, member)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_PUBLIC})
