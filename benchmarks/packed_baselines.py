"""What calibrated checkpoints are compared with: NNCodec, and the method of CERWU.

``nncodec`` needs the package of that name. ``cerwu`` follows Conzelmann and Bamler 2025, "Reducing
storage of pretrained neural networks by rate-constrained quantization and entropy coding" (arXiv
2505.18758): its steps, its Hessian with the quadratic part of the rate, its choice of every weight;
bytes are those that wavprune's tables take for its indices.
"""

from __future__ import annotations

import importlib
import io
import math
import tempfile
from collections.abc import Mapping
from contextlib import redirect_stdout
from functools import partial
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch

from wavprune.checkpoint import trellis_tables
from wavprune.checkpoint.trellis import Ints
from wavprune.checkpoint.trellis_coder import SYMBOLS

State = dict[str, torch.Tensor]
Doubles = npt.NDArray[np.float64]

# Of the mean diagonal, added to a Hessian; as the authors do.
DAMPING = 0.01
PASSES = 2


def nncodec(state: Mapping[str, torch.Tensor], qp: int) -> tuple[int, State]:
    """Bytes and decoded tensors, with its own settings: dependent quantisation is on."""
    with redirect_stdout(io.StringIO()), tempfile.TemporaryDirectory() as directory:
        library = importlib.import_module("nncodec.nn")
        arrays = {name: t.numpy().copy() for name, t in state.items() if t.ndim}
        coded = library.encode(arrays, {"qp": qp, "verbose": False, "results": directory})
        decoded = library.decode(bytearray(coded), {"verbose": False})
    tensors = {name: torch.as_tensor(np.asarray(array)) for name, array in decoded.items()}
    return len(coded), dict(state) | tensors


class Linear(NamedTuple):
    """A layer of a folded network.

    Attributes:
        weight: ``(R, d)``, group after group.
        hessian: ``(groups, d, d)``: twice the second moments of its inputs, summed over positions.
    """

    weight: Doubles
    hessian: Doubles


def cerwu(layers: Mapping[str, Linear], bins: int, exponent: float) -> tuple[int, State]:
    """Bytes of the layers' weights, and the weights.

    Args:
        layers: of the network.
        bins: values of a grid from the largest weight to its negative.
        exponent: the multiplier of the rate is 10 to this.
    """
    tally = np.zeros((2 * trellis_tables.CLASSES, SYMBOLS), dtype=np.int64)
    weights: State = {}
    side = 0.0
    for name, layer in layers.items():
        delta = max(float(np.abs(layer.weight).max()), 1e-30) / (bins // 2)
        parts = np.split(layer.weight, len(layer.hessian))
        indices = np.concatenate(
            [
                _quantised(part / delta, hessian * delta**2, 10.0**exponent)
                for part, hessian in zip(parts, layer.hessian, strict=True)
            ]
        )
        classes = trellis_tables.classify([partial(np.asarray, indices)])
        magnitudes = np.minimum(np.abs(indices), SYMBOLS // 2 - 1)
        symbols = 2 * magnitudes - (indices < 0)
        # One quantiser: the second table of each class stays empty.
        np.add.at(tally, (2 * classes.table(), symbols), 1)
        side += sum(_entropy(part) for part in (classes.rows, classes.columns)) / 8 + 8
        weights[name] = torch.from_numpy(indices * delta)
    tables, frequencies = trellis_tables.choose(tally)
    used = tally > 0
    bits = float(trellis_tables.bits_of(frequencies)[used] @ tally[used])
    return math.ceil(bits / 8 + side + len(tables)), weights


def _quantised(weight: Doubles, hessian: Doubles, multiplier: float) -> Ints:
    """Indices of weights in units of their grid."""
    d = len(hessian)
    diagonal = np.diagonal(hessian)
    damped = hessian + np.diag(np.where(diagonal == 0, 1.0, 0.0) + DAMPING * diagonal.mean())
    gamma = 1 / (math.log(2) * max(float(weight.var()), 1e-12))
    regular = damped + multiplier * gamma * np.eye(d)
    inverse = np.linalg.inv(regular)
    moved = weight @ damped @ inverse
    root = np.linalg.cholesky((inverse + inverse.T) / 2).T.astype(np.float64)
    most = max(1, int(np.abs(weight).max() + 0.5))
    grid = np.arange(-most, most + 1)
    rate = _gaussian_rate(grid, float(weight.std()))
    for _ in range(PASSES):
        cost = (rate - gamma / 2 * grid**2).astype(np.float64)
        indices = _pass(moved, root, multiplier, cost, most)
        counts = np.bincount((indices + most).ravel(), minlength=len(grid)) + 0.5
        rate = -np.log2(counts / counts.sum())
    return indices


def _pass(
    moved: Doubles, root: Doubles, multiplier: float, cost: npt.NDArray[Any], most: int
) -> Ints:
    rest = moved.copy()
    indices = np.zeros(moved.shape, dtype=np.int32)
    for j in range(moved.shape[1]):
        x = rest[:, j]
        near = np.clip(np.rint(x), -most, most).astype(np.int64)
        # Nearer to 0 a weight takes fewer bits.
        options = np.stack([near, near - np.sign(near), near + np.sign(x - near), 0 * near])
        options = np.clip(options, -most, most).astype(np.int64)
        loss = (x - options) ** 2 / (2 * root[j, j] ** 2) + multiplier * cost[options + most]
        chosen = np.take_along_axis(options, loss.argmin(0)[None], 0)[0]
        indices[:, j] = chosen
        rest[:, j:] -= ((x - chosen) / root[j, j])[:, None] * root[j, j:]
    return indices


def _gaussian_rate(grid: npt.NDArray[np.int64], deviation: float) -> Doubles:
    edges = (np.append(grid, grid[-1] + 1) - 0.5) / (max(deviation, 1e-6) * math.sqrt(2))
    below = 0.5 * (1 + np.array([math.erf(edge) for edge in edges]))
    rate: Doubles = -np.log2(np.maximum(np.diff(below), 1e-9))
    return rate


def _entropy(classes: npt.NDArray[np.uint8]) -> float:
    tally = np.bincount(classes)
    tally = tally[tally > 0]
    return float((tally * np.log2(len(classes) / tally)).sum())
