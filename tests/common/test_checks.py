from __future__ import annotations

import numpy as np
import pytest

from wavprune.common.checks import choice, fraction, integer, positive, real
from wavprune.errors import WavpruneError


@pytest.mark.parametrize("value", [True, 1.0, "1", None])
def test_what_is_no_integer_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match="level must be an integer, 1 or more, not"):
        integer("level", value, 1)


def test_an_integer_is_one_of_any_type() -> None:
    assert integer("seed", np.int32(4), 0, 9) == 4
    with pytest.raises(WavpruneError, match="seed must be an integer, from 0 to 9, not 10"):
        integer("seed", 10, 0, 9)


@pytest.mark.parametrize("value", [-0.1, 1, 2.0, float("inf")])
def test_a_fraction_is_below_one(value: float) -> None:
    with pytest.raises(WavpruneError, match=r"sparsity must be in \[0, 1\), not"):
        fraction("sparsity", value)


def test_numbers_are_neither_nan_nor_bool() -> None:
    with pytest.raises(WavpruneError, match="x must be a number, not NaN"):
        real("x", float("nan"))
    with pytest.raises(TypeError, match="x must be a number, not True"):
        real("x", True)
    assert real("x", 10**400) == float("inf")
    with pytest.raises(WavpruneError, match="x must be a positive number, not 0"):
        positive("x", 0)


def test_a_choice_repeats_what_was_given_and_names_what_is_close() -> None:
    with pytest.raises(WavpruneError, match="unknown scope 'all'; allowed: layer, global"):
        choice("scope", "all", ("layer", "global"))
    with pytest.raises(WavpruneError, match="close to it: haar; allowed: many"):
        choice("wavelet", "Haar", ("haar", "db2"), "many")
