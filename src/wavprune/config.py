"""What to prune and how: one frozen, validated set of settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import pywt
import torch

from ._version import versions
from .common.checks import choice, fraction, integer, real
from .common.registry import Registry
from .errors import WavpruneError

METHODS = ("dwt", "min_weight", "random")
SCOPES = ("layer", "global")
MODES = tuple(pywt.Modes.modes)
WAVELETS = tuple(pywt.wavelist(kind="discrete"))
AUTO = "auto"
# Methods by another name.
ALIASES = {"magnitude": "min_weight", "min-weight": "min_weight"}
# What each name stands for: a ``bases.Family``, an ``engine.rules.Rule``.
BASES = Registry[Any]("wavelet", home="wavprune.bases")
RULES = Registry[Any]("method", home="wavprune.engine.rules")


@dataclass(frozen=True, slots=True)
class PruneConfig:
    """The settings of one pruning run, checked when they are made.

    Args:
        method: ``"dwt"`` prunes coefficients of ``wavelet``; ``"min_weight"``, or ``"min-weight"``
            or ``"magnitude"``, prunes weights by magnitude (the identity basis); ``"random"``
            prunes weights drawn from ``seed``.
        wavelet: any of ``pywt.wavelist(kind="discrete")``, or ``"uhaar"``, ``"dct"``, ``"klt"``,
            ``"identity"``, a registered name, or ``"auto"``: for each layer the one of identity,
            uhaar, dct and, on
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
        targets: layer names, globs or ``"re:..."`` patterns to prune, of convolutions and
            ``nn.Linear`` alike; None means every convolution.
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
        if isinstance(self.method, str):
            _set(self, "method", ALIASES.get(self.method, self.method))
        RULES.check(self.method)
        if self.wavelet != AUTO:
            _check_wavelet(self.wavelet)
        choice("mode", self.mode, MODES)
        choice("scope", self.scope, SCOPES)
        if not isinstance(self.backend, str):
            raise TypeError(f"backend must be a name, not {self.backend!r}")
        if not isinstance(self.force_level, bool):
            raise TypeError(f"force_level must be True or False, not {self.force_level!r}")
        if self.level is not None:
            _set(self, "level", integer("level", self.level, 1))
        if self.basis_name == AUTO and self.force_level:
            raise WavpruneError(
                "force_level=True makes a wavelet fit that does not, and wavelet='auto' takes "
                "those that fit; give one of them"
            )
        _set(self, "seed", integer("seed", self.seed, 0, 2**63 - 1))
        _set(self, "targets", _patterns("targets", self.targets))
        _set(self, "ignore", _patterns("ignore", self.ignore))
        self._check_amount()
        _check_device(self.device)

    @property
    def basis_name(self) -> str:
        """The basis that the method prunes in: its own, or ``wavelet``."""
        own: str | None = RULES[self.method].basis
        return own or self.wavelet

    def _check_amount(self) -> None:
        if self.sparsity is not None and self.percentile is not None:
            raise WavpruneError(
                f"sparsity={self.sparsity!r} and percentile={self.percentile!r} were both given; "
                "give one of them"
            )
        if self.percentile is None:
            amount = 0.5 if self.sparsity is None else fraction("sparsity", self.sparsity)
            _set(self, "sparsity", amount)
            return
        amount = real("percentile", self.percentile)
        if not 0 <= amount <= 100:
            raise WavpruneError(f"percentile must be in [0, 100], not {self.percentile!r}")
        if self.scope == "global":
            raise WavpruneError(
                f"percentile={self.percentile!r} is a threshold per layer; "
                "with scope='global' give sparsity"
            )
        if self.method == "random":
            raise WavpruneError(
                f"percentile={self.percentile!r} ranks magnitudes, which method='random' does not "
                "look at; give sparsity or match"
            )
        _set(self, "percentile", amount)


CONFIG_FIELDS = tuple(field.name for field in dataclasses.fields(PruneConfig))


@dataclass(frozen=True, slots=True)
class RunSettings:
    """The settings of a run, as they were given.

    Attributes:
        method: ``"dwt"``, ``"min_weight"``, ``"random"``, or a registered rule.
        wavelet: the basis; read by ``"dwt"`` only.
        level: levels asked for; None means the deepest that exists.
        mode: PyWavelets' boundary mode.
        force_level: True where levels that PyWavelets calls too deep were allowed.
        sparsity: pruned fraction relative to the weights; None with ``percentile``.
        percentile: WaveletTransforms' knob; None with ``sparsity``.
        scope: ``"layer"`` or ``"global"``.
        device: where it was to be computed; None means where each weight lives.
        backend: the backend asked for.
        targets: patterns of the layers to prune; None means every convolution.
        ignore: patterns of the layers left out.
        seed: of random masks.
        match: what was matched, such as ``"dwt uhaar"``; else None.
        versions: of this library, torch, numpy and PyWavelets.
    """

    method: str = "dwt"
    wavelet: str = "uhaar"
    level: int | None = None
    mode: str = "periodization"
    force_level: bool = False
    sparsity: float | None = None
    percentile: float | None = None
    scope: str = "layer"
    device: str | None = None
    backend: str = "auto"
    targets: tuple[str, ...] | None = None
    ignore: tuple[str, ...] | None = None
    seed: int = 0
    match: str | None = None
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(
        cls, config: PruneConfig, match: str | None = None, sparsity: float | None = None
    ) -> RunSettings:
        """Those of a run with this configuration.

        Args:
            config: what was asked for.
            match: the label of the run whose kept counts were matched, if any.
            sparsity: what was matched, in place of that of ``config``.
        """
        settings = {name: getattr(config, name) for name in CONFIG_FIELDS}
        settings["device"] = None if config.device is None else str(config.device)
        if match is not None:
            settings["sparsity"] = sparsity
            settings["match"] = match
        return cls(**settings, versions=dict(versions()))

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> RunSettings:
        """What ``to_dict`` gave, also of an older version; unknown entries are left out."""
        known = {field.name for field in dataclasses.fields(cls)} & values.keys()
        settings = {name: values[name] for name in known}
        for name in ("targets", "ignore"):
            if settings.get(name) is not None:
                settings[name] = tuple(settings[name])
        return cls(**settings)

    def to_dict(self) -> dict[str, Any]:
        """Names and values, ready for JSON; ``match`` only where there was one."""
        settings = dataclasses.asdict(self)
        if self.match is None:
            del settings["match"]
        return settings

    @property
    def label(self) -> str:
        """Method, and basis where that was chosen."""
        return f"{self.method} {self.wavelet}" if self.method == "dwt" else self.method


def _check_wavelet(name: object) -> None:
    if isinstance(name, str) and name in BASES:
        return
    own = [AUTO, *(other for other in BASES if other not in WAVELETS)]
    described = f"{', '.join(own)} and the {len(WAVELETS)} names of pywt.wavelist(kind='discrete')"
    choice("wavelet", name, (AUTO, *BASES), described)


def _set(config: PruneConfig, field: str, value: Any) -> None:
    object.__setattr__(config, field, value)


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
        raise WavpruneError(f"{name} is empty; leave it out to select every layer")
    return result


def _check_device(value: object) -> None:
    if value is None or isinstance(value, torch.device):
        return
    if not isinstance(value, str):
        raise TypeError(f"device must be a string, a torch.device or None, not {value!r}")
    try:
        torch.device(value)
    except RuntimeError as error:
        raise WavpruneError(
            f"unknown device {value!r}; allowed: 'cpu', 'cuda', 'cuda:0', ..., or None"
        ) from error
