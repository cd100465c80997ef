"""The metrics that a sweep file names."""

from __future__ import annotations

import hashlib
from importlib.metadata import PackageNotFoundError, version

from ..evaluation.measure import Measure
from .factories import bound_factory, factory_digest
from .sources import MetricSource


def load_metric(source: MetricSource | None) -> Measure | None:
    """The measure of a source; None where a classifier is measured.

    Raises:
        WavpruneError: it cannot be imported or made, or does not say which direction is better.
        TypeError: it is no metric.
    """
    if source is None:
        return None
    return Measure(
        bound_factory(source),
        name=source.name,
        higher_is_better=source.higher_is_better,
        logits=source.logits,
        output=source.output,
        result=source.result,
    )


def metric_identity(source: MetricSource) -> str:
    """A hash of the metric's code in the sweep file's folder, or the version of its package."""
    package = source.factory.partition(":")[0].partition(".")[0]
    try:
        release = version(package)
    except PackageNotFoundError:
        release = ""
    return hashlib.sha256(f"{factory_digest(source)} {release}".encode()).hexdigest()
