from __future__ import annotations

import dataclasses
import inspect
import math
from typing import Any

import numpy as np
import pytest
import pywt
import torch

import wavprune
from wavprune import PruneConfig
from wavprune.bases import names
from wavprune.config import METHODS, MODES, SCOPES, WAVELETS


def test_every_wavelet_and_mode_of_pywavelets_is_allowed() -> None:
    assert len(WAVELETS) == 106
    assert len(MODES) == 9
    for wavelet in (*pywt.wavelist(kind="discrete"), *names(), "auto"):
        assert PruneConfig(wavelet=wavelet).wavelet == wavelet
    for mode in pywt.Modes.modes:
        assert PruneConfig(mode=mode).mode == mode
    for method in METHODS:
        assert PruneConfig(method=method).method == method
    for scope in SCOPES:
        assert PruneConfig(scope=scope).scope == scope


def test_half_is_pruned_unless_said_otherwise() -> None:
    assert PruneConfig().sparsity == 0.5
    assert PruneConfig(sparsity=0.0).sparsity == 0.0
    assert PruneConfig(percentile=50).sparsity is None


@pytest.mark.parametrize("sparsity", [0, 0.0, 0.3, math.nextafter(1, 0), np.float32(0.25)])
def test_sparsities_from_0_to_just_below_1(sparsity: float) -> None:
    found = PruneConfig(sparsity=sparsity).sparsity
    assert found == sparsity
    assert type(found) is float


@pytest.mark.parametrize("percentile", [0, 100, 12.5, np.int64(7)])
def test_percentiles_from_0_to_100(percentile: float) -> None:
    found = PruneConfig(percentile=percentile).percentile
    assert found == percentile
    assert type(found) is float


def test_integers_of_numpy_are_integers() -> None:
    config = PruneConfig(level=np.int8(2), seed=np.uint64(3))  # type: ignore[arg-type]
    assert (config.level, config.seed) == (2, 3)
    assert type(config.level) is int
    assert type(config.seed) is int


@pytest.mark.parametrize("field", ["targets", "ignore"])
def test_one_pattern_is_a_list_of_one(field: str) -> None:
    ways: list[Any] = ["layer1.*", ["layer1.*"], ("layer1.*",), iter(["layer1.*"])]
    for given in ways:
        assert getattr(PruneConfig(**{field: given}), field) == ("layer1.*",)


@pytest.mark.parametrize("device", ["cpu", "cuda", "cuda:1", torch.device("cpu"), None])
def test_devices_need_not_be_there_to_be_named(device: str | torch.device | None) -> None:
    assert PruneConfig(device=device).device == device


def test_a_config_is_a_value() -> None:
    config = PruneConfig(wavelet="haar", targets=("a",))
    assert config == PruneConfig(wavelet="haar", targets=("a",))
    assert len({config, PruneConfig(wavelet="haar", targets=("a",)), PruneConfig()}) == 2
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.wavelet = "db2"  # type: ignore[misc]


def test_a_config_changed_by_replace_is_checked_again() -> None:
    config = dataclasses.replace(PruneConfig(), sparsity=0.9)
    assert config.sparsity == 0.9
    with pytest.raises(ValueError, match="sparsity"):
        dataclasses.replace(config, sparsity=1.0)


def test_the_config_and_prune_have_the_same_settings_and_defaults() -> None:
    parameters = inspect.signature(wavprune.fast.prune).parameters
    for field in dataclasses.fields(PruneConfig):
        assert parameters[field.name].default == field.default
