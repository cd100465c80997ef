"""What a network is measured by: any metric, its name and its direction."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from ..errors import WavpruneError

# Where the outputs of a network are that returns a mapping.
OUTPUTS = ("logits", "out")
_PROTOCOL = ("update", "compute", "reset")


@dataclass(frozen=True, slots=True)
class Measure:
    """A metric of outputs and targets, for networks that are no classifiers, or for any other view.

    Args:
        metric: an object with ``update(outputs, targets)``, ``compute()`` and ``reset()``, as every
            ``torchmetrics.Metric``, of which copies are used; or a function of outputs and
            targets that returns the value of the batch, or ``(N,)`` values, one for each input.
        name: what tables call it; empty takes the name of its class or function.
        higher_is_better: whether larger values are better; None takes the metric's own
            ``higher_is_better``.
        logits: whether the outputs are logits, so that agreement and KL divergence with a reference
            are measured too. None: where the outputs are floating-point ``(N, C)``, C at least 2,
            and the targets ``(N,)`` integers. True takes ``(N, C, ...)`` too, each position as one
            answer, which keeps all of them in memory.
        output: which part of what the network returns is its output: a key, an index, or a
            function. None: the tensor itself, ``.logits``, the keys ``"logits"`` and ``"out"``,
            the first entry of a tuple that begins with a tensor; else everything.
        result: the entry to take where the metric computes a mapping, such as ``"map"``.

    Raises:
        TypeError: ``metric`` is something else, or a class.
        WavpruneError: the direction is not known.

    Example:
        >>> def psnr(outputs, targets):
        ...     return -10 * (outputs - targets).square().mean((1, 2, 3)).log10()
        >>> Measure(psnr, higher_is_better=True).name
        'psnr'
    """

    metric: Any
    name: str = ""
    higher_is_better: bool | None = None
    logits: bool | None = None
    output: str | int | Callable[[Any], Any] | None = None
    result: str | None = None

    def __post_init__(self) -> None:
        metric = self.metric
        if inspect.isclass(metric):
            raise TypeError(
                f"metric is the class {metric.__name__}; give an object of it: {metric.__name__}()"
            )
        if not self.has_state and not callable(metric):
            raise TypeError(
                "metric must be a torchmetrics.Metric or a function of outputs and targets, not "
                f"{type(metric).__name__}"
            )
        if not isinstance(self.name, str):
            raise TypeError(f"name must be a string, not {self.name!r}")
        if not self.name:
            function = getattr(metric, "func", metric)
            own = type(metric).__name__ if self.has_state else getattr(function, "__name__", "")
            object.__setattr__(self, "name", own or type(metric).__name__)
        if self.higher_is_better is None:
            object.__setattr__(self, "higher_is_better", getattr(metric, "higher_is_better", None))
        for field, value in (("higher_is_better", self.higher_is_better), ("logits", self.logits)):
            if value is not None and not isinstance(value, bool):
                raise TypeError(f"{field} must be True, False or None, not {value!r}")
        if self.higher_is_better is None:
            raise WavpruneError(
                f"metric {self.name!r} does not say whether higher is better; give "
                "Measure(metric, higher_is_better=True), or False"
            )

    @property
    def has_state(self) -> bool:
        """Whether the metric gathers batches itself."""
        return all(callable(getattr(self.metric, name, None)) for name in _PROTOCOL)

    def output_of(self, returned: Any) -> Any:
        """The part of what a network returned that is measured.

        Raises:
            WavpruneError: it has no such part.
        """
        if self.output is None:
            return default_output(returned)
        if callable(self.output):
            return self.output(returned)
        try:
            return returned[self.output]
        except (KeyError, IndexError, TypeError) as error:
            has = f" with the keys {list(returned)}" if isinstance(returned, Mapping) else ""
            raise WavpruneError(
                f"output={self.output!r}: the model returned a {type(returned).__name__}{has}"
            ) from error


def default_output(returned: Any) -> Any:
    """The tensor of what a network returned, where it is known; else everything.

    Example:
        >>> default_output((torch.tensor([1.0]), "aux"))
        tensor([1.])
    """
    logits = getattr(returned, "logits", None)
    if isinstance(logits, torch.Tensor):
        return logits
    if isinstance(returned, Mapping):
        return next((returned[name] for name in OUTPUTS if name in returned), returned)
    if isinstance(returned, tuple) and returned and isinstance(returned[0], torch.Tensor):
        return returned[0]
    return returned


def measure_of(metric: object) -> Measure | None:
    """The measure that ``metric`` stands for; None for the measures of a classifier.

    Raises:
        TypeError, WavpruneError: as ``Measure``.
    """
    return metric if metric is None or isinstance(metric, Measure) else Measure(metric)
