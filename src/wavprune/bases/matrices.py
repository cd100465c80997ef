"""Matrices that are shared and therefore read-only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Matrix = npt.NDArray[np.float64]

# PyWavelets' tabulated filters sum to zero only up to 1e-13 .. 1e-11, so what is 0 for every
# input in exact arithmetic comes out of them as a row that small.
NEGLIGIBLE = 1e-10


def frozen(matrix: npt.ArrayLike) -> Matrix:
    """A read-only float64 copy, fit to be shared."""
    result = np.array(matrix, dtype=np.float64, order="C")
    result.flags.writeable = False
    return result
