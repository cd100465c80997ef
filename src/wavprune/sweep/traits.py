"""Which settings have an effect on a run, by what its method and its basis say of themselves."""

from __future__ import annotations

from functools import cache

from ..bases import family_of, named_basis
from ..config import AUTO, RULES, PruneConfig
from ..engine.rules import Magnitude


def reads_wavelet(config: PruneConfig) -> bool:
    """Whether the method prunes in the basis that was asked for; others have one of their own."""
    return RULES[config.method].basis is None


def ranks_magnitudes(config: PruneConfig) -> bool:
    """Whether the method keeps the coefficients of the largest magnitude or importance."""
    return isinstance(RULES[config.method], Magnitude)


def uses_seed(config: PruneConfig) -> bool:
    """Whether the method draws random numbers."""
    uses: bool = RULES[config.method].uses_seed
    return uses


def unread_settings(config: PruneConfig) -> set[str]:
    """The names of the settings that have no effect on the result."""
    unread = set()
    if not uses_seed(config):
        unread |= {"seed"}
    if not reads_wavelet(config):
        return unread | {"wavelet", "mode", "level", "force_level"}
    if config.wavelet != AUTO:
        has_boundary, has_levels = _basis_traits(config.wavelet)
        if not has_boundary:
            # Only a transform with a boundary can be too long for a kernel.
            unread |= {"mode", "force_level"}
        if not has_levels:
            unread |= {"level"}
    if config.level is None:
        unread |= {"force_level"}
    return unread


@cache
def _basis_traits(wavelet: str) -> tuple[bool, bool]:
    """Whether a basis has a boundary mode, and whether it has several levels."""
    family = family_of(wavelet)
    has_boundary = not family.data_driven and named_basis(wavelet, (8, 8)).has_boundary
    return has_boundary, family.max_level(wavelet, (1 << 12, 1 << 12)) > 1
