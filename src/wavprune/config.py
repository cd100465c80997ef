"""What to prune and how: one frozen, validated set of settings."""

from __future__ import annotations

import difflib
import math
import numbers
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pywt
import torch

METHODS = ("dwt", "min_weight", "random")
SCOPES = ("layer", "global")
MODES = tuple(pywt.Modes.modes)
WAVELETS = tuple(pywt.wavelist(kind="discrete"))
OWN_BASES = ("uhaar", "dct", "klt", "identity")
AUTO = "auto"


@dataclass(frozen=True, slots=True)
class PruneConfig:
    """The settings of one pruning run, checked when they are made.

    Args:
        method: ``"dwt"`` prunes coefficients of ``wavelet``; ``"min_weight"`` prunes weights by
            magnitude (the identity basis); ``"random"`` prunes weights drawn from ``seed``.
        wavelet: any of ``pywt.wavelist(kind="discrete")``, or ``"uhaar"``, ``"dct"``, ``"klt"``,
            ``"identity"``, or ``"auto"``: for each layer the one of identity, uhaar, dct and, on
            axes of 16 and longer, db4 and sym8 that changes its weight least. Read by ``"dwt"``
            only.
        level: how many levels to transform, 1 or more; None means the deepest that exists.
        mode: any of ``pywt.Modes.modes``: how PyWavelets extends a kernel past its border.
        force_level: use ``level`` even where PyWavelets calls it too deep for the kernel.
        sparsity: pruned fraction relative to the weights, ``0 <= sparsity < 1``.
        percentile: WaveletTransforms' knob, ``0 <= percentile <= 100``, per layer: prune
            coefficients below ``numpy.percentile(|C|, percentile)``. With neither of the two,
            ``sparsity`` is 0.5.
        scope: ``"layer"`` ranks each layer by itself; ``"global"`` ranks all layers together.
        device: where to compute, as ``torch.device`` takes it; None means where each weight lives.
        backend: a name from ``wavprune.backends.names()``, or ``"auto"``.
        targets: layer names, globs or ``"re:..."`` patterns to prune, of ``nn.Conv2d``
            and ``nn.Linear`` alike; None means every ``nn.Conv2d``.
        ignore: layer names, globs or ``"re:..."`` patterns to leave out.
        seed: which random mask ``"random"`` draws; any integer from 0 up to ``2**63 - 1``.

    Raises:
        ValueError: a value is outside what is allowed; the message names it.
        TypeError: a value is of the wrong type; the message names it.

    Example:
        >>> PruneConfig(wavelet="haar", sparsity=0.8).scope
        'layer'
    """

    method: str = "dwt"
    wavelet: str = "uhaar"
    level: int | None = None
    mode: str = "periodization"
    force_level: bool = False
    sparsity: float | None = None
    percentile: float | None = None
    scope: str = "layer"
    device: str | torch.device | None = None
    backend: str = "auto"
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        _choice("method", self.method, METHODS)
        _choice("wavelet", self.wavelet, (AUTO, *OWN_BASES, *WAVELETS))
        _choice("mode", self.mode, MODES)
        _choice("scope", self.scope, SCOPES)
        if not isinstance(self.backend, str):
            raise TypeError(f"backend must be a name, not {self.backend!r}")
        if not isinstance(self.force_level, bool):
            raise TypeError(f"force_level must be True or False, not {self.force_level!r}")
        if self.level is not None:
            _set(self, "level", _integer("level", self.level, 1, None))
        if self.method == "dwt" and self.wavelet == AUTO and self.force_level:
            raise ValueError(
                "force_level=True makes a wavelet fit that does not, and wavelet='auto' takes "
                "those that fit; give one of them"
            )
        _set(self, "seed", _integer("seed", self.seed, 0, 2**63 - 1))
        _set(self, "targets", _patterns("targets", self.targets))
        _set(self, "ignore", _patterns("ignore", self.ignore))
        self._check_amount()
        _check_device(self.device)

    def _check_amount(self) -> None:
        if self.sparsity is not None and self.percentile is not None:
            raise ValueError(
                f"sparsity={self.sparsity!r} and percentile={self.percentile!r} were both given; "
                "give one of them"
            )
        if self.percentile is None:
            amount = 0.5 if self.sparsity is None else _real("sparsity", self.sparsity)
            if not 0 <= amount < 1:
                raise ValueError(f"sparsity must be in [0, 1), not {self.sparsity!r}")
            _set(self, "sparsity", amount)
            return
        amount = _real("percentile", self.percentile)
        if not 0 <= amount <= 100:
            raise ValueError(f"percentile must be in [0, 100], not {self.percentile!r}")
        if self.scope == "global":
            raise ValueError(
                f"percentile={self.percentile!r} is a threshold per layer; "
                "with scope='global' give sparsity"
            )
        if self.method == "random":
            raise ValueError(
                f"percentile={self.percentile!r} ranks magnitudes, which method='random' does not "
                "look at; give sparsity or match"
            )
        _set(self, "percentile", amount)


def _set(config: PruneConfig, field: str, value: Any) -> None:
    object.__setattr__(config, field, value)


def _choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if not isinstance(value, str):
        raise TypeError(f"{name} must be a string, not {value!r}")
    if value in allowed:
        return
    if len(allowed) <= 12:
        raise ValueError(f"unknown {name} {value!r}; allowed: {', '.join(allowed)}")
    close = difflib.get_close_matches(value.lower(), allowed, n=4, cutoff=0.5)
    hint = f"close to it: {', '.join(close)}; " if close else ""
    raise ValueError(
        f"unknown {name} {value!r}; {hint}allowed: {', '.join((AUTO, *OWN_BASES))} and the "
        f"{len(WAVELETS)} names of pywt.wavelist(kind='discrete')"
    )


def _integer(name: str, value: object, low: int, high: int | None) -> int:
    bounds = f"{low} or more" if high is None else f"from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, {bounds}, not {value!r}")
    result = int(value)
    if result < low or (high is not None and result > high):
        raise ValueError(f"{name} must be an integer, {bounds}, not {value!r}")
    return result


def _real(name: str, value: object) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise TypeError(f"{name} must be a number, not {value!r}")
    try:
        result = float(value)
    except OverflowError:
        result = math.inf
    if math.isnan(result):
        raise ValueError(f"{name} must be a number, not NaN")
    return result


def _patterns(name: str, value: object) -> tuple[str, ...] | None:
    if value is None:
        return None
    patterns = [value] if isinstance(value, str) else value
    if not isinstance(patterns, Iterable):
        raise TypeError(f"{name} must be a pattern or a list of patterns, not {value!r}")
    result = tuple(patterns)
    for pattern in result:
        if not isinstance(pattern, str):
            raise TypeError(f"{name} must hold strings, not {pattern!r}")
    if not result:
        raise ValueError(f"{name} is empty; leave it out to select every layer")
    return result


def _check_device(value: object) -> None:
    if value is None or isinstance(value, torch.device):
        return
    if not isinstance(value, str):
        raise TypeError(f"device must be a string, a torch.device or None, not {value!r}")
    try:
        torch.device(value)
    except RuntimeError as error:
        raise ValueError(
            f"unknown device {value!r}; allowed: 'cpu', 'cuda', 'cuda:0', ..., or None"
        ) from error
