"""Which layers are compressed, in which basis, and what of them is kept."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

from ..config import AUTO, PruneConfig
from ..engine.layers import LayerRef
from ..engine.run import prune_layers
from ..errors import WavpruneError
from ..pruned import PrunedLayer
from ..report import PruneReport
from .formats.names import Weight, describe_skipped, layer_name, select
from .layer import Layer
from .prepared import cheapest_basis, check_kernel, prepared, size_of
from .quantisers import TRELLIS
from .recorded import ChangedLayerWarning, kept_by_record, still_pruned
from .records import DTYPES
from .selection import Kept, kept_by_report, prune_with_masks
from .sources import Source, Tensor


@dataclass(frozen=True)
class Plan:
    """What to do with each layer: exactly one of the three is not None.

    Attributes:
        config: prune, and store what is kept.
        report: store what was pruned.
        quantised: prune nothing; the basis, targets and ignore of these settings count.
        recorded: with ``quantised``: layers that a file says were pruned, which keep their zeros.
    """

    config: PruneConfig | None = None
    report: PruneReport | None = None
    quantised: PruneConfig | None = None
    recorded: Mapping[str, PrunedLayer] = field(default_factory=dict)

    def layer(self, tensor: Tensor) -> Layer:
        """A weight, ready to be stored.

        Raises:
            WavpruneError: it is not finite, or its basis cannot be stored.
        """
        name = layer_name(tensor.name)
        ref = LayerRef(name, tensor.read())
        size = size_of(ref)
        if self.config is not None:
            kept = prune_with_masks(ref, self.config)
            # It was pruned in place. What is stored comes from the weight as it is, read again when
            # the pruned one is gone.
            del ref
            return prepared(LayerRef(name, tensor.read()), kept, size)
        if self.report is not None:
            stats = self.report[_reported_name(name, self.report)]
            return prepared(ref, kept_by_report(ref, stats, self.report), size)
        assert self.quantised is not None
        check_kernel(ref)
        if name in self.recorded:
            return prepared(ref, kept_by_record(ref, self.recorded[name]), size)
        return prepared(ref, Kept(cheapest_basis(ref.weight, self.quantised)), size)


def pruned_together(plan: Plan, source: Source) -> Plan:
    """The plan, where layers that are ranked together have been: those are in memory for that.

    Raises:
        WavpruneError: a layer cannot be pruned.
    """
    if plan.config is None or plan.config.scope != "global":
        return plan
    tensors = choose_tensors(source, plan)
    refs = [LayerRef(layer_name(tensor.name), tensor.read()) for tensor in tensors]
    return Plan(report=prune_layers(refs, plan.config, masks=True))


def with_record(plan: Plan, source: Source) -> Plan:
    """The plan, with what the file says was pruned where that counts."""
    if plan.quantised is None or plan.quantised.wavelet != AUTO:
        return plan
    return replace(plan, recorded=source.pruned)


def recorded_tensors(source: Source, plan: Plan) -> list[Tensor]:
    """The weights that the file says were pruned."""
    weights = [weight for weight in source.weights if weight.layer in plan.recorded]
    keys = dict.fromkeys(source.aliases.get(weight.key, weight.key) for weight in weights)
    return [source.tensors[key] for key in keys]


def verified(plan: Plan, tensors: Sequence[Tensor], whole_matrices: bool) -> Plan:
    """The plan, without the records of layers that have changed since; a warning names these.

    Args:
        plan: with what the file says.
        tensors: that are compressed.
        whole_matrices: True where a matrix can be stored in a basis other than the identity.

    Returns:
        The same object where nothing has changed.
    """
    recorded: dict[str, PrunedLayer] = {}
    lost: dict[str, str] = {}
    for tensor in tensors:
        name = layer_name(tensor.name)
        if name not in plan.recorded:
            continue
        if len(tensor.shape) == 2 and plan.recorded[name].level_used and not whole_matrices:
            lost[name] = f"the coder {TRELLIS!r} stores matrices as they are"
            continue
        try:
            if still_pruned(plan.layer(tensor)):
                recorded[name] = plan.recorded[name]
            else:
                lost[name] = "its weight has changed since"
        except WavpruneError as error:
            lost[name] = str(error)
    if not lost:
        return plan
    warnings.warn(
        f"what was pruned is not known of {describe_skipped(lost)}; stored as they are now",
        ChangedLayerWarning,
        stacklevel=3,
    )
    return replace(plan, recorded=recorded)


def plan_of(
    report: PruneReport | None,
    config: PruneConfig | None,
    wavelet: str | None,
    targets: Sequence[str] | str | None,
    ignore: Sequence[str] | str | None,
) -> Plan:
    """The plan of the arguments of ``save``.

    Raises:
        TypeError: an argument is of the wrong type.
        WavpruneError: arguments do not go together.
    """
    if report is not None and not isinstance(report, PruneReport):
        raise TypeError(f"report must be a PruneReport, not {type(report).__name__}")
    if config is not None and not isinstance(config, PruneConfig):
        raise TypeError(f"config must be a PruneConfig, not {type(config).__name__}")
    own = {"wavelet": wavelet, "targets": targets, "ignore": ignore}
    own = {name: value for name, value in own.items() if value is not None}
    if report is None and config is None:
        settings = {"wavelet": AUTO} | own
        return Plan(quantised=PruneConfig(**settings))  # type: ignore[arg-type]  # it checks them
    if own or (report is not None and config is not None):
        names = [*(["report"] if report else []), *(["config"] if config else []), *own]
        raise WavpruneError(
            f"{', '.join(names)} were given; give one of report, config, or wavelet, targets and "
            "ignore: a report and a config say themselves which layers and which basis"
        )
    return Plan(config=config, report=report)


def choose_tensors(source: Source, plan: Plan) -> list[Tensor]:
    """The tensors that are compressed; of tied weights, the one that is stored.

    Raises:
        WavpruneError: none is, a pattern or a layer of the report is not there, or a tensor is of a
            dtype that cannot be.
    """
    if plan.report is not None:
        chosen = _reported(source.weights, plan.report)
    else:
        config = plan.config or plan.quantised
        assert config is not None
        chosen = select(source.weights, config, source.prefix, also=plan.recorded)
        if not chosen:
            two_axes = [weight.layer for weight in source.weights]
            hint = f"; targets can name its 2-D ones: {', '.join(two_axes[:8])}" if two_axes else ""
            raise WavpruneError(
                f"the model has no '*.weight' tensor of 3 to 5 axes, so nothing is compressed{hint}"
            )
    keys = dict.fromkeys(source.aliases.get(weight.key, weight.key) for weight in chosen)
    tensors = [source.tensors[key] for key in keys]
    for tensor in tensors:
        if tensor.dtype not in DTYPES:
            raise WavpruneError(
                f"layer {layer_name(tensor.name)!r}: its weight has dtype {tensor.dtype}; "
                f"allowed: {', '.join(DTYPES)}; ignore that layer"
            )
    return tensors


def _reported(weights: Iterable[Weight], report: PruneReport) -> list[Weight]:
    by_layer = {weight.layer: weight for weight in weights}
    chosen = []
    for stats in report:
        # A bare layer is its own model, and has no name.
        weight = by_layer.get(stats.name or "weight")
        if weight is None or weight.shape != tuple(stats.shape):
            there = "no such weight" if weight is None else f"one of {weight.shape}"
            raise WavpruneError(
                f"report: layer {stats.name!r} is {tuple(stats.shape)}; the model has {there}"
            )
        chosen.append(weight)
    return chosen


def _reported_name(name: str, report: PruneReport) -> str:
    return "" if name == "weight" and all(stats.name != name for stats in report) else name
