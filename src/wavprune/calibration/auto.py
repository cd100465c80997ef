"""``wavelet="auto"`` with calibration: of a few bases, for each layer the one of least error.

The error is that of the layer's outputs after selection and refit at the layer's kept count, on
inputs held back where there are any.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from ..backends import Layer
from ..config import PruneConfig
from ..engine.auto import TIE, Choice
from ..engine.layers import LayerRef
from .admm import top
from .collected import Calibration
from .magnitude import budget_of, magnitude_masks
from .problem import Problem, is_solvable, problem_of
from .refit import refit

ITERATIONS = 8


def choose_bases(
    options: Sequence[Sequence[Layer]],
    refs: Sequence[LayerRef],
    calibration: Calibration,
    config: PruneConfig,
) -> list[Choice]:
    """The option of each layer.

    Args:
        options: what each layer may be pruned as.
        refs: the layers.
        calibration: what is known of them.
        config: how much is kept: each layer's count is that of magnitude in its second option,
            which is a transform.

    Returns:
        One choice per layer, with the runner-up and its error relative to the layer's outputs.
    """
    if all(len(of_layer) == 1 for of_layer in options):
        return [Choice()] * len(options)
    solvable = [
        [layer for layer in of_layer if is_solvable(ref, layer)]
        for ref, of_layer in zip(refs, options, strict=True)
    ]
    likely = [of_layer[min(1, len(of_layer) - 1)] for of_layer in solvable]
    problems = {layer.name: problem_of(layer, calibration) for layer in likely}
    shared = config.scope == "global"
    masks = magnitude_masks(problems, budget_of(refs, config), shared)
    choices = []
    for of_layer in solvable:
        name = of_layer[0].name
        if len(of_layer) == 1 or name not in calibration.layers:
            choices.append(Choice())
            continue
        keep = int(masks[name].sum())
        errors = [_error(problem_of(layer, calibration), keep, calibration) for layer in of_layer]
        choices.append(_best([layer.basis.name for layer in of_layer], errors))
    return choices


def _error(problem: Problem, keep: int, calibration: Calibration) -> float:
    """The root of the squared error of the outputs over that of no output at all."""
    weights = problem.weights(calibration.gains[problem.name])
    scores = problem.C.square() * problem.diagonal[:, None, :] * weights[..., None]
    (mask,) = top([scores], min(keep, scores.numel()))
    moment = None
    if problem.name in calibration.held:
        centered = calibration.layers[problem.name].centered
        held = calibration.held[problem.name].second_moment(centered)
        moment = problem.to_coefficients(held).to(problem.dtype)
    error = problem.error(refit(problem, mask, ITERATIONS), weights, moment)
    whole = problem.error(torch.zeros_like(problem.C), weights, moment)
    return math.sqrt(max(error, 0.0) / whole) if whole > 0 else 0.0


def _best(names: Sequence[str], errors: Sequence[float]) -> Choice:
    order = sorted(range(len(names)), key=lambda i: (round(errors[i] / TIE), i))
    second = order[1]
    return Choice(order[0], names[second], errors[second])
