"""Backends: where the five steps run. One file each, one ``register`` line each.

A backend is a class with two working methods, ``threshold`` and ``apply_``. Asked for by name it
runs or says why it can't; ``"auto"`` takes the first one here that can do the whole job.
"""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import NamedTuple, Protocol, runtime_checkable

import torch

from ..bases.basis import Basis, Operator


@dataclass(frozen=True, slots=True)
class Batch:
    """The kernels of one layer and what ranks their coefficients.

    Attributes:
        weight: ``(Cout, Cin/groups, kh, kw)``, on the device that computes.
        basis: the basis of its kernels.
        by_importance: True ranks by ``|c_m| * ||S[:, m]||``, False by ``|c_m|``.
        compute_dtype: float32 or float64, the same for all batches that share a threshold.
        draw: a 64-bit seed where a random draw ranks the weights, else None.
        first: which output channel of the whole weight ``weight`` begins with, where it is a part.
    """

    weight: torch.Tensor
    basis: Basis
    by_importance: bool
    compute_dtype: torch.dtype
    draw: int | None = None
    first: int = 0

    @property
    def operator(self) -> Operator:
        """The matrices whose coefficients are ranked.

        Raises:
            ValueError: the kernels are so large that their basis has only ``factors``.
        """
        basis = self.basis
        return basis.importance_operator if self.by_importance else basis.coefficient_operator

    @property
    def ranked(self) -> int:
        """How many coefficients of each kernel are ranked; of factors, structural zeros too."""
        factors = self.basis.factors
        return len(self.operator.rows) if factors is None else math.prod(factors.grid)

    @property
    def dropped(self) -> int:
        """How many coefficients of each kernel are 0 without a look at them."""
        return self.operator.dropped if self.basis.factors is None else 0

    @property
    def flat(self) -> bool:
        """True where the bits of a mask are in the order of the coefficients."""
        return self.basis.factors is not None or self.operator.identity

    @property
    def kernels(self) -> int:
        """How many kernels the weight holds."""
        return int(self.weight.shape[0] * self.weight.shape[1])


class Target(NamedTuple):
    """How much to keep of some batches taken together: one of the two.

    Attributes:
        keep: how many coefficients to keep.
        percentile: the percentile of ``|C|``, structural zeros included, to cut at (one batch).
    """

    keep: int | None = None
    percentile: float | None = None


class Backend(Protocol):
    """What every backend offers.

    Attributes:
        name: the name it is registered by.
        unit: how many weights it likes to get in one call.
        one_at_a_time: True where it looks at batches that share a threshold one after the other,
            so that they may live on several devices, or come and go while it iterates.
    """

    name: str
    unit: int
    one_at_a_time: bool

    def unsupported(self, batch: Batch) -> str | None:
        """Why this backend cannot prune this batch, or None."""
        ...

    def threshold(self, jobs: Sequence[tuple[Sequence[Batch], Target]]) -> torch.Tensor:
        """One exact threshold for each job.

        Args:
            jobs: batches that share a threshold, and how much of them to keep.

        Returns:
            ``(jobs,)``, float64, on the device that computed; NaN where a weight is not finite,
            infinity where nothing is to be kept.
        """
        ...

    def apply_(self, batches: Sequence[Batch], thresholds: torch.Tensor) -> torch.Tensor:
        """Prune each batch's weight in place.

        Args:
            batches: what to prune.
            thresholds: ``(batches,)``, float64: each batch's own. Where one is NaN every weight
                stays as it is, and the result means nothing.

        Returns:
            ``(batches, 4)``, float64, on the device that computed: coefficients kept (never a 0),
            exact zeros in the weight afterwards, squared Frobenius norm of the change as stored,
            and of the weight before.
        """
        ...


