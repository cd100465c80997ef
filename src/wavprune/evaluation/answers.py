"""What a network answered on a data set, gathered batch by batch."""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from ..common.clock import timed
from ..common.loaders import (
    batches,
    inputs_and_labels,
    inputs_and_targets,
    num_batches,
    num_samples,
    on_device,
)
from ..engine.ambient import inference_mode, neutral
from ..engine.running import running
from ..errors import WavpruneError
from .measure import Measure
from .predictions import Predictions, batch_predictions, joined
from .spread import Parts

# Parts of the data that a metric with a state is computed on too, for its spread.
GROUPS = 10


@dataclass(frozen=True)
class Answers:
    """What a network was measured at by a ``Measure``.

    Attributes:
        measure: the measure.
        samples: how many inputs there were.
        value: of the metric.
        parts: its values on parts of the data; None where it has none there.
        logits: ``(P, C)``, an answer for each sample or position, on the CPU; None where the
            outputs are no logits.
    """

    measure: Measure
    samples: int
    value: float
    parts: Parts | None
    logits: torch.Tensor | None


class ClassifierTally:
    """Gathers the predictions of a classifier."""

    def __init__(self) -> None:
        self._outputs: list[Predictions] = []

    def read(self, batch: Any) -> tuple[Any, Any]:
        """The inputs and labels of a batch, checked."""
        return inputs_and_labels(batch)

    def add(self, output: Any, targets: Any) -> None:
        """Add what the model returned for a batch."""
        self._outputs.append(batch_predictions(output, targets))

    def answers(self) -> Predictions:
        """The predictions of all batches."""
        return joined(self._outputs)


class MetricTally:
    """Gathers what a metric says of batches.

    Args:
        measure: the metric, which is copied.
        num_batches: how many batches there will be; None where that is not known.
    """

    def __init__(self, measure: Measure, num_batches: int | None) -> None:
        self._measure = measure
        self._split = num_batches is not None and num_batches < GROUPS
        self._batches = 0
        self._samples = 0
        self._logits: list[torch.Tensor] | None = []
        self._values: list[torch.Tensor] = []
        self._weights: list[int] = []
        self._whole: Any = None
        self._groups: list[Any] = []
        if measure.has_state:
            with timed("metrics"), inference_mode(False):
                self._whole = _fresh(measure.metric)
                groups = 0 if _holds_network(measure.metric) else GROUPS
                self._groups = [_fresh(self._whole) for _ in range(groups)]
            self._weights = [0] * GROUPS

    def read(self, batch: Any) -> tuple[Any, Any]:
        """The inputs and targets of a batch."""
        return inputs_and_targets(batch)

    def add(self, output: Any, targets: Any) -> None:
        """Add what the model returned for a batch.

        Raises:
            WavpruneError: the metric refuses it, or returns something that is no value.
        """
        with timed("metrics"), neutral():
            outputs = _plain(self._measure.output_of(output))
            targets = _plain(targets)
            samples = num_samples(targets if targets is not None else outputs)
            self._add_logits(outputs, targets)
            try:
                if self._measure.has_state:
                    self._whole.update(outputs, targets)
                else:
                    value = self._measure.metric(outputs, targets)
            except Exception as error:
                raise WavpruneError(
                    f"metric {self._measure.name!r} failed on outputs {_described(outputs)} and "
                    f"targets {_described(targets)}: {type(error).__name__}: {error}"
                ) from error
            if self._measure.has_state:
                self._add_groups(outputs, targets, samples)
            else:
                self._add_value(value, samples)
            self._samples += samples
            self._batches += 1

    def answers(self) -> Answers:
        """What all batches together give.

        Raises:
            WavpruneError: the metric gives no finite number.
        """
        with timed("metrics"), neutral():
            if self._measure.has_state:
                value = self._number(_computed(self._whole, self._measure.name))
                parts = self._group_parts()
            else:
                values = torch.cat(self._values).double()
                weights = torch.tensor(self._weights, dtype=torch.float64, device="cpu")
                parts = Parts(values, weights / weights.sum())
                value = float((parts.values * parts.weights).sum())
            if not math.isfinite(value):
                raise WavpruneError(
                    f"metric {self._measure.name!r} is {value} for this model and data; allowed: a "
                    "finite number"
                )
            logits = torch.cat(self._logits) if self._logits else None
        return Answers(self._measure, self._samples, value, parts, logits)

    def _add_value(self, value: Any, samples: int) -> None:
        values = torch.as_tensor(value, device="cpu").detach()
        if values.ndim > 1 or (values.ndim == 1 and len(values) != samples):
            raise WavpruneError(
                f"metric {self._measure.name!r} returned shape {tuple(values.shape)} for "
                f"{samples} inputs; allowed: one value, or ({samples},)"
            )
        self._values.append(values.reshape(-1))
        self._weights += [1] * samples if values.ndim else [samples]

    def _add_groups(self, outputs: Any, targets: Any, samples: int) -> None:
        shares = [(self._batches % GROUPS, outputs, targets, samples)]
        if self._split and _can_split(outputs, samples) and _can_split(targets, samples):
            shares = [
                (
                    group,
                    _share(outputs, group),
                    _share(targets, group),
                    len(range(samples)[group::GROUPS]),
                )
                for group in range(min(GROUPS, samples))
            ]
        for group, some, their_targets, count in shares:
            if self._groups:
                try:
                    self._groups[group].update(some, their_targets)
                except Exception:  # a metric may need more samples than a part has
                    self._groups = []
            self._weights[group] += count

    def _group_parts(self) -> Parts | None:
        used = [i for i, count in enumerate(self._weights) if count]
        if not self._groups or len(used) < 2:
            return None
        try:
            with warnings.catch_warnings():
                # What is said of a part is no news of the whole.
                warnings.simplefilter("ignore")
                values = [self._number(self._groups[i].compute()) for i in used]
        except Exception:  # as above
            return None
        if not all(map(math.isfinite, values)):
            return None
        weights = torch.tensor([self._weights[i] for i in used], dtype=torch.float64, device="cpu")
        return Parts(
            torch.tensor(values, dtype=torch.float64, device="cpu"), weights / weights.sum()
        )

    def _number(self, value: Any) -> float:
        name, result = self._measure.name, self._measure.result
        if isinstance(value, Mapping):
            if result is None or result not in value:
                raise WavpruneError(
                    f"metric {name!r} computes {', '.join(map(str, value))}; name one of them: "
                    f"result={next(iter(value), '')!r}"
                )
            value = value[result]
        elif result is not None:
            raise WavpruneError(
                f"result={result!r}: metric {name!r} computes a {type(value).__name__}, not a "
                "mapping"
            )
        tensor = torch.as_tensor(value, device="cpu")
        if tensor.numel() != 1:
            raise WavpruneError(
                f"metric {name!r} computes shape {tuple(tensor.shape)}; allowed: one number"
            )
        return float(tensor)

    def _add_logits(self, outputs: Any, targets: Any) -> None:
        wanted = self._measure.logits
        if wanted is False or self._logits is None:
            return
        if wanted is None and not _are_logits(outputs, targets):
            self._logits = None
            return
        if not isinstance(outputs, torch.Tensor) or outputs.ndim < 2 or outputs.shape[1] < 2:
            raise WavpruneError(
                f"logits=True: the outputs are {_described(outputs)}; allowed: (N, C, ...), C at "
                "least 2"
            )
        if not bool(torch.isfinite(outputs).all()):
            raise WavpruneError("logits=True: outputs that the model returned are NaN or infinite")
        self._logits.append(outputs.movedim(1, -1).flatten(0, -2).detach())


