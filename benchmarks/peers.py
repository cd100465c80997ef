"""Published layer-wise pruning methods, written from their papers; what calibration is up against.

Each takes one weight as rows ``(r, d)`` with the second moment of its inputs ``(d, d)``, and how
many values to keep of the whole; each returns the pruned rows, exactly ``keep`` of them not 0.
Everything is in float64 on the CPU and made to be read, not to be fast.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import torch
from torch import nn

from wavprune import Calibration
from wavprune.calibration.statistics import merged
from wavprune.report import PruneReport

Prune = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]


def wanda(rows: torch.Tensor, moment: torch.Tensor, keep: int) -> torch.Tensor:
    """Weights times the norms of their inputs, compared within each row; nothing is refitted.

    Sun, Liu, Bair and Kolter, "A Simple and Effective Pruning Approach for Large Language Models",
    2023. Rows keep equally many; the first ones one more where ``keep`` is no multiple.
    """
    scores = rows.abs() * moment.diagonal().sqrt()
    each, more = divmod(keep, len(rows))
    counts = torch.full((len(rows),), each)
    counts[:more] += 1
    ranks = scores.argsort(1, descending=True).argsort(1)
    return rows * (ranks < counts[:, None])


def sparsegpt(
    rows: torch.Tensor, moment: torch.Tensor, keep: int, block: int = 128, damping: float = 0.01
) -> torch.Tensor:
    """Column by column, with what is lost made up for in the columns to come.

    Frantar and Alistarh, "SparseGPT: Massive Language Models Can Be Accurately Pruned in One-Shot",
    2023, algorithm 1; the mask of a block is chosen over all rows when the block is reached.
    """
    pruned = rows.clone()
    columns = rows.shape[1]
    factor = torch.linalg.cholesky(torch.linalg.inv(damped(moment, damping)), upper=True)
    left = keep
    for start in range(0, columns, block):
        end = min(start + block, columns)
        part, inverse = pruned[:, start:end], factor[start:end, start:end]
        share = round(left * (end - start) / (columns - start))
        left -= share
        kept = largest(part.square() / inverse.diagonal().square(), share)
        errors = torch.zeros_like(part)
        for column in range(end - start):
            value = part[:, column] * kept[:, column]
            errors[:, column] = (part[:, column] - value) / inverse[column, column]
            part[:, column:] -= errors[:, column, None] * inverse[column, column:]
            part[:, column] = value
        pruned[:, end:] -= errors @ factor[start:end, end:]
    return pruned


def obc(rows: torch.Tensor, moment: torch.Tensor, keep: int, damping: float = 0.01) -> torch.Tensor:
    """Greedy removal one weight at a time, the optimal brain surgeon in each row.

    Frantar, Singh and Alistarh, "Optimal Brain Compression", 2022: algorithm 1 in each row, then
    the cheapest steps of all rows together (algorithm 2). Takes ``r d**3`` operations.
    """
    hessian = damped(moment, damping)
    values, inverses = rows.clone(), torch.linalg.inv(hessian).repeat(len(rows), 1, 1)
    every = torch.arange(len(rows))
    removed = torch.zeros_like(rows, dtype=torch.bool)
    cost, order = torch.zeros_like(rows), torch.zeros_like(rows, dtype=torch.int64)
    for step in range(rows.shape[1]):
        scores = values.square() / inverses.diagonal(dim1=1, dim2=2).clamp_min(1e-30)
        cost[:, step], chosen = scores.masked_fill(removed, torch.inf).min(1)
        order[:, step] = chosen
        column = inverses[every, :, chosen]
        pivot = column[every, chosen]
        values -= column * (values[every, chosen] / pivot)[:, None]
        inverses -= column[:, :, None] * (column / pivot[:, None])[:, None, :]
        removed[every, chosen] = True
        values[removed] = 0
    # A row's steps stay in their order, so a cheap step after a dear one counts as dear.
    dearest = cost.cummax(1).values
    kept = torch.zeros_like(removed).scatter(1, order, largest(dearest, keep))
    return refitted(rows, hessian, kept)


def refitted(rows: torch.Tensor, hessian: torch.Tensor, kept: torch.Tensor) -> torch.Tensor:
    """The least squares of the kept values, row by row."""
    result = torch.zeros_like(rows)
    for row, mask, into in zip(rows, kept, result, strict=True):
        chosen = mask.nonzero()[:, 0]
        wanted = (hessian[chosen] @ row)[:, None]
        factor = torch.linalg.cholesky(hessian[chosen[:, None], chosen])
        into[chosen] = torch.cholesky_solve(wanted, factor)[:, 0]
    return result


def damped(moment: torch.Tensor, share: float) -> torch.Tensor:
    """With a share of the mean diagonal added; inputs that are always 0 stay solvable."""
    diagonal = moment.diagonal()
    return moment + torch.diag((share * diagonal.mean() + 1e-12).expand(len(moment)))


def largest(scores: torch.Tensor, number: int) -> torch.Tensor:
    """True at the ``number`` largest of all, the first of equals."""
    chosen = torch.zeros(scores.numel(), dtype=torch.bool)
    chosen[scores.flatten().argsort(descending=True, stable=True)[:number]] = True
    return chosen.view(scores.shape)


PEERS: Mapping[str, Prune] = MappingProxyType({"Wanda": wanda, "SparseGPT": sparsegpt, "OBC": obc})


def prune_layers(
    method: str, model: nn.Module, calibration: Calibration, report: PruneReport
) -> None:
    """Prune a model's layers in place, each to the count that a report has.

    The papers prune every layer to one sparsity, which leaves the first layers of small networks
    with next to nothing; with the counts of magnitude over all layers they do far better.

    Args:
        method: of ``PEERS``.
        model: the unpruned model.
        calibration: of its layers.
        report: of magnitude, in the identity.
    """
    for layer in report:
        name = layer.name
        parameter = model.get_submodule(name).weight
        assert isinstance(parameter, torch.Tensor)
        rows = calibration.layers[name].rows
        parts = [calibration.fitted[name], calibration.held[name]]
        moments = merged(parts).second_moment(centered=False)
        if calibration.blocks[name] > 1:
            raise ValueError(f"layer {name!r}: its matrix was cut into blocks; give more memory")
        matrices = list(rows.of_weight(parameter))
        groups = len(matrices)
        each, more = divmod(layer.kept, groups)
        counts = [each + (index < more) for index in range(groups)]
        pruned = [
            PEERS[method](matrix, moment, count)
            for matrix, moment, count in zip(matrices, moments, counts, strict=True)
        ]
        values = rows.join(torch.stack(pruned)).reshape(parameter.shape)
        with torch.no_grad():
            parameter.copy_(values)
