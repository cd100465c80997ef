"""How much each layer keeps: one budget over all layers, in units of what a layer really costs.

The loss that covariances predict is right within a layer, and wrong between layers by orders of
magnitude. So each layer is pruned alone, at the level nearest to its share, and the loss that the
network then has over the predicted one scales the layer's row weights. With these one top k is
taken over all layers, and once more at the shares that it gave.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch

from .admm import ITERATIONS, select, top
from .collected import Calibration
from .guard import Reference
from .network import Network, Values
from .problem import Problem
from .refit import refit
from .replay import Resumed, record

LEVELS = (0.3, 0.5, 0.7, 0.85, 0.95, 0.98, 0.99)
RIDGES = (0.01, 0.1, 1.0, 10.0)
# Of few inputs, fewer still are held back: of ridges whose errors are this close, relatively, the
# smallest is taken.
RIDGES_OF_FEW, TOLERANCE_OF_FEW = (0.03, 0.3, 3.0), 0.25
ROUNDS = 3
# Rows of a layer that ridges are tried on, and steps of selection and solver there.
TRIED_ROWS, TRIED_ITERATIONS = 256, 10
# Steps of the rounds whose masks only give shares.
ROUGH_ITERATIONS = 14
LEAST_LOSS, LEAST_PREDICTED = 1e-7, 1e-30

RowWeights = Mapping[str, torch.Tensor]


def choose_ridges(
    problems: Mapping[str, Problem],
    calibration: Calibration,
    row_weights: RowWeights,
    share: float,
) -> None:
    """Give each problem the ridge whose solution has the least error on inputs held back.

    Args:
        problems: by name; their ridges are set.
        calibration: its statistics ``held`` are looked at.
        row_weights: of each layer, ``(groups, r)``.
        share: of the coefficients of a layer that are kept meanwhile.
    """
    grid, tolerance = (RIDGES_OF_FEW, TOLERANCE_OF_FEW) if calibration.few else (RIDGES, 0.0)
    for name, problem in problems.items():
        held = calibration.held.get(name)
        if held is None:
            problem.ridge = grid[min(1, len(grid) - 1)]
            continue
        moment = problem.to_coefficients(held.second_moment(calibration.layers[name].centered)).to(
            problem.dtype
        )
        rows = problem.rows_sample(TRIED_ROWS)
        errors = []
        for ridge in grid:
            problem.ridge = ridge
            errors.append(_held_out(problem, moment, row_weights[name], share, rows))
        enough = min(errors) * (1 + tolerance)
        problem.ridge = next(r for r, error in zip(grid, errors, strict=True) if error <= enough)


def _held_out(
    problem: Problem,
    moment: torch.Tensor,
    row_weights: torch.Tensor,
    share: float,
    rows: torch.Tensor,
) -> float:
    problem.spectrum()
    part = problem.of_rows(rows)
    weights = problem.weights(row_weights)[:, rows]
    # As the layer will be pruned: what looks at coefficients one by one asks for larger ridges.
    own = {part.name: row_weights[:, rows.to(row_weights.device)]}
    keep = max(1, int(share * part.numel))
    mask = select([part], keep, own, TRIED_ITERATIONS)[part.name]
    X = refit(part, mask, TRIED_ITERATIONS)
    return part.error(X, weights, moment)


class Probe:
    """What the network loses when a single layer is pruned; tried once for each level.

    Args:
        network: the unpruned network.
        calibration: with inputs to probe on.
        problems: with their ridges.
        row_weights: that choose what a probed layer keeps.
    """

    def __init__(
        self,
        network: Network,
        calibration: Calibration,
        problems: Mapping[str, Problem],
        row_weights: RowWeights,
    ) -> None:
        self._network, self._calibration = network, calibration
        self._problems, self._row_weights = problems, row_weights
        self._batches = calibration.probe
        each = calibration.max_memory // (4 * len(self._batches))
        self._records = [record(network, calibration.layers, b, each) for b in self._batches]
        self._reference = Reference([found.outputs for found in self._records])
        self._found: dict[tuple[str, float], tuple[float, torch.Tensor]] = {}

    def scale(self, name: str, share: float, row_weights: torch.Tensor) -> float:
        """The measured loss for each unit of predicted loss.

        Args:
            name: of the layer.
            share: of its coefficients that it keeps; the nearest level counts.
            row_weights: ``(groups, r)``, of the predicted loss.
        """
        level = min(LEVELS, key=lambda level: abs(level - (1 - share)))
        if (name, level) not in self._found:
            self._found[name, level] = self._try(name, level)
        measured, X = self._found[name, level]
        problem = self._problems[name]
        predicted = problem.error(X, problem.weights(row_weights))
        return max(measured, LEAST_LOSS) / max(predicted, LEAST_PREDICTED)

    def _try(self, name: str, level: float) -> tuple[float, torch.Tensor]:
        problem = self._problems[name]
        keep = -int(-(1 - level) * problem.numel // 1)
        weights = problem.weights(self._row_weights[name])
        (mask,) = top([problem.removal_scores() * weights[..., None]], keep)
        X = refit(problem, mask)
        weight = problem.to_weight(X).to(problem.layer.weight)
        site = self._calibration.layers[name]
        norms = frozenset([site.norm] if site.norm else [])
        outputs = []
        for batch, found in zip(self._batches, self._records, strict=True):
            tap = Resumed(
                self._network, Values({name: weight}), found, self._calibration.layers, norms
            )
            outputs.append(self._network.run(tap, batch))
        losses = torch.nan_to_num(self._reference.losses(outputs), nan=torch.inf)
        return float(losses.mean()), X


def calibrated(
    problems: Mapping[str, Problem],
    keep: int,
    row_weights: RowWeights,
    probe: Probe,
    rounds: int = ROUNDS,
) -> dict[str, torch.Tensor]:
    """Masks of all layers, ``keep`` coefficients in all, in units of measured losses.

    Args:
        problems: by name.
        keep: how many coefficients.
        row_weights: of each layer, ``(groups, r)``.
        probe: what measures.
        rounds: how often shares are found.
    """
    shares = dict.fromkeys(problems, keep / sum(p.numel for p in problems.values()))
    masks: dict[str, torch.Tensor] = {}
    for last in [False] * (rounds - 1) + [True]:
        scaled = {
            name: weights * probe.scale(name, shares[name], weights)
            for name, weights in row_weights.items()
            if name in problems
        }
        steps = ITERATIONS if last else ROUGH_ITERATIONS
        masks = select(list(problems.values()), keep, scaled, steps)
        shares = {name: float(mask.double().mean()) for name, mask in masks.items()}
    return masks