Tally = ClassifierTally | MetricTally


def tally_of(measure: Measure | None, loader: Iterable[Any]) -> Tally:
    """What gathers the answers to a loader's batches."""
    return ClassifierTally() if measure is None else MetricTally(measure, num_batches(loader))


def answers_of(
    model: nn.Module,
    loader: Iterable[Any],
    measure: Measure | None = None,
    device: str | torch.device | None = None,
    progress: bool = False,
) -> Predictions | Answers:
    """Run a model over a loader.

    Args:
        model: it is in evaluation mode while it runs.
        loader: see ``evaluate``.
        measure: what gathers its answers; None takes it for a classifier.
        device: where to run; None means where the model lives.
        progress: show a progress bar on standard error.

    Raises:
        TypeError, WavpruneError: as ``evaluate``.
    """
    tally = tally_of(measure, loader)
    with running(model, device) as run_device, timed("reference"):
        for batch in batches(loader, progress, "predict"):
            inputs, targets = tally.read(batch)
            tally.add(model(on_device(inputs, run_device)), targets)
        return tally.answers()


def _fresh(metric: Any) -> Any:
    """A copy of a metric that has seen nothing."""
    copied = copy.deepcopy(metric)
    if isinstance(copied, nn.Module):
        copied = copied.to("cpu")
    copied.reset()
    return copied


def _holds_network(metric: Any) -> bool:
    """Whether a metric has parameters, as those do that compare features of images."""
    return isinstance(metric, nn.Module) and any(True for _ in metric.parameters())


def _computed(metric: Any, name: str) -> Any:
    try:
        return metric.compute()
    except Exception as error:
        raise WavpruneError(
            f"metric {name!r} cannot be computed: {type(error).__name__}: {error}"
        ) from error


def _plain(value: Any) -> Any:
    """Tensors on the CPU, in float32 at least, in the same containers."""
    if isinstance(value, torch.Tensor):
        value = value.detach().cpu()
        half = value.dtype in (torch.float16, torch.bfloat16)
        return value.float() if half else value
    if isinstance(value, Mapping):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return value


def _are_logits(outputs: Any, targets: Any) -> bool:
    return (
        isinstance(outputs, torch.Tensor)
        and isinstance(targets, torch.Tensor)
        and outputs.is_floating_point()
        and outputs.ndim == 2
        and outputs.shape[1] >= 2
        and targets.shape == outputs.shape[:1]
        and targets.dtype in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
    )


def _can_split(value: Any, samples: int) -> bool:
    if isinstance(value, Mapping):
        return all(_can_split(entry, samples) for entry in value.values())
    return isinstance(value, torch.Tensor | list) and len(value) == samples


def _share(value: Any, group: int) -> Any:
    """Every tenth sample."""
    if isinstance(value, Mapping):
        return {key: _share(entry, group) for key, entry in value.items()}
    return value[group::GROUPS]


def _described(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"{tuple(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    if isinstance(value, Mapping):
        return f"with the keys {list(value)}"
    return f"of type {type(value).__name__}"