@runtime_checkable
class Projector(Backend, Protocol):
    """A backend that also keeps a weight pruned while it is trained."""

    def masks(self, batches: Sequence[Batch], thresholds: torch.Tensor) -> list[torch.Tensor]:
        """Which coefficients ``apply_`` would keep.

        Args:
            batches: weights, not changed.
            thresholds: ``(batches,)``, float64: each batch's own.

        Returns:
            One mask a batch, as ``wavprune.masks`` lays it out, on the weight's device.
        """
        ...

    def project_(self, batches: Sequence[Batch], masks: Sequence[torch.Tensor]) -> None:
        """Set the coefficients that a mask does not keep to 0, in place.

        Args:
            batches: what to change.
            masks: one a batch.
        """
        ...


class _Entry(NamedTuple):
    name: str
    module: str
    automatic: bool


_REGISTRY: dict[str, _Entry] = {}


def register(name: str, module: str, *, automatic: bool) -> None:
    """Add a backend: ``module`` (in this package) has ``make() -> Backend``.

    ``make`` raises ImportError with the reason where the backend cannot run on this machine.
    ``"auto"`` tries the automatic ones in the order of registration.
    """
    _REGISTRY[name] = _Entry(name, module, automatic)


register("native", "native", automatic=True)
register("triton", "triton.backend", automatic=True)
register("eager", "eager", automatic=True)
register("ptwt", "ptwt", automatic=False)
register("reference", "reference", automatic=False)


def names() -> list[str]:
    """The names of all registered backends.

    Example:
        >>> "eager" in names()
        True
    """
    return list(_REGISTRY)


def unavailable() -> dict[str, str]:
    """The backends that cannot run on this machine: name -> why, and what would change it."""
    reasons = {}
    for name in names():
        try:
            _load(name)
        except ImportError as error:
            reasons[name] = str(error)
    return reasons


def resolve(
    name: str, batches: Sequence[Batch], scattered: bool = False, masks: bool = False
) -> Backend:
    """The backend that prunes these batches.

    Args:
        name: a registered name, or ``"auto"``.
        batches: all of them; the answer holds for the whole call.
        scattered: True where they share a threshold and are never on one device at one time.
        masks: True where it must be a ``Projector`` too.

    Raises:
        ValueError: the named backend does not exist, cannot run here, or cannot prune a batch.
    """
    if name == "auto":
        for entry in _REGISTRY.values():
            if entry.automatic:
                try:
                    backend = _load(entry.name)
                except ImportError:
                    continue
                if _obstacle(backend, batches, scattered, masks) is None:
                    return backend
        raise AssertionError("eager runs everything")
    check_name(name)
    try:
        backend = _load(name)
    except ImportError as error:
        raise ValueError(f"backend {name!r} cannot run here: {error}") from error
    reason = _obstacle(backend, batches, scattered, masks)
    if reason is not None:
        raise ValueError(f"backend {name!r} cannot do this: {reason}")
    return backend


def resolve_projector(name: str, batches: Sequence[Batch]) -> Projector:
    """The backend that keeps these batches pruned; see ``resolve``."""
    backend = resolve(name, batches, masks=True)
    assert isinstance(backend, Projector)
    return backend


def _obstacle(
    backend: Backend, batches: Sequence[Batch], scattered: bool, masks: bool
) -> str | None:
    if masks and not isinstance(backend, Projector):
        return "it has no masks, which training needs; 'native' and 'eager' have"
    if scattered and not backend.one_at_a_time:
        return (
            "one threshold for weights that do not fit on one device together; "
            "'eager' takes them one after the other"
        )
    return next(filter(None, map(backend.unsupported, batches)), None)


def check_name(name: str) -> None:
    """Raise ValueError unless ``name`` is ``"auto"`` or registered."""
    if name == "auto" or name in _REGISTRY:
        return
    close = difflib.get_close_matches(name, names(), n=1)
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(f"unknown backend {name!r}{hint}; allowed: auto, {', '.join(names())}")


@cache
def _load(name: str) -> Backend:
    module = importlib.import_module(f".{_REGISTRY[name].module}", __package__)
    backend: Backend = module.make()
    return backend
