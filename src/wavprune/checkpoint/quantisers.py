"""Coefficients to the values that a file stores: floats, or whole numbers times a scale."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from ..common.checks import choice, positive
from ..errors import WavpruneError
from .coders import CODERS, Symbols
from .layer import Layer
from .records import FLOATS, SYMBOLS
from .stored_basis import Floats

AUTO = "auto"
# No coder of symbols: what quantises and codes whole models (``packing.py``).
TRELLIS = "trellis"
# What becomes of batch norms where calibration inputs choose the steps.
FOLD, KEEP = "fold", "keep"
BATCH_NORMS = (FOLD, KEEP)
BITS = (8, 6, 4)
LARGEST_SYMBOL = 32700


@dataclass(frozen=True)
class Quantiser:
    """How values are stored.

    Attributes:
        values: ``"float32"``, ``"float16"`` or ``"symbols"``.
        bits: with symbols, of each: the scale of an output channel takes its largest coefficient to
            the largest symbol. None takes ``step``.
        step: with symbols, the distance of neighbors over the Frobenius norm of the weight, or
            the least at which every symbol has 16 bits.
        coder: ``"auto"`` or the name of one.
    """

    values: str
    bits: int | None = None
    step: float | None = None
    coder: str = AUTO

    def scales(self, layer: Layer) -> Floats | None:
        """What the symbols of a layer are multiplied by: ``(1,)``, or ``(Cout,)`` with ``bits``."""
        if self.values != SYMBOLS:
            return None
        if self.bits is None:
            assert self.step is not None
            # No coefficient is larger than its row's norm times the weight's, so none overflows.
            rows = 1.0
            if layer.analysis is not None:
                rows = float(np.linalg.norm(layer.analysis, axis=1).max())
            scale = np.float32(layer.norm * max(self.step, rows / LARGEST_SYMBOL))
            return np.array([scale if scale > 0 else 1], dtype=np.float32)
        # A matrix that is one kernel has one scale.
        count = min(layer.shape[0], len(layer.kernels))
        per_channel = len(layer.kernels) // count
        peaks = np.zeros(count, dtype=np.float32)
        for start, chunk in layer.chunks():
            starts, channel = channels(start, chunk.shape[1], per_channel)
            found = np.maximum.reduceat(np.abs(chunk).max(axis=0), starts)
            among = slice(channel, channel + len(starts))
            peaks[among] = np.maximum(peaks[among], found)
        peaks /= np.float32((1 << (self.bits - 1)) - 1)
        return np.where(peaks > 0, peaks, np.float32(1))


def quantiser_of(
    bits: int | None,
    values: str | None,
    step: float | None,
    target_bytes: float | None,
    target_bits_per_weight: float | None,
    coder: str,
    target_kl: float | None = None,
) -> Quantiser:
    """The quantiser of the arguments of ``save``; with a target, one whose step is replaced.

    Raises:
        TypeError: an argument is of the wrong type.
        WavpruneError: an argument is out of range, or more than one was given.
    """
    given = {
        "bits": bits,
        "values": values,
        "step": step,
        "target_bytes": target_bytes,
        "target_bits_per_weight": target_bits_per_weight,
        "target_kl": target_kl,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if len(given) > 1:
        shown = ", ".join(f"{name}={value!r}" for name, value in given.items())
        raise WavpruneError(f"{shown} were given; give one of them")
    choice("coder", coder, (AUTO, *CODERS, TRELLIS))
    for name in ("target_bytes", "target_bits_per_weight", "target_kl"):
        if name in given:
            positive(name, given[name])
    if values is not None:
        return Quantiser(choice("values", values, tuple(FLOATS)), coder=coder)
    if step is not None:
        return Quantiser(SYMBOLS, step=positive("step", step), coder=coder)
    if bits is not None and (isinstance(bits, bool) or bits not in BITS):
        raise WavpruneError(f"bits must be one of {', '.join(map(str, BITS))}, not {bits!r}")
    return Quantiser(SYMBOLS, bits=int(bits or BITS[0]), coder=coder)


def quantise(coefficients: Floats, scales: Floats) -> Symbols:
    """Symbols of coefficients ``(M, kernels)``; ``scales`` is ``(1,)`` or ``(kernels,)``."""
    symbols: Symbols = np.rint(coefficients / scales).astype(np.int16)
    return symbols


def quantise_weights(weights: Floats, scale: Floats, start: int, layer: Layer) -> Symbols:
    """Symbols of weights ``(1, n)`` that are no coefficients, so that few outputs move.

    Rounding is moved by the mean of the errors of each output channel. It brings the errors' sum
    near 0, for few bits and little error: what the inputs have in common, their mean after a ReLU,
    then moves no output. It is the sum that SQuant (Guo et al. 2022, "SQuant: On-the-Fly Data-Free
    Quantization via Diagonal Hessian Approximation") brings to 0 by choosing roundings one by one.
    """
    steps = weights / scale
    errors = steps[0] - np.rint(steps[0])
    starts, _ = channels(start, len(errors), len(layer.kernels) // layer.shape[0])
    lengths = np.diff(starts, append=len(errors))
    means = np.add.reduceat(errors, starts) / lengths
    shift = np.repeat(means.astype(np.float32), lengths)
    symbols: Symbols = np.rint(steps + shift).astype(np.int16)
    return symbols


def channels(start: int, count: int, per_channel: int) -> tuple[npt.NDArray[np.intp], int]:
    """Where output channels begin among some kernels, and which channel is the first."""
    return np.arange(-(start % per_channel), count, per_channel).clip(0), start // per_channel


def exponent_for(peak: float, low: int = -30, high: int = 30) -> int:
    """By which power of 2 to divide weights so that float32, and its squares, have room for them.

    Args:
        peak: the largest magnitude.
        low: exponents from here
        high: to here need no division.

    Example:
        >>> exponent_for(0.5), exponent_for(3e38), exponent_for(1e-40)
        (0, 128, -132)
    """
    _, exponent = math.frexp(peak)
    return 0 if peak == 0 or low < exponent <= high else exponent
